"""When prefetching pays: a model of a decode step as events on two clocks, the device's and the link's. For planning, and to foretell a run.

A layer is its front (attention and router), then its experts. When a layer's routing is known, what it misses is demanded, what is queued for it and
not asked for is cancelled, and prefetches for later layers are queued. Its hits are computed at once, then each missing expert when it has arrived,
those first that were sent ahead. The link is serial; what has started is not taken back, and demand goes before prefetches. The next layer's front
begins when this layer's experts are done.

What is resident is given, since it does not depend on prefetching: records land where they would have landed anyway. This is written on its own,
without `jaxmoe.offload.link` or `staging`, so that each can be held against the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float

Candidates = Sequence[Sequence[Sequence[tuple[int, int]]]]
"""By step and layer: `(layer, expert)` to send when that layer's routing is known, best first; a later layer of the same step."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds.

    Attributes:
        front: of a layer until its routing is known to the host.
        copy: of one expert on the link.
        hits: of computing the experts of a layer that are there, whatever their number.
        hit: of each of them.
        land: of landing and computing one missing expert, once it is there.
        host: of the host's work a layer, while the device waits.
        host_miss: of its work a missing expert, likewise.
        prefetch: of the host's work a layer for prefetching, where it is on; it delays the layer where it takes longer than its hits.
        rest: of a step beside its MoE layers.
    """

    front: float
    copy: float
    hits: float = 0.0
    hit: float = 0.0
    land: float = 0.0
    host: float = 0.0
    host_miss: float = 0.0
    prefetch: float = 0.0
    rest: float = 0.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """How it prefetches. Attributes: `width` records for one layer's turn, at most; `staging` records held, at most (queued ones included)."""

    width: int = 1
    staging: int = 4


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        seconds_S: of each step.
        useful, late, wasted, cancelled, demand: records, as `jaxmoe.offload.staging.Counters` has them in bytes; what is still staged is in none.
        link_share: of the time, in which the link was busy.
        stall_share: of the time, in which the device waited for the link.
    """

    seconds_S: Float[np.ndarray, "S"]
    useful: int
    late: int
    wasted: int
    cancelled: int
    demand: int
    link_share: float
    stall_share: float

    @property
    def seconds(self) -> float:
        """Of a step, on the average."""
        return float(self.seconds_S.mean())


@dataclasses.dataclass
class _Record:
    """A record that was queued for the turn `first`, and has been found likely for `turn` since. `arrives` is None until it starts."""

    layer: int
    expert: int
    first: int
    turn: int
    rank: int
    queued_at: float
    arrives: float | None = None


class _Run:
    """The clocks, and what is staged."""

    def __init__(self, costs: Costs, setting: Setting | None):
        self.costs, self.setting = costs, setting
        self.now = self.free_at = self.taken = self.stalled = 0.0
        self.staged: dict[tuple[int, int], _Record] = {}
        self.counts = dict.fromkeys(("useful", "late", "wasted", "cancelled", "demand"), 0)

    def occupy(self, at: float) -> float:
        self.free_at = max(self.free_at, at) + self.costs.copy
        self.taken += self.costs.copy
        return self.free_at

    def settle(self, now: float) -> None:
        """Starts the prefetches that have started by now."""
        while queued := [r for r in self.staged.values() if r.arrives is None]:
            first = min(queued, key=lambda r: (r.turn, r.rank))
            begins = max(self.free_at, first.queued_at)
            if begins > now:
                return
            first.arrives = self.occupy(begins)

    def drop(self, record: _Record) -> None:
        self.counts["cancelled" if record.arrives is None else "wasted"] += 1
        del self.staged[record.layer, record.expert]

    def room(self, now: float, turn: int, coming: int) -> bool:
        """Makes room for a record of the turn `coming`: what was for a turn that has passed goes, the oldest first, or what is queued for a later."""
        assert self.setting is not None
        if len(self.staged) < self.setting.staging:
            return True
        passed = [r for r in self.staged.values() if r.turn < turn and (r.arrives is None or r.arrives <= now)]
        later = [r for r in self.staged.values() if r.turn > coming and r.arrives is None]
        if not passed and not later:
            return False
        self.drop(min(passed, key=lambda r: r.turn) if passed else max(later, key=lambda r: (r.turn, r.rank)))
        return True

    def layer(self, turn: int, layer: int, need_E: np.ndarray, resident_LE: np.ndarray, ahead: Sequence[tuple[int, int]]) -> None:
        """One layer's events."""
        c, there_E = self.costs, resident_LE[layer]
        self.now += c.front + c.host
        self.settle(self.now)
        missing = set(np.flatnonzero(need_E & ~there_E).tolist())
        arrivals: list[tuple[float, _Record | None]] = []
        for record in [r for r in self.staged.values() if r.layer == layer]:
            if record.expert in missing:
                missing.discard(record.expert)
                del self.staged[layer, record.expert]
                promoted = record.arrives is None
                arrivals.append((self.occupy(self.now) if promoted else record.arrives, None if promoted else record))  # type: ignore[arg-type]
            elif record.arrives is None:
                self.drop(record)
        arrivals.sort(key=lambda pair: (pair[1] is None, pair[0]))
        arrivals += [(self.occupy(self.now), None) for _ in missing]
        began = self.now
        if self.setting is not None:
            self.queue(turn, layer, ahead, resident_LE)
        hits = c.hits + c.hit * float((need_E & there_E).sum())
        self.now = max(began + hits, began + (c.prefetch if self.setting is not None else 0.0))
        for arrival, ahead_of in arrivals:
            late = arrival > self.now
            self.counts["demand" if ahead_of is None else "late" if late else "useful"] += 1
            self.stalled += max(0.0, arrival - self.now)
            self.now = max(self.now, arrival) + c.land + c.host_miss

    def queue(self, turn: int, layer: int, ahead: Sequence[tuple[int, int]], resident_LE: np.ndarray) -> None:
        assert self.setting is not None
        for rank, key in enumerate(ahead):
            if key in self.staged:
                self.staged[key].turn, self.staged[key].rank = turn + key[0] - layer, rank
        sent: dict[int, int] = {}
        for record in self.staged.values():
            sent[record.first] = sent.get(record.first, 0) + 1
        for rank, (target, expert) in enumerate(ahead):
            coming = turn + target - layer
            if resident_LE[target, expert] or (target, expert) in self.staged or sent.get(coming, 0) >= self.setting.width:
                continue
            if not self.room(self.now, turn, coming):
                return
            self.staged[target, expert] = _Record(target, expert, coming, coming, rank, self.now)
            sent[coming] = sent.get(coming, 0) + 1


