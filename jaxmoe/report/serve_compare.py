"""Comparisons of serving in virtual time: ways to compute prompts, to group, to put aside and to order, on the same requests.

The scheduler and its pages are the real ones; steps take what a linear model says (`jaxmoe.engine.serving.virtual.Cost`: compute plus copies, in
series), tokens and routing are made up or recorded (`serve_routing`). Every number is exact and the same on every machine; times are virtual seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoe.engine.serving import cost
from jaxmoe.engine.serving.prefix import prefix_groups, request_order, tree_tokens
from jaxmoe.engine.serving.scheduler import Policy, SchedulerState
from jaxmoe.engine.serving.simulated import Cost, SimRequest, SimResult, simulate
from jaxmoe.engine.serving.types import Phase, PrefillMode, ServeSpec, StepPlan
from jaxmoe.report import serve_load, serve_stats
from jaxmoe.report.serve_load import Sizes
from jaxmoe.report.serve_routing import Routed

LINK = 25e9
STEP, TOKEN = 2e-3, 1e-5
"""Virtual seconds of any step, and of a token in it."""
PAGE = 32
KV_BYTES = 98_304
"""Keys and values of a token in all layers: Qwen3-30B-A3B's in bfloat16."""
CHUNK = 256

Watch = Callable[[SchedulerState, StepPlan], None]


@dataclasses.dataclass(frozen=True)
class Found:
    """One arm of a comparison. Attributes: `arm`; `settings`; `counts`, exact numbers; `seconds`, virtual times or rates; `link`, share of the link's
    time that copies took."""

    arm: str
    settings: Mapping[str, Any]
    counts: Mapping[str, int]
    seconds: Mapping[str, float]
    link: float


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all arms run on. Attributes: `routed`, experts of tokens; `resident`, share of every layer's experts that the device holds; `verify`,
    check every read and invariant."""

    routed: Routed
    resident: float
    verify: bool = False

    def run(self, queue: Sequence[SimRequest], spec: ServeSpec, policy: Policy, watch: Watch | None = None) -> SimResult:
        """Serves these requests to their ends."""
        r = self.routed
        costs = Cost(STEP, TOKEN, 0.0, LINK, r.expert_bytes, PAGE * KV_BYTES, r.layers, r.experts, round(self.resident * r.experts))
        return simulate(queue, spec, policy, costs, r, watch=watch, verify=self.verify)

    def request(self, i: int, prompt: int, new: int, at: int, arrived: float = 0.0) -> SimRequest:
        """Request `i`, of the topics in turn; its prompt is a passage from its topic's token `at` on, and it goes on with tokens of the topic."""
        topics = self.routed.topics
        return SimRequest(self.routed.text(i, prompt, at), new, arrived, i, topics[i % len(topics)], user=f"topic {i % len(topics)}")

    def found(self, arm: str, settings: Mapping[str, Any], counts: Mapping[str, int], seconds: Mapping[str, float], result: SimResult) -> Found:
        """An arm. `answers` stands for all tokens given: equal of arms that gave the same; `stalls` are sequences passed over in a step."""
        said = repr([[result.tokens.get(id) for id in of] for of in result.of])
        answers = int.from_bytes(hashlib.blake2b(said.encode(), digest_size=6).digest())
        counts = {**counts, "expert_bytes": result.expert_bytes, "page_bytes": result.page_bytes, "answers": answers}
        counts |= {"tokens": sum(map(len, result.tokens.values())), "steps": len(result.log), "stalls": result.stalls}
        busy = (result.expert_bytes + result.page_bytes) / LINK / result.clock
        return Found(arm, {"resident": self.resident, **settings}, counts, {"total": result.clock, **seconds}, busy)


