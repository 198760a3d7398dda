"""The scheduler's state: sequences, who holds which pages and slots, and counts. A value: whatever changes it gives another.

Sequences come in by `submit` and leave when a step ends them or by `cancel`. No arrays on a device, no clock, no text.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from jaxmoe.engine.serving.pages import HostPages, PagePool
from jaxmoe.engine.serving.types import Phase, Piece, Seq, ServeSpec

T = TypeVar("T")


def changed(value: T, **fields: Any) -> T:
    """`dataclasses.replace` without running the constructor, which is most of its time: a step changes every sequence that decodes."""
    new = object.__new__(type(value))
    new.__dict__.update(value.__dict__)
    new.__dict__.update(fields)
    return new


@dataclasses.dataclass(frozen=True)
class Wave:
    """Prompts on their way through the groups of layers. `pieces`, `places`, `tokens` as of `types.GroupStep`; `group` is the next one."""

    pieces: tuple[Piece, ...]
    places: tuple[int, ...]
    tokens: int
    group: int = 0


@dataclasses.dataclass(frozen=True)
class Counters:
    """What was done so far.

    Attributes:
        steps: plans that did something.
        preemptions: sequences put aside; `swaps` those of them whose pages went to host memory.
        out_pages, in_pages: pages copied to and from host memory, prefixes included.
        kept_pages: of those that went out, pages of prefixes without a sequence.
        recomputed: tokens computed again because they were given up and not found in any page.
        cached: tokens that admitted sequences found in pages; `host_cached` those of them that were in host memory.
        copies: pages copied on the device, before a write.
        decode, prompt: tokens that decoding gave, and tokens of prompts that were computed.
        padded: tokens that prompts were padded by, to whole runs.
        cancelled: sequences.
    """

    steps: int = 0
    preemptions: int = 0
    swaps: int = 0
    out_pages: int = 0
    in_pages: int = 0
    kept_pages: int = 0
    recomputed: int = 0
    cached: int = 0
    host_cached: int = 0
    copies: int = 0
    decode: int = 0
    prompt: int = 0
    padded: int = 0
    cancelled: int = 0


@dataclasses.dataclass(frozen=True)
class SchedulerState:
    """Everything the scheduler knows. Its containers are never changed in place.

    Attributes:
        spec: sizes.
        seqs: by id, in order of arrival.
        pool, host: of pages.
        slots: that are free, ascending.
        running, swapped: ids in these phases, in the order in which they came there.
        wave: under way, if one is.
        service: tokens that each user was given, a prompt's counted once and new ones twice (see `submit` for users who come back).
        users: sequences that each user has here.
        counters: see there.
    """

    spec: ServeSpec
    seqs: Mapping[int, Seq]
    pool: PagePool
    host: HostPages
    slots: tuple[int, ...]
    running: tuple[int, ...] = ()
    swapped: tuple[int, ...] = ()
    wave: Wave | None = None
    service: Mapping[str, float] = dataclasses.field(default_factory=dict)
    users: Mapping[str, int] = dataclasses.field(default_factory=dict)
    counters: Counters = Counters()

    @property
    def idle(self) -> bool:
        """Whether there are no sequences."""
        return not self.seqs

    @property
    def waiting(self) -> int:
        """Sequences that have nothing on the device or in host memory."""
        return len(self.seqs) - len(self.running) - len(self.swapped)

    def check(self, pools: bool = True) -> None:
        """AssertionError where the state contradicts itself; `pools`: or where one of its pools does, which takes most of the time."""
        spec, seqs = self.spec, self.seqs
        if pools:
            self.pool.check()
            self.host.check()
        for pool, pages in ((self.pool, [s.pages for s in seqs.values()]), (self.host, [s.host for s in seqs.values()])):
            listed = Counter(page for some in pages for page in some)
            assert all(len(set(some)) == len(some) for some in pages), "a page is twice in a sequence"
            assert pool.free + pool.cached + pool.held == pool.pages and pool.held == len(listed), "a page is held that no sequence lists"
            assert all(pool.refs(page) == n for page, n in listed.items()), "references are not the sequences that list a page"
        by_phase = {phase: [i for i, s in seqs.items() if s.phase is phase] for phase in Phase}
        assert sorted(self.running) == sorted(by_phase[Phase.RUNNING]) and sorted(self.swapped) == sorted(by_phase[Phase.SWAPPED]), "phases"
        used = [seqs[i].slot for i in self.running]
        assert sorted([*used, *self.slots]) == list(range(spec.slots)), "each slot is free or has one sequence"
        for s in seqs.values():
            _check_seq(spec, s)
        if self.wave is not None:
            _check_wave(spec, self.wave, self)
        assert dict(self.users) == dict(Counter(s.user for s in seqs.values())), "sequences by user"


def _check_seq(spec: ServeSpec, s: Seq) -> None:
    assert 0 <= s.computed < s.known < s.limit <= spec.positions, f"sequence {s.id}: computed < known < limit"
    assert s.left == 1 or s.computed % spec.run == 0, f"sequence {s.id}: a piece would begin within a run"
    if s.phase is Phase.RUNNING:
        assert len(s.pages) >= spec.pages_for(s.computed), f"sequence {s.id}: pages"
    else:
        assert not s.pages and s.slot == -1, f"sequence {s.id} is {s.phase.value} and has pages or a slot"
    assert s.phase is not Phase.SWAPPED or s.host_tokens == s.computed > 0, f"sequence {s.id}: swapped without its tokens"
    assert len(s.host) == spec.pages_for(s.host_tokens) and s.host_tokens <= s.computed, f"sequence {s.id}: pages in host memory"
    assert s.phase is not Phase.WAITING or s.computed == 0, f"sequence {s.id} waits and has computed tokens"


def _check_wave(spec: ServeSpec, wave: Wave, state: SchedulerState) -> None:
    assert wave.pieces and wave.tokens <= spec.wave and wave.group < spec.groups, "a wave within its size and groups"
    end = 0
    for piece, place in zip(wave.pieces, wave.places, strict=True):
        s = state.seqs[piece.id]
        assert place >= end and place % spec.run == 0 and place + piece.count <= wave.tokens, "places of a wave"
        assert s.phase is Phase.RUNNING and (s.slot, s.computed) == (piece.slot, piece.at), "who is in the wave stays as it is"
        end = place + piece.count


def fresh(spec: ServeSpec, group: int = 16) -> SchedulerState:
    """A state without sequences; `group` as for `PagePool`."""
    return SchedulerState(spec, {}, PagePool(spec.pages, group), HostPages(spec.host_pages, group), tuple(range(spec.slots)))


def submit(state: SchedulerState, seq: Seq) -> SchedulerState:
    """With one more sequence waiting.

    A user who had nothing here starts with as much service as the least served of the others has, not with an advantage saved up meanwhile
    (virtual token counter, arXiv 2401.00588).

    Args:
        state: not changed.
        seq: as it comes: waiting, without pages.

    Returns:
        The state with it.

    Raises:
        ValueError: its id is taken, its counts are impossible, or it can never fit.
    """
    spec = state.spec
    if seq.id in state.seqs:
        raise ValueError(f"there is a sequence {seq.id} already: give each its own number")
    if not 0 < seq.prompt <= seq.known < seq.limit or seq.computed or seq.pages or seq.phase is not Phase.WAITING:
        raise ValueError(f"sequence {seq.id} has a prompt of {seq.prompt}, {seq.known} tokens and a limit of {seq.limit}: these must rise from 1")
    if seq.limit > spec.positions:
        raise ValueError(f"sequence {seq.id} may reach {seq.limit} positions, the engine has {spec.positions}")
    if (needed := spec.pages_for(seq.limit - 1)) > spec.pages:
        raise ValueError(f"sequence {seq.id} may need {needed} pages, the pool has {spec.pages}")
    service = dict(state.service)
    if seq.user not in state.users:
        least = min((service.get(user, 0.0) for user in state.users), default=0.0)
        service[seq.user] = max(service.get(seq.user, 0.0), least)
    users = {**state.users, seq.user: state.users.get(seq.user, 0) + 1}
    return changed(state, seqs={**state.seqs, seq.id: seq}, service=service, users=users)


def cancel(state: SchedulerState, ids: Iterable[int]) -> SchedulerState:
    """Without these sequences, wherever they stand; those that it does not have are ignored. The others of a wave keep their places."""
    gone = [i for i in dict.fromkeys(ids) if i in state.seqs]
    if not gone:
        return state
    draft = Draft(state)
    for i in gone:
        draft.remove(i)
    draft.count(cancelled=len(gone))
    return draft.state()


class Draft:
    """A state in the making: copies of its parts that may be changed.

    Attributes: those of `SchedulerState`, with lists and dicts for tuples and mappings.
    """

    def __init__(self, state: SchedulerState):
        """Copies what changes; `state` stays as it is."""
        self._given = state
        self.spec = state.spec
        self.seqs: dict[int, Seq] = dict(state.seqs)
        self.pool, self.host = state.pool.copy(), state.host.copy() if state.spec.host_pages else state.host
        self.slots, self.running, self.swapped = list(state.slots), list(state.running), list(state.swapped)
        self.wave = state.wave
        self.service, self.users = dict(state.service), dict(state.users)
        self._counts: dict[str, int] = {}

    def count(self, **more: int) -> None:
        """Adds to counters."""
        for name, n in more.items():
            self._counts[name] = self._counts.get(name, 0) + n

    def state(self) -> SchedulerState:
        """What it has become; the draft is not used after."""
        counters = self._given.counters
        if self._counts:
            counters = changed(counters, **{name: getattr(counters, name) + n for name, n in self._counts.items()})
        return SchedulerState(
            self.spec, self.seqs, self.pool, self.host, tuple(self.slots), tuple(self.running), tuple(self.swapped), self.wave,
            self.service, self.users, counters,
        )  # fmt: skip

    def set(self, seq: Seq) -> Seq:
        """Puts a sequence in the place of the one with its id."""
        self.seqs[seq.id] = seq
        return seq

    def take_off(self, seq: Seq) -> None:
        """Gives back a running sequence's pages and slot; `seqs` still has it as it was."""
        self.pool.drop(seq.pages)
        self.slots.append(seq.slot)
        self.slots.sort()
        self.running.remove(seq.id)

    def remove(self, id: int) -> None:
        """A sequence leaves with all that it holds."""
        seq = self.seqs.pop(id)
        if seq.phase is Phase.RUNNING:
            self.take_off(seq)
        elif seq.phase is Phase.SWAPPED:
            self.swapped.remove(id)
        if seq.host:
            self.host.drop(seq.host)
        if self.wave is not None:
            self._leave_wave(id)
        self._leave_user(seq.user)

    def _leave_wave(self, id: int) -> None:
        assert self.wave is not None
        stay = [i for i, piece in enumerate(self.wave.pieces) if piece.id != id]
        if len(stay) < len(self.wave.pieces):
            pieces, places = (tuple(part[i] for i in stay) for part in (self.wave.pieces, self.wave.places))
            self.wave = changed(self.wave, pieces=pieces, places=places) if stay else None

    def _leave_user(self, user: str) -> None:
        """Counts are kept of users who are ahead of someone here: they must not come back as if they had had nothing."""
        self.users[user] -= 1
        if self.users[user]:
            return
        del self.users[user]
        least = min((self.service.get(u, 0.0) for u in self.users), default=float("inf"))
        self.service = {u: n for u, n in self.service.items() if u in self.users or n > least}
