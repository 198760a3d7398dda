"""A runner without a model: it does a scheduler's plans in virtual time, and fails where a read would not find what belongs there.

In the place of keys and values, every position of every page holds a hash of all tokens up to it; so a page that is shared wrongly, lost in a swap,
not copied before a write, or used again too early is noticed by the next one that reads it. Every group of layers has pages of its own, since a wave
writes them at different steps. The next token is a function of the hash; any loop over one sequence alone can tell what it must be. Time follows a
linear model of costs; experts are what a routing function says, kept per layer by least recent use. No device, no clock, no randomness.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from jaxmoe.engine.serving.types import GroupStep, Piece, Row, ServeSpec, StepPlan

MASK = (1 << 63) - 1
NOTHING = -1
"""In a position that nobody has written."""

Routing = Callable[[Int[np.ndarray, "T"]], Int[np.ndarray, "T L A"]]
"""Experts that each token asks for in each layer."""


def extend(before: int, token: int) -> int:
    """The hash of a context with one more token; 0 is that of none."""
    x = ((before ^ (token + 1)) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) & MASK
    return x ^ (x >> 29)


def next_token(context: int, seed: int, vocab: tuple[int, int]) -> int:
    """The token that follows a context's hash, within `vocab` (from, to)."""
    x = extend(extend(context, seed), 7)
    return vocab[0] + (x >> 8) % (vocab[1] - vocab[0])


@dataclasses.dataclass(frozen=True)
class Cost:
    """A step takes fixed + per_token * tokens + per_context * positions read + (bytes of missed experts + bytes of moved pages) / link.

    Attributes:
        fixed: seconds of a step.
        per_token, per_context: seconds.
        link: bytes a second between host and device.
        expert_bytes, page_bytes: of one expert of one layer; of a page in all layers.
        layers, experts: of the model; 0 layers for none that are streamed.
        slots: experts of each layer that the device holds.
    """

    fixed: float = 1e-3
    per_token: float = 1e-5
    per_context: float = 0.0
    link: float = 25e9
    expert_bytes: int = 0
    page_bytes: int = 0
    layers: int = 0
    experts: int = 0
    slots: int = 0


class ExpertCache:
    """Which experts the device holds: of each layer the `slots` used last. Attributes: `held` bool [L, E]."""

    def __init__(self, layers: int, experts: int, slots: int):
        self.held: Bool[np.ndarray, "L E"] = np.zeros((layers, experts), bool)
        self._used = np.zeros((layers, experts), np.int64)
        self._slots, self._now = slots, 0

    def ask(self, asked: Bool[np.ndarray, "L E"]) -> int:
        """Experts that have to be brought for a step that asks for these."""
        self._now += 1
        missed = int((asked & ~self.held).sum())
        self._used[asked] = self._now
        self.held |= asked
        for l in np.flatnonzero(self.held.sum(1) > self._slots):
            on = np.flatnonzero(self.held[l])
            order = on[np.argsort(-self._used[l, on], kind="stable")]
            self.held[l, order[self._slots :]] = False
        return missed


@dataclasses.dataclass
class Live:
    """A sequence's tokens, as an engine keeps them. Attributes: `ids`; `seed`, `vocab` of `next_token`; `hashes` of the context up to each token."""

    ids: list[int]
    seed: int
    vocab: tuple[int, int]
    hashes: Int[np.ndarray, "S"]

    def push(self, token: int) -> None:
        """One more token."""
        n = len(self.ids)
        self.hashes[n] = extend(int(self.hashes[n - 1]) if n else 0, token)
        self.ids.append(token)


def new_live(prompt: Sequence[int], limit: int, seed: int, vocab: tuple[int, int]) -> Live:
    """A sequence that has its prompt and room for `limit` tokens."""
    live = Live([], seed, vocab, np.full(limit, NOTHING, np.int64))
    for token in prompt:
        live.push(token)
    return live


