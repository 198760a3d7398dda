"""Sequences that come in or come back: the pages they find, the pages they need, and who may have to wait."""

from __future__ import annotations

from collections.abc import Iterator

from jaxmoe.engine.serving.drafting import NOBODY, Step
from jaxmoe.engine.serving.types import Move, Phase, Seq


class Admission:
    """The queue of one step: who could come in, best first, until one does not fit.

    Attributes:
        closed: nobody else comes in during this step.
    """

    def __init__(self, step: Step):
        self._step = step
        # Whoever comes in needs one page at least.
        self.closed = step.preempted or not step.slots or len(step.running) == len(step.seqs) or not _fits(step, 1)
        self._computing: set[bytes] | None = None

    def queue(self) -> Iterator[Seq]:
        """Whoever waits or was put aside, best first; children that need their parent's prompt only once that is there.

        Everyone is looked at before the first comes in: a parent that comes back in this step has its pages only after copies on the device are made.
        """
        step = self._step
        ids = [*step.swapped, *(i for i, s in step.seqs.items() if s.phase is Phase.WAITING and not self._held_back(s))]
        yield from step.ranked(i for i in ids if i != step.made_way)

    def ready(self) -> None:
        """Those that can decode at once come in, while prompts have to wait."""
        if self.closed:
            return
        step = self._step
        ids = [i for i in step.swapped if step.seqs[i].left == 1]
        ids += [i for i, s in step.seqs.items() if s.phase is Phase.WAITING and s.parent is not None and self.forks(s)]
        for seq in step.ranked(ids) if ids else ():
            if self.closed or (came := self.admit(seq)) is None:
                return
            step.has_row(came)

    def admit(self, seq: Seq) -> Seq | None:
        """Gives a sequence a slot, and pages for all of its tokens; None, with nothing changed, where it does not fit, and then nobody else comes in.

        One page for each running sequence stays free, so that who comes in does not drive others out at the next step.
        """
        came = _fork(self._step, seq) if seq.parent is not None and self.forks(seq) else _admit(self._step, seq)
        self.closed = came is None or not self._step.slots
        if came is not None and self._computing is not None and came.left > 1:
            self._computing.update(_to_compute(self._step, came))
        return came

    def deferred(self, seq: Seq) -> bool:
        """Whether a prompt had better wait for a prefix that another one is computing."""
        step = self._step
        page, share = step.spec.page, step.policy.defer
        keys = seq.keys[: (seq.known - 1) // page]
        if share > 1 or seq.phase is not Phase.WAITING or not keys or not step.spec.sharing:
            return False
        if self._computing is None:
            self._computing = {key for i in step.running if step.seqs[i].left > 1 for key in _to_compute(step, step.seqs[i])}
        if not self._computing:
            return False
        there = len(step.pool.match(keys))
        there += len(step.host.match(keys[there:]))
        saved = next((i for i, key in enumerate(keys[there:]) if key not in self._computing), len(keys) - there)
        return saved > 0 and saved * page >= share * (seq.known - there * page)

    def _held_back(self, seq: Seq) -> bool:
        """A child waits as long as its parent is here and has not computed the prompt, or cannot lend it in this step."""
        if seq.parent is None or not self._may_fork(seq):
            return False
        return not self.forks(seq)

    def _may_fork(self, seq: Seq) -> bool:
        step = self._step
        return step.spec.sharing and seq.known == seq.prompt and seq.parent in step.seqs

    def forks(self, seq: Seq) -> bool:
        """Whether a sequence can share the pages of its parent's prompt in this step."""
        if not self._may_fork(seq):
            return False
        if self._step.made_way is not None:
            return False  # pages that have just been given back are read after copies on the device are made
        parent = _parent(self._step, seq)
        return parent.phase is Phase.RUNNING and parent.computed >= seq.prompt


def _parent(step: Step, seq: Seq) -> Seq:
    assert seq.parent is not None
    return step.seqs[seq.parent]


def _to_compute(step: Step, seq: Seq) -> tuple[bytes, ...]:
    return seq.keys[seq.computed // step.spec.page :]


def _fits(step: Step, pages: int) -> bool:
    return pages + len(step.running) <= step.pool.available


def _fork(step: Step, seq: Seq) -> Seq | None:
    """A child shares its parent's prompt but for the page that its first token is written to, of which it gets a copy."""
    parent, page = _parent(step, seq), step.spec.page
    last = (seq.prompt - 1) // page
    if not _fits(step, 1):
        return None
    step.pool.hold(parent.pages[:last])
    new = step.take(1, None, keep=False)  # not a page that is still to be read: copies on the device may come before those to the host
    assert new is not None
    if (seq.prompt - 1) % page:
        step.copies.append((parent.pages[last], new[0]))
        step.count(copies=1)
    step.count(cached=seq.prompt - 1)
    return step.run(seq, pages=(*parent.pages[:last], new[0]), computed=seq.prompt - 1, cached=seq.prompt - 1)


def _admit(step: Step, seq: Seq) -> Seq | None:
    """Pages are found on the device by key, then in host memory, its own there first; the rest are new."""
    spec, swapped = step.spec, seq.phase is Phase.SWAPPED
    keys = seq.keys[: (seq.known - 1) // spec.page] if spec.sharing else ()
    there = step.pool.match(keys)
    step.pool.hold(there)
    need = spec.pages_for(seq.known) - len(there)
    if not _fits(step, need):
        step.pool.drop(there)
        return None
    on_host = list(seq.host[len(there) :]) if swapped else step.host.match(keys[len(there) :])
    if not swapped:
        step.borrow(on_host)
        step.count(host_cached=len(on_host) * spec.page)
    new = step.take(need, there[-1] if there else None)
    assert new is not None
    pages = (*there, *new)
    if on_host or swapped:
        step.into.append(Move(seq.id, tuple(new[: len(on_host)]), tuple(on_host), step.slots[0] if swapped else NOBODY))
        step.count(in_pages=len(on_host))
    computed = max(seq.computed, len(there) * spec.page) if swapped else (len(there) + len(on_host)) * spec.page
    for i in range(len(there), min(len(there) + len(on_host), computed // spec.page, len(keys))):
        step.pool.register(pages[i], keys[i])
    if swapped:
        return step.run(seq, pages=pages, computed=computed)
    return _came_in(step, seq, pages, computed, on_host if not there else [])


def _came_in(step: Step, seq: Seq, pages: tuple[int, ...], computed: int, on_host: list[int]) -> Seq:
    """The counts of who had nothing computed; host pages of its beginning are its own copy from now on."""
    page = step.spec.page
    step.count(cached=computed, recomputed=max(0, seq.lost - computed))
    if on_host:
        step.host.hold(on_host)
    return step.run(
        seq, pages=pages, computed=computed, lost=0, host=tuple(on_host), host_tokens=len(on_host) * page,
        cached=seq.cached if seq.preempted else computed,
    )  # fmt: skip
