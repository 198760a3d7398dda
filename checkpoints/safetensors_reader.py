"""Reads Hugging Face folders of safetensors files by byte ranges, so that memory holds no more than what was asked for.

It knows files, headers and tensors' names, dtypes and shapes; it doesn't know what a tensor means. The format: 8
bytes of header length (little endian), a JSON header `{name: {dtype, shape, data_offsets}}`, then the tensors back to
back (github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from checkpoints.errors import CheckpointError

DTYPES: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""Dtypes that can be read, and the numpy dtype that holds each: bfloat16 is held as uint16."""

PACKED: dict[str, np.dtype] = {"U8": np.dtype("u1"), "F8_E4M3": np.dtype("u1")}
"""Dtypes of packed numbers, which `read_bytes` reads as they are."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MAX_HEADER = 100_000_000  # as the reference reader limits it
_SAMPLES, _SAMPLE_BYTES = 32, 8192


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` and `nbytes` are bytes in `file`; `dtype` is as the file spells it ('BF16')."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of weights: its size in bytes, the SHA-256 of its header, and that of a sample of its data."""

    name: str
    nbytes: int
    header_sha256: str
    sample_sha256: str


class SafetensorsFolder:
    """The tensors of a folder that holds `model.safetensors`, or shards with `model.safetensors.index.json`.

    Opening reads every header and checks it against the file's size; data is read only by the read methods. Use it as
    a context manager.

    Args:
        folder: the Hugging Face folder.

    Raises:
        CheckpointError: no weights, a missing or truncated file, a damaged header or index, a tensor in two files.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self.files: tuple[SourceFile, ...] = ()
        self._open_files: dict[str, int] = {}
        try:
            shards, index = _shards_of(self.folder)
            self.files = tuple(self._read_header(name) for name in shards)
            self._check_index(index)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; reading afterwards opens them again."""
        while self._open_files:
            os.close(self._open_files.popitem()[1])

    def __getitem__(self, name: str) -> TensorInfo:
        """What is known of a tensor.

        Raises:
            CheckpointError: there is none of that name.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        return self.tensors[name]

    def read(self, name: str) -> np.ndarray:
        """The whole tensor: its shape, dtype as in `DTYPES`.

        Raises:
            CheckpointError: no such tensor, a dtype that isn't in `DTYPES`, or the file ends too early.
        """
        info = self[name]
        return self.read_elements(name, 0, info.size).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of the first axis, and only their bytes: `[stop - start, *shape[1:]]`.

        Raises:
            CheckpointError: as `read`.
            IndexError: the range doesn't lie within the first axis.
        """
        info = self[name]
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise IndexError(f"rows {start}:{stop} of tensor {name} with shape {list(info.shape)}")
        width = math.prod(info.shape[1:])
        flat = self.read_elements(name, start * width, (stop - start) * width)
        return flat.reshape(stop - start, *info.shape[1:])

    def read_elements(self, name: str, start: int, count: int) -> np.ndarray:
        """`count` elements from element `start` on, in C order, as a flat array of the dtype in `DTYPES`.

        Raises:
            CheckpointError: as `read`.
            IndexError: the range doesn't lie within the tensor.
        """
        return self._read(self[name], self.held_dtype(name), start, count)

    def read_matrix(self, name: str, width: int, start: int, stop: int, at: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The tensor seen as rows of `width` elements: rows `at` of those from `start` to `stop`, `[n, width]`.

        Raises:
            CheckpointError, IndexError: as `read_elements`.
        """
        return self.read_elements(name, start * width, (stop - start) * width).reshape(-1, width)[at]

    def read_bytes(self, name: str, start: int, count: int) -> np.ndarray:
        """`count` elements from element `start` on of a tensor whose dtype is in `PACKED`, as a flat array of uint8.

        Raises:
            CheckpointError: no such tensor, another dtype, or the file ends too early.
            IndexError: the range doesn't lie within the tensor.
        """
        info = self[name]
        if info.dtype not in PACKED:
            raise CheckpointError(f"{self.folder / info.file}: tensor {name} has dtype {info.dtype}, {' or '.join(PACKED)} is needed")
        return self._read(info, PACKED[info.dtype], start, count)

    def _read(self, info: TensorInfo, dtype: np.dtype, start: int, count: int) -> np.ndarray:
        if start < 0 or count < 0 or start + count > info.size:
            raise IndexError(f"elements {start}:{start + count} of tensor {info.name} with {info.size}")
        out = np.empty(count, dtype)
        self._pread(info.file, info.start + start * dtype.itemsize, out.data.cast("B") if count else memoryview(b""))
        return out

    def held_dtype(self, name: str) -> np.dtype:
        """The numpy dtype a tensor is read as.

        Raises:
            CheckpointError: its dtype isn't in `DTYPES`.
        """
        info = self[name]
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.folder / info.file}: tensor {name} has dtype {info.dtype}, "
                f"which is not supported ({', '.join(DTYPES)} are)"
            )
        return DTYPES[info.dtype]

    def check_shape(self, name: str, expected: Iterable[int]) -> None:
        """Compares a tensor's shape with the one its model needs.

        Raises:
            CheckpointError: no such tensor, or another shape; the message has both.
        """
        info, shape = self[name], tuple(expected)
        if info.shape != shape:
            raise CheckpointError(
                f"{self.folder / info.file}: tensor {name} has shape {list(info.shape)}, the config needs {list(shape)}"
            )

    def _file(self, name: str) -> int:
        if name not in self._open_files:
            self._open_files[name] = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        return self._open_files[name]

    def _pread(self, file: str, position: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            got = os.preadv(self._file(file), [into[done:]], position + done)
            if got == 0:
                size = os.fstat(self._file(file)).st_size
                raise CheckpointError(
                    f"{self.folder / file}: truncated: {position + len(into)} bytes needed, the file has {size}"
                )
            done += got

    def _read_header(self, file: str) -> SourceFile:
        path = self.folder / file
        size = os.fstat(self._file(file)).st_size
        if size < 8:
            raise CheckpointError(f"{path}: truncated: 8 bytes needed for the header's length, the file has {size}")
        prefix = bytearray(8)
        self._pread(file, 0, memoryview(prefix))
        length = int.from_bytes(prefix, "little")
        if length > _MAX_HEADER:
            raise CheckpointError(
                f"{path}: damaged header: it claims {length} bytes, at most {_MAX_HEADER} are possible"
            )
        if 8 + length > size:
            raise CheckpointError(f"{path}: truncated: {8 + length} bytes needed for the header, the file has {size}")
        raw = bytearray(length)
        self._pread(file, 8, memoryview(raw))
        infos = _parse_header(path, bytes(raw))
        needed = 8 + length + sum(info.nbytes for info in infos)
        if size < needed:
            raise CheckpointError(f"{path}: truncated: {needed} bytes needed, the file has {size}")
        if size > needed:
            raise CheckpointError(f"{path}: damaged: {size} bytes, {needed} of which its header speaks of")
        for info in infos:
            if info.name in self.tensors:
                raise CheckpointError(f"{path}: tensor {info.name} is in {self.tensors[info.name].file} as well")
            self.tensors[info.name] = info
        return SourceFile(file, size, hashlib.sha256(bytes(raw)).hexdigest(), self._sample(file, 8 + length, size))

    def _sample(self, file: str, start: int, stop: int) -> str:
        """SHA-256 over evenly spread pieces of the data (all of it where it is small): tells retrained weights of one
        shape apart."""
        digest = hashlib.sha256()
        for i in range(_SAMPLES):
            at = start + (stop - start) * i // _SAMPLES
            end = start + (stop - start) * (i + 1) // _SAMPLES
            piece = bytearray(min(_SAMPLE_BYTES, end - at))
            self._pread(file, at, memoryview(piece))
            digest.update(piece)
        return digest.hexdigest()

    def _check_index(self, index: dict[str, str]) -> None:
        for name, file in index.items():
            info = self.tensors.get(name)
            if info is None or info.file != file:
                raise CheckpointError(f"{self.folder / file}: tensor {name} is missing, {INDEX} says it is there")


def _shards_of(folder: Path) -> tuple[list[str], dict[str, str]]:
    """File names of the weights, and the index's map from tensor to file (empty for a single file)."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / SINGLE).is_file():
        return [SINGLE], {}
    path = folder / INDEX
    if not path.is_file():
        raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is there")
    try:
        index = json.loads(path.read_bytes())["weight_map"]
        shards = sorted(set(index.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged: no JSON object with a 'weight_map' of names to files") from error
    for shard in shards:
        if Path(str(shard)).name != shard:
            raise CheckpointError(f"{path}: {shard!r} is not a file name")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard}: missing, {INDEX} names it")
    return shards, index


def _parse_header(path: Path, raw: bytes) -> list[TensorInfo]:
    """Tensors in the order of their data.

    Raises:
        CheckpointError: no JSON object, a field missing or malformed, sizes that disagree with shapes, or data with
            holes or overlaps.
    """
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        infos = [_parse_tensor(path, 8 + len(raw), name, entry) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: damaged header: not the JSON that safetensors files begin with") from error
    infos.sort(key=lambda info: (info.start, info.nbytes))
    at = 8 + len(raw)
    for info in infos:
        if info.start != at:
            raise CheckpointError(
                f"{path}: damaged header: tensor {info.name} begins at byte {info.start}, the one before ends at {at}"
            )
        at += info.nbytes
    return infos


def _parse_tensor(path: Path, data: int, name: str, entry: dict) -> TensorInfo:
    dtype, shape, (start, stop) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise CheckpointError(f"{path}: damaged header: shape or offsets of tensor {name} are not counts")
    known = DTYPES.get(dtype) or PACKED.get(dtype)
    size = known.itemsize * math.prod(shape) if known else stop - start
    if stop - start != size:
        raise CheckpointError(
            f"{path}: damaged header: tensor {name} of {dtype} {list(shape)} "
            f"takes {size} bytes, its offsets span {stop - start}"
        )
    return TensorInfo(name, dtype, shape, path.name, data + start, stop - start)
