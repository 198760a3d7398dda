"""A queue of requests that decode in turns, as its order alone: who holds a row, who runs next, and how long the others have waited.

For simulations of recorded routing (`jaxmoe.report.regroup_bench`); the engine's own queue is `jaxmoe.engine.serving`, which chooses by the same
functions. Rounds of one step are the default: the next token is known then, and it says more about the next experts than all that a request did
before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from jaxmoe.offload.regroup import choose


@dataclasses.dataclass(frozen=True)
class Grouping:
    """How batches are put together.

    Attributes:
        batch: requests that decode together.
        policy: of `jaxmoe.offload.regroup.POLICIES`.
        bound: rounds running that a request which holds a row may be passed over; None for no bound.
        every: steps of a round.
        held_cost: what an expert counts for that is on the device when a batch is chosen, of one that is not; for 'greedy'. 1 looks for few distinct
            experts; less for few loads, which is the same where little fits on the device.
    """

    batch: int
    policy: str = "greedy"
    bound: int | None = 16
    every: int = 1
    held_cost: float = 1.0


@dataclasses.dataclass(frozen=True)
class Pool:
    """The requests that hold rows, in order of arrival. Attributes: `numbers` theirs; `waited` rounds since each last ran, or came."""

    numbers: tuple[int, ...] = ()
    waited: tuple[int, ...] = ()

    def admit(self, numbers: Iterable[int]) -> Pool:
        """With these at the end."""
        new = tuple(numbers)
        return Pool(self.numbers + new, self.waited + (0,) * len(new))

    def choose(self, paths: np.ndarray, grouping: Grouping, held: np.ndarray | None = None) -> tuple[int, ...]:
        """The numbers of those that run next; `paths` [R, ...] in the pool's order, `held` bool [L, E] the experts on the device."""
        if len(self.numbers) <= grouping.batch:
            return self.numbers
        picked = choose(grouping.policy, paths, self.waited, grouping.batch, grouping.bound, held, grouping.held_cost)
        return tuple(self.numbers[i] for i in picked)

    def commit(self, picked: Iterable[int], ended: Iterable[int]) -> Pool:
        """After a round in which these ran and those of them ended."""
        ran, gone = set(picked), set(ended)
        left = [(n, 0 if n in ran else w + 1) for n, w in zip(self.numbers, self.waited, strict=True) if n not in gone]
        return Pool(tuple(n for n, _ in left), tuple(w for _, w in left))
