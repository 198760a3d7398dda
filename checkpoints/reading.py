"""Reads slices of chunked arrays: each chunk once however many slices share it, several at a time, in bounded memory; and counts the bytes.

It knows chunk grids and numpy buffers, and neither what an array means nor where its numbers go.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorstore as ts

from checkpoints import store
from checkpoints.errors import CheckpointError

Box = tuple[tuple[int, int], ...]
"""(start, stop) on every axis."""

BLOCK_BYTES = 8 << 20
"""Read by one call at most, if chunks aren't larger."""

PENDING_BYTES = 32 << 20
"""Of blocks that are being read at the same time, if a single one isn't larger."""


class Target(NamedTuple):
    """Where a slice of an array goes: `out` has the shape of `box`."""

    box: Box
    out: np.ndarray


class Reader:
    """Arrays by path, opened when they are first asked for, and what was read of them.

    Attributes:
        bytes_read: of whole chunks, as checksums and codecs make it; what little arrays say about themselves doesn't count.
        bytes_owned: of what was asked for, as it lies on disk.
    """

    def __init__(self, name: str, open_array: Callable[[str], ts.TensorStore], chunk_extra: int = 0, check: Callable[[str, Box], None] | None = None):
        """
        Args:
            name: of the folder, for errors.
            open_array: opens an array for reading; raises CheckpointError.
            chunk_extra: bytes that a chunk takes on disk besides its numbers.
            check: looks at the chunks of a slice that was read; raises CheckpointError.
        """
        self._name, self._open, self._extra, self._check = name, open_array, chunk_extra, check
        self._arrays: dict[str, ts.TensorStore] = {}
        self._lock = threading.Lock()
        self.bytes_read = self.bytes_owned = 0

    def array(self, path: str) -> ts.TensorStore:
        """The array, open."""
        if path not in self._arrays:
            self._arrays[path] = self._open(path)
        return self._arrays[path]

    def own(self, nbytes: int) -> None:
        """Counts bytes that were asked for."""
        with self._lock:
            self.bytes_owned += nbytes

    def read(self, path: str, box: Box) -> np.ndarray:
        """One slice as it is on disk; called from any thread.

        Raises:
            CheckpointError: a chunk of it is missing or damaged.
        """
        array = self.array(path)
        future = array[tuple(slice(*span) for span in box)].read()
        self._count(box, array)
        return self._result(path, future, box)

    def gather(self, path: str, targets: Sequence[Target], convert: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> None:
        """Fills every target's `out`; no chunk is read twice.

        Args:
            path: which array.
            targets: slices of it, which may overlap.
            convert: makes what `out` holds of a part of the array.

        Raises:
            CheckpointError: a chunk is missing or damaged.
        """
        array = self.array(path)
        chunk, itemsize = chunk_of(array), array.dtype.numpy_dtype.itemsize
        pending: deque[tuple[ts.Future, Box, list[Target]]] = deque()
        held = 0
        for block, sharers in _blocks(array.shape, chunk, itemsize, targets):
            wanted = _bounds([_meet(block, target.box) for target in sharers])
            nbytes = volume(wanted) * itemsize
            while pending and held + nbytes > PENDING_BYTES:
                held -= self._finish(path, pending.popleft(), convert)
            self._count(wanted, array)
            pending.append((array[tuple(slice(*span) for span in wanted)].read(), wanted, sharers))
            held += nbytes
        while pending:
            self._finish(path, pending.popleft(), convert)

    def _finish(self, path: str, item: tuple[ts.Future, Box, list[Target]], convert: Callable[[np.ndarray], np.ndarray]) -> int:
        """Waits for a block and hands it out; gives its bytes."""
        future, box, sharers = item
        data = self._result(path, future, box)
        for target in sharers:
            part = _meet(box, target.box)
            target.out[within(part, target.box)] = convert(data[within(part, box)])
        return data.nbytes

    def _result(self, path: str, future: ts.Future, box: Box) -> np.ndarray:
        try:
            data = future.result()
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self._name}: leaf {path} is damaged: {store.one_line(error)}") from error
        if self._check is not None:
            self._check(path, box)
        return data

    def _count(self, box: Box, array: ts.TensorStore) -> None:
        chunk = chunk_of(array)
        chunks = math.prod(-(-stop // c) - start // c if stop > start else 0 for (start, stop), c in zip(box, chunk, strict=True))
        nbytes = chunks * (math.prod(chunk) * array.dtype.numpy_dtype.itemsize + self._extra)
        with self._lock:
            self.bytes_read += nbytes


def chunk_of(array: ts.TensorStore) -> tuple[int, ...]:
    """The shape of what can be read on its own."""
    return tuple(n or 1 for n in array.chunk_layout.read_chunk.shape or ())


def box_of(index: tuple, shape: tuple[int, ...]) -> tuple[Box, tuple]:
    """`(box, rest)` of ints and slices as numpy takes them: `x[index]` is `x[box][rest]`.

    Raises:
        IndexError: too many of them, or one that is out of range.
        TypeError: something else among them.
    """
    if len(index) > len(shape):
        raise IndexError(f"{len(index)} indices for {len(shape)} axes")
    box: list[tuple[int, int]] = []
    rest: list[int | slice] = []
    for part, n in zip((*index, *(slice(None),) * (len(shape) - len(index))), shape, strict=True):
        if isinstance(part, slice):
            span = range(*part.indices(n))
            box.append((min(span[0], span[-1]), max(span[0], span[-1]) + 1) if span else (0, 0))
            rest.append(slice(None, None, part.step))
            continue
        if not isinstance(part, int | np.integer):
            raise TypeError(f"{part!r}: an index is an int or a slice")
        if not -n <= part < n:
            raise IndexError(f"index {part} of an axis of {n}")
        box.append((int(part) % n, int(part) % n + 1))
        rest.append(0)
    return tuple(box), tuple(rest)


def volume(box: Box) -> int:
    """Elements in a box."""
    return math.prod(stop - start for start, stop in box)


def covered(boxes: Sequence[Box]) -> int:
    """Elements in any of some boxes, each counted once."""
    cuts = [sorted({edge for span in spans for edge in span}) for spans in zip(*boxes, strict=True)]
    cells = itertools.product(*(itertools.pairwise(edges) for edges in cuts))
    return sum(volume(cell) for cell in cells if any(_meet(cell, box) == cell for box in boxes))


def within(part: Box, whole: Box) -> tuple[slice, ...]:
    """Where a box lies in another, as numpy takes it."""
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(part, whole, strict=True))


def _meet(a: Box, b: Box) -> Box:
    return tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))


