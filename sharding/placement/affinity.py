"""ExFlow's program: experts that follow each other on one device (arXiv 2401.08383), here also with a limit on every device's load.

A search places all layers: each in turn takes its best for its neighbours as they are, by an exact assignment where only numbers are limited and by
swaps where loads are too; from several starts. Bounds come from each step by itself; of small models HiGHS solves the whole. Knows counts only.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from sharding.placement import exact, traffic
from sharding.placement.balance import Packed, pack_layers
from sharding.placement.exact import cost_of, one_hot
from sharding.placement.problem import Problem

ROUNDS = 40
"""Most passes over the layers from one start."""


@dataclasses.dataclass(frozen=True, eq=False)
class Placed:
    """Where experts are. Attributes: `device`, of each layer's experts; `value`, the hops' cost; `bound`, none within the limits costs less."""

    device: Int[np.ndarray, "L E"]
    value: float
    bound: float


@dataclasses.dataclass(frozen=True, eq=False)
class Limits:
    """Loads that may not be above something on any device. Attributes: `load` of experts, of the whole trace and of each span; `most` of each."""

    load: Int[np.ndarray, "R L E"]
    most: Float[np.ndarray, "R L"]


def place(
    problem: Problem,
    seconds: float = 10.0,
    slack: float | None = None,
    seed: int = 0,
    starts: int = 4,
    packed: list[Packed] | None = None,
) -> Placed:
    """The placement of equal numbers whose hops cost least.

    Args:
        problem: what is to be placed.
        seconds: time limit; within it the result depends on the seed alone. One pass from one start is made at least.
        slack: how even loads are to be (`limits_of`); None if they don't matter.
        seed, starts: of the search.
        packed: balanced groups of every layer; packed here if not given.
    """
    end, rng = time.perf_counter() + seconds, np.random.default_rng(seed)
    packed = pack_layers(problem.load, problem.devices) if packed is None else packed
    limits = None if slack is None else limits_of(problem, slack, packed)
    best, value = None, np.inf
    bound = bound_of(problem, limits)
    for device in _starts(problem, packed, limits, rng, starts):
        if best is not None and (time.perf_counter() > end or value <= bound):
            break
        device = _search(problem, device, limits, end)
        cost = cost_of(device, problem.transitions, problem.links)
        if cost < value:
            best, value = device, cost
    assert best is not None, "there is at least one start"
    left = end - time.perf_counter()
    if value > bound and left > 0.05 and exact.size(problem.transitions, problem.devices) <= exact.MOST:
        load, most = (None, None) if limits is None else (limits.load, limits.most)
        solved = exact.solve_whole(problem.transitions, problem.links, left, load=load, most=most)
        if solved.device is not None and (cost := cost_of(solved.device, problem.transitions, problem.links)) < value:
            best, value = solved.device, cost
        bound = max(bound, solved.bound)
    return Placed(best, value, min(bound, value))


def limits_of(problem: Problem, slack: float, packed: list[Packed]) -> Limits:
    """What devices' loads in each layer may be: (1 + slack) times the mean, or what packing gives where that is more; in a span, what packing gives.

    Raises:
        ValueError: a negative slack.
    """
    if not slack >= 0:
        raise ValueError(f"slack = {slack}: a share of the mean load that devices may be above it, at least 0")
    load = np.concatenate([problem.load[None], problem.spans])
    most = np.array([[np.bincount(found.group, row, problem.devices).max() for found, row in zip(packed, rows, strict=True)] for rows in load])
    most[0] = np.maximum(most[0], (1 + slack) * problem.load.sum(1) / problem.devices)
    return Limits(load, most)


def _starts(problem: Problem, packed: list[Packed], limits: Limits | None, rng: np.random.Generator, count: int) -> Iterator[np.ndarray]:
    """Packed groups; then what follows affinity from the first layer on, and random ones; within limits, packed groups with random names."""
    groups = np.stack([found.group for found in packed])
    yield relabel(problem, groups)
    if limits is None and count > 1:
        device = [groups[0]]
        for step in problem.transitions:
            device.append(_assign(step.T.astype(float) @ one_hot(device[-1], problem.devices) @ problem.links))
        yield np.stack(device)
    even = np.repeat(np.arange(problem.devices), problem.room)
    for _ in range(count - (1 if limits is not None else 2)):
        if limits is None:
            yield np.stack([rng.permutation(even) for _ in range(problem.layers)])
        else:
            yield np.stack([rng.permutation(problem.devices)[row] for row in groups])


def relabel(problem: Problem, group: Int[np.ndarray, "L E"], seconds: float = 0.0) -> Int[np.ndarray, "L E"]:
    """Groups as devices, named so that hops cost little."""
    found = traffic.assign(traffic.cluster_moves(problem.transitions, group, problem.devices), problem.links, seconds=seconds)
    return np.take_along_axis(found.device, group, 1)


# --- The search


def _search(problem: Problem, device: np.ndarray, limits: Limits | None, end: float) -> np.ndarray:
    """Layers in turn, forwards and backwards, until none changes."""
    device, value = device.copy(), np.inf
    order = list(range(problem.layers))
    for turn in range(ROUNDS):
        for layer in order:
            if turn and time.perf_counter() > end:
                return device
            cost = hop_costs(problem, device, layer)
            if limits is None:
                device[layer] = _assign(cost)
            else:
                device[layer] = swap_within(cost, limits.load[:, layer], device[layer], limits.most[:, layer])
        device = relabel(problem, device)
        found = cost_of(device, problem.transitions, problem.links)
        if found >= value * (1 - 1e-12):
            break
        value = found
        order.reverse()
    return device


def hop_costs(problem: Problem, device: Int[np.ndarray, "L E"], layer: int) -> Float[np.ndarray, "E n"]:
    """What the hops to and from each expert of a layer cost at each device, its neighbours being where they are."""
    cost = np.zeros((problem.experts, problem.devices))
    if layer > 0:
        cost += problem.transitions[layer - 1].T.astype(float) @ one_hot(device[layer - 1], problem.devices) @ problem.links
    if layer + 1 < problem.layers:
        cost += problem.transitions[layer].astype(float) @ one_hot(device[layer + 1], problem.devices) @ problem.links
    return cost


def _assign(cost: Float[np.ndarray, "E n"]) -> Int[np.ndarray, "E"]:
    """Equal numbers at the least cost: each device is as many columns as it has room."""
    room = len(cost) // cost.shape[1]
    expert, column = linear_sum_assignment(np.repeat(cost, room, 1))
    return column[np.argsort(expert)] // room


def swap_within(
    cost: Float[np.ndarray, "E n"], load: Int[np.ndarray, "R E"], device: Int[np.ndarray, "E"], most: Float[np.ndarray, "R"]
) -> Int[np.ndarray, "E"]:
    """The best swap of two experts, again and again, while one saves cost and none of the loads rises above its limit."""
    device, n = device.copy(), cost.shape[1]
    total = np.stack([np.bincount(device, row, n) for row in load])
    expert, later = np.arange(len(device)), np.triu(np.ones((len(device), len(device)), bool), 1)
    while True:
        here, there = cost[expert, device], cost[:, device]
        saved = here[:, None] + here[None] - there - there.T
        e, f = np.nonzero((saved > 1e-9 * max(1.0, float(here.sum()))) & later)
        more = load[:, f] - load[:, e]
        fits = ((total[:, device[e]] + more <= most[:, None]) & (total[:, device[f]] - more <= most[:, None])).all(0)
        if not fits.any():
            return device
        at = int(np.argmax(np.where(fits, saved[e, f], 0.0)))
        total[:, device[e[at]]] += more[:, at]
        total[:, device[f[at]]] -= more[:, at]
        device[e[at]], device[f[at]] = device[f[at]], device[e[at]]


# --- Bounds


def bound_of(problem: Problem, limits: Limits | None = None) -> float:
    """No placement's hops cost less: all pairs but those that one device could hold, at the cheapest link, step by step."""
    n = problem.devices
    if n == 1:
        return 0.0
    cheapest = problem.links[~np.eye(n, dtype=bool)].min()
    away = 0.0
    for layer, step in enumerate(problem.transitions):
        kept = kept_by_spectrum(step, n)
        for flows, to in ((step, layer + 1), (step.T, layer)):
            within = () if limits is None else zip(limits.load[:, to], limits.most[:, to], strict=True)
            kept = min(kept, kept_by_row(flows, problem.room, within))
        away += max(float(step.sum()) - kept, 0.0)
    return float(cheapest) * away


