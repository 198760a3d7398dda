"""A mixed queue on the serving engine with part of the experts on the device: what it costs to decode by predicted paths, in turns, all together, in
the order of arrival, or one request at a time.

Every arm serves the same requests and gives the same tokens, on the same compiled programs; what differs is how many sequences the scheduler may hold
and decode in a step, and how it chooses them. Bytes are those of experts that crossed the link, counted where they are read; seconds are the wall's.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoe.engine.generate import Sampling
from jaxmoe.engine.model import Model
from jaxmoe.engine.serving import scheduler
from jaxmoe.engine.serving.compiles import CompileCount
from jaxmoe.engine.serving.core import ServingEngine
from jaxmoe.engine.serving.paths import RequestPaths, by_token_seen
from jaxmoe.engine.serving.requests import ServeRequest
from jaxmoe.engine.serving.routing import DecodeCounts
from jaxmoe.engine.serving.runner import Runner
from jaxmoe.engine.serving.scheduler import Policy
from jaxmoe.engine.serving.types import ServeSpec
from jaxmoe.experts import SlotBank
from jaxmoe.offload import request_paths
from jaxmoe.offload.predictors import PREDICTORS, sizes_of
from jaxmoe.offload.predictors.interface import one_hot
from jaxmoe.offload.request_paths import PathSource
from jaxmoe.offload.trace import DECODE, Trace, model_hash, model_meta
from jaxmoe.report import record
from jaxmoe.report.regroup_bench import Recorded, oracle
from jaxmoe.report.serve_load import Sizes
from jaxmoe.train.corpus import Corpus, windows

NAME = "serve_queue"
PAGE = 32
PROMPT, NEW = 32, Sizes(32, 0.5, 8, 96)
"""Tokens of a prompt, a whole page; and of an answer."""
HELD = 0.3
"""What an expert that is on the device counts for, where arms look at that."""
CONTROLS = ("arrival", "turns", "no regrouping", "one at a time")
RATIOS = ("tokens_per_second", "bytes_per_token", "decode_bytes_per_token", "distinct_per_token")


@dataclasses.dataclass(frozen=True)
class Queue:
    """Attributes: `requests`, in order of arrival, all there at the beginning; `domains` of each."""

    requests: tuple[ServeRequest, ...]
    domains: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to serve a queue. Attributes: `slots` sequences that hold pages, of which `batch` decode in a step; `policy`; `source`, a key of the
    sources of paths."""

    name: str
    slots: int
    batch: int
    policy: Policy = Policy()
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Ran:
    """What an arm did. Attributes: `ids` new tokens of each request; `seconds` by what took them; `counts`."""

    ids: tuple[tuple[int, ...], ...]
    seconds: Mapping[str, float]
    counts: Mapping[str, float]


