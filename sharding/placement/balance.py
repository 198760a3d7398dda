"""MoETuner's first program: a layer's experts in groups of equal number whose largest load is smallest (arXiv 2502.06643).

Longest-first packing and swaps give a result at once; a simple bound often proves it best; where it doesn't, HiGHS looks for a better one, or proves
that there is none, within a time limit. Knows loads, neither experts' weights nor devices.
"""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

WORTH = 0.05
"""Seconds below which a program isn't begun."""


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Groups of one layer. Attributes: `group`, of each item; `value`, the largest group's load; `bound`, no packing's largest load is below it."""

    group: Int[np.ndarray, "E"]
    value: float
    bound: float


def pack_layers(load: Float[np.ndarray, "L E"], groups: int, seconds: float = 0.0) -> list[Packed]:
    """Every layer's groups; what time one layer leaves goes to those after it."""
    end, out = time.perf_counter() + seconds, []
    started = [quick_pack(row, groups) for row in load]
    open_ = sum(found.value > found.bound for found in started)
    for row, found in zip(load, started, strict=True):
        if found.value > found.bound:
            share = (end - time.perf_counter()) / open_
            open_ -= 1
            found = improve(row, groups, found, share) if share > WORTH else found
        out.append(found)
    return out


def pack(load: Float[np.ndarray, "E"], groups: int, seconds: float = 0.0) -> Packed:
    """Groups of equal number, the largest load smallest.

    Args:
        load: of each item, not negative; E divides by `groups`.
        groups: how many.
        seconds: for HiGHS; with 0, packing and swaps alone.
    """
    return pack_layers(load[None], groups, seconds)[0]


def quick_pack(load: Float[np.ndarray, "E"], groups: int) -> Packed:
    """Longest-first packing, then swaps with the fullest group."""
    group = _swaps(load, lpt(load, groups), groups)
    return Packed(group, _fullest(load, group, groups), packing_bound(load, groups))


def lpt(load: Float[np.ndarray, "E"], groups: int) -> Int[np.ndarray, "E"]:
    """Each item, the heaviest first, to the lightest group that has room (of those the first)."""
    room, total = np.full(groups, len(load) // groups), np.zeros(groups)
    group = np.zeros(len(load), np.int64)
    for item in np.argsort(-load, kind="stable"):
        to = int(np.argmin(np.where(room > 0, total, np.inf)))
        group[item], total[to], room[to] = to, total[to] + load[item], room[to] - 1
    return group


def _swaps(load: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    group, total = group.copy(), np.bincount(group, load, groups)
    while True:
        full = int(total.argmax())
        mine, others = np.flatnonzero(group == full), np.flatnonzero(group != full)
        if not len(others):
            return group
        moved = load[mine][:, None] - load[others][None]
        then = np.where(moved > 0, np.maximum(total[full] - moved, total[group[others]] + moved), np.inf)
        at = np.unravel_index(np.argmin(then), then.shape)
        # By more than rounding: of loads that are fractions, two groups could swap forever.
        if then[at] >= total[full] * (1 - 1e-12):
            return group
        e, f = mine[at[0]], others[at[1]]
        group[e], group[f] = group[f], full
        total = np.bincount(group, load, groups)


def _fullest(load: np.ndarray, group: np.ndarray, groups: int) -> float:
    return float(np.bincount(group, load, groups).max())


def packing_bound(load: Float[np.ndarray, "E"], groups: int) -> float:
    """No packing's largest load is below this.

    The mean is one bound. Another: of the k * groups + 1 heaviest items some group holds k + 1, which weigh at least what the lightest of them do,
    and its other items at least what the lightest of all do.
    """
    room, down = len(load) // groups, np.sort(load)[::-1]
    mean = float(load.sum()) / groups
    best = float(math.ceil(mean - 1e-9)) if np.issubdtype(load.dtype, np.integer) else mean
    for k in range(room if groups > 1 else 0):
        last = k * groups
        best = max(best, float(down[last - k : last + 1].sum() + down[len(down) - (room - k - 1) :].sum()))
    return best


def improve(load: Float[np.ndarray, "E"], groups: int, found: Packed, seconds: float) -> Packed:
    """Looks for groups with a smaller largest load than those found, and raises the bound."""
    whole = np.issubdtype(load.dtype, np.integer)
    below = found.value - (1 if whole else 1e-9 * max(found.value, 1.0))
    if below < found.bound:
        return dataclasses.replace(found, bound=found.value)
    result = _program(load, groups, found.bound, below, seconds)
    if result.status == 2:  # infeasible: nothing is better
        return dataclasses.replace(found, bound=found.value)
    bound = found.bound
    if result.mip_dual_bound is not None and np.isfinite(result.mip_dual_bound):
        proven = float(result.mip_dual_bound)
        # Below `found.value` the program's own bound holds; it never looked above.
        bound = min(max(bound, math.ceil(proven - 1e-6) if whole else proven), found.value)
    if result.x is None:
        return dataclasses.replace(found, bound=bound)
    group = result.x[: len(load) * groups].reshape(len(load), groups).argmax(1)
    value = _fullest(load, group, groups)
    return Packed(group, value, min(bound, value)) if value < found.value else dataclasses.replace(found, bound=bound)


def _program(load: np.ndarray, groups: int, low: float, high: float, seconds: float):
    """Minimise z with x[e, g] in {0, 1}: one group an item, equal numbers, loads at most z, low <= z <= high."""
    E, cells = len(load), len(load) * groups
    item, group = np.divmod(np.arange(cells), groups)
    zeros, ones = np.zeros(groups), np.ones(cells)
    rows = np.concatenate([item, E + group, E + groups + group, E + groups + np.arange(groups)])
    columns = np.concatenate([np.tile(np.arange(cells), 3), np.full(groups, cells)])
    values = np.concatenate([ones, ones, load[item], zeros - 1])
    table = coo_array((values, (rows, columns)), shape=(E + 2 * groups, cells + 1)).tocsr()
    room = np.full(groups, E // groups)
    lower = np.concatenate([np.ones(E), room, np.full(groups, -np.inf)])
    upper = np.concatenate([np.ones(E), room, zeros])
    least, most = np.zeros(cells + 1), np.ones(cells + 1)
    heaviest = int(load.argmax())
    most[heaviest * groups + 1 : (heaviest + 1) * groups] = 0  # groups have no names: the heaviest item is in the first
    least[-1], most[-1] = low, high
    cost = np.zeros(cells + 1)
    cost[-1] = 1
    kinds = np.append(np.ones(cells), 0)
    options = {"time_limit": seconds, "mip_rel_gap": 0.0}
    return milp(cost, integrality=kinds, bounds=Bounds(least, most), constraints=LinearConstraint(table, lower, upper), options=options)
