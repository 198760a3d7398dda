"""What a conversion writes, checksums and resumes as one: a leaf, or one expert of one, and the chunks it is written in.

A unit is made of one piece of the source. It fills one array, or two where it is quantized. This file reads the source; it writes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from checkpoints import store
from checkpoints.families import Piece, leaf_dtype_name
from checkpoints.quantized import Unpacked
from checkpoints.quantizer import SCALES, VALUES, Quantizer
from jaxmoe import formats
from jaxmoe.spec import Leaf

BLOCK_BYTES = 8 << 20
"""Of the source, as float32, that are decoded and picked from at once."""

Part = tuple[tuple[slice, ...], np.ndarray]
"""Where a chunk lies in its array, and its numbers."""


@dataclasses.dataclass(frozen=True)
class Output:
    """One array that a unit fills, or fills an expert of: its path, the whole array, its chunk (with the array's axes), and what its numbers are."""

    path: str
    leaf: Leaf
    chunk: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Unit:
    """A leaf, or one expert of it. `chunk` has the axes of the plain weights, without the experts'."""

    path: str
    leaf: Leaf
    piece: Piece
    chunk: tuple[int, ...]
    quantizer: Quantizer | None = None

    @property
    def key(self) -> tuple[str, int | None]:
        """What names the unit: leaf and expert."""
        return self.path, self.piece.expert

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The arrays that it fills."""
        chunk = self.chunk if self.piece.expert is None else (1, *self.chunk)
        if self.quantizer is None:
            return (Output(self.path, self.leaf, chunk, leaf_dtype_name(self.leaf)),)
        leaves = self.quantizer.leaves(self.leaf)
        chunks = self.quantizer.chunks((self.chunk[0], self.chunk[1]))
        names = ((VALUES, f"int{self.quantizer.bits}"), (SCALES, "float32"))
        return tuple(
            Output(f"{self.path}.{name}", leaf, (1, *part), dtype) for (name, dtype), leaf, part in zip(names, leaves, chunks, strict=True)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the unit as stored."""
        share = 1 if self.piece.expert is None else self.leaf.shape[0]
        return sum(output.leaf.nbytes // share for output in self.outputs)

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """Its chunks in order, as (axis, start, stop) of the plain weights."""
        return store.unit_chunks(self.piece.shape, self.chunk)

    def region(self, output: Output, axis: int, start: int, stop: int) -> tuple[slice, ...]:
        """Where a chunk of the unit lies in one of its arrays."""
        expert = self.piece.expert
        inner = []
        for i, (n, whole) in enumerate(zip(output.leaf.shape[-len(self.piece.shape) :], self.piece.shape, strict=True)):
            inner.append(slice(start * n // whole, stop * n // whole) if i == axis else slice(0, n))
        return tuple(inner) if expert is None else (slice(expert, expert + 1), *inner)

    def files(self, folder: Path) -> Iterator[str]:
        """Where its chunks lie."""
        for axis, start, stop in self.chunks():
            for output in self.outputs:
                index = (s.start // c for s, c in zip(self.region(output, axis, start, stop), output.chunk, strict=True))
                yield store.chunk_file(folder, output.path, tuple(index))


def chunk_data(source: Unpacked, unit: Unit) -> Iterator[tuple[Part, ...]]:
    """The unit's chunks in order, each with a part for every output.

    Memory: where chunks are cut along the tensor's rows, a chunk's rows; otherwise the unit (an expert's `down`), or what it is quantized to.
    """
    if unit.quantizer is not None:
        return _quantized_data(source, unit, unit.quantizer)
    return _plain_data(source, unit)


def _plain_data(source: Unpacked, unit: Unit) -> Iterator[tuple[Part, ...]]:
    piece, (output,) = unit.piece, unit.outputs
    whole = None
    for axis, start, stop in unit.chunks():
        if axis == piece.row_axis:
            block = _rows(source, piece, start, stop, output.dtype)
        else:
            if whole is None:
                whole = _rows(source, piece, 0, piece.shape[piece.row_axis], output.dtype)
            block = whole[_along(axis, start, stop)]
        yield (_part(unit, output, axis, start, stop, block),)


def _quantized_data(source: Unpacked, unit: Unit, quantizer: Quantizer) -> Iterator[tuple[Part, ...]]:
    whole = None
    for axis, start, stop in unit.chunks():
        if axis == unit.piece.row_axis == 1:  # chunks are whole columns, and rows of the source
            w = _rows(source, unit.piece, start, stop, "float32")
            blocks = quantizer.apply(unit.path, unit.piece.expert or 0, w, slice(start, stop))
        else:
            if whole is None:
                whole = _quantize_whole(source, unit, quantizer)
            values, scales = (unit.region(output, axis, start, stop)[1:] for output in unit.outputs)
            blocks = whole[0][values], whole[1][scales]
        yield tuple(_part(unit, output, axis, start, stop, block) for output, block in zip(unit.outputs, blocks, strict=True))


def _quantize_whole(source: Unpacked, unit: Unit, quantizer: Quantizer) -> tuple[np.ndarray, np.ndarray]:
    """An expert's values and scales, by blocks of columns; the source goes by them too where its rows are columns here."""
    piece, expert = unit.piece, unit.piece.expert or 0
    k, n = piece.shape
    whole = _rows(source, piece, 0, k, "float32") if piece.row_axis == 0 else None
    values, scales = (np.empty(output.leaf.shape[1:], output.leaf.dtype) for output in unit.outputs)
    step = max(1, BLOCK_BYTES // (4 * k))
    for start in range(0, n, step):
        columns = slice(start, min(n, start + step))
        w = _rows(source, piece, start, columns.stop, "float32") if whole is None else whole[:, columns]
        values[:, columns], scales[:, columns] = quantizer.apply(unit.path, expert, w, columns)
    return values, scales


def _along(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, slice(start, stop))


def _part(unit: Unit, output: Output, axis: int, start: int, stop: int, block: np.ndarray) -> Part:
    data = formats.contiguous(block)
    return unit.region(output, axis, start, stop), data if unit.piece.expert is None else data[None]


def _rows(source: Unpacked, piece: Piece, start: int, stop: int, dtype: str) -> np.ndarray:
    """Steps `start` to `stop` along the axis of the leaf that the source's rows run along, as the leaf has them."""
    step = piece.rows_per_step
    return piece.to_leaf(read_rows(source, piece, start * step, stop * step, dtype))


def read_rows(source: Unpacked, piece: Piece, start: int, stop: int, dtype: str) -> np.ndarray:
    """Rows `start` to `stop` of a piece, as `dtype` is held; the source is read in blocks, so that what lies between them is never in memory whole.

    Returns:
        `[stop - start, cols]`.
    """
    if source.holds(piece.hf, formats.leaf_dtype(dtype)) and stop > start:
        whole = next(iter(piece.blocks(start, stop, piece.height)))
        if whole.stop - whole.first == stop - start and piece.along == 0:  # neighbours in the file, and nothing to be done to them
            return source.read_matrix(piece.hf, piece.width, whole.first, whole.stop)
    out = np.empty((stop - start, piece.cols), formats.leaf_dtype(dtype))
    for block in piece.blocks(start, stop, max(1, BLOCK_BYTES // (4 * piece.width))):
        rows = source.read_matrix(piece.hf, piece.width, block.first, block.stop, block.at)
        out[block.rows.start - start : block.rows.stop - start] = formats.store_numpy(piece.take_columns(rows), dtype)
    return out
