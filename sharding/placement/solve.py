"""Placements by name: `solve` makes one and says how near the best it is, `plan` also judges it beside the experts as they stand."""

from __future__ import annotations

import dataclasses
import time
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from sharding.placement import affinity, traffic
from sharding.placement.assignment import Placement, placement_of
from sharding.placement.balance import Packed, pack_layers
from sharding.placement.exact import Objective
from sharding.placement.judge import baselines, judge, judge_devices
from sharding.placement.problem import SPANS, Problem, loads, problem_of
from sharding.placement.replicas import Replicas, replicate

Method = Literal["moetuner", "exflow", "combined"]
PLACES = get_args(Method)
METHODS = (*PLACES, "eplb")

SLACK = 0.05
"""Of the combined method: a device's load in a layer over the layer's mean, as a share of it, on the tokens that it is fitted to."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One program of a method.

    Attributes:
        name: what it minimises.
        value: what was reached.
        bound: no placement reaches less.
        seconds: it took.
    """

    name: str
    value: float
    bound: float
    seconds: float

    @property
    def gap(self) -> float:
        """The share of the value that a better placement could save at most."""
        return max(0.0, (self.value - self.bound) / self.value) if self.value > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Report:
    """How a placement was made. Attributes: `method`; `stages`, its programs in order."""

    method: str
    stages: tuple[Stage, ...]

    @property
    def seconds(self) -> float:
        """All programs took."""
        return sum(stage.seconds for stage in self.stages)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What `plan` made. Attributes: `made`; `report`; `judged`, by the name of a placement, what `judge` says of it."""

    made: Placement | Replicas
    report: Report
    judged: dict[str, dict[str, float]]


def solve(
    ids: Int[np.ndarray, "T L A"],
    experts: int,
    devices: int,
    method: Method,
    seconds: float = 10.0,
    seed: int = 0,
    slack: float = SLACK,
    spans: int = SPANS,
    links: Float[np.ndarray, "n n"] | None = None,
    objective: Objective = "sum",
) -> tuple[Placement, Report]:
    """A placement for the routing of a trace.

    Args:
        ids: experts that each token asked for; -1 is none.
        experts: E.
        devices: n.
        method: 'moetuner': loads as even as can be, then the cheapest traffic of such groups. 'exflow': the fewest hops between layers, whatever the
            loads. 'combined': the fewest hops with loads that are even, and as even in every span of the trace as those of packing.
        seconds: time limit of all programs together; what has been found then is kept. Searches that end before it depend on the seed alone.
        seed: of searches.
        slack: of 'combined': no device's load in a layer is above (1 + slack) times the mean.
        spans: of 'combined': into so many the trace is cut.
        links: cost of each pair's way (`node_links`); 1 between any two if not given.
        objective: of 'moetuner', see `traffic.assign`.

    Raises:
        ValueError: a method that isn't known, ids outside the experts, times or slacks below 0.
        SplitError: the experts don't divide among the devices.
    """
    if method not in PLACES:
        raise ValueError(f"method = {method!r}: choose from {', '.join(PLACES)}")
    if not seconds >= 0:
        raise ValueError(f"seconds = {seconds}: a time limit is at least 0")
    problem = problem_of(ids, experts, devices, links, spans)
    stages: list[Stage] = []
    if method == "moetuner":
        device = _moetuner(problem, seconds, seed, objective, stages)
    else:
        packed = _packed(problem, seconds / 2, stages) if method == "combined" else None
        began = time.perf_counter()
        left = seconds - sum(stage.seconds for stage in stages)
        found = affinity.place(problem, left, slack if method == "combined" else None, seed, packed=packed)
        stages.append(Stage("cost of hops", found.value, found.bound, time.perf_counter() - began))
        device = found.device
    return placement_of(device, devices), Report(method, tuple(stages))


def _packed(problem: Problem, seconds: float, stages: list[Stage]) -> list[Packed]:
    began = time.perf_counter()
    packed = pack_layers(problem.load, problem.devices, seconds)
    value, bound = (sum(getattr(found, name) for found in packed) for name in ("value", "bound"))
    stages.append(Stage("fullest devices' loads", value, bound, time.perf_counter() - began))
    return packed


def _moetuner(problem: Problem, seconds: float, seed: int, objective: Objective, stages: list[Stage]) -> np.ndarray:
    group = np.stack([found.group for found in _packed(problem, seconds / 2, stages)])
    began = time.perf_counter()
    moves = traffic.cluster_moves(problem.transitions, group, problem.devices)
    found = traffic.assign(moves, problem.links, objective, seconds - stages[0].seconds, seed)
    stages.append(Stage("cost of the groups' traffic", found.value, found.bound, time.perf_counter() - began))
    return np.take_along_axis(found.device, group, 1)


def solve_replicas(ids: Int[np.ndarray, "T L A"], experts: int, devices: int, extra: int) -> tuple[Replicas, Report]:
    """Copies of hot experts for the routing of a trace; see `replicate`. No load can be more even than the mean."""
    began = time.perf_counter()
    load = loads(ids, experts)
    made = replicate(load, devices, extra)
    fullest = made.device_loads(load).max(1).sum()
    stage = Stage("fullest devices' loads", float(fullest), float(load.sum() / devices), time.perf_counter() - began)
    return made, Report("eplb", (stage,))


def plan(
    ids: Int[np.ndarray, "T L A"],
    experts: int,
    devices: int,
    method: str,
    seconds: float = 10.0,
    extra: int | None = None,
    judged: Int[np.ndarray, "T L A"] | None = None,
    **options,
) -> Plan:
    """A placement, judged beside experts as they stand and random ones.

    Args:
        ids, experts, devices, method, seconds: see `solve`; the method may be 'eplb' as well.
        extra: slots a layer for copies, of 'eplb'; one a device if not given.
        judged: the tokens that it is judged on; those it was made from if not given.
        options: of `solve`.
    """
    on = ids if judged is None else judged
    made: Placement | Replicas
    if method == "eplb":
        made, report = solve_replicas(ids, experts, devices, (devices if devices > 1 else 0) if extra is None else extra)
        found = judge_devices(made.devices_of(on), devices)
    elif extra:
        raise ValueError(f"extra = {extra}: only the method 'eplb' makes copies, not {method!r}")
    else:
        made, report = solve(ids, experts, devices, method, seconds, **options)  # type: ignore[arg-type]
        found = judge(made, on)
    return Plan(made, report, baselines(on, experts, devices) | {method: found})
