"""What regrouping requests by predicted paths saves: a queue of recorded sequences of mixed domains under every policy and source of paths.

The routing of a sequence does not depend on what it is decoded beside, so a recorded sequence can be put into any batch. Distinct experts are counted
over the whole queue, its end included, per full batch of tokens; the baseline is a batch of those that came first, each running to its end.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoe.offload.predictors.interface import one_hot
from jaxmoe.offload.replay import replay
from jaxmoe.offload.request_paths import PathSource, as_sets, by_profile, by_token, recent
from jaxmoe.offload.request_pool import Grouping, Pool
from jaxmoe.offload.trace import DECODE, PROMPT, Trace

SPEEDS = (0.02, 0.05, 0.1, 0.5, 25.0)
"""Link speeds, 10^9 bytes per second: the emulated ones, one at which a small expert takes as long as a large model's does over PCIe, and PCIe's."""
CACHES = (0.25, 0.5)
"""Shares of a layer's experts that its slots hold, for loads."""
HELD = 0.5
"""The share that is on the device where batches are chosen by what is there."""
POLICY = "lfu"
PAD_STEPS = 512
"""Replayed steps come in multiples of this, so that few programs are compiled."""


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One sequence. Attributes: `domain`; `tokens` int32 [T] read; `ids` [T, L, A]; `prompt`, how many of the tokens are prompt."""

    domain: str
    tokens: np.ndarray
    ids: np.ndarray
    prompt: int


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to form batches. Attributes: `grouping`; `rows`, requests to choose from; `source`, a key of the sources."""

    grouping: Grouping
    rows: int
    source: str = ""

    @property
    def label(self) -> str:
        """For tables."""
        g = self.grouping
        return f"{g.policy} {self.source}".strip() + (f", held {g.held_cost:g}" if g.held_cost < 1 else "")


@dataclasses.dataclass(frozen=True)
class Run:
    """One queue under one arm. Attributes: `used` bool [S, L, E] of its steps; `tokens` decoded; `waited`, most rounds that a request was passed
    over; `seconds` that the scheduler kept a processor busy.
    """

    used: np.ndarray
    tokens: int
    waited: int
    seconds: float


# --- Sequences


def recorded(traces: Mapping[str, Trace], least: int = 2) -> list[Recorded]:
    """The sequences of traces by domain that decoded at least so many tokens."""
    out = []
    for domain, trace in traces.items():
        for s in np.unique(trace.sequence):
            mine = trace.sequence == s
            prompt = int((trace.phase[mine] == PROMPT).sum())
            if mine.sum() - prompt >= least:
                out.append(Recorded(domain, trace.tokens[mine], trace.ids[mine], prompt))
    return out


def halves(trace: Trace) -> tuple[Trace, Trace]:
    """Every other sequence of a trace: one half to learn from, one to be measured with.

    Raises:
        ValueError: it has fewer than two.
    """
    numbers = np.unique(trace.sequence)
    if len(numbers) < 2:
        raise ValueError("the trace holds one sequence: two are needed, to learn from one and to measure with the other")
    columns = [f.name for f in dataclasses.fields(Trace) if f.name != "meta"]

    def part(chosen: np.ndarray) -> Trace:
        kept = np.isin(trace.sequence, chosen)
        values = {name: getattr(trace, name) for name in columns}
        return dataclasses.replace(trace, **{name: value[kept] for name, value in values.items() if value is not None})

    return part(numbers[::2]), part(numbers[1::2])


# --- A queue


def oracle(sequences: Sequence[Recorded], experts: int, every: int) -> PathSource:
    """What each request will ask for in its next `every` steps, [R, every L, E]: no estimate does better."""
    truth = [np.concatenate([one_hot(s.ids, experts), np.zeros((every, s.ids.shape[1], experts), bool)]) for s in sequences]

    def begin(state, row, number):
        state[row] = number, 0
        return state

    def after(state, row, tokens, ids):
        state[row, 1] += len(tokens)
        return state

    def paths(state, rows, tokens):
        return np.stack([truth[i][at : at + every] for i, at in state[rows]]).reshape(len(rows), -1, experts)

    return PathSource("oracle", lambda rows: np.zeros((rows, 2), int), begin, after, paths)


Learned = Callable[[Sequence[Recorded], int], dict[str, PathSource]]
"""`(sequences of a queue, steps of a round) -> sources of paths by name`."""