def rounded(tokens: int) -> int:
    """Tokens in whole pages."""
    return -(-tokens // PAGE) * PAGE


def served(result: SimResult) -> list[serve_stats.Served]:
    """What each sequence got; tokens of one step come together."""
    out = []
    for id, times in result.times.items():
        at, counts = np.unique(np.asarray(times), return_counts=True)
        events = tuple(zip(at.tolist(), counts.tolist(), strict=True))
        out.append(serve_stats.Served(result.arrived[id], events, id in result.tokens))
    return out


# --- Prompts: layered, chunked, whole


def prefill(
    setup: Setup, prompt: int = 2048, streams: int = 8, groups: Sequence[int] = (4, 8, 16), chunks: Sequence[int] = (256, 512)
) -> list[Found]:
    """A long prompt comes while streams decode, under each mode: its time to first token, the streams' longest gap, and the experts it brought.

    Args:
        setup: see there; the streams are of the first topic, the prompt of the last.
        prompt: tokens.
        streams: sequences that decode.
        groups: of layers, for layered prefill; those of more groups than layers are left out.
        chunks: tokens of a chunk, beside those of the streams.

    Returns:
        Arms "whole", "chunked, N" and "layered, N". `gap_bound` is the cost model's, in its serial form, for what the arm brought, and supposes that
        every group brings as much as the others; `prompt_asked` the experts of all layers that the prompt asks for.
    """
    cases: list[tuple[str, PrefillMode, int, int]] = [("whole", "whole", 1, CHUNK)]
    cases += [(f"chunked, {n}", "chunked", 1, n) for n in chunks]
    cases += [(f"layered, {n}", "layered", n, CHUNK) for n in groups if n <= setup.routed.layers]
    new = 96 + prompt // min([*chunks, prompt])  # of the streams: more than the prompt takes steps, in any mode
    return [_attacked(setup, prompt, streams, new, *case) for case in cases]


def _attacked(setup: Setup, prompt: int, streams: int, new: int, arm: str, mode: PrefillMode, groups: int, chunk: int) -> Found:
    calm_tokens, rows = 32, streams + 1
    positions = rounded(max(prompt + 8, PAGE + new))
    pages = rows * positions // PAGE
    spec = ServeSpec(rows, PAGE, pages, positions, rows, chunk + rows, rounded(prompt), groups, burst=1, run=PAGE)
    topics, policy = setup.routed.topics, Policy(prefill=mode)
    each = (topics[0][1] - topics[0][0]) // streams
    calm = [SimRequest(setup.routed.text(0, PAGE, i * each), new, seed=i, vocab=topics[0]) for i in range(streams)]
    unloaded = setup.run(calm, spec, policy)
    arrival = unloaded.times[0][calm_tokens]
    attacker = SimRequest(setup.routed.text(len(topics) - 1, prompt, 0), 8, arrival, streams, topics[-1])
    result = setup.run([*calm, attacker], spec, policy)
    steps = [step for step in result.log if step.now >= arrival]
    missed, size = sum(step.prompt_missed for step in steps), setup.routed.expert_bytes
    # What a step takes without its part of the prompt, at worst.
    t_dec = max(STEP + TOKEN * streams + step.decode_missed * size / LINK for step in steps)
    if mode == "layered":
        bound = cost.layered(missed * size, LINK, groups, t_dec, TOKEN * prompt, overlapped=False)
    else:
        most = max(step.prompt_missed for step in steps) * size
        bound = cost.chunked(most, LINK, -(-prompt // chunk) if mode == "chunked" else 1, t_dec, TOKEN * prompt, overlapped=False)
    gaps = [b - a for id in range(streams) for a, b in zip(result.times[id], result.times[id][1:], strict=False) if b > arrival]
    before = [gap for id in range(streams) for gap in unloaded.gaps(id)[calm_tokens:]]
    asked = sum(len(np.unique(setup.routed.table[list(attacker.prompt), l])) for l in range(setup.routed.layers))
    counts = {"prompt_loads": missed, "prompt_asked": asked, "prompt_bytes": missed * size}
    seconds = {"ttft": result.first_token(streams), "gap": max(gaps), "gap_bound": bound.gap, "gap_unloaded": float(np.median(before))}
    return setup.found(arm, {"prefill": mode, "groups": groups, "chunk": chunk, "prompt": prompt, "streams": streams}, counts, seconds, result)


# --- Which sequences decode together


def grouping(setup: Setup, requests: int = 48, batch: int = 4, wait: int = 4, new: int = 48, prompt: int = 32, seed: int = 0) -> list[Found]:
    """A queue of mixed topics under each way to choose what decodes together, all requests there from the beginning.

    Args:
        setup: see there; topics are mixed in equal parts. Grouping is told the true experts of every sequence's next token.
        requests: of the queue.
        batch: sequences of a step.
        wait: batches' worth of sequences that hold pages, to be chosen from.
        new: tokens of an answer on average, log-normal.
        prompt: tokens of each.
        seed: of order and lengths.

    Returns:
        Arms "one at a time", "arrival" (each batch runs on until one of it ends), "turns", "greedy" (by union of experts), "greedy, held" (those on
        the device counting less) and "greedy, admission" (the objective looks at experts too). `waited` is the most steps running that a sequence
        was passed over.
    """
    rng = np.random.default_rng([seed, 7])
    news = Sizes(new, 0.6, 4, 4 * new).draw(requests, rng).tolist()
    width = min(b - a for a, b in setup.routed.topics)
    queue = [setup.request(i, prompt, news[i], int(rng.integers(width))) for i in rng.permutation(requests).tolist()]
    greedy = Policy(group="greedy")
    cases = [
        ("one at a time", 1, 1, Policy()),
        ("arrival", batch, batch, Policy()),
        ("turns", batch, wait * batch, Policy()),
        ("greedy", batch, wait * batch, greedy),
        ("greedy, held", batch, wait * batch, dataclasses.replace(greedy, held_cost=0.3)),
        ("greedy, admission", batch, wait * batch, dataclasses.replace(greedy, objective="expert-aware")),
    ]
    return [_queued(setup, queue, *case) for case in cases]


def _queued(setup: Setup, queue: list[SimRequest], arm: str, batch: int, slots: int, policy: Policy) -> Found:
    positions = rounded(max(len(r.prompt) + r.new for r in queue))
    groups = min(4, setup.routed.layers)
    spec = ServeSpec(slots, PAGE, 2 * slots * positions // PAGE, positions, batch, batch + PAGE, max(CHUNK, positions), groups, burst=1, run=PAGE)
    waited = 0

    def watch(state: SchedulerState, plan: StepPlan) -> None:
        nonlocal waited
        waited = max([waited, *(state.seqs[i].waited for i in state.running)])

    result = setup.run(queue, spec, policy, watch)
    tokens, decoded, loads = sum(map(len, result.tokens.values())), sum(s.decode for s in result.log), sum(s.decode_missed for s in result.log)
    counts = {"decoded": decoded, "distinct": sum(s.distinct for s in result.log), "decode_loads": loads, "waited": waited}
    counts |= {"decode_bytes": loads * setup.routed.expert_bytes, "bytes_per_token": result.expert_bytes // tokens}
    seconds = {"per_token": result.clock / tokens, "longest_gap": max(max(result.gaps(id)) for id in result.tokens)}
    settings = {"batch": batch, "slots": slots, "group": policy.group or "", "held_cost": policy.held_cost, "requests": len(queue)}
    return setup.found(arm, settings, counts, seconds, result)


# --- Putting aside


def preemption(setup: Setup, requests: int = 8, prompt: int = 64, new: int = 448, room: float = 0.5) -> list[Found]:
    """More sequences than the pool can hold to their ends: those put aside are swapped, or computed again.

    Args:
        setup: see there.
        requests: sequences, all there from the beginning.
        prompt, new: tokens of each.
        room: pages of the pool, as a part of what all sequences need at their ends.

    Returns:
        Arms "recompute" (nothing is kept), "recompute, prefixes" (pages that the device gives up are kept in host memory and found by their keys) and
        "swap". `resume` is the mean time from coming back to the next token, `resume_extra` the part of it above the median step that only decodes.
    """
    width = min(b - a for a, b in setup.routed.topics)
    queue = [setup.request(i, prompt, new, i * width // requests) for i in range(requests)]
    host = requests * rounded(prompt + new) // PAGE
    again = Policy(preemption="recompute")
    cases = [("recompute", dataclasses.replace(again, keep=False), 0), ("recompute, prefixes", again, host), ("swap", Policy(), host)]
    return [_short_of_pages(setup, queue, room, *case) for case in cases]


def _short_of_pages(setup: Setup, queue: list[SimRequest], room: float, arm: str, policy: Policy, host: int) -> Found:
    rows, positions = len(queue), rounded(len(queue[0].prompt) + queue[0].new)
    each = positions // PAGE
    pages, groups = max(each, round(room * each * rows)), min(4, setup.routed.layers)
    spec = ServeSpec(rows, PAGE, pages, positions, rows, rows + CHUNK, 2 * positions, groups, burst=1, run=PAGE, host_pages=host)
    came: list[tuple[int, int]] = []  # (step, sequence) of those that came back
    away: set[int] = set()
    at = 0

    def watch(state: SchedulerState, plan: StepPlan) -> None:
        nonlocal at, away
        came.extend((at, id) for id in away if id in state.seqs and state.seqs[id].phase is Phase.RUNNING)
        away = {id for id, seq in state.seqs.items() if seq.preempted and seq.phase is not Phase.RUNNING}
        at += 1

    result = setup.run(queue, spec, policy, watch)
    resumed = [next((t for t in result.times[id] if t > result.log[step].now), result.clock) - result.log[step].now for step, id in came]
    done, resume = result.state.counters, float(np.mean(resumed)) if resumed else 0.0
    usual = float(np.median([step.seconds for step in result.log if not step.prompt_missed and not step.moved]))
    counts = {"preemptions": done.preemptions, "swaps": done.swaps, "recomputed": done.recomputed, "came_back": len(came)}
    seconds = {"resume": resume, "resume_extra": max(0.0, resume - usual), "longest_gap": max(max(result.gaps(id)) for id in result.tokens)}
    settings = {"preemption": policy.preemption, "pages": pages, "host_pages": host, "requests": rows, "prompt": len(queue[0].prompt)}
    return setup.found(arm, settings, counts, seconds, result)


# --- Offline batches


def offline(
    setup: Setup, requests: int = 128, prompt: int = 256, shared: int = 192, group: int = 8, new: int = 32, slots: int = 8, pages: int = 64,
    seed: int = 0,
) -> list[Found]:  # fmt: skip
    """A batch whose prompts begin alike in groups, in the order of arrival and in BatchLLM's, with the same cache of pages.

    Args:
        setup: see there; prompts are tokens of all topics.
        requests, prompt, shared, group, new, seed: of `serve_load.batch`.
        slots: sequences that run at a time.
        pages: of the pool, fewer than all prefixes need.

    Returns:
        Arms "arrival", "throughput" (the objective alone, in the order of arrival) and "prefix groups"; `computed` tokens of prompts beside `unique`,
        the fewest that any order computes.
    """
    vocabulary = len(setup.routed.table)
    load = serve_load.batch(requests, seed, prompt, shared, group, new, vocabulary)
    prompts = [job.prompt for job in load.jobs if not isinstance(job.prompt, int)]
    queue = [SimRequest(ids, new, seed=job.seed, vocab=(0, vocabulary), user=job.user) for ids, job in zip(prompts, load.jobs, strict=True)]
    positions, groups = rounded(prompt + new), min(4, setup.routed.layers)
    spec = ServeSpec(slots, PAGE, pages, positions, slots, slots + CHUNK, 2 * positions, groups, burst=1, run=PAGE)
    unique, arrived = tree_tokens(prompts, PAGE), list(range(requests))
    cases = [
        ("arrival", arrived, Policy()),
        ("throughput", arrived, Policy(objective="throughput")),
        ("prefix groups", request_order(prefix_groups(prompts, PAGE, [new] * requests)), Policy()),
    ]
    return [_batch(setup, queue, spec, unique, *case) for case in cases]


def _batch(setup: Setup, queue: list[SimRequest], spec: ServeSpec, unique: int, arm: str, order: list[int], policy: Policy) -> Found:
    peak = 0

    def watch(state: SchedulerState, plan: StepPlan) -> None:
        nonlocal peak
        peak = max(peak, state.pool.held)

    result = setup.run([queue[i] for i in order], spec, policy, watch)
    back = dict(zip(order, result.of, strict=True))
    result.of = [back[i] for i in range(len(order))]
    done = result.state.counters
    counts = {"computed": done.prompt, "unique": unique, "cached": done.cached, "peak_pages": peak, "preemptions": done.preemptions}
    return setup.found(arm, {"order": arm, "slots": spec.slots, "pages": spec.pages, "requests": len(queue)}, counts, {}, result)


# --- How much load is borne


def goodput(
    setup: Setup, requests: int = 64, slots: int = 8, inputs: Sizes = Sizes(384, 0.8, 32, 1536), outputs: Sizes = Sizes(32, 0.7, 4, 96),  # noqa: B008
    limits: tuple[float, float] = (5.0, 2.0), rates: tuple[float, float, float] = (0.02, 4.0, 0.02), seed: int = 0,
) -> list[Found]:  # fmt: skip
    """The highest rate of conversations at which 9 of 10 keep their limits, which are multiples of what the control gives a request alone.

    Args:
        setup: see there.
        requests: of a run.
        slots: sequences that run at a time, half of them decode in a step; pages are for half of what they may need.
        inputs, outputs: lengths.
        limits: times the medians of time to first token and time per token.
        rates: (lowest, highest, where the search stops), requests per virtual second.
        seed: of the load.

    Returns:
        Arms "chunked, recompute, fcfs", the control, and "layered, swap, expert-aware".
    """
    positions = rounded(inputs.most + outputs.most)
    pages, host = slots * positions // PAGE // 2, slots * positions // PAGE
    groups = min(8, setup.routed.layers)
    batch, wave = max(1, slots // 2), rounded(inputs.most)
    spec = ServeSpec(slots, PAGE, pages, positions, batch, CHUNK + slots, wave, groups, burst=1, run=PAGE, host_pages=host)
    control = Policy(prefill="chunked", preemption="recompute", keep=False)
    cases = [("chunked, recompute, fcfs", control), ("layered, swap, expert-aware", Policy(objective="expert-aware", group="greedy"))]

    def queue(rate: float) -> list[SimRequest]:
        load = serve_load.chat(requests, rate, seed, inputs=inputs, outputs=outputs)
        return [setup.request(i, job.tokens, job.new, 7 * i, job.arrival) for i, job in enumerate(load.jobs)]

    alone = [served(setup.run([dataclasses.replace(r, arrived=0.0)], spec, control))[0] for r in queue(1.0)[:16]]
    within = serve_stats.limits_of(alone, *limits)

    def attained(policy: Policy, rate: float) -> float:
        return serve_stats.attainment(served(setup.run(queue(rate), spec, policy)), within)

    out = []
    for arm, policy in cases:
        search = serve_stats.best_rate(functools.partial(attained, policy), *rates)
        result = setup.run(queue(max(search.rate, rates[0])), spec, policy)
        seconds = {"goodput_rate": search.rate, "violation": search.violation, "ttft_limit": within.ttft, "tpot_limit": within.tpot}
        settings = {"requests": requests, "slots": slots, "ttft_times": limits[0], "tpot_times": limits[1]}
        out.append(setup.found(arm, settings, {"probes": len(search.probes)}, seconds, result))
    return out
