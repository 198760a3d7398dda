"""Which of the waiting requests decode together, so that a batch asks for few distinct experts: policies over the requests' predicted paths.

A path is [L, E] (or flat): what a request is expected to ask for in its next steps, as a set or as probabilities. A batch's cost is the expected size
of its union, sum of 1 - prod(1 - p), which of sets is their union's size; so one float32 formula serves both.

Every policy is `(paths [R, ...], waited [R], size, bound) -> int [size]`, requests in order of arrival, and keeps the bound: a request is passed over
in at most `bound` rounds running. R requests and batches of B need bound + 1 >= R / B, and that is enough: it holds from round to round that at most
(k + 1) B requests must run within k + 1 rounds, for every k, as long as a batch takes what must go for that and no more than R wait.

Sources: ExpertFlow (arXiv 2410.17954, token scheduler: two adjacent batches, K-means on Hamming distance), Read-ME (arXiv 2410.19123, queues by
expert). This file knows no engine and no model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

EXHAUSTIVE = 4
"""Batches of up to so many requests are split by trying every split."""

SWAPS = 16
CANDIDATES = 16
"""Most swaps that improve a split, and requests of each batch that are tried in one: all of them in batches of up to so many."""

GroupPolicy = Callable[[ArrayLike, ArrayLike, int, int | None], Int[np.ndarray, "size"]]
"""`(paths, waited, size, bound) -> requests`, see above; bound None for none."""


def top_paths(scores: ArrayLike, active: int) -> Bool[np.ndarray, "*R L E"]:
    """The `active` best experts of every layer as a set; of equals the first.

    Args:
        scores: float [..., L, E].
        active: experts that a token uses (A).
    """
    scores = np.asarray(scores)
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :active]
    out = np.zeros(scores.shape, bool)
    np.put_along_axis(out, best, True, axis=-1)
    return out


def expected_union(paths: ArrayLike) -> float:
    """Distinct experts that requests with these paths [R, ...] ask for together, expected if they are independent."""
    return float((1 - np.prod(1 - flat(paths), axis=0)).sum())


def flat(paths: ArrayLike) -> Float[np.ndarray, "R P"]:
    """Paths as float32, a row a request.

    Raises:
        ValueError: there is no axis of requests, or a value is outside [0, 1].
    """
    given = np.asarray(paths)
    if given.ndim < 2:
        raise ValueError(f"paths of shape {list(given.shape)}: give [requests, layers, experts]")
    out = given.reshape(len(given), -1).astype(np.float32, copy=False)
    if given.dtype != bool and out.size and not (0 <= out.min() and out.max() <= 1):
        raise ValueError(f"paths between {out.min()} and {out.max()}: give sets, or probabilities between 0 and 1")
    return out


# --- Waiting


def least_bound(requests: int, size: int) -> int:
    """The smallest bound that can be kept: rounds that a request is passed over when all take turns."""
    return max(0, -(-requests // size) - 1)


def check_bound(requests: int, size: int, bound: int | None) -> None:
    """Refuses a bound that can't be kept.

    Raises:
        ValueError: a batch of less than one request, or a bound below `least_bound`.
    """
    if size < 1:
        raise ValueError(f"a batch of {size} requests: give at least 1")
    if bound is not None and bound < (least := least_bound(requests, size)):
        raise ValueError(f"a waiting bound of {bound} rounds can't be kept by {requests} requests in batches of {size}: give at least {least}")


class Picks:
    """Takes a batch's requests one by one such that no bound will be broken, now or later.

    Attributes:
        room: requests that the batch still takes.
        free: bool [R], which are not in it yet.
        taken: those that are, in order.
        binding: whether the bound has a say in this batch.
    """

    def __init__(self, waited: ArrayLike, size: int, bound: int | None):
        """
        Args:
            waited: int [R], rounds since each request last ran, or came.
            size: of the batch; R where that is less.
            bound: see above.

        Raises:
            ValueError: the bound can't be kept.
        """
        waited = np.asarray(waited)
        check_bound(len(waited), size, bound)
        self.room, self.free = min(size, len(waited)), np.ones(len(waited), bool)
        self.taken: list[int] = []
        self._slack = np.zeros(0, int) if bound is None else bound - waited
        levels = 0 if bound is None else min(bound, least_bound(len(waited), size)) + 1
        counts = np.searchsorted(np.sort(self._slack), np.arange(levels), side="right")
        self._need = counts - size * np.arange(levels)  # of those with slack up to k, how many this batch has to take
        if (self._need > size).any():
            k = int(np.argmax(self._need > size))
            raise ValueError(f"{counts[k]} requests must run within {k + 1} rounds of {size} to keep the bound of {bound}: give a larger bound")
        self.binding = bool((self._need > 0).any())

    def allowed(self) -> Bool[np.ndarray, "R"]:
        """Which may be taken next: those at their bound as long as there are any, then those that leave the others enough room."""
        if not self.binding:
            return self.free
        late = self.free & (self._slack <= 0)
        if late.any():
            return late
        tight = np.flatnonzero(self._need >= self.room)
        return self.free & (self._slack <= tight[0]) if len(tight) else self.free

    def take(self, request: int) -> None:
        """Puts a request into the batch."""
        self.free[request] = False
        self.taken.append(int(request))
        self.room -= 1
        if self.binding:
            self._need[max(0, self._slack[request]) :] -= 1


def by_rank(ranking: ArrayLike, waited: ArrayLike, size: int, bound: int | None) -> Int[np.ndarray, "size"]:
    """The first `size` of a ranking [R] of all requests that keep the bound."""
    ranking, picks = np.asarray(ranking), Picks(waited, size, bound)
    if not picks.binding:
        return ranking[: picks.room]
    while picks.room:
        picks.take(ranking[np.argmax(picks.allowed()[ranking])])
    return np.asarray(picks.taken)


def oldest_first(waited: ArrayLike) -> Int[np.ndarray, "R"]:
    """Requests by how long they have waited; of equals the one that came first."""
    return np.argsort(-np.asarray(waited), kind="stable")


# --- Policies


def arrival(paths: ArrayLike, waited: ArrayLike, size: int, bound: int | None) -> Int[np.ndarray, "size"]:
    """Those that came first, who thus run to their ends, unless the bound lets others in."""
    return by_rank(np.arange(len(np.asarray(waited))), waited, size, bound)


def random(paths: ArrayLike, waited: ArrayLike, size: int, bound: int | None, rng: np.random.Generator | None = None) -> Int[np.ndarray, "size"]:
    """Any; `rng` of seed 0 anew in every call if not given."""
    rng = rng or np.random.default_rng(0)
    return by_rank(rng.permutation(len(np.asarray(waited))), waited, size, bound)


def greedy_union(
    paths: ArrayLike, waited: ArrayLike, size: int, bound: int | None, cost: Float[np.ndarray, "*P"] | None = None
) -> Int[np.ndarray, "size"]:
    """Begins with who has waited longest, then adds whose path makes the union grow least; requests at their bound come before that.

    Args:
        paths: [R, ...], sets or probabilities.
        waited: int [R], rounds since each last ran.
        size: of the batch.
        bound: rounds that a request may be passed over.
        cost: what each expert costs a batch that asks for it, of the shape of a path; 1 if not given. Less for one that is on the device already.

    Returns:
        The batch, in the order in which it was put together.

    Raises:
        ValueError: the bound can't be kept.
    """
    rows, picks, old = flat(paths), Picks(waited, size, bound), np.asarray(waited)
    open_P = np.ones(rows.shape[1], np.float32) if cost is None else np.asarray(cost, np.float32).ravel()
    if open_P.shape != rows.shape[1:]:
        raise ValueError(f"costs of {open_P.size} experts, paths of {rows.shape[1]}: give one cost an expert")
    growth = rows @ open_P
    while picks.room:
        may = picks.allowed()
        one = int(np.argmin(np.where(may, growth, np.inf)) if picks.taken else np.argmax(np.where(may, old, -1)))
        picks.take(one)
        covered = rows[one] * open_P
        new = np.flatnonzero(covered)
        growth = growth - (rows @ covered if 2 * len(new) > len(covered) else rows[:, new] @ covered[new])
        open_P = open_P - covered
    return np.asarray(picks.taken)


def by_expert(paths: ArrayLike, waited: ArrayLike, size: int, bound: int | None) -> Int[np.ndarray, "size"]:
    """Read-ME's queues by expert: the batch is filled from the longest queue, then from the next.

    Read-ME has one set of experts for all layers, and a request stands in the queue of its expert. Here every layer votes: a request stands in one
    queue a layer, that of the expert it wants most above the average of who waits (an expert that all want tells none apart). Of all queues of all
    layers the longest is emptied first, the longest-waiting of it before others; then the queues are counted anew without those taken.

    Args, returns and errors: see `greedy_union`. Paths have to be [R, L, E].
    """
    given, old, picks = np.asarray(paths), np.asarray(waited), Picks(waited, size, bound)
    if given.ndim != 3:
        raise ValueError(f"paths of shape {list(given.shape)}: queues by expert need [requests, layers, experts]")
    key = np.argmax(given - given.mean(0, dtype=np.float32), axis=2) + given.shape[2] * np.arange(given.shape[1])
    member = np.zeros(len(given), bool)
    while picks.room:
        may = picks.allowed()
        if not (may & member).any():
            queue = np.argmax(np.bincount(key[may].ravel(), minlength=1))
            member = (key == queue).any(1)
        picks.take(int(np.argmax(np.where(may & member, old, -1))))
    return np.asarray(picks.taken)


def pairs(paths: ArrayLike, waited: ArrayLike, size: int, bound: int | None) -> Int[np.ndarray, "size"]:
    """ExpertFlow's token scheduler: the two batches that have waited longest are split anew, and the one with the oldest request goes first."""
    old = oldest_first(waited)
    if len(old) < 2 * size:
        return greedy_union(paths, waited, size, bound)
    first, second = (old[: 2 * size][part] for part in two_batches(np.asarray(paths)[old[: 2 * size]], size))
    front, back = (first, second) if old[0] in first else (second, first)
    return by_rank(np.concatenate([front, back, old[2 * size :]]), waited, size, bound)


