"""A Hugging Face tensor put together out of leaves, by blocks of its rows: the converter's reading, the other way round.

Of each leaf that a tensor is made of, memory holds one chunk where chunks are cut along the tensor's rows. Where they are not (an expert's `down`; a
transposed or interleaved expert; `attn.o`), it holds that expert's matrix, or that leaf. This file reads converted folders, and writes nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints import store
from checkpoints.dequantize import Packing
from checkpoints.errors import CheckpointError
from checkpoints.families import Piece
from checkpoints.load import Checkpoint
from checkpoints.manifest import LeafRecord
from checkpoints.quantizer import SCALES, VALUES
from checkpoints.safetensors_writer import Tensor
from jaxmoe import formats

BLOCK_BYTES = 8 << 20
"""Of a tensor that are put together at once, counted as float32."""

_COLUMNS = 64

Parts = Sequence[tuple[str, Piece]]
"""The leaves and pieces that make up a tensor."""


class Rows:
    """The rows of one piece, in order, out of parts of its leaf that come one after another.

    Args:
        piece: which.
        parts: (start, stop, data): the leaf (or one expert of it) from `start` to `stop` along `piece.row_axis`; together they are all of it.
    """

    def __init__(self, piece: Piece, parts: Iterator[tuple[int, int, np.ndarray]]):
        self._piece, self._parts = piece, parts
        self._start, self._stop, self._held = 0, 0, np.empty(0)

    def take(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, `[stop - start, cols]`; `start` is never before an earlier call's."""
        each, axis = self._piece.rows_per_step, self._piece.row_axis
        first = at = start // each
        found = []
        while at < -(-stop // each):
            if at >= self._stop:
                self._start, self._stop, self._held = next(self._parts)
            until = min(-(-stop // each), self._stop)
            index = (slice(None),) * axis + (slice(at - self._start, until - self._start),)
            found.append(_contiguous(self._held[index].transpose(self._piece.order)).reshape(-1, self._piece.cols))
            at = until
        rows = found[0] if len(found) == 1 else np.concatenate(found)
        return rows[start - first * each : stop - first * each]


def _contiguous(x: np.ndarray) -> np.ndarray:
    """The same numbers in C order. A transposed array is copied a few columns at a time, whose rows then stay in the cache: four times as fast."""
    if x.flags.c_contiguous:
        return x
    out = np.empty(x.shape, x.dtype)
    for start in range(0, x.shape[-1], _COLUMNS):
        out[..., start : start + _COLUMNS] = x[..., start : start + _COLUMNS]
    return out


def tensor_blocks(tensor: Tensor, parts: Parts, rows_of: Callable[[str, Piece], Rows]) -> Iterator[np.ndarray]:
    """A tensor's numbers by blocks of its rows, in the dtype in which files' numbers are held; all of one expert before the next one's.

    Args:
        tensor: what it is to be.
        parts: leaves and pieces that make it up.
        rows_of: opens a piece.

    Raises:
        CheckpointError: a number that the tensor's dtype can't hold.
    """
    bands: dict[int, list[tuple[str, Piece]]] = {}
    for path, piece in parts:
        bands.setdefault(piece.base, []).append((path, piece))
    for base in sorted(bands):
        (height, width), *others = {(piece.height, piece.width) for _, piece in bands[base]}
        assert not others, tensor
        rows = [(piece, rows_of(path, piece)) for path, piece in bands[base]]
        step = max(1, BLOCK_BYTES // (4 * width))
        for start in range(0, height, step):
            yield _block(tensor, rows, start, min(start + step, height), width)


def _block(tensor: Tensor, rows: list[tuple[Piece, Rows]], start: int, stop: int, width: int) -> np.ndarray:
    """Rows `start` to `stop` of a band, `[n, width]`."""
    out = None
    for piece, source in rows:
        first, last, period = piece.take
        if piece.along == 1:
            data = store_as(tensor, source.take(start, stop))
            out = np.empty((stop - start, width), data.dtype) if out is None else out
            out.reshape(stop - start, -1, period)[:, :, first:last] = data.reshape(stop - start, -1, last - first)
            continue
        begin, end = (row // period * (last - first) + min(max(row % period - first, 0), last - first) for row in (start, stop))
        if begin == end:
            continue
        data = store_as(tensor, source.take(begin, end))
        if len(data) == stop - start:
            return data
        out = np.empty((stop - start, width), data.dtype) if out is None else out
        out[np.isin(np.arange(start, stop) % period, np.arange(first, last))] = data
    assert out is not None, tensor
    return out


def store_as(tensor: Tensor, held: np.ndarray) -> np.ndarray:
    """Numbers of a leaf (float32, or bfloat16 as uint16) as the tensor's dtype is held; exact where it can be, to nearest even otherwise.

    Raises:
        CheckpointError: finite ones that float16 can't hold.
    """
    if tensor.dtype == "F16":
        wide = formats.load_numpy(held)
        with np.errstate(over="ignore"):
            out = wide.astype(np.float16)
        if (np.isinf(out) & np.isfinite(wide)).any():
            raise CheckpointError(f"tensor {tensor.name} has numbers that float16 can't hold: export it as float32 or bfloat16")
        return out
    if tensor.dtype == "BF16" and held.dtype == np.float32:
        bits = np.ascontiguousarray(held).view(np.uint32)
        if not (bits & 0xFFFF).any():  # what was bfloat16 once: with the bits of its not-a-numbers
            return (bits >> 16).astype(np.uint16)
    return formats.store_numpy(held, "bfloat16" if tensor.dtype == "BF16" else "float32")


def leaf_parts(source: Checkpoint, path: str, piece: Piece) -> Iterator[tuple[int, int, np.ndarray]]:
    """A leaf, or one expert of it, in parts along `piece.row_axis`: chunks where they are cut along that, otherwise everything at once.

    Args:
        source: the converted folder.
        path: of the plain leaf; if it is quantized on disk, its numbers come as float32.
        piece: its expert, if any, and its row axis.

    Raises:
        CheckpointError: it is missing, damaged, or has another checksum than the manifest says.
    """
    leaves, axis = source.manifest.leaves, piece.row_axis
    if path in leaves:
        yield from _along(axis, piece.shape, _checked_chunks(source.folder, path, leaves[path], piece.expert))
        return
    values, scales = (leaves[f"{path}.{name}"] for name in (VALUES, SCALES))
    about: dict[str, Any] = source.manifest.quantization or {}
    packing = Packing(about["bits"], about["group"], piece.shape[0])
    both = [_checked_chunks(source.folder, f"{path}.{name}", record, piece.expert) for name, record in ((VALUES, values), (SCALES, scales))]
    if axis == 1 and _is_cut_along(1, values) and values.chunk[2] == scales.chunk[2]:
        for (_, start, stop, numbers), (*_, factors) in zip(*both, strict=True):
            yield start, stop, packing.dequantize(numbers, factors)
        return
    ((_, _, numbers),), ((_, _, factors),) = (
        _along(-1, record.shape[1:], chunks) for record, chunks in zip((values, scales), both, strict=True)
    )
    yield 0, piece.shape[axis], packing.dequantize(numbers, factors)


def _is_cut_along(axis: int, record: LeafRecord) -> bool:
    """Whether an expert's chunks are cut along this axis and no other."""
    return [i for i, (n, c) in enumerate(zip(record.shape[1:], record.chunk[1:], strict=True)) if c < n] == [axis]


def _along(axis: int, shape: tuple[int, ...], chunks: Iterator[tuple[int, int, int, np.ndarray]]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Chunks as they are where they are cut along this axis, or all as one."""
    whole = None
    for cut, start, stop, data in chunks:
        if cut == axis:
            yield start, stop, data
            continue
        whole = np.empty(shape, data.dtype) if whole is None else whole
        whole[(slice(None),) * cut + (slice(start, stop),)] = data
    if whole is not None:
        yield 0, shape[axis], whole


def _checked_chunks(folder: Path, path: str, record: LeafRecord, expert: int | None) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """A unit's chunks as they are on disk, (axis, start, stop, data); its checksum has been compared before the last one is given."""
    array = store.open_array(folder, path, record)
    outer = () if expert is None else (expert,)
    shape, chunk = record.shape[len(outer) :], record.chunk[len(outer) :]
    spans, crc = list(store.unit_chunks(shape, chunk)), 0
    for i, (axis, start, stop) in enumerate(spans):
        data = store.read_array(folder, path, array, (*outer, *(slice(None),) * axis, slice(start, stop)))
        crc = zlib.crc32(np.ascontiguousarray(data).data, crc)
        if i == len(spans) - 1 and f"{crc:08x}" != record.crc32[expert or 0]:
            which = "" if expert is None else f", expert {expert},"
            raise CheckpointError(f"{folder}: leaf {path}{which} has checksum {crc:08x}, the manifest says {record.crc32[expert or 0]}")
        yield axis, start, stop, data
