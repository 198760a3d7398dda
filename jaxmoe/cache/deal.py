"""How the tokens of a prompt are dealt out to the devices of a mesh axis, on the host: runs of neighbours in zig-zag order, 0, .., n-1, n-1, .., 0.

So every device gets early positions, which see little, and late ones, which see much, alike. Plain numpy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jaxmoe.cache.batch import Batch
from jaxmoe.spec import AttentionSpec


def zigzag(units: Int[np.ndarray, "u"], n: int) -> Int[np.ndarray, "u"]:
    """The device of each of the units 0, 1, ... of a sequence: 0 to n-1, back to 0, and again."""
    turn = np.asarray(units) % (2 * n)
    return np.minimum(turn, 2 * n - 1 - turn)


def split_batch(batch: Batch, n: int, held: Int[np.ndarray, "n B"] | None = None) -> tuple[list[Batch], Bool[np.ndarray, "n R"]]:
    """A prefill batch as one smaller batch for each of n devices.

    A run at position p goes to device `zigzag(p // run)`, so that a long prompt lies evenly on the devices however it is cut into steps; where
    several sequences ask for the same device, to the one that has least to do in this step. On a device, runs of a sequence keep their order.

    Args:
        batch: with runs of more than one token.
        n: devices.
        held: how many tokens of each cache row each device has (`take_room`): a run that can't go to its own device goes where its row has least.

    Returns:
        Batches of equal shapes, shorter runs in place of the batch's, and which device has each of `logit_rows`: there the device's batch has the
        row's index, elsewhere 0. Hidden rows for the head are `psum(where(own[r], x[logit_rows], 0))`.

    Raises:
        ValueError: a decode batch: its tokens are on all devices.
    """
    if batch.run < 2:
        raise ValueError("run = 1: a decode batch isn't split, every device along the axis takes all of it")
    tokens = len(batch.tokens)
    run = _shorter(batch.run, max(2, tokens // (2 * n)))
    room = -(-tokens // (run * n))
    given: list[list[tuple[int, int, int, int]]] = [[] for _ in range(n)]
    for r in range(int(batch.n_runs)):
        row, first, length = (int(x[r]) for x in (batch.run_segments, batch.run_positions, batch.run_lengths))
        for at in range(0, length, run):
            device = int(zigzag(np.asarray((first + at) // run), n))
            if len(given[device]) == room:
                free = [d for d in range(n) if len(given[d]) < room]
                device = min(free, key=lambda d: (0 if held is None else held[d, row], len(given[d])))
            given[device].append((row, first + at, r * batch.run + at, min(run, length - at)))
    place = np.full((n, tokens), -1)
    batches = [_batch(batch, pieces, run, room, place[d]) for d, pieces in enumerate(given)]
    own = place[:, batch.logit_rows] >= 0
    rows = np.where(own, place[:, batch.logit_rows], 0).astype(np.int32)
    return [dataclasses.replace(b, logit_rows=rows[d]) for d, b in enumerate(batches)], own


def deal_batch(batch: Batch, n: int, held: Int[np.ndarray, "n B"] | None = None) -> list[Batch]:
    """`split_batch` with the rows that a device doesn't have as -1 in its `logit_rows`."""
    batches, own = split_batch(batch, n, held)
    rows: list[Any] = [np.where(mine, b.logit_rows, -1).astype(np.int32) for b, mine in zip(batches, own, strict=True)]
    return [dataclasses.replace(b, logit_rows=r) for b, r in zip(batches, rows, strict=True)]


def _shorter(run: int, most: int) -> int:
    """The longest part of a run, up to `most` tokens and at least 2, that it is a multiple of."""
    return max((d for d in range(2, min(run, most) + 1) if run % d == 0), default=run)


def _batch(batch: Batch, pieces: Sequence[tuple[int, int, int, int]], run: int, room: int, place: Int[np.ndarray, "T"]) -> Batch:
    """One device's; `place` is told where each of the whole batch's tokens is in it."""
    flat = np.zeros((2, room * run), np.int32)
    segments, runs = np.full(room * run, -1, np.int32), np.zeros((3, room), np.int32)
    for i, (row, first, source, length) in enumerate(pieces):
        here, there = slice(i * run, i * run + length), slice(source, source + length)
        flat[:, here] = batch.tokens[there], batch.positions[there]
        segments[here], runs[:, i] = row, (row, first, length)
        place[there] = np.arange(here.start, here.stop)
    leaves: list[Any] = [flat[0], flat[1], segments, *runs, np.int32(len(pieces)), np.zeros(1, np.int32)]
    return dataclasses.replace(Batch(*leaves), run=run)


def take_room(held: Int[np.ndarray, "n B"], batches: Sequence[Batch], capacity: int) -> Int[np.ndarray, "n B"]:
    """How many tokens of each cache row each device holds after a prefill step.

    Args:
        held: before it. A row whose sequence begins in this step counts from nothing.
        batches: of `split_batch`.
        capacity: positions of a row on a device: the last axis of `SplitKVState.positions`, there.

    Raises:
        ValueError: a device has no room for what it was dealt.
    """
    held = held.copy()
    for batch in batches:
        for r in range(int(batch.n_runs)):
            if batch.run_positions[r] == 0:
                held[:, batch.run_segments[r]] = 0
    for device, batch in enumerate(batches):
        rows = batch.run_segments[: batch.n_runs]
        np.add.at(held[device], rows, batch.run_lengths[: batch.n_runs])
        for row in rows[held[device, rows] + batch.run > capacity]:
            have = f"{held[device, row]} tokens on device {device} and a run of {batch.run}"
            raise ValueError(f"row {row}: {have} are more than its {capacity} positions: make the cache for more")
    return held


def pairs(spec: AttentionSpec, owner: Int[np.ndarray, "P"], n: int) -> Int[np.ndarray, "n n"]:
    """Query-key pairs that a prompt's attention has, by the device of the query and that of the key.

    Args:
        spec: the mask.
        owner: the device of each position.
        n: devices.
    """
    at = np.arange(len(owner))
    first = np.zeros_like(at)
    if spec.window is not None:
        first = np.maximum(first, at - spec.window + 1)
    if spec.chunk is not None:
        first = np.maximum(first, at // spec.chunk * spec.chunk)
    before = np.concatenate([np.zeros((1, n), int), np.cumsum(owner[:, None] == np.arange(n), axis=0)])  # keys of a device before a position
    seen = before[at + 1] - before[first]
    return np.stack([seen[owner == d].sum(0) for d in range(n)])


def balance(pairs_nn: Int[np.ndarray, "n n"]) -> tuple[float, float]:
    """The most work of a device over the mean, of the whole attention; and of the slowest device at each hop, if hops are waited for."""
    n = len(pairs_nn)
    mean = pairs_nn.sum() / n
    hops = [max(pairs_nn[d, (d - hop) % n] for d in range(n)) for hop in range(n)]
    return float(pairs_nn.sum(1).max() / mean), float(math.fsum(hops) / mean)