def mixed_queue(text: Corpus, count: int = 256, seed: int = 0, split: str = "held_out", prompt: int = PROMPT, new: Sizes = NEW) -> Queue:
    """Requests of all domains of a corpus in equal parts, shuffled: windows of its text, continued at temperature 1; no text ends earlier.

    Raises:
        ValueError: the text is too short for so many.
    """
    each = -(-count // len(text.domains))
    found = [(domain, tuple(map(int, ids[:prompt]))) for domain in text.domains for ids in windows(text, domain, prompt, split, most=each)]
    if len(found) < count:
        raise ValueError(f"the {split} text of {len(text.domains)} domains has {len(found)} windows of {prompt} tokens: give {count}, or more text")
    rng = np.random.default_rng([seed, 11])
    chosen = [found[i] for i in rng.permutation(len(found))[:count]]
    lengths = new.draw(count, rng).tolist()
    how = [Sampling(1.0, seed=seed + i) for i in range(count)]
    requests = [ServeRequest(ids, n, sampling, ignore_eos=True) for (_, ids), n, sampling in zip(chosen, lengths, how, strict=True)]
    return Queue(tuple(requests), tuple(domain for domain, _ in chosen))


def arms(batch: int, wait: int, sources: Sequence[str]) -> list[Arm]:
    """The controls, then grouping by each source with `wait` batches' worth of sequences to choose from, then looking at what is on the device."""
    many, greedy = wait * batch, Policy(group="greedy")
    out = [Arm("arrival", batch, batch), Arm("turns", many, batch), Arm("no regrouping", many, many), Arm("one at a time", 1, 1)]
    out += [Arm(f"grouped by {source}", many, batch, greedy, source) for source in sources]
    held = [source for source in ("token, learned", "oracle") if source in sources]
    return out + [Arm(f"grouped by {source}, held", many, batch, dataclasses.replace(greedy, held_cost=HELD), source) for source in held]


# --- Running


class _Recording:
    """In the place of `RequestPaths`, for a run that learns every sequence's routing. Attributes: `parts` of each id: (tokens, experts)."""

    def __init__(self) -> None:
        self.parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def of(self, state: Any, live: Any, runner: Any) -> tuple[None, None]:
        return None, None

    def learn(self, plan: Any, given: Any, live: Any, runner: Runner) -> None:
        for call in runner.routed:
            for id, _, tokens, experts in call.by_sequence():
                self.parts.setdefault(id, []).append((tokens, experts))

    def sequence(self, id: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and experts of all that a request decoded; of its prompt nothing is known, which went by groups of layers."""
        tokens, experts = zip(*self.parts[id], strict=True)
        return np.concatenate(tokens), np.concatenate(experts)


class _Timed:
    """Paths, and the seconds that they take."""

    def __init__(self, paths: Any):
        self._paths, self.seconds = paths, 0.0

    def of(self, *args: Any) -> Any:
        began = time.perf_counter()
        found = self._paths.of(*args)
        self.seconds += time.perf_counter() - began
        return found

    def learn(self, *args: Any) -> None:
        began = time.perf_counter()
        self._paths.learn(*args)
        self.seconds += time.perf_counter() - began


def make_runner(model: Model, batch: int, wait: int, positions: int) -> Runner:
    """One for all arms: the largest of them says what shapes programs have.

    Raises:
        ValueError: all experts are on the device.
    """
    if not isinstance(model.bank, SlotBank):
        raise ValueError("a queue's bytes are those of experts that come from host memory: load the model with fewer slots than experts")
    slots = wait * batch
    groups = min(4, model.spec.n_layers)
    spec = ServeSpec(slots, PAGE, slots * positions // PAGE, positions, slots, slots + PAGE, slots * PROMPT, groups, burst=1, run=PAGE)
    runner = Runner(model, spec, record=True)
    runner.row_buckets = tuple(sorted({1, batch, slots}))
    return runner


def run_arm(runner: Runner, queue: Queue, arm: Arm, paths: Any = None) -> Ran:
    """Serves a queue, from an empty device.

    Args:
        runner: of `make_runner`; large enough for the arm.
        queue: all there at the beginning.
        arm: its source is not looked at.
        paths: a `RequestPaths` or what stands in its place.
    """
    runner.rebuild()
    runner.decoded = DecodeCounts()
    paths, compiled = _Timed(paths), CompileCount()
    engine = ServingEngine(runner, None, (), arm.policy, paths=paths if paths._paths is not None else None)
    engine.state = scheduler.fresh(dataclasses.replace(runner.spec, slots=arm.slots, batch=arm.batch), runner.spec.move)
    for request in queue.requests:
        engine.submit(request)
    ids: list[list[int]] = [[] for _ in queue.requests]
    done, waited, began = np.zeros(len(ids)), 0, time.perf_counter()
    while not engine.idle:
        for event in engine.step():
            if event.error is not None:
                raise RuntimeError(event.error)
            ids[event.id] += event.ids
            done[event.id] = time.perf_counter() - began
        waited = max([waited, *(engine.state.seqs[i].waited for i in engine.state.running)])
    seconds = {"wall": time.perf_counter() - began, "paths": paths.seconds, "mean_until_done": float(done.mean())}
    return Ran(tuple(map(tuple, ids)), seconds, _counts(runner, engine, ids, waited) | {"compiles": compiled.since})


def _counts(runner: Runner, engine: ServingEngine, ids: Sequence[Sequence[int]], waited: int) -> dict[str, float]:
    size, whole, decode = runner.model.bank.record_bytes, runner.counters(), runner.decoded.read()
    tokens, decoded = sum(map(len, ids)), sum(len(some) - 1 for some in ids)
    loads, asked = int(decode["loads"].sum()), int(decode["requests"].sum())
    prompt_loads = int(whole["loads"].sum()) - loads
    layers = len(whole["loads"])
    return {
        "tokens": tokens, "decoded": decoded, "steps": engine.state.counters.steps, "decode_steps": runner.decoded.steps, "waited": waited,
        "decode_bytes": loads * size, "prompt_bytes": prompt_loads * size, "bytes_per_token": (loads + prompt_loads) * size / tokens,
        "decode_bytes_per_token": loads * size / decoded, "distinct_per_step": asked / layers / runner.decoded.steps,
        "distinct_per_token": asked / layers / decoded, "decode_hit_rate": int(decode["hits"].sum()) / asked,
    }  # fmt: skip


# --- Sources of paths


def _trace(model: Model, recording: _Recording) -> Trace:
    """What was decoded, as a trace; the routers' weights were not kept, and all count alike."""
    parts = [recording.sequence(id) for id in recording.parts]
    tokens, ids = (np.concatenate([part[k] for part in parts]) for k in range(2))
    numbers = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part[0]) for part in parts])
    phase, step = np.full(len(tokens), DECODE, np.uint8), np.arange(len(tokens), dtype=np.int32)
    meta = model_meta(model.spec, "a model", "a queue of other text")
    return Trace(ids.astype(np.int16), np.ones(ids.shape, np.float16), tokens.astype(np.int32), numbers, phase, step, meta)