def _bounds(boxes: list[Box]) -> Box:
    return tuple((min(start for start, _ in spans), max(stop for _, stop in spans)) for spans in zip(*boxes, strict=True))


def _blocks(shape: tuple[int, ...], chunk: tuple[int, ...], itemsize: int, targets: Sequence[Target]) -> Iterator[tuple[Box, list[Target]]]:
    """Boxes of whole chunks, none in two of them, each with the targets that touch it; they touch every chunk of it.

    The grid is cut where any target's chunks begin or end, and what is then still large into blocks.
    """
    spans = [(_whole_chunks(target.box, shape, chunk), target) for target in targets if volume(target.box)]
    cuts = [sorted({edge for box, _ in spans for edge in box[axis]}) for axis in range(len(shape))]
    for cell in itertools.product(*(itertools.pairwise(edges) for edges in cuts)):
        sharers = [target for box, target in spans if all(a <= c and d <= b for (a, b), (c, d) in zip(box, cell, strict=True))]
        if sharers:
            yield from ((block, sharers) for block in _split(cell, chunk, itemsize))


def _whole_chunks(box: Box, shape: tuple[int, ...], chunk: tuple[int, ...]) -> Box:
    return tuple((start // c * c, min(n, -(-stop // c) * c)) for (start, stop), n, c in zip(box, shape, chunk, strict=True))


def _split(box: Box, chunk: tuple[int, ...], itemsize: int) -> Iterator[Box]:
    """A box in parts of at most `BLOCK_BYTES`, or of one chunk; the first axes are cut first."""
    nbytes = volume(box) * itemsize
    for axis, (start, stop) in enumerate(box):
        if nbytes > BLOCK_BYTES and stop - start > chunk[axis]:
            step = max(1, BLOCK_BYTES * (stop - start) // (nbytes * chunk[axis])) * chunk[axis]
            for first in range(start, stop, step):
                yield from _split((*box[:axis], (first, min(first + step, stop)), *box[axis + 1 :]), chunk, itemsize)
            return
    yield box