@dataclasses.dataclass
class StepLog:
    """What one step did.

    Attributes:
        now: when it began.
        seconds: that it took.
        decode, prompt: sequences that decoded, and tokens of prompts; a wave's in its last group.
        decode_missed, prompt_missed: experts that had to be brought.
        distinct: experts that decoding asked for, in all layers.
        moved: pages between device and host.
    """

    now: float
    seconds: float = 0.0
    decode: int = 0
    prompt: int = 0
    decode_missed: int = 0
    prompt_missed: int = 0
    distinct: int = 0
    moved: int = 0


class SimulatedRunner:
    """Attributes: `clock` seconds; `log` of steps; `cache` of experts; `verify` whether every read is checked."""

    def __init__(self, spec: ServeSpec, cost: Cost, routing: Routing | None = None, verify: bool = True):
        self.spec, self.cost, self.routing, self.verify = spec, cost, routing, verify
        self.clock, self.log = 0.0, list[StepLog]()
        self.cache = ExpertCache(cost.layers, cost.experts, cost.slots)
        self._pages = np.full((spec.groups, spec.pages + 1, spec.page), NOTHING, np.int64)
        self._host = np.full((spec.groups, spec.host_pages, spec.page), NOTHING, np.int64)
        self._slots = np.full((spec.groups, spec.slots), NOTHING, np.int64)
        self._aside: dict[int, np.ndarray] = {}
        self._parked = np.full(spec.wave, NOTHING, np.int64)
        self._edges = np.linspace(0, cost.layers, spec.groups + 1).astype(int)

    def run(self, plan: StepPlan, live: Mapping[int, Live]) -> dict[int, tuple[int, ...]]:
        """Does what a plan says.

        Args:
            plan: of the scheduler.
            live: every sequence that it names; not changed.

        Returns:
            New tokens, by sequence.

        Raises:
            AssertionError: a read would not have found what belongs there.
        """
        log = StepLog(self.clock)
        self._move(plan, log)
        given = {row.id: self._decode(row, plan.tables[row.slot], live[row.id]) for row in plan.decode}
        for piece in plan.chunk:
            given |= self._piece(piece, plan.tables[piece.slot], live[piece.id], slice(None))
        if plan.group is not None:
            given |= self._group(plan.group, plan, live)
        self._spend(plan, live, given, log)
        return given

    # --- Pages

    def _move(self, plan: StepPlan, log: StepLog) -> None:
        targets = [b for _, b in plan.copies]
        assert len(set(targets)) == len(targets), "two copies into one page"
        for source, target in plan.copies:
            self._pages[:, target] = self._pages[:, source]
        for move in plan.out:
            self._host[:, list(move.host)] = self._pages[:, list(move.device)]
            if move.slot >= 0:
                self._aside[move.id] = self._slots[:, move.slot].copy()
        for move in plan.into:
            self._pages[:, list(move.device)] = self._host[:, list(move.host)]
            if move.slot >= 0:
                self._slots[:, move.slot] = self._aside.pop(move.id)
        log.moved = sum(len(move.device) for move in (*plan.out, *plan.into))

    def _check(self, live: Live, table: Sequence[int], slot: int, before: int, layers) -> None:
        """All positions before `before` hold this sequence's tokens, in some groups of layers."""
        if not self.verify or not before:
            return
        truth, page = live.hashes[:before], self.spec.page
        found = self._pages[layers][:, list(table[: self.spec.pages_for(before)])].reshape(-1, self.spec.pages_for(before) * page)[:, :before]
        assert (found == truth).all(), f"position {int((found != truth).any(0).argmax())} of {before} does not hold its sequence's token"
        if not self.spec.sharing:
            assert (self._slots[layers, slot] == truth[-1]).all(), "a slot's state is not its sequence's"

    def _write(self, live: Live, table: Sequence[int], slot: int, at: int, count: int, layers) -> None:
        where = np.arange(at, at + count)
        pages = np.asarray(table)[where // self.spec.page]
        assert (pages < self.spec.pages).all(), "tokens written to the trash page"
        self._pages[layers, pages, where % self.spec.page] = live.hashes[at : at + count]
        self._slots[layers, slot] = live.hashes[at + count - 1]

    # --- Tokens

    def _decode(self, row: Row, table: Sequence[int], given: Live) -> tuple[int, ...]:
        live = given if row.count == 1 else Live(list(given.ids), given.seed, given.vocab, given.hashes.copy())
        assert row.at == len(live.ids) - 1, f"sequence {row.id} has {len(live.ids)} tokens and would go on at position {row.at}"
        new: list[int] = []
        for k in range(row.count):
            self._check(live, table, row.slot, row.at + k, slice(None))
            self._write(live, table, row.slot, row.at + k, 1, slice(None))
            new.append(next_token(int(live.hashes[row.at + k]), live.seed, live.vocab))
            if k + 1 < row.count:
                live.push(new[-1])
        return tuple(new)

    def _piece(self, piece: Piece, table: Sequence[int], live: Live, layers) -> dict[int, tuple[int, ...]]:
        assert piece.at % self.spec.run == 0 and piece.count > 0, "a piece begins at a multiple of the run"
        self._check(live, table, piece.slot, piece.at, layers)
        self._write(live, table, piece.slot, piece.at, piece.count, layers)
        end = piece.at + piece.count
        assert piece.ends == (end == len(live.ids)), "only the last piece of a prompt gives a token"
        return {piece.id: (next_token(int(live.hashes[end - 1]), live.seed, live.vocab),)} if piece.ends else {}

    def _group(self, step: GroupStep, plan: StepPlan, live: Mapping[int, Live]) -> dict[int, tuple[int, ...]]:
        """One group of layers; what it takes up is what the group before left at the same places."""
        given: dict[int, tuple[int, ...]] = {}
        for piece, place in zip(step.pieces, step.places, strict=True):
            truth = live[piece.id].hashes[piece.at : piece.at + piece.count]
            here = slice(place, place + piece.count)
            if step.group:
                assert (self._parked[here] == truth + step.group - 1).all(), "a wave's hidden states are not where they were left"
            self._parked[here] = truth + step.group
            given |= self._piece(piece, plan.tables[piece.slot], live[piece.id], slice(step.group, step.group + 1))
        return given if step.last else {}

    # --- Time

    def _spend(self, plan: StepPlan, live: Mapping[int, Live], given, log: StepLog) -> None:
        cost, group = self.cost, plan.group
        parts = [*plan.chunk, *(group.pieces if group else ())]
        rows = [(live[row.id].ids + list(given[row.id]))[row.at : row.at + row.count] for row in plan.decode]
        rounds = max((len(row) for row in rows), default=1)
        for k in range(rounds):
            asked = self._asked([row[k] for row in rows if k < len(row)], slice(None))
            log.decode_missed += self.cache.ask(asked)
            log.distinct += int(asked.sum())
        layers = slice(None) if group is None else slice(self._edges[group.group], self._edges[group.group + 1])
        log.prompt_missed = self.cache.ask(self._asked([t for p in parts for t in live[p.id].ids[p.at : p.at + p.count]], layers))
        share = 1.0 if group is None else 1 / self.spec.groups
        log.decode, tokens = len(rows), sum(p.count for p in parts)
        log.prompt = tokens if group is None or group.last else 0
        context = sum(row.at + row.count for row in plan.decode) + share * sum(p.at + p.count for p in parts)
        moved = (log.decode_missed + log.prompt_missed) * cost.expert_bytes + log.moved * cost.page_bytes
        work = cost.fixed * rounds + cost.per_token * (sum(map(len, rows)) + share * tokens) + cost.per_context * context
        log.seconds = work + moved / cost.link
        self.clock += log.seconds
        self.log.append(log)

    def _asked(self, tokens: Sequence[int], layers: slice) -> Bool[np.ndarray, "L E"]:
        asked = np.zeros_like(self.cache.held)
        if tokens and asked.size and self.routing is not None:
            ids = self.routing(np.unique(tokens))
            asked[np.arange(asked.shape[0])[None, :, None], ids] = True
            asked[: layers.start or 0] = False
            asked[asked.shape[0] if layers.stop is None else layers.stop :] = False
        return asked