def sources(model: Model, queue: Queue, truth: _Recording, other: Trace | None, path: Any = None) -> dict[str, tuple[PathSource, int | None]]:
    """By name, each with how many tokens without routing it is told (`RequestPaths`): learned while serving, from other text, and the truth.

    Args:
        model, queue: that are measured.
        truth: a recording of that queue.
        other: of other text; sources that are fitted are left out without one.
        path: a trained path predictor (`jaxmoe.train.path_predictor.train`); left out without one.
    """
    router, _ = model.spec.moe
    layers, experts, active = len(model.spec.moe_layers), router.experts, router.active
    prior = np.full((layers, experts), active / experts, np.float32) if other is None else _mean(other)
    previous = PREDICTORS["previous"]
    fitted = previous.fit([], sizes=sizes_of(model.spec))
    out: dict[str, tuple[PathSource, int | None]] = {
        "previous token": (request_paths.by_predictor(previous, fitted), 0), "own routing": (request_paths.recent(prior), 0),
        "token, learned": (by_token_seen(layers, experts, active), 0),
    }  # fmt: skip
    if other is not None:
        out["token"] = (request_paths.by_token([other]), 0)
    if path is not None:
        out["path predictor"] = (request_paths.by_predictor(PREDICTORS["path"], path), path.settings.window)
    known = []
    for i, request in enumerate(queue.requests):
        tokens, ids = truth.sequence(i)
        prompt = np.asarray(request.prompt_ids)
        unknown = np.full((len(prompt), layers, active), -1, ids.dtype)
        known.append(Recorded(queue.domains[i], np.concatenate([prompt, tokens]), np.concatenate([unknown, ids]), len(prompt)))
    return out | {"oracle": (oracle(known, experts, 1), None)}


def _mean(trace: Trace) -> np.ndarray:
    return one_hot(trace.ids, trace.experts).mean(0, dtype=np.float32)


# --- The measurement


