"""The arrays of a converted folder: one Zarr v3 array a leaf, in a folder named by the leaf's path, as Orbax lays
them out without OCDBT.

Chunks are uncompressed, each followed by its CRC-32C, so that any reader notices a damaged one, and so that an
expert's eighth is one file of plain bytes. With `_METADATA` beside them, `orbax.checkpoint` restores the tree as it
is. Values equal to zero are written like any others, and a missing chunk is an error here (stock Orbax reads it as
zeros).
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from checkpoints.errors import CheckpointError
from checkpoints.families import Piece
from checkpoints.manifest import LeafRecord, parse_json, write_text
from jaxmoe.spec import Leaf

ORBAX_METADATA = "_METADATA"
CHUNK_BYTES = 16 << 20
"""Aimed-at size of the chunks of leaves that aren't experts."""

CRC_BYTES = 4
"""Of a chunk's file, after its numbers."""

_PARTS = 8
_PART_BYTES = 64 << 10  # smaller parts of a leaf aren't worth a file of their own
_SPLIT_AXES = ("vocab", "heads", "kv_heads", "hidden", "mlp_hidden", "shared_hidden")  # what tensor parallelism splits


def chunk_shape(leaf: Leaf, piece: Piece, step: int = 1) -> tuple[int, ...]:
    """How a leaf is cut, so that what splits it later reads no more than its share.

    Experts `[E, D, F]` go by one expert and an eighth of F (`[E, F, D]` as well); where 8 doesn't divide F, the largest smaller count that does.
    Any other leaf is cut along the axis that tensor parallelism splits, or along the one that its source's rows run along if it has none: into a
    multiple of 8 chunks (4, 2, 1 where 8 doesn't divide, or where they would be small), of about `CHUNK_BYTES` at most.

    Args:
        leaf: the whole array.
        piece: the part of the source that fills it, or one expert of it.
        step: numbers along an expert's hidden axis that chunks may not part.
    """
    if piece.expert is not None:
        axis = leaf.axes.index("hidden")
        parts = max(n for n in range(1, _PARTS + 1) if leaf.shape[axis] % (n * step) == 0)
        return (1, *(n // parts if i == axis else n for i, n in enumerate(leaf.shape) if i))
    axis = next((leaf.axes.index(name) for name in _SPLIT_AXES if name in leaf.axes), piece.row_axis)
    steps = _steps(leaf.shape[axis], leaf.nbytes)
    return tuple(steps if i == axis else n for i, n in enumerate(leaf.shape))


def _steps(length: int, nbytes: int) -> int:
    """How many of an axis's steps a chunk takes."""
    base = next(n for n in (_PARTS, 4, 2, 1) if length % n == 0 and (n == 1 or nbytes // n >= _PART_BYTES))
    limit = max(1, min(length, CHUNK_BYTES * length // max(1, nbytes)))
    even = [length // n for n in range(base, length + 1, base) if length % n == 0 and length // n <= limit]
    if even and 4 * even[0] >= min(limit, length // base):
        return even[0]
    return limit  # an uneven last chunk takes a whole one's bytes on disk


def _spec(folder: Path, path: str) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{os.path.realpath(folder)}/{path}/"},  # '..' in a path is an error of tensorstore's
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }


_WRITING = ts.Context({"file_io_sync": False})  # one sync at the end costs less than one per chunk
_ZARR_JSON = "zarr.json"


def _metadata(shape: tuple[int, ...], stored: str, chunk: tuple[int, ...]) -> dict[str, Any]:
    return {
        "shape": list(shape),
        "data_type": stored,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "fill_value": 0,
    }


def create_array(folder: Path, path: str, leaf: Leaf, chunk: tuple[int, ...]) -> ts.TensorStore:
    """Opens a leaf's array for writing, and makes it where it isn't there.

    Raises:
        OSError, ValueError: it cannot be written, or an array of another shape, dtype or chunk is there.
    """
    spec = {**_spec(folder, path), "metadata": _metadata(leaf.shape, leaf.dtype.name, chunk)}
    _drop_if_cut(folder / path / "zarr.json")
    return ts.open(spec, create=True, open=True, read=True, write=True, context=_WRITING).result()


def _drop_if_cut(path: Path) -> None:
    """Removes metadata of which a power cut has left the name only: they weren't synced."""
    try:
        json.loads(path.read_bytes())
    except FileNotFoundError:
        return
    except ValueError:
        path.unlink()


def write_chunk(array: ts.TensorStore, region: tuple[slice, ...], data: np.ndarray) -> ts.Future:
    """Begins to write one chunk; `data` may be dropped, not changed, before the future is done."""
    return array[region].write(data, can_reference_source_data_indefinitely=True).commit


class Writes:
    """Chunks that are being written, of so many bytes at most, if a single one isn't larger. However its block ends, nothing is being written any
    more after it.

    Raises:
        OSError, ValueError: a chunk could not be written; at a later one, or at the end.
    """

    def __init__(self, limit: int):
        self._limit, self._held = limit, 0
        self._pending: deque[tuple[ts.Future, int]] = deque()

    def __enter__(self) -> Writes:
        return self

    def begin(self, array: ts.TensorStore, region: tuple[slice, ...], data: np.ndarray) -> None:
        """Begins to write a chunk, once there is room for it."""
        while self._pending and self._held + data.nbytes > self._limit:
            self._wait()
        self._pending.append((write_chunk(array, region, data), data.nbytes))
        self._held += data.nbytes

    def __exit__(self, kind, *_) -> None:
        try:
            while self._pending and kind is None:
                self._wait()
        finally:
            for future, _nbytes in self._pending:
                future.exception()  # waits; what went wrong first is already on its way

    def _wait(self) -> None:
        future, nbytes = self._pending.popleft()
        self._held -= nbytes
        future.result()


def chunk_intact(folder: Path, path: str, chunk: tuple[int, ...], itemsize: int, index: tuple[int, ...]) -> bool:
    """Whether a chunk's file is there and of full length."""
    try:
        size = os.stat(chunk_file(folder, path, index)).st_size
    except FileNotFoundError:
        return False
    return size == math.prod(chunk) * itemsize + CRC_BYTES


def chunk_file(folder: Path, path: str, index: tuple[int, ...]) -> str:
    """The file of a leaf's chunk."""
    return f"{folder}/{path}/{'.'.join(map(str, index))}"


def chunk_crcs(folder: Path, path: str, shape: tuple[int, ...], chunk: tuple[int, ...]) -> str:
    """The CRC-32C that each of a leaf's files ends with: 8 hexadecimal digits for every chunk, in C order.

    Raises:
        CheckpointError: a chunk is missing or can't be read.
    """
    return "".join(_ending(folder, path, index, -1) for index in np.ndindex(*_grid(shape, chunk)))


def check_chunks(folder: Path, path: str, record: LeafRecord, box: Sequence[tuple[int, int]]) -> None:
    """Makes sure that the chunks which a slice touches are those that were written there.

    A chunk that lies in another's place is whole, and its own checksum right; here the checksums are compared with the manifest's.

    Raises:
        CheckpointError: one of them is another.
    """
    grid, nbytes = _grid(record.shape, record.chunk), math.prod(record.chunk) * np.dtype(record.stored).itemsize
    for index in itertools.product(*(range(start // c, -(-stop // c)) for (start, stop), c in zip(box, record.chunk, strict=True))):
        at = 2 * CRC_BYTES * int(np.ravel_multi_index(index, grid))
        expected, got = record.chunk_crc32c[at : at + 2 * CRC_BYTES], _ending(folder, path, index, nbytes)
        if got != expected:
            name = ".".join(map(str, index))
            raise CheckpointError(f"{folder}: leaf {path} is damaged: chunk {name} is not the one that was written (CRC-32C {got}, not {expected})")


def _grid(shape: tuple[int, ...], chunk: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-n // c) for n, c in zip(shape, chunk, strict=True))


def _ending(folder: Path, path: str, index: tuple[int, ...], nbytes: int) -> str:
    """The checksum after a chunk's bytes; -1: at the end of its file."""
    name = ".".join(map(str, index))
    try:
        fd = os.open(chunk_file(folder, path, index), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, CRC_BYTES, nbytes if nbytes >= 0 else os.fstat(fd).st_size - CRC_BYTES).hex()
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointError(f"{folder}: leaf {path} is damaged: chunk {name}: {error.strerror}") from error


def bytes_on_disk(leaf: Leaf, chunk: tuple[int, ...], block: int) -> int:
    """What a leaf's files take on a disk that is shared out in blocks of so many bytes."""
    count = math.prod(-(-n // c) for n, c in zip(leaf.shape, chunk, strict=True))
    size = math.prod(chunk) * leaf.dtype.itemsize + CRC_BYTES
    return count * (-(-size // block) * block) + block


def open_array(folder: Path, path: str, record: LeafRecord) -> ts.TensorStore:
    """Opens a leaf's array for reading; it must be exactly what was written, for numbers could be read otherwise.

    Raises:
        CheckpointError: it's missing, damaged, or of another shape, dtype, chunk or encoding.
    """
    array = _open(folder, path)
    got, wanted = _on_disk(folder / path / _ZARR_JSON), _metadata(record.shape, record.stored, record.chunk)
    for key in wanted:
        if _explicit(got.get(key)) != _explicit(wanted[key]):
            raise CheckpointError(f"{folder}: leaf {path} is damaged: {_ZARR_JSON} has {key} {got.get(key)}, {wanted[key]} was written")
    return array


def _open(folder: Path, path: str) -> ts.TensorStore:
    try:
        return ts.open(_spec(folder, path), open=True, read=True).result()
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder}: leaf {path} is missing or damaged: {one_line(error)}") from error


def _on_disk(path: Path) -> dict[str, Any]:
    try:
        data = parse_json(path, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: missing or unreadable: {error.strerror}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: damaged: not a JSON object")
    return data


def _explicit(value: Any) -> Any:
    """A part of an array's metadata without the configurations that mean the same whether they are written out or not."""
    if isinstance(value, list):
        return [_explicit(v) for v in value]
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if v not in ({"separator": "."}, {"endian": "little"})}
    return value


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
    write_text(folder / ORBAX_METADATA, json.dumps(_orbax_metadata({path: leaf.shape for path, leaf in leaves.items()})))


def orbax_metadata_problem(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What is wrong with the file that `write_orbax_metadata` wrote, if anything is."""
    path = folder / ORBAX_METADATA
    if not path.is_file():
        return f"{ORBAX_METADATA} is missing"
    try:
        same = parse_json(path, path.read_bytes()) == _orbax_metadata(shapes)
    except CheckpointError:
        same = False
    return None if same else f"{ORBAX_METADATA} is not what was written: stock Orbax would restore another tree"


def _orbax_metadata(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    tree = {}
    for path, shape in shapes.items():
        keys = path.split(".")
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],  # 2: a dict's key
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": list(shape)},
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in all, leaf path) after each chunk."""


class Count:
    """Adds up bytes for a `Progress`."""

    def __init__(self, total: int, progress: Progress | None):
        self.done, self.total, self._progress = 0, total, progress

    def __call__(self, nbytes: int, path: str = "") -> None:
        self.done += nbytes
        if self._progress is not None:
            self._progress(self.done, self.total, path)