def learn(fit: Mapping[str, Trace], more: Callable[[Sequence[Recorded]], Mapping[str, PathSource]] = lambda sequences: {}) -> Learned:
    """Fits profiles and the token table to traces by domain, once; `more` makes further sources for the sequences of a queue."""
    first = next(iter(fit.values()))
    experts, active = first.experts, first.ids.shape[2]
    by_domain = {name: one_hot(t.ids, experts).mean(0, dtype=np.float32) for name, t in fit.items()}
    mean = np.mean(list(by_domain.values()), axis=0)
    token = by_token(list(fit.values()))

    def sources(sequences: Sequence[Recorded], every: int) -> dict[str, PathSource]:
        profile = by_profile(np.stack([by_domain[s.domain] if s.domain in by_domain else mean for s in sequences]))
        nothing = by_profile(np.zeros((len(sequences), 1, 1), np.float32))
        own = {"": nothing, "recent": recent(mean), "profile": profile, "token": token, "token, sets": as_sets(token, active)}
        return own | {"oracle": oracle(sequences, experts, every)} | dict(more(sequences))

    return sources


class _Held:
    """What a cache of frequent experts holds, for `held_cost`: counts fade by 0.9 a step, as in `residency`'s lfu."""

    def __init__(self, shape: tuple[int, int], slots: int):
        self.slots, self._count, self.there = slots, np.zeros(shape), np.zeros(shape, bool)

    def see(self, used: np.ndarray) -> None:
        """Takes a step's experts."""
        self._count = 0.9 * self._count + used
        rank = np.where(self.there | used, self._count, -1.0)
        best = np.argsort(-rank, axis=1, kind="stable")[:, : self.slots]
        there = np.zeros_like(self.there)
        np.put_along_axis(there, best, True, axis=1)
        self.there = there & (rank >= 0)


def simulate(sequences: Sequence[Recorded], arm: Arm, source: PathSource, experts: int) -> Run:
    """Runs a queue, in the order of the sequences, to its end."""
    grouping, pool, waiting, clock = arm.grouping, Pool(), list(range(len(sequences))), time.thread_time
    at, state = np.asarray([s.prompt for s in sequences]), source.init(arm.rows)
    free, row_of = list(range(arm.rows)), np.zeros(len(sequences), int)
    used: list[np.ndarray] = []
    tokens, waited, seconds = 0, 0, 0.0
    held = _Held((sequences[0].ids.shape[1], experts), round(HELD * experts)) if grouping.held_cost < 1 else None
    while waiting or pool.numbers:
        new, waiting = waiting[: arm.rows - len(pool.numbers)], waiting[arm.rows - len(pool.numbers) :]
        began = clock()
        for i in new:
            row_of[i] = free.pop()
            state = source.begin(state, row_of[i], i)
            if source.routed:
                state = source.after(state, row_of[i], sequences[i].tokens[: at[i]], sequences[i].ids[: at[i]])
        pool = pool.admit(new)
        paths = source.paths(state, row_of[list(pool.numbers)], np.asarray([sequences[i].tokens[at[i]] for i in pool.numbers]))
        picked = pool.choose(paths, grouping, None if held is None else held.there)
        seconds += clock() - began
        for k in range(grouping.every):
            ids = [sequences[i].ids[at[i] + k] for i in picked if at[i] + k < len(sequences[i].ids)]
            if ids:
                used.append(np.any(one_hot(np.stack(ids), experts), axis=0))
                tokens += len(ids)
                if held is not None:
                    held.see(used[-1])
        began = clock()
        for i in picked:
            step = slice(at[i], at[i] + grouping.every)
            if source.routed:
                state = source.after(state, row_of[i], sequences[i].tokens[step], sequences[i].ids[step])
            at[i] = min(at[i] + grouping.every, len(sequences[i].ids))
        ended = [i for i in picked if at[i] == len(sequences[i].ids)]
        free += [row_of[i] for i in ended]
        pool = pool.commit(picked, ended)
        waited = max(waited, max(pool.waited, default=0))
        seconds += clock() - began
    return Run(np.stack(used), tokens, waited, seconds)


def loads(run: Run, share: float) -> float:
    """Experts that a cache of that share of every layer's experts has to bring."""
    rest = -len(run.used) % PAD_STEPS
    padded = np.concatenate([run.used, np.zeros((rest, *run.used.shape[1:]), bool)])
    slots = max(1, round(share * run.used.shape[2]))
    return float(replay((padded, np.full(len(padded), DECODE, np.uint8)), slots, POLICY).loads_L.sum())


# --- Arms, and what they come to


