"""Intervals by the bootstrap, for shares that are sums over units: prompts, groups of prompts, or the steps of one run, which come in blocks."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

DRAWS = 1000
LEVEL = 0.95
BLOCK = 16
"""Steps that are drawn together: routing of neighbouring tokens is alike, so single steps would promise too much."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A share with its `LEVEL` limits."""

    value: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        """Whether the interval is on one side of zero."""
        return self.low > 0 or self.high < 0


def resample(units: int, seed: int = 0, block: int = 1, draws: int = DRAWS) -> Int[np.ndarray, "D N"]:
    """How often each unit is in each draw.

    Args:
        units: to draw from, in order.
        seed: of the draws.
        block: neighbours that are drawn together, the last and the first being neighbours too (the circular block bootstrap of Politis and Romano,
            1992); 1 for units that are independent. More than there are units count as all.
        draws: how many.

    Raises:
        ValueError: no units, or a block of none.
    """
    if units < 1 or block < 1:
        raise ValueError(f"{units} units in blocks of {block}: there must be some of both")
    size = min(block, units)
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, units, (draws, -(-units // size)))
    places = (starts[:, :, None] + np.arange(size)).reshape(draws, -1)[:, :units] % units
    counts = np.zeros((draws, units), np.int64)
    np.add.at(counts, (np.arange(draws)[:, None], places), 1)
    return counts


def limits(value: float, drawn: Float[np.ndarray, "D"], level: float = LEVEL) -> Interval:
    """The percentile interval of what was drawn."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def share(parts_N: np.ndarray, wholes_N: np.ndarray, counts_DN: np.ndarray) -> Interval:
    """A ratio of sums, such as hits over requests."""
    return limits(_ratio(parts_N.sum(), wholes_N.sum()), _ratio(counts_DN @ parts_N, counts_DN @ wholes_N))


def difference(parts_N: np.ndarray, others_N: np.ndarray, wholes_N: np.ndarray, counts_DN: np.ndarray) -> Interval:
    """How much more the one ratio is than the other, both drawn from the same units."""
    return share(np.asarray(parts_N, np.float64) - others_N, wholes_N, counts_DN)


def _ratio(part, whole):
    return np.asarray(part, np.float64) / np.maximum(whole, 1)
