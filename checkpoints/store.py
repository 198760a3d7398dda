"""The arrays of a converted folder: one Zarr v3 array a leaf, in a folder named by the leaf's path, as Orbax lays
them out without OCDBT.

Chunks are uncompressed, each followed by its CRC-32C, so that any reader notices a damaged one, and so that an
expert's eighth is one file of plain bytes. With `_METADATA` beside them, `orbax.checkpoint` restores the tree as it
is. Values equal to zero are written like any others, and a missing chunk is an error here (stock Orbax reads it as
zeros).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from checkpoints.errors import CheckpointError
from checkpoints.families import Piece
from checkpoints.manifest import LeafRecord, write_text
from jaxmoe.spec import Leaf

ORBAX_METADATA = "_METADATA"
CHUNK_BYTES = 16 << 20
"""Aimed-at size of the chunks of leaves that aren't experts."""

_CRC_BYTES = 4
_EXPERT_PARTS = 8


def chunk_shape(leaf: Leaf, piece: Piece) -> tuple[int, ...]:
    """How a leaf is cut.

    Experts `[E, D, F]` go by one expert and an eighth of F (`[E, F, D]` as well); where 8 doesn't divide F, the
    largest smaller count that does. Any other leaf is cut along the axis that its source's rows run along, into at
    most about `CHUNK_BYTES`.
    """
    if piece.expert is not None:
        axis = leaf.axes.index("hidden")
        parts = max(n for n in range(1, _EXPERT_PARTS + 1) if leaf.shape[axis] % n == 0)
        return (1, *(n // parts if i == axis else n for i, n in enumerate(leaf.shape) if i))
    axis = piece.row_axis
    step = math.prod(leaf.shape) // leaf.shape[axis] * leaf.dtype.itemsize
    limit = max(1, min(leaf.shape[axis], CHUNK_BYTES // step))
    even = max(n for n in range(1, limit + 1) if leaf.shape[axis] % n == 0)
    steps = even if 4 * even >= limit else limit  # an uneven last chunk takes a whole one's bytes on disk
    return tuple(steps if i == axis else n for i, n in enumerate(leaf.shape))


def _spec(folder: Path, path: str) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder / path}/"},
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }


_WRITING = ts.Context({"file_io_sync": False})  # one sync at the end costs less than one per chunk


def create_array(folder: Path, path: str, leaf: Leaf, chunk: tuple[int, ...]) -> ts.TensorStore:
    """Opens a leaf's array for writing, and makes it where it isn't there.

    Raises:
        CheckpointError: an array of another shape, dtype or chunk is there.
        OSError, ValueError: it cannot be written.
    """
    metadata = {
        "shape": list(leaf.shape),
        "data_type": leaf.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "fill_value": 0,
    }
    spec = {**_spec(folder, path), "metadata": metadata}
    return ts.open(spec, create=True, open=True, read=True, write=True, context=_WRITING).result()


def write_chunk(array: ts.TensorStore, region: tuple[slice, ...], data: np.ndarray) -> ts.Future:
    """Begins to write one chunk; `data` may be dropped, not changed, before the future is done."""
    return array[region].write(data, can_reference_source_data_indefinitely=True).commit


def chunk_intact(folder: Path, path: str, chunk: tuple[int, ...], itemsize: int, index: tuple[int, ...]) -> bool:
    """Whether a chunk's file is there and of full length."""
    try:
        size = (folder / path / ".".join(map(str, index))).stat().st_size
    except FileNotFoundError:
        return False
    return size == math.prod(chunk) * itemsize + _CRC_BYTES


def open_array(folder: Path, path: str, record: LeafRecord) -> ts.TensorStore:
    """Opens a leaf's array for reading, and compares it with its record.

    Raises:
        CheckpointError: it's missing, damaged, or of another shape or dtype.
    """
    try:
        array = ts.open(_spec(folder, path), open=True, read=True).result()
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder}: leaf {path} is missing or damaged: {one_line(error)}") from error
    if tuple(array.shape) != record.shape or array.dtype.name != record.stored:
        raise CheckpointError(
            f"{folder}: leaf {path} is damaged: {array.dtype.name}{list(array.shape)} on disk, "
            f"{record.stored}{list(record.shape)} in the manifest"
        )
    return array


def read_array(folder: Path, path: str, array: ts.TensorStore, index: tuple) -> np.ndarray:
    """The slice `index` (ints and slices) of a leaf; only the chunks that it touches are read.

    Raises:
        CheckpointError: one of those is missing or damaged.
    """
    try:
        return array[index].read().result()
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder}: leaf {path} is damaged: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """An exception's text without line breaks and without the source locations that tensorstore appends."""
    return " ".join(str(error).split(" [source locations=")[0].split())


def unit_chunks(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """The chunks of one unit (a leaf, or one expert of it) in order, as (axis, start, stop): they are cut along one
    axis at most."""
    cut = [axis for axis, (n, c) in enumerate(zip(shape, chunk, strict=True)) if c < n]
    assert len(cut) <= 1, (shape, chunk)
    axis = cut[0] if cut else 0
    for start in range(0, shape[axis], chunk[axis]):
        yield axis, start, min(start + chunk[axis], shape[axis])


def write_orbax_metadata(folder: Path, leaves: Mapping[str, Leaf]) -> None:
    """Writes what `orbax.checkpoint` reads a tree's structure from (its PyTree handler, without OCDBT, Zarr v3, numpy
    leaves)."""
    tree = {}
    for path, leaf in leaves.items():
        keys = path.split(".")
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],  # 2: a dict's key
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": list(leaf.shape)},
        }
    data = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    write_text(folder / ORBAX_METADATA, json.dumps(data))


Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in all, leaf path) after each chunk."""