def run(
    used_SLE: Bool[np.ndarray, "S L E"],
    resident_SLE: Bool[np.ndarray, "S L E"],
    costs: Costs,
    candidates: Candidates | None = None,
    setting: Setting = Setting(),
) -> Outcome:
    """Runs the events of some decode steps, one after another.

    Args:
        used_SLE: what every step asks each layer for.
        resident_SLE: what is in a layer's slots when the step comes to it.
        costs: in seconds.
        candidates: what to send; None for no prefetching.
        setting: how.

    Returns:
        The outcome. The residency that a candidate is compared with is that of its own turn, which nothing between now and then can change.
    """
    state = _Run(costs, None if candidates is None else setting)
    seconds, layers = [], used_SLE.shape[1]
    for s, (used_LE, resident_LE) in enumerate(zip(used_SLE, resident_SLE, strict=True)):
        began = state.now
        for layer in range(layers):
            ahead = () if candidates is None else candidates[s][layer]
            state.layer(s * layers + layer, layer, used_LE[layer], resident_LE, ahead)
        state.now += costs.rest
        seconds.append(state.now - began)
    state.settle(state.now)
    busy = state.taken - max(0.0, state.free_at - state.now)
    return Outcome(np.array(seconds), **state.counts, link_share=busy / state.now, stall_share=state.stalled / state.now)


def gain(
    used_SLE: np.ndarray, resident_SLE: np.ndarray, costs: Costs, candidates: Candidates, settings: Sequence[Setting] = (Setting(),)
) -> tuple[float, Setting, Outcome]:
    """Seconds a step without prefetching over those with it, in the best of some settings.

    Returns:
        The gain, the setting, and its outcome.
    """
    without = run(used_SLE, resident_SLE, costs).seconds
    outcomes = [(setting, run(used_SLE, resident_SLE, costs, candidates, setting)) for setting in settings]
    setting, best = min(outcomes, key=lambda pair: pair[1].seconds)
    return without / best.seconds, setting, best


# --- What is predicted


