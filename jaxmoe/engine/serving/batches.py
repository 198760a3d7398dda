"""From rows and pieces of a plan to the arrays that programs take. Numpy alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxmoe.cache.batch import Batch
from jaxmoe.cache.contiguous import KEY_BLOCK
from jaxmoe.engine.serving.types import Piece, Row, ServeSpec


def sizes(most: int, least: int, run: int = 1) -> tuple[int, ...]:
    """Buckets of tokens, whole runs each: the largest, and a quarter and a sixteenth of it where those are worth a program of their own."""
    found = [-(-most // run) * run]
    while len(found) < 3 and found[-1] // 4 >= least:
        found.append(-(-found[-1] // 4 // run) * run)
    return tuple(reversed(found))


def page_tables(spec: ServeSpec, tables: Mapping[int, Sequence[int]]) -> Int[np.ndarray, "S X"]:
    """Every slot's pages, and the trash page where there is none; as wide as whole blocks of keys need, which is how attention reads it."""
    wide = -(-spec.positions // KEY_BLOCK) * KEY_BLOCK // spec.page
    out = np.full((spec.slots, wide), spec.trash, np.int32)
    for slot, pages in tables.items():
        out[slot, : len(pages)] = pages
    return out


def places_of(spec: ServeSpec, pieces: Sequence[Piece]) -> tuple[tuple[int, ...], int]:
    """Where each piece begins when they lie one after another, and the tokens that they take, padding included."""
    ends = np.cumsum([-(-piece.count // spec.run) * spec.run for piece in pieces])
    return tuple([0, *ends[:-1].tolist()]) if pieces else (), int(ends[-1]) if pieces else 0


def prompt_batch(
    spec: ServeSpec, rows: Sequence[Row], pieces: Sequence[Piece], places: Sequence[int], tokens: int, singles: int, ids: Mapping[int, Sequence[int]],
    tables: Int[np.ndarray, "S X"],
) -> Batch:  # fmt: skip
    """A batch of sequences that decode and of pieces of prompts.

    Args:
        spec: sizes.
        rows: that decode, at most `singles`.
        pieces, places: of prompts, and where each begins among the prompts' tokens.
        tokens: bucket of the prompts' tokens, a multiple of the run.
        singles: bucket of the rows; 0 for none.
        ids: tokens of each sequence.
        tables: of `page_tables`.

    Returns:
        The batch; its `logit_rows` are the `singles`, then one for each slot: of the pieces' last tokens, in order.
    """
    run, total, runs = spec.run, singles + tokens, singles + tokens // spec.run
    flat = np.zeros((2, total), np.int32)
    segments, each = np.full(total, -1, np.int32), np.zeros((3, runs), np.int32)
    last = []
    for i, row in enumerate(rows):
        flat[:, i], segments[i], each[:, i] = (ids[row.id][row.at], row.at), row.slot, (row.slot, row.at, 1)
    used = 0
    for piece, place in zip(pieces, places, strict=True):
        where = slice(singles + place, singles + place + piece.count)
        flat[0, where], flat[1, where] = ids[piece.id][piece.at : piece.at + piece.count], np.arange(piece.at, piece.at + piece.count)
        segments[where] = piece.slot
        for k in range(0, piece.count, run):
            each[:, singles + (place + k) // run] = piece.slot, piece.at + k, min(run, piece.count - k)
        used = max(used, place // run - (-piece.count // run))
        if piece.ends:
            last.append(singles + place + piece.count - 1)
    last += [0] * (spec.slots - len(last))
    logit_rows = np.concatenate([np.arange(singles), last]).astype(np.int32)
    leaves: list[Any] = [flat[0], flat[1], segments, *each, np.int32(used), logit_rows, tables, np.int32(len(rows)) if singles else None]
    return dataclasses.replace(Batch(*leaves), run=run, singles=singles)
