"""MoETuner's second program: which device each layer's clusters go to, so that tokens' ways from layer to layer cost least (arXiv 2502.06643).

Where all links cost the same, what a layer's best assignment saves doesn't depend on how the layers before are named: a chain of assignment problems,
each solved exactly, is the optimum of the whole. Otherwise layers are assigned in turn, each exactly for its neighbours as they are, from several
starts.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from sharding.placement import exact
from sharding.placement.exact import Objective, cost_of
from sharding.placement.problem import is_uniform

ROUNDS = 50
"""Most passes over the layers from one start."""


@dataclasses.dataclass(frozen=True, eq=False)
class Assigned:
    """Devices of clusters. Attributes: `device`, of each layer's clusters; `value`, their traffic's cost; `bound`, no assignment costs less."""

    device: Int[np.ndarray, "L n"]
    value: float
    bound: float


def cluster_moves(moves: Int[np.ndarray, "L1 E E"], group: Int[np.ndarray, "L E"], groups: int) -> Int[np.ndarray, "L1 n n"]:
    """Pairs from cluster to cluster."""
    out = [exact.flow(group, moves, layer, groups) for layer in range(len(moves))]
    return np.rint(np.asarray(out).reshape(len(moves), groups, groups)).astype(np.int64)


def assign(
    moves: Int[np.ndarray, "L1 n n"],
    links: Float[np.ndarray, "n n"],
    objective: Objective = "sum",
    seconds: float = 1.0,
    seed: int = 0,
    starts: int = 8,
) -> Assigned:
    """One cluster a device in every layer, the traffic's cost smallest.

    Args:
        moves: of `cluster_moves`.
        links: cost of each pair's way.
        objective: 'sum' over all links, or 'max' (see `Objective`). MoETuner minimises the largest link's; here of each step, as layers run in turn.
        seconds: time limit.
        seed, starts: of the searches from random assignments, where no exact way is known.
    """
    end, n = time.perf_counter() + seconds, len(links)
    device, bound = _chain(moves, links), bound_of(moves, links, objective)
    value = cost_of(device, moves, links, objective)
    if objective == "sum" and is_uniform(links):
        return Assigned(device, value, value)
    rng = np.random.default_rng(seed)
    for start in range(starts):
        if value <= bound or (start and time.perf_counter() > end):
            break
        first = device if start == 0 else np.stack([rng.permutation(n) for _ in range(len(moves) + 1)])
        found = _descend(first, moves, links, objective, end)
        cost = cost_of(found, moves, links, objective)
        if cost < value:
            device, value = found, cost
    left = end - time.perf_counter()
    if value > bound and left > 0.05 and exact.size(moves, n) <= exact.MOST:
        solved = exact.solve_whole(moves, links, left, objective)
        cost = value if solved.device is None else cost_of(solved.device, moves, links, objective)
        if solved.device is not None and cost < value:
            device, value = solved.device, cost
        bound = max(bound, solved.bound)
    return Assigned(device, value, min(bound, value))


def _chain(moves: np.ndarray, links: np.ndarray) -> np.ndarray:
    """Each layer the best for the one before it."""
    n = len(links)
    device = [np.arange(n)]
    for step in moves:
        back = step.T.astype(float) @ links[device[-1]]  # cost of a cluster of the next layer at each device
        device.append(_match(back))
    return np.stack(device)


def _match(cost: np.ndarray) -> np.ndarray:
    cluster, device = linear_sum_assignment(cost)
    return device[np.argsort(cluster)]


def _descend(device: np.ndarray, moves: np.ndarray, links: np.ndarray, objective: Objective, end: float) -> np.ndarray:
    """Layer by layer to a better one for its neighbours, until no layer changes."""
    device = device.copy()
    for _ in range(ROUNDS):
        before = cost_of(device, moves, links, objective)
        for layer in range(len(device)):
            device[layer] = _best_layer(device, moves, links, layer) if objective == "sum" else _swap_layer(device, moves, links, layer)
        if cost_of(device, moves, links, objective) >= before * (1 - 1e-12) or time.perf_counter() > end:
            break
    return device


def _best_layer(device: np.ndarray, moves: np.ndarray, links: np.ndarray, layer: int) -> np.ndarray:
    cost = np.zeros((len(links), len(links)))
    if layer > 0:
        cost += moves[layer - 1].T.astype(float) @ links[device[layer - 1]]
    if layer < len(moves):
        cost += moves[layer].astype(float) @ links[device[layer + 1]]
    return _match(cost)


def _swap_layer(device: np.ndarray, moves: np.ndarray, links: np.ndarray, layer: int) -> np.ndarray:
    """The layer after the best swap of two clusters, or as it is."""
    low, high = max(layer - 1, 0), min(layer + 1, len(moves))
    part, steps, at = device[low : high + 1].copy(), moves[low:high], layer - low
    best, kept = cost_of(part, steps, links, "max"), part[at].copy()
    for a in range(len(links)):
        for b in range(a):
            part[at] = device[layer]
            part[at, [a, b]] = part[at, [b, a]]
            cost = cost_of(part, steps, links, "max")
            if cost < best:
                best, kept = cost, part[at].copy()
    return kept


def bound_of(moves: Int[np.ndarray, "L1 n n"], links: Float[np.ndarray, "n n"], objective: Objective = "sum") -> float:
    """No assignment costs less: each step by itself, at the dearest of three bounds.

    One: every cluster keeps what it can on its own device, and the rest takes the cheapest link. Two and three (Gilmore 1962, Lawler 1963): were a
    cluster on a device, its largest flow would stay and the next ones take the cheapest links; the best assignment of such costs, by rows and by
    columns.
    """
    return float(sum(_step_bound(step.astype(float), links, objective) for step in moves))


def _step_bound(step: np.ndarray, links: np.ndarray, objective: Objective) -> float:
    n = len(links)
    if n == 1:
        return 0.0
    cheapest = links[~np.eye(n, dtype=bool)].min()
    kept = step[linear_sum_assignment(-step)].sum()
    sides = []
    for flows in (step, step.T):
        cost = np.sort(flows, 1)[:, ::-1] @ np.sort(links, 1).T
        sides.append(cost[linear_sum_assignment(cost)].sum())
    total = max(cheapest * (step.sum() - kept), *sides)
    return float(total) if objective == "sum" else float(total) / (n * (n - 1))
