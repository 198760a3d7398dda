"""What serving's scheduler and its runners speak of: sizes, sequences, plans and results. Plain numbers, no arrays on a device.

The host's side is pure: `scheduler.plan` decides what a step does, a runner does it, `scheduler.commit` advances. A sequence is known here by counts
alone; its tokens and text are the engine's.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Literal


@dataclasses.dataclass(frozen=True)
class ServeSpec:
    """The static sizes of a serving engine; the shapes of all its programs follow from them.

    Attributes:
        slots: S, sequences that hold pages on the device at a time.
        page: W, tokens of a page.
        pages: N, pages of the pool, each with room for all layers; one more, the trash page, takes what padding writes.
        positions: the longest sequence, prompt and new tokens together; a multiple of `page`.
        batch: sequences that decode in one step, at most `slots`.
        chunk: prompt tokens of a step, at most, where prompts go in chunks or whole.
        wave: prompt tokens that go through the layers together, at most, where they go by groups of layers.
        groups: G, groups of layers.
        burst: tokens that a sequence gets from one decode call, at most, while nothing waits.
        run: tokens of a run of a prompt; it divides `page`, and every piece of a prompt begins at a multiple of it.
        host_pages: pages that host memory holds, for sequences that were put aside and prefixes that may come again.
        move: Y, pages that one copy between device and host takes.
        sharing: pages are shared between sequences with the same prefix. Not where layers carry a state that no page holds.
        mixed: a chunk and the decoding sequences go through the model in one call.
    """

    slots: int
    page: int
    pages: int
    positions: int
    batch: int
    chunk: int
    wave: int
    groups: int
    burst: int = 8
    run: int = 32
    host_pages: int = 0
    move: int = 16
    sharing: bool = True
    mixed: bool = True

    @property
    def table(self) -> int:
        """X, entries of a sequence's page table."""
        return self.positions // self.page

    @property
    def trash(self) -> int:
        """The trash page's number."""
        return self.pages

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens need."""
        return -(-tokens // self.page)


class Phase(enum.Enum):
    """Where a sequence stands. WAITING has nothing on the device, RUNNING a slot and pages, SWAPPED its pages in host memory."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"


@dataclasses.dataclass(frozen=True)
class Seq:
    """One sequence, as the scheduler knows it.

    Attributes:
        id: its number, rising in order of arrival.
        prompt: tokens of the prompt.
        known: tokens so far, prompt and generated.
        computed: tokens whose keys and values are written; at least one fewer than `known`.
        limit: `known` at which it ends.
        arrived: by the engine's clock, seconds.
        phase, slot, pages: see `Phase`; `pages` in the order of its tokens, -1 for no slot.
        keys: of its first full pages, as far as the tokens are known: what a page holds is a function of its key.
        host: pages in host memory that hold its first `host_tokens` tokens.
        priority: larger goes first.
        user: whose it is, for fairness.
        expected: new tokens that it is expected to give, for orders that go by that.
        stepwise: it needs the host between any two tokens (a grammar, penalties), so that it takes one token a call.
        parent: the sequence whose prompt it shares and that it waits for, or None (`n` answers to one prompt).
        waited: rounds running that it was ready to decode and was passed over.
        ran: when it last got a token, by the engine's clock; `arrived` before that.
        preempted: how often it was put aside.
        cached: tokens of its prompt that were found in pages, counted when it was first admitted.
        lost: tokens that were computed and given up since it was last admitted.
    """

    id: int
    prompt: int
    known: int
    limit: int
    arrived: float
    computed: int = 0
    phase: Phase = Phase.WAITING
    slot: int = -1
    pages: tuple[int, ...] = ()
    keys: tuple[bytes, ...] = ()
    host: tuple[int, ...] = ()
    host_tokens: int = 0
    priority: int = 0
    user: str = ""
    expected: int = 0
    stepwise: bool = False
    parent: int | None = None
    waited: int = 0
    ran: float = 0.0
    preempted: int = 0
    cached: int = 0
    lost: int = 0

    @property
    def left(self) -> int:
        """Tokens that are known and not computed; 1 of a sequence that decodes."""
        return self.known - self.computed

    @property
    def decodes(self) -> bool:
        """Whether all that it lacks is its next token."""
        return self.phase is Phase.RUNNING and self.left == 1


@dataclasses.dataclass(frozen=True)
class Row:
    """A sequence that decodes in a step: the token at position `at` goes in, and up to `count` new ones come out."""

    id: int
    slot: int
    at: int
    count: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of a prompt that a step computes: `count` tokens from position `at`, a multiple of the run; `ends` says that a token is to be drawn."""

    id: int
    slot: int
    at: int
    count: int
    ends: bool


@dataclasses.dataclass(frozen=True)
class Move:
    """Pages of a sequence between device and host: `device[i]` and `host[i]` hold the same tokens. `slot` has the states that no page holds."""

    id: int
    device: tuple[int, ...]
    host: tuple[int, ...]
    slot: int


@dataclasses.dataclass(frozen=True)
class GroupStep:
    """One group of layers for the prompts of a wave.

    Attributes:
        pieces: the wave's, the same at every group but for sequences that were cancelled, which are gone: the others keep their places.
        places: where each piece begins in the wave's tokens, a multiple of the run.
        tokens: of the wave, padding between and after pieces included.
        group: which group of layers.
        last: it is the last, after which tokens are drawn.
    """

    pieces: tuple[Piece, ...]
    places: tuple[int, ...]
    tokens: int
    group: int
    last: bool


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What one step does, in this order: `copies` of pages on the device, `out` to the host, `into` the device, then decoding and prompts.

    Attributes:
        copies: (from, to) pages, before any is written that another sequence reads.
        out, into: of sequences put aside and taken up again; of prefixes kept and found in host memory.
        decode: sequences that decode.
        chunk: parts of prompts that go through all layers, in the same call as `decode` if the spec says mixed.
        group: parts of prompts that go through some layers, after `decode`.
        tables: page table by slot of every running sequence, in the order of its tokens.
        reason: why nothing is done, of a plan that does nothing.
    """

    copies: tuple[tuple[int, int], ...] = ()
    out: tuple[Move, ...] = ()
    into: tuple[Move, ...] = ()
    decode: tuple[Row, ...] = ()
    chunk: tuple[Piece, ...] = ()
    group: GroupStep | None = None
    tables: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    reason: str = ""

    @property
    def empty(self) -> bool:
        """Whether the step would do nothing."""
        return not (self.copies or self.out or self.into or self.decode or self.chunk or self.group)


@dataclasses.dataclass(frozen=True)
class Results:
    """What a step gave. Attributes: `tokens` new ones of each sequence, as many as count; `ended` sequences that are done, for whatever reason;
    `keys` of pages that became full, in order, to be added to the sequence's."""

    tokens: Mapping[int, int]
    ended: frozenset[int] = frozenset()
    keys: Mapping[int, tuple[bytes, ...]] = dataclasses.field(default_factory=dict)


PrefillMode = Literal["chunked", "splitfuse", "layered", "whole"]
"""How prompts are computed beside decoding: in chunks of what a step has left (Sarathi-Serve), in steps of always the same size (Dynamic SplitFuse),
by groups of layers (layered prefill), or at once."""

Preemption = Literal["swap", "recompute"]
