"""What a step's calls asked of the experts, as far as a runner keeps it: where each token went, and how much the bank was asked by decoding.

Nothing here waits for the device before it is read.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxmoe.cache.batch import Batch
from jaxmoe.engine.serving.types import Piece, Row

PENDING = 64
"""Decode calls whose counts stay on the device, at most."""


@dataclasses.dataclass(frozen=True, eq=False)
class Routed:
    """The routing of one call, padding included.

    Attributes:
        ids: int64 [n], the sequence of each token; -1 of padding.
        positions, tokens: int [n], where each stands in its sequence, and what it is.
        experts: int16 [..., L, A] of n tokens in the same order; on the device until it is read.
    """

    ids: Int[np.ndarray, "n"]
    positions: Int[np.ndarray, "n"]
    tokens: Int[np.ndarray, "n"]
    experts: Any

    def by_sequence(self) -> Iterator[tuple[int, int, Int[np.ndarray, "t"], Int[np.ndarray, "t L A"]]]:
        """Yields each sequence, the position of its first token, its tokens, which follow each other, and their experts. Waits for the device."""
        experts = np.asarray(self.experts)
        experts = experts.reshape(-1, *experts.shape[-2:])
        for id in dict.fromkeys(self.ids[self.ids >= 0].tolist()):
            own = np.flatnonzero(self.ids == id)
            yield id, int(self.positions[own[0]]), self.tokens[own], experts[own]


def decoded(rows: Sequence[Row], tokens: np.ndarray, positions: np.ndarray, out: np.ndarray, experts: Any) -> Routed:
    """What `programs.decode_step` routed.

    Args:
        rows: of the plan.
        tokens, positions: [n] that went in, padding included.
        out: [burst, n] that came out; -1 where a sequence had ended.
        experts: [burst, n, L, A].
    """
    ids = np.full(out.shape, -1, np.int64)
    ids[:, : len(rows)] = [row.id for row in rows]
    read = np.concatenate([tokens[None], out[:-1]])
    at = positions[None] + np.arange(len(out))[:, None]
    return Routed(np.where(out >= 0, ids, -1).ravel(), at.ravel(), read.ravel(), experts)


def prompted(rows: Sequence[Row], pieces: Sequence[Piece], batch: Batch, experts: Any) -> Routed:
    """What `programs.prompts_step` routed, [T, L, A], of the rows and pieces that the batch was made of."""
    slots = {row.slot: row.id for row in rows} | {piece.slot: piece.id for piece in pieces}
    of_slot = np.full(max(slots, default=0) + 2, -1, np.int64)  # the last for padding, whose slot is -1
    of_slot[list(slots)] = list(slots.values())
    return Routed(of_slot[batch.segments], np.asarray(batch.positions), np.asarray(batch.tokens), experts)


@jax.jit
def _counted(requests: jax.Array, hits: jax.Array, loads: jax.Array) -> jax.Array:
    return jnp.stack([requests, hits, loads])


class DecodeCounts:
    """What decode calls asked of a slot bank, by MoE layer; calls that also hold prompts are not among them.

    Attributes: `steps` of the model; `each`, distinct experts of each layer in each call of one step that was read, for whoever empties the list.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.each: deque[int] = deque(maxlen=2**16)
        self._pending: list[tuple[jax.Array, jax.Array, int]] = []
        self._sums: np.ndarray | int = 0

    def look(self, bank: Any) -> jax.Array | None:
        """The counters of a bank's state as they will be when what runs is done; None of a bank that counts nothing."""
        return _counted(bank.requests, bank.hits, bank.loads) if hasattr(bank, "requests") else None

    def add(self, before: jax.Array | None, bank: Any, steps: int) -> None:
        """Takes a call of so many steps, with what `look` gave before it and the bank's state after it."""
        self.steps += steps
        after = self.look(bank)
        if before is not None and after is not None:
            self._pending.append((before, after, steps))
        if len(self._pending) >= PENDING:
            self._settle()

    def _settle(self) -> None:
        for before, after, steps in jax.device_get(self._pending):
            self.each += (after - before)[0].tolist() if steps == 1 else []
            self._sums = self._sums + (after - before).astype(np.int64)  # int32 counters may have gone round between: their difference has not
        self._pending = []

    def read(self) -> dict[str, Int[np.ndarray, "L"]]:
        """`requests` (distinct experts, summed over steps), `hits` and `loads`; nothing if no bank was asked."""
        self._settle()
        return {} if isinstance(self._sums, int) else dict(zip(("requests", "hits", "loads"), self._sums.copy(), strict=True))

    @property
    def distinct_per_step(self) -> Int[np.ndarray, "L"] | None:
        """Distinct experts of each layer in a decode step, on average; None if no bank was asked."""
        found = self.read().get("requests")
        return None if found is None else found / max(1, self.steps)