def queue_records(
    model: Model, queue: Queue, other: Queue | None = None, batch: int = 8, wait: int = 4, train: Callable[[Trace], Any] | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Serves a queue in every way, and checks that all give the same tokens.

    Args:
        model: with as many slots for experts as is to be measured.
        queue: what is served.
        other: a queue of other text, from which sources that are fitted learn.
        batch: sequences of a step.
        wait: batches' worth of sequences to choose from.
        train: gives a path predictor of a trace of the other text.
        tell: is told what comes next.

    Returns:
        A record (`jaxmoe.report.record`) an arm. `counters` has numbers, and ratios by "number / control"; its bound is what the oracle's grouping
        reaches in tokens per 10^9 bytes of experts.

    Raises:
        ValueError: all experts are on the device.
        RuntimeError: an arm gave other tokens than the first, or a step failed.
    """
    queues = [queue] if other is None else [queue, other]
    positions = max(-(-(len(r.prompt_ids) + r.max_new_tokens) // PAGE) for q in queues for r in q.requests) * PAGE
    tell("compiling")
    runner = make_runner(model, batch, wait, positions)
    compile_seconds = runner.warm_up(modes=("decode", "group"))
    everyone = Arm("recording", batch * wait, batch * wait)
    truth, elsewhere = _Recording(), _Recording()
    tell("recording")
    expected = run_arm(runner, queue, everyone, truth).ids
    trace = None
    if other is not None:
        run_arm(runner, other, everyone, elsewhere)
        trace = _trace(model, elsewhere)
    if train is not None and trace is not None:
        tell("training the path predictor")
    found = sources(model, queue, truth, trace, train(trace) if train is not None and trace is not None else None)
    ran: dict[Arm, Ran] = {}
    for arm in arms(batch, wait, list(found)):
        tell(arm.name)
        ran[arm] = run_arm(runner, queue, arm, _paths(runner, arm, found))
        if ran[arm].ids != expected:
            raise RuntimeError(f"the tokens of {arm.name!r} differ from those of all decoding together: grouping must not change them")
    return _records(model, queue, ran, compile_seconds)


def _paths(runner: Runner, arm: Arm, found: Mapping[str, tuple[PathSource, int | None]]) -> RequestPaths | None:
    if not arm.source:
        return None
    paths = RequestPaths(found[arm.source][0], runner, arm.policy, found[arm.source][1])
    paths.warm_up()
    return paths


def _records(model: Model, queue: Queue, ran: Mapping[Arm, Ran], compile_seconds: float) -> list[dict[str, Any]]:
    numbers = {arm.name: {**r.counts, "tokens_per_second": r.counts["tokens"] / r.seconds["wall"]} for arm, r in ran.items()}
    best, out = 1e9 / numbers["grouped by oracle"]["bytes_per_token"], []
    for arm, r in ran.items():
        own = numbers[arm.name]
        beside = {f"{name} / {c}": own[name] / numbers[c][name] for c in CONTROLS if c != arm.name for name in RATIOS}
        settings = {
            "arm": arm.name, "mode": "fused", "link": "none: bytes are counted", "batch": arm.batch, "slots": arm.slots,
            "requests": len(queue.requests), "domains": len(set(queue.domains)), "expert_slots": list(model.bank.slots),
            "experts": model.bank.experts, "policy": model.bank.policy,
            "prefill": arm.policy.prefill, "group": arm.policy.group or "", "bound": arm.policy.bound, "held_cost": arm.policy.held_cost,
            "source": arm.source,
        }  # fmt: skip
        out.append(
            record.make_record(
                name=NAME, spec_hash=model_hash(model.spec), settings=settings, seeds={"sampling": queue.requests[0].sampling.seed},
                timings={name: record.timing([value]) for name, value in r.seconds.items()}, compile_seconds=compile_seconds,
                bytes={name: int(value) for name, value in own.items() if name in ("decode_bytes", "prompt_bytes")},
                counters={name: value for name, value in own.items() if name not in ("decode_bytes", "prompt_bytes")} | beside,
                bound=record.make_bound("link", best, 1e9 / own["bytes_per_token"], "tok/GB"),
            )
        )  # fmt: skip
    return out
