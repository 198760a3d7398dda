"""The whole placement as one integer program, for small models; of larger ones it says no more than the simple bounds do.

x[l, e, d]: item e of layer l is on device d. y[l, e, f, c, d]: e is on c and its follower f on d; y's sums are x, which is the products' convex hull
for one pair. Items are experts (ExFlow, arXiv 2401.08383) or clusters of them (MoETuner, arXiv 2502.06643).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from sharding.placement.problem import is_uniform

Objective = Literal["sum", "max"]
"""What of the traffic's cost is minimised: its sum over all links, or that of the dearest link in each step from layer to layer, added up."""

MOST = 6000
"""Variables of a program that is worth beginning."""


@dataclasses.dataclass(frozen=True, eq=False)
class Solved:
    """What HiGHS found. Attributes: `device`, None if nothing; `bound`, no placement costs less."""

    device: Int[np.ndarray, "L E"] | None
    bound: float


def cost_of(device: Int[np.ndarray, "L E"], moves: Int[np.ndarray, "L1 E E"], links: Float[np.ndarray, "n n"], objective: Objective = "sum") -> float:
    """What a placement's traffic costs; see `Objective`."""
    each = [links * flow(device, moves, layer, len(links)) for layer in range(len(moves))]
    return float(sum(cost.sum() if objective == "sum" else cost.max() for cost in each))


def flow(device: Int[np.ndarray, "L E"], moves: Int[np.ndarray, "L1 E E"], layer: int, devices: int) -> Float[np.ndarray, "n n"]:
    """Pairs that go from each device to each, from one layer to the next."""
    here, there = one_hot(device[layer], devices), one_hot(device[layer + 1], devices)
    return here.T @ moves[layer].astype(float) @ there


def one_hot(device: Int[np.ndarray, "E"], devices: int) -> Float[np.ndarray, "E n"]:
    """1 where an item is."""
    return (device[:, None] == np.arange(devices)).astype(float)


def size(moves: Int[np.ndarray, "L1 E E"], devices: int) -> int:
    """Variables that the program would have."""
    return (len(moves) + 1) * moves.shape[1] * devices + int(np.count_nonzero(moves)) * devices**2


def solve_whole(
    moves: Int[np.ndarray, "L1 E E"],
    links: Float[np.ndarray, "n n"],
    seconds: float,
    objective: Objective = "sum",
    load: Int[np.ndarray, "R L E"] | None = None,
    most: Float[np.ndarray, "R L"] | None = None,
) -> Solved:
    """The cheapest placement with equal numbers on every device.

    Args:
        moves: pairs from items of each layer to items of the next.
        links: cost of each pair's way.
        seconds: time limit.
        objective: see `Objective`.
        load, most: none of a device's loads in a layer is above its `most`; no limit if not given.
    """
    program = _Program(moves, len(links))
    for add in (program.once, program.room, program.pairs):
        add()
    cost = np.zeros(program.variables + len(moves))
    at, _ = program.y_index()
    price = moves[tuple(program.nonzero)][:, None, None] * links[None]
    if objective == "sum":
        cost[at] = price
    else:
        cost[program.variables :] = 1
        program.dearest(at, price)
    if load is not None and most is not None:
        program.limit(load, most)
    return program.run(cost, seconds, is_uniform(links))


class _Program:
    """Rows of constraints as they are gathered: x first, then y, then one z for every step."""

    def __init__(self, moves: np.ndarray, devices: int):
        self.steps, self.items, self.n = len(moves), moves.shape[1], devices
        self.nonzero = np.stack(np.nonzero(moves))
        self.x = np.arange((self.steps + 1) * self.items * devices).reshape(self.steps + 1, self.items, devices)
        self.variables = self.x.size + self.nonzero.shape[1] * devices**2
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._low: list[np.ndarray] = []
        self._high: list[np.ndarray] = []
        self._rows = 0

    def y_index(self) -> tuple[np.ndarray, np.ndarray]:
        """[pairs, n, n] of y, and the step of each pair."""
        pairs = self.nonzero.shape[1]
        return self.x.size + np.arange(pairs * self.n**2).reshape(pairs, self.n, self.n), self.nonzero[0]

    def add(self, columns: np.ndarray, values: np.ndarray, low, high) -> None:
        """Rows [m, k] of columns and their values, each between its limits."""
        m, k = columns.shape
        self._parts.append((np.repeat(self._rows + np.arange(m), k), columns.reshape(-1), np.broadcast_to(values, (m, k)).reshape(-1)))
        self._low.append(np.broadcast_to(np.asarray(low, float), (m,)))
        self._high.append(np.broadcast_to(np.asarray(high, float), (m,)))
        self._rows += m

    def once(self) -> None:
        self.add(self.x.reshape(-1, self.n), np.ones(1), 1, 1)

    def room(self) -> None:
        each = self.items // self.n
        self.add(self.x.transpose(0, 2, 1).reshape(-1, self.items), np.ones(1), each, each)

    def pairs(self) -> None:
        at, step = self.y_index()
        minus = np.append(np.ones(self.n), -1)
        for rows, x in ((at, self.x[step, self.nonzero[1]]), (at.transpose(0, 2, 1), self.x[step + 1, self.nonzero[2]])):
            self.add(np.concatenate([rows, x[..., None]], 2).reshape(-1, self.n + 1), minus, 0, 0)

    def dearest(self, at: np.ndarray, price: np.ndarray) -> None:
        step = self.nonzero[0]
        for layer in range(self.steps):
            mine = np.flatnonzero(step == layer)
            columns = at[mine].reshape(len(mine), -1).T
            z = np.full((len(columns), 1), self.variables + layer)
            self.add(np.concatenate([columns, z], 1), np.concatenate([price[mine].reshape(len(mine), -1).T, z * 0 - 1], 1), -np.inf, 0)

    def limit(self, load: np.ndarray, most: np.ndarray) -> None:
        for rows, tops in zip(load, most, strict=True):
            for layer, (row, top) in enumerate(zip(rows, tops, strict=True)):
                self.add(self.x[layer].T, row.astype(float)[None], -np.inf, top)

    def run(self, cost: np.ndarray, seconds: float, uniform: bool) -> Solved:
        rows, columns, values = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        table = coo_array((values, (rows, columns)), shape=(self._rows, len(cost))).tocsr()
        most = np.ones(len(cost))
        most[self.variables :] = np.inf
        if uniform:
            most[self.x[0, 0, 1:]] = 0  # devices have no names where all links are alike
        kinds = np.zeros(len(cost))
        kinds[: self.x.size] = 1
        limits = LinearConstraint(table, np.concatenate(self._low), np.concatenate(self._high))
        options = {"time_limit": max(seconds, 0.01), "mip_rel_gap": 0.0}
        result = milp(cost, integrality=kinds, bounds=Bounds(np.zeros(len(cost)), most), constraints=limits, options=options)
        bound = result.mip_dual_bound
        device = None if result.x is None else result.x[: self.x.size].reshape(self.x.shape).argmax(2)
        return Solved(device, max(0.0, float(bound)) if bound is not None and np.isfinite(bound) else 0.0)