def kept_by_row(step: Int[np.ndarray, "E E"], room: int, limits: Iterable[tuple[Int[np.ndarray, "E"], float]] = ()) -> float:
    """No placement keeps more pairs on one device: were each expert alone with the followers that it likes best.

    Of each the least of several: `room` followers, whatever their loads; and for each load and its limit, followers up to that limit, whatever their
    number, the last in part.
    """
    best = np.sort(step, 1)[:, len(step) - room :].sum(1).astype(float)
    for load, most in limits:
        worth = np.divide(step, load[None], out=np.full(step.shape, np.inf), where=load[None] > 0)
        order = np.argsort(-worth, 1, kind="stable")
        flows, weights = np.take_along_axis(step, order, 1), load[order].astype(float)
        before = np.cumsum(weights, 1) - weights
        best = np.minimum(best, (flows * np.clip((most - before) / np.maximum(weights, 1), 0, 1)).sum(1))
    return float(best.sum())


def kept_by_spectrum(step: Int[np.ndarray, "E E"], devices: int) -> float:
    """No placement of equal numbers keeps more pairs on one device, by the step's singular values.

    With U and V the devices' orthonormal indicator vectors in the two layers, the kept pairs are (E / n) tr(U' M V). The all-ones vector lies in both
    spans, and gives sum(M) / n; of what is left, the trace is at most the sum of the n - 1 largest singular values of M centred by rows and columns
    (von Neumann's trace inequality).
    """
    centred = step - step.mean(0, keepdims=True) - step.mean(1, keepdims=True) + step.mean()
    top = np.linalg.svd(centred, compute_uv=False)[: devices - 1]
    most = float(step.sum()) / devices + len(step) // devices * float(top.sum())
    return most * (1 + 1e-9)  # rounding of the singular values
