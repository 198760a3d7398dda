"""A step in the making: the state as it will be, and the copies that have to be made for it. Pages are taken and given back here and nowhere else.

The order in which a runner copies does not matter between `copies` and `out`: neither reads what the other writes. `into` comes after `out`.
"""

from __future__ import annotations

import numpy as np

from jaxmoe.engine.serving.objective import Paths, Policy, Ranker
from jaxmoe.engine.serving.state import Draft, SchedulerState, changed
from jaxmoe.engine.serving.types import Move, Phase, Row, Seq

NOBODY = -1
"""The id and slot of a move of pages that are not a sequence's."""


class Step(Draft):
    """What one call of `plan` has decided so far.

    Attributes:
        policy, now, paths, held: as `plan` was given them.
        copies, out, into, decode: as of `types.StepPlan`, growing.
        preempted: whether a sequence was put aside for want of pages, after which nobody else comes in.
        made_way: who was put aside so that another can come in, and does not come back in the same step.
    """

    def __init__(self, state: SchedulerState, policy: Policy, now: float, paths: Paths | None, held: np.ndarray | None):
        super().__init__(state)
        self.policy, self.now, self.paths, self.held = policy, now, paths, held
        self.copies: list[tuple[int, int]] = []
        self.out: list[Move] = []
        self.into: list[Move] = []
        self.decode: list[Row] = []
        self.preempted = False
        self.made_way: int | None = None
        self._borrowed: list[list[int]] = []
        self._ranker = Ranker(self, policy, now, paths, held)

    def ranked(self, ids) -> list[Seq]:
        """Sequences by the objective, best first."""
        return self._ranker.ranked(self.seqs[i] for i in ids)

    def ahead(self, one: Seq, other: Seq) -> bool:
        """See `Ranker.ahead`."""
        return self._ranker.ahead(one, other)

    def cached(self, seq: Seq) -> int:
        """Tokens of a sequence that need not be computed, as far as the device knows."""
        return self._ranker.cached(seq)

    # --- Device pages

    def take(self, n: int, near: int | None, keep: bool = True) -> list[int] | None:
        """Pages of the pool, as of `PagePool.take`; prefixes that it gives up go to host memory first, if `keep` and the policy say so."""
        if n > self.pool.available:
            return None
        if keep and self.policy.keep and self.spec.host_pages and n > self.pool.free:
            self._keep(self.pool.oldest(n - self.pool.free))
        return self.pool.take(n, near)

    def _keep(self, pages: list[int]) -> None:
        """Copies of registered pages in host memory, of those that are not there yet, as far as there is room without taking it from sequences."""
        keyed = [(page, key) for page in pages if (key := self.pool.key(page)) is not None and not self.host.match([key])]
        keyed = keyed[: self.host.available]
        if not keyed:
            return
        host = self.host.take(len(keyed))
        assert host is not None
        for (_, key), at in zip(keyed, host, strict=True):
            self.host.register(at, key)
        self._borrowed.append(host)  # nobody else may write there in this step
        self.out.append(Move(NOBODY, tuple(page for page, _ in keyed), tuple(host), NOBODY))
        self.count(out_pages=len(keyed), kept_pages=len(keyed))

    def grow(self, seq: Seq, n: int) -> bool:
        """Gives a running sequence `n` more pages; False, and nothing changes, where the pool has fewer."""
        pages = self.take(n, seq.pages[-1] if seq.pages else None)
        if pages is None:
            return False
        seq = self.seqs[seq.id]  # it may have changed since it was looked at: others' copies in host memory make room
        self.set(changed(seq, pages=(*seq.pages, *pages)))
        return True

    # --- Host pages

    def borrow(self, host: list[int]) -> None:
        """Keeps host pages that this step reads from being given to someone else in it."""
        self.host.hold(host)
        self._borrowed.append(host)

    def take_host(self, n: int, but: int) -> list[int] | None:
        """Pages in host memory; where there are too few, running sequences other than `but` lose their copies there, which are second ones."""
        for id in self.running:
            if n <= self.host.available:
                break
            if (seq := self.seqs[id]).host and id != but:
                self.host.drop(seq.host)
                self.set(changed(seq, host=(), host_tokens=0))
        return self.host.take(n)

    def state(self) -> SchedulerState:
        """See `Draft.state`."""
        for host in self._borrowed:  # one by one: a page that was kept in this step may be read in it, and then has two
            self.host.drop(host)
        return super().state()

    # --- Coming and going

    def run(self, seq: Seq, **fields) -> Seq:
        """A sequence gets a slot and is running, with these fields changed."""
        if seq.phase is Phase.SWAPPED:
            self.swapped.remove(seq.id)
        self.running.append(seq.id)
        # -1: whoever comes in during a step was not passed over in it.
        return self.set(changed(seq, phase=Phase.RUNNING, slot=self.slots.pop(0), waited=-1, **fields))

    def has_row(self, seq: Seq) -> None:
        """A sequence that came in with one token to compute decodes at once, where a step has room."""
        if len(self.decode) < self.spec.batch:
            self.decode.append(Row(seq.id, seq.slot, seq.computed, 1))