def arms(batch: int, wait: int = 4, bound: int = 16) -> list[Arm]:
    """What is compared at one batch size: policies and sources at a pool of `wait` batches, then pools, rounds and bounds of the best."""

    def arm(policy: str, source: str = "", times: int = wait, most: int | None = bound, every: int = 1, held: float = 1.0) -> Arm:
        return Arm(Grouping(batch, policy, most, every, held), times * batch, source)

    out = [arm("arrival", times=1, most=None), arm("random")]
    out += [arm(policy, source) for source in ("recent", "profile", "token", "oracle") for policy in ("pairs", "by_expert", "greedy")]
    out += [arm("greedy", "token, sets"), arm("pairs", "token", 2, 2), arm("pairs", "oracle", 2, 2)]
    out += [arm("greedy", source, times) for times in (2, 8) for source in ("token", "oracle")]
    out += [arm("greedy", source, every=every) for every in (2, 4, 16) for source in ("recent", "token", "oracle")]
    out += [arm("greedy", source, most=most) for most in (wait - 1, 8, 64) for source in ("token",)]
    out += [arm("greedy", "token", times, held=0.3) for times in (wait, 8)]
    return list(dict.fromkeys(out))


def compare(
    learned: Learned, traces: Mapping[str, Trace], chosen: Sequence[Arm], orders: int = 10, seed: int = 0,
    progress: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every arm on the same shuffled queues.

    Args:
        learned: of `learn`, from other traces.
        traces: those that are measured, by domain.
        chosen: arms of one batch size or more; each batch size with its `arrival`.
        orders: shuffles.
        seed: of them.
        progress: is told what comes next.

    Returns:
        A JSON-able record an arm; see `record`.
    """
    everyone = recorded(traces)
    experts, size = next(iter(traces.values())).experts, int(next(iter(traces.values())).expert_bytes.max())
    found: dict[Arm, list[Run]] = {arm: [] for arm in chosen}
    for order in range(orders):
        rng = np.random.default_rng([seed, order])
        sequences = [everyone[i] for i in rng.permutation(len(everyone))]
        for arm in chosen:
            progress(f"order {order + 1} of {orders}: batch {arm.grouping.batch}, {arm.label}")
            found[arm].append(simulate(sequences, arm, learned(sequences, arm.grouping.every)[arm.source], experts))
    bases = {arm.grouping.batch: runs for arm, runs in found.items() if arm.grouping.policy == "arrival"}
    return [record(arm, runs, bases[arm.grouping.batch], size) for arm, runs in found.items()]


def record(arm: Arm, runs: Sequence[Run], bases: Sequence[Run], expert_bytes: int) -> dict[str, Any]:
    """What an arm did, beside the baseline on the same queues.

    Returns:
        `distinct`, a layer and full batch; `reduction` of it with 95 % limits (bootstrap over orders); `waited`, most rounds; `microseconds` of the
        scheduler a step; `caches`, by share of experts held: `loads` a full batch of tokens, their `reduction`, `break_even_gbps` (below that speed
        the loads saved take longer than the scheduler) and `net_reduction` of seconds by link speed.
    """
    g, layers = arm.grouping, runs[0].used.shape[1]

    def per_batch(counts: Sequence[float], of: Sequence[Run]) -> np.ndarray:
        return np.asarray([c * g.batch / r.tokens for c, r in zip(counts, of, strict=True)])

    seconds = float(np.mean([r.seconds / len(r.used) for r in runs]))
    mine, theirs = (per_batch([float(r.used.sum()) / layers for r in of], of) for of in (runs, bases))
    caches = {}
    for share in CACHES:
        ours, base = (float(per_batch([loads(r, share) for r in of], of).mean()) for of in (runs, bases))
        net = {str(v): float(1 - (ours * expert_bytes / v / 1e9 + seconds) / (base * expert_bytes / v / 1e9)) for v in SPEEDS}
        even = (base - ours) * expert_bytes / seconds / 1e9
        caches[str(share)] = {"loads": ours, "reduction": 1 - ours / base, "break_even_gbps": max(0.0, even), "net_reduction": net}
    return {
        **dataclasses.asdict(g), "rows": arm.rows, "source": arm.source, "orders": len(runs), "distinct": float(mine.mean()),
        **interval(mine, theirs), "waited": max(r.waited for r in runs), "microseconds": 1e6 * seconds, "caches": caches,
    }  # fmt: skip


def interval(mine: np.ndarray, theirs: np.ndarray, draws: int = 2000) -> dict[str, float]:
    """`reduction` of the mean, and its 95 % limits `low` and `high`: paired bootstrap over orders."""
    picks = np.random.default_rng(0).integers(0, len(mine), (draws, len(mine)))
    low, high = np.percentile(1 - mine[picks].mean(1) / theirs[picks].mean(1), [2.5, 97.5])
    return {"reduction": float(1 - mine.mean() / theirs.mean()), "low": float(low), "high": float(high)}
