"""`Batch`: the tokens of one step, ragged, padded to a bucket. Plain numpy until the step takes it."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import numpy as np
from jaxtyping import Array, Int


@flax.struct.dataclass
class Batch:
    """Tokens of many sequences on one axis, in *runs*: run r owns tokens `[r * run, (r + 1) * run)`, of which the first `run_lengths[r]` are real,
    consecutive positions of one sequence. Decoding has runs of one token; a prompt is cut into runs of many. A batch may have both: its first
    `singles` tokens are then runs of one, and what is said of runs holds of the tokens after them.

    Attributes:
        tokens: int32 [T] ids; 0 in padding.
        positions: int32 [T] absolute positions; 0 in padding.
        segments: int32 [T], the cache row each token belongs to; -1 in padding.
        run_segments, run_positions, run_lengths: int32 [T / run], cache row, first position and real tokens of each run.
        n_runs: int32 [], how many runs are real; they come first.
        logit_rows: int32 [R], the tokens whose logits are wanted (padding repeats an entry); -1 for those that another device has, where the
            tokens of a sequence are divided among several.
        tables: int32 [B, X] pages of each cache row's keys and values, where they lie in pages (`jaxmoe.cache.paged`); else None.
        n_singles: int32 [], how many of the single tokens are real; they come first. None where there are none.
        run: tokens in a run (static).
        singles: tokens before the runs, each a run by itself (static); `run_segments`, `run_positions` and `run_lengths` begin with theirs.
        grouped: one group's of several groups of devices, which may have no run at all (static).
    """

    tokens: Int[Array, "T"]
    positions: Int[Array, "T"]
    segments: Int[Array, "T"]
    run_segments: Int[Array, "n"]
    run_positions: Int[Array, "n"]
    run_lengths: Int[Array, "n"]
    n_runs: Int[Array, ""]
    logit_rows: Int[Array, "R"]
    tables: Int[Array, "B X"] | None = None
    n_singles: Int[Array, ""] | None = None
    run: int = flax.struct.field(pytree_node=False, default=1)
    singles: int = flax.struct.field(pytree_node=False, default=0)
    grouped: bool = flax.struct.field(pytree_node=False, default=False)

    def parts(self) -> list[tuple[slice, Batch]]:
        """The single tokens and the runs as batches of their own, each with where its tokens are; one part if there are no single tokens.

        `logit_rows` are those of the whole in both.
        """
        if not self.singles:
            return [(slice(None), self)]
        n = self.singles

        def part(tokens: slice, runs: slice, run: int, count) -> tuple[slice, Batch]:
            each = {name: getattr(self, name)[tokens] for name in ("tokens", "positions", "segments")}
            each |= {name: getattr(self, name)[runs] for name in ("run_segments", "run_positions", "run_lengths")}
            return tokens, dataclasses.replace(self, **each, n_runs=count, n_singles=None, run=run, singles=0)

        return [part(slice(None, n), slice(None, n), 1, self.n_singles), part(slice(n, None), slice(n, None), self.run, self.n_runs)]


def join_batches(batches: list[Batch], over_devices: bool | None = None) -> Batch:
    """One batch of those of several groups of devices, one after another, each with its own runs; `n_runs` gets an axis over groups.

    A single batch stays as it is, unless it is said to be `over_devices`.
    """
    first = batches[0]
    if not (len(batches) > 1 if over_devices is None else over_devices):
        return first
    names = [field.name for field in dataclasses.fields(Batch) if field.name not in ("run", "singles", "grouped")]
    given = [name for name in names if getattr(first, name) is not None]
    leaves: dict[str, Any] = {name: np.concatenate([np.atleast_1d(getattr(b, name)) for b in batches]) for name in given}
    return dataclasses.replace(first, grouped=True, **leaves)


def make_batch(
    pieces: list[tuple[int, int, list[int]]], run: int, tokens: int, logit_rows: list[int] | None = None, n_logits: int | None = None
) -> Batch:
    """Packs pieces of sequences into a batch.

    Args:
        pieces: `(cache row, first position, ids)` per piece, in order; a piece longer than `run` becomes several runs.
        run: tokens in a run.
        tokens: the bucket T, a multiple of `run`.
        logit_rows: which tokens need logits, as `(piece index, offset)` flattened by the caller; the last token of each piece when None.
        n_logits: R; the number of rows asked for when None.

    Returns:
        A batch of numpy arrays.

    Raises:
        ValueError: the pieces need more runs than the bucket has.
    """
    n = tokens // run
    flat = {k: np.zeros(tokens, np.int32) for k in ("tokens", "positions")}
    segments = np.full(tokens, -1, np.int32)
    runs = np.zeros((3, n), np.int32)
    used, last = 0, []
    for row, start, ids in pieces:
        for at in range(0, len(ids), run):
            part = ids[at : at + run]
            if used >= n:
                raise ValueError(f"pieces of {[len(p[2]) for p in pieces]} tokens need more than {n} runs of {run}")
            where = slice(used * run, used * run + len(part))
            flat["tokens"][where] = part
            flat["positions"][where] = np.arange(start + at, start + at + len(part))
            segments[where] = row
            runs[:, used] = row, start + at, len(part)
            used += 1
        last.append((used - 1) * run + (len(ids) - 1) % run)
    rows = list(last if logit_rows is None else logit_rows)
    rows += [rows[-1]] * ((n_logits or len(rows)) - len(rows))
    leaves: list[Any] = [flat["tokens"], flat["positions"], segments, *runs, np.int32(used), np.asarray(rows, np.int32)]
    return dataclasses.replace(Batch(*leaves), run=run)
