"""How arrays are cut into chunks, and which of them a process writes: those of the shards that it holds first copies of.

It knows shardings and chunks, and neither pytrees nor files.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from checkpoints.trees.format import TreeLeaf, dtype_of

CHUNK_BYTES = 16 << 20
"""Most bytes in a chunk."""

Region = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """One chunk that this process writes: `region` of leaf `path`, which is `inner` of `source` (a numpy array, or a jax array on one device)."""

    path: str
    key: str
    region: Region
    source: Any
    inner: Region
    nbytes: int


def chunk_shape(shape: tuple[int, ...], shard: tuple[int, ...], itemsize: int, limit: int = CHUNK_BYTES) -> tuple[int, ...]:
    """How an array of `shape` is cut whose shards have shape `shard`: into shards, and those along one axis (along more where one isn't enough) until
    a chunk has `limit` bytes at most. No chunk belongs to two shards."""
    chunk = tuple(max(1, n) for n in shard)
    while 0 not in shard and math.prod(chunk) * itemsize > limit and max(chunk) > 1:
        size = math.prod(chunk) * itemsize
        steps = [_step(n, max(1, limit // (size // n)), whole == part) for n, whole, part in zip(chunk, shape, shard, strict=True)]
        # The axis along which fewest chunks are small enough; without one, that which makes them smallest.
        rank = [(max(limit, size // n * s), math.ceil(n / s), axis) for axis, (n, s) in enumerate(zip(chunk, steps, strict=True)) if n > 1]
        axis = min(rank)[2]
        chunk = (*chunk[:axis], steps[axis], *chunk[axis + 1 :])
    return chunk


def _step(n: int, most: int, uncut: bool) -> int:
    """The length, at most `most`, of the parts that `n` is cut into: about even ones, or, on an axis that is cut into shards, ones that divide it."""
    if uncut or n == 1:
        return math.ceil(n / math.ceil(n / most))
    return max(d for d in range(1, min(n, most) + 1) if n % d == 0)


def pieces_of(path: str, leaf: TreeLeaf, array: Any) -> Iterator[Piece]:
    """The chunks of a leaf that this process writes: of the shards that it holds first copies of, or, where each process has the whole leaf, all of
    them in process 0 and none elsewhere."""
    if not _is_distributed(array) and jax.process_index():
        return
    whole = tuple(slice(0, n) for n in leaf.shape)
    shards = [(whole, array)] if isinstance(array, np.ndarray) else [(s.index, s.data) for s in array.addressable_shards if s.replica_id == 0]
    for index, source in shards:
        starts = [s.start or 0 for s in index]
        spans = [range(a, a + n, c) for a, n, c in zip(starts, source.shape, leaf.chunk, strict=True)]
        for corner in itertools.product(*spans):
            stops = [min(at + c, a + n) for at, c, a, n in zip(corner, leaf.chunk, starts, source.shape, strict=True)]
            region = tuple(slice(at, stop) for at, stop in zip(corner, stops, strict=True))
            inner = tuple(slice(at - a, stop - a) for at, stop, a in zip(corner, stops, starts, strict=True))
            nbytes = math.prod(s.stop - s.start for s in region) * dtype_of(leaf.dtype).itemsize
            yield Piece(path, leaf.chunk_key(corner), region, source, inner, nbytes)


def _is_distributed(value: Any) -> bool:
    """Whether processes hold different parts of it."""
    return isinstance(value, jax.Array) and not value.is_fully_addressable


def on_host(source: Any) -> np.ndarray:
    """A piece's source as a numpy array; on a CPU it stays where it is, and as long as it is looked at it can't be donated (jax copies instead)."""
    # Of another array object over the same buffer: jax keeps the host's copy, or the view, as long as the object lives.
    return source if isinstance(source, np.ndarray) else np.asarray(own_view(source))


def own_view(source: jax.Array) -> jax.Array:
    """Another array object over the buffer of a jax array on one device."""
    return jax.make_array_from_single_device_arrays(source.shape, source.sharding, [source])