def synthetic(
    used_SLE: Bool[np.ndarray, "S L E"], recall: float, seed: int = 0, depth: int = 1, frequent: bool = False
) -> list[list[list[tuple[int, int]]]]:
    """Candidates of a predictor that names as many experts as are used, each with the probability `recall` a true one.

    Args:
        used_SLE: the truth.
        recall: see above.
        seed: of what it gets wrong.
        depth: layers ahead, nearest first.
        frequent: wrong ones are the most used so far that are not true, as a predictor's near misses are, instead of any.
    """
    rng = np.random.default_rng(seed)
    steps, layers, experts = used_SLE.shape
    count_LE = np.zeros((layers, experts))
    out: list[list[list[tuple[int, int]]]] = []
    for used_LE in used_SLE:
        guesses = [_guess(rng, used_LE[layer], recall, count_LE[layer] if frequent else None) for layer in range(layers)]
        ahead = [[(t, e) for t in range(layer + 1, min(layer + 1 + depth, layers)) for e in guesses[t]] for layer in range(layers)]
        out.append(ahead)
        count_LE += used_LE
    return out


def _guess(rng: np.random.Generator, used_E: np.ndarray, recall: float, count_E: np.ndarray | None) -> list[int]:
    true, wrong = np.flatnonzero(used_E), rng.permutation(np.flatnonzero(~used_E))
    if count_E is not None:
        wrong = wrong[np.argsort(-count_E[wrong], kind="stable")]
    kept = true[rng.random(len(true)) < recall]
    return rng.permutation(np.concatenate([kept, wrong[: len(true) - len(kept)]])).tolist()


def ranked(
    scores: Callable[[int, int], Float[np.ndarray, "L E"] | None], steps: int, layers: int, depth: int = 1, most: int = 16, least: float = 1e-6
) -> list[list[list[tuple[int, int]]]]:
    """Candidates of a predictor's scores.

    Args:
        scores: `(step, layer) -> [L, E]` when that layer's routing is known; None for nothing.
        steps, layers: of the run.
        depth: layers ahead, nearest first.
        most: candidates of one layer.
        least: the lowest score.
    """

    def at(step: int, layer: int) -> Iterator[tuple[int, int]]:
        found = scores(step, layer)
        for target in range(layer + 1, min(layer + 1 + depth, layers)) if found is not None else ():
            best = np.argsort(-found[target], kind="stable")[:most]  # type: ignore[index]
            yield from ((target, int(e)) for e in best if found[target, e] >= least)  # type: ignore[index]

    return [[list(at(step, layer)) for layer in range(layers)] for step in range(steps)]


# --- What a real engine costs


@dataclasses.dataclass(frozen=True)
class Measured:
    """A run without prefetching. Attributes: `seconds` of a step on the average; `copy`, those of a record on the link, 0 where nothing is paced."""

    seconds: float
    copy: float


TRIES = 20
"""Halvings of an interval, and with that a relative error of a millionth."""


def fit_costs(
    fast: Measured,
    slow: Measured,
    used_SLE: Bool[np.ndarray, "S L E"],
    resident_SLE: Bool[np.ndarray, "S L E"],
    resident_seconds: float | None = None,
) -> Costs:
    """Costs with which the model gives the times of two runs without prefetching, over links of two speeds.

    Two runs tell two things: what a layer takes, and how much of that hides a transfer (the experts that are there) and how much can't (the front).
    A third one, with all experts resident in the same engine, parts the missing experts' share; without it they are taken to cost what hits do. What
    the host does is in these as well: a clock outside can't part it from what the device does.

    Args:
        fast, slow: the runs; `slow` over the slower link.
        used_SLE, resident_SLE: what they asked for, and what was there.
        resident_seconds: of a step with all experts resident in the same engine.

    Returns:
        Costs for the slow link; replace `copy` for another one. Where no share explains the slow run, the nearest one, all or nothing.

    Raises:
        ValueError: runs over links of the same speed.
    """
    if not slow.copy > fast.copy:
        raise ValueError(f"two links of {fast.copy:g} and {slow.copy:g} seconds a record tell nothing apart: give a slower one as slow")
    steps, layers = used_SLE.shape[:2]
    misses = float((used_SLE & ~resident_SLE).sum()) / steps

    def costs(share: float) -> Costs:
        """With this share of a layer hiding transfers, and the fast run's seconds."""
        total = fast.seconds
        for _ in range(8):  # towards the total from which the fast run's own stalls are taken
            plain = total if resident_seconds is None else min(total, resident_seconds)
            found = Costs(plain / layers * (1 - share), fast.copy, plain / layers * share, land=(total - plain) / max(misses, 1e-9))
            if fast.copy == 0:
                break
            total = max(0.0, total + fast.seconds - run(used_SLE, resident_SLE, found).seconds)
        return dataclasses.replace(found, copy=slow.copy)

    low, high = 0.0, 1.0
    for _ in range(TRIES):  # the more a layer hides, the shorter is the slow run
        share = (low + high) / 2
        if run(used_SLE, resident_SLE, costs(share)).seconds > slow.seconds:
            low = share
        else:
            high = share
    return costs((low + high) / 2)