POLICIES: dict[str, GroupPolicy] = {
    "arrival": arrival, "random": random, "pairs": pairs, "greedy": greedy_union, "by_expert": by_expert,
}  # fmt: skip
"""By name; what a user can ask for."""


def find_group_policy(name: str) -> GroupPolicy:
    """A policy by name.

    Raises:
        ValueError: there is none.
    """
    if name not in POLICIES:
        raise ValueError(f"there is no grouping {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name]


def choose(
    policy: str, paths: ArrayLike, waited: ArrayLike, size: int, bound: int | None, held: Bool[np.ndarray, "L E"] | None = None,
    held_cost: float = 1.0,
) -> Int[np.ndarray, "size"]:  # fmt: skip
    """A batch by the name of a policy.

    Args:
        policy: of `POLICIES`.
        paths, waited, size, bound: see `greedy_union`.
        held: experts that are on the device; None where it does not matter.
        held_cost: what such a one counts for, of one that is not; 'greedy' alone heeds it. 1 looks for few distinct experts; less for few loads,
            which is the same where little fits on the device.
    """
    if policy == "greedy" and held is not None and held_cost < 1:
        return greedy_union(paths, waited, size, bound, np.where(held, np.float32(held_cost), np.float32(1)))
    return find_group_policy(policy)(paths, waited, size, bound)


# --- Two batches


def two_batches(paths: ArrayLike, size: int) -> tuple[Int[np.ndarray, "size"], Int[np.ndarray, "size"]]:
    """Splits two batches' requests into two that together ask for few distinct experts: R1 + R2, in ExpertFlow's words.

    Up to `EXHAUSTIVE` requests a batch every split is tried. Else the better of two local optima under swaps of two requests: from the halves as they
    came, so that the result is never worse than those, and from balanced 2-means, whose first centres are the farthest of all from the mean and the
    farthest from it. For balanced groups Hamming's and Euclid's distance rank alike. ExpertFlow names K-means and gives neither balance nor start.

    Args:
        paths: [2 size, ...], sets or probabilities.
        size: of each batch (T).

    Returns:
        The requests of each, ascending; request 0 is in the first.

    Raises:
        ValueError: the number of requests is not twice the size.
    """
    rows = flat(paths)
    if len(rows) != 2 * size or size < 1:
        raise ValueError(f"{len(rows)} requests are not two batches of {size}: give {2 * max(size, 1)}")
    away = 1 - rows.astype(np.float64)  # in float32 products of many become denormal, which processors are slow at
    if size <= EXHAUSTIVE:
        return _best_split(away, size)
    found = [_swapped(away, first) for first in (np.arange(2 * size) < size, _two_means(rows, size))]
    first = min(found, key=functools.partial(_cost, away))
    first = first if first[0] else ~first
    return np.flatnonzero(first), np.flatnonzero(~first)


def _cost(away: np.ndarray, first: np.ndarray) -> float:
    """What both batches ask for, of 1 - paths and who is in the first; lower by what no batch asks for."""
    return -float(away[first].prod(0).sum() + away[~first].prod(0).sum())


def _best_split(away: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    rest = range(1, 2 * size)
    firsts = np.array([(0, *others) for others in itertools.combinations(rest, size - 1)])
    seconds = np.array([[i for i in rest if i not in first] for first in firsts])
    spared = away[firsts].prod(1).sum(1) + away[seconds].prod(1).sum(1)
    best = int(np.argmax(spared))
    return firsts[best], seconds[best]


def _two_means(rows: np.ndarray, size: int) -> np.ndarray:
    """Balanced: the `size` requests that are nearer to the first centre than to the second by most; bool [R]."""
    one = rows[np.argmax(((rows - rows.mean(0)) ** 2).sum(1))]
    towards = one - rows[np.argmax(((rows - one) ** 2).sum(1))]
    before = np.zeros(len(rows), bool)
    for _ in range(16):
        first = np.zeros(len(rows), bool)
        first[np.argsort(-(rows @ towards), kind="stable")[:size]] = True
        if (first == before).all():
            break
        before, towards = first, rows[first].mean(0) - rows[~first].mean(0)
    return first


def _swapped(away: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The best swap of two requests as long as it gains, `SWAPS` at most, among the `CANDIDATES` of each batch that gain most by moving alone."""
    first = first.copy()
    for _ in range(SWAPS):
        one, two = np.flatnonzero(first), np.flatnonzero(~first)
        all_one, all_two = away[one].prod(0), away[two].prod(0)
        rest_one, rest_two = _without(away[one]), _without(away[two])
        i = _most(rest_one.sum(1) + away[one] @ all_two)
        j = _most(rest_two.sum(1) + away[two] @ all_one)
        spared = rest_one[i] @ away[two[j]].T + (rest_two[j] @ away[one[i]].T).T
        now = float(all_one.sum() + all_two.sum())
        m, n = np.unravel_index(np.argmax(spared), spared.shape)
        if spared[m, n] <= now + 1e-4 * max(1.0, now):
            break
        first[one[i[m]]], first[two[j[n]]] = False, True
    return first


def _most(gains: np.ndarray) -> np.ndarray:
    return np.sort(np.argsort(-gains, kind="stable")[:CANDIDATES])


def _without(away: np.ndarray) -> np.ndarray:
    """Products over all rows but one, for each; [T, P]."""
    ones = np.ones((1, away.shape[1]), away.dtype)
    before = np.concatenate([ones, np.cumprod(away[:-1], axis=0)])
    after = np.concatenate([np.cumprod(away[:0:-1], axis=0)[::-1], ones])
    return before * after
