"""Reads Hugging Face folders of safetensors files by byte ranges, so that memory holds no more than what was asked for.

It knows files, headers and tensors' names, dtypes and shapes; it doesn't know what a tensor means. The format: 8
bytes of header length (little endian), a JSON header `{name: {dtype, shape, data_offsets}}`, then the tensors back to
back (github.com/huggingface/safetensors, "Format").

Whatever the reference reader refuses is refused here. So is what it takes only because it is lenient: a tensor that is
listed twice (it takes the last), a header that doesn't begin with '{', names that cannot be printed in one line, shapes
that numpy cannot hold.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.safetensors_header import DTYPES, MAX_HEADER, PACKED, TensorInfo, parse_header, parse_index, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_SAMPLES, _SAMPLE_BYTES = 32, 8192
_HASH_BYTES = 8 << 20


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

    Attributes:
        streaming: set it where much is read once: the system then needn't keep in its memory what has been read.

    Raises:
        CheckpointError: no weights, a missing or truncated file, a damaged header or index, a tensor in two files.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.streaming = False
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
        into, at = (out.data.cast("B") if count else memoryview(b"")), info.start + start * dtype.itemsize
        self._pread(info.file, at, into)
        if self.streaming:
            os.posix_fadvise(self._file(info.file), at, len(into), os.POSIX_FADV_DONTNEED)
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

    def recorded_sha256(self, file: str) -> str | None:
        """The SHA-256 that the download of a file recorded: 64 hexadecimal digits; None if it recorded none.

        huggingface_hub keeps it where it downloads into a folder of the user's choice (`--local-dir`): the second line
        of `.cache/huggingface/download/FILE.metadata`, which for large files is the SHA-256 of their content.
        """
        path = self.folder / ".cache" / "huggingface" / "download" / f"{file}.metadata"
        try:
            lines = _read_small(path).decode().splitlines()
        except (CheckpointError, ValueError):
            return None
        etag = lines[1].strip().strip('"').lower() if len(lines) > 1 else ""
        return etag if len(etag) == 64 and set(etag) <= set("0123456789abcdef") else None

    def check_sha256(self, file: str, progress: Callable[[int, int, str], None] | None = None) -> bool:
        """Reads a whole file and compares its SHA-256 with the recorded one.

        Args:
            file: its name in the folder.
            progress: called with (bytes read, bytes in all, file).

        Returns:
            Whether there was a recorded one to compare with; without, nothing is read.

        Raises:
            CheckpointError: it has another, or cannot be read.
        """
        recorded = self.recorded_sha256(file)
        if recorded is None:
            return False
        size, digest = os.fstat(self._file(file)).st_size, hashlib.sha256()
        piece = bytearray(min(size, _HASH_BYTES))
        for at in range(0, size, _HASH_BYTES):
            part = memoryview(piece)[: size - at]
            self._pread(file, at, part)
            digest.update(part)
            if progress is not None:
                progress(at + len(part), size, file)
        if digest.hexdigest() != recorded:
            raise CheckpointError(f"{self.folder / file}: damaged: SHA-256 {digest.hexdigest()}, the download recorded {recorded}: download it again")
        return True

    def _file(self, name: str) -> int:
        if name not in self._open_files:
            self._open_files[name] = _open_regular(self.folder / name)
        return self._open_files[name]

    def _pread(self, file: str, position: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            try:
                got = os.preadv(self._file(file), [into[done:]], position + done)
            except OSError as error:
                raise CheckpointError(f"{self.folder / file}: cannot be read: {error.strerror}") from error
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
        if length > MAX_HEADER:
            raise CheckpointError(
                f"{path}: damaged header: it claims {length} bytes, at most {MAX_HEADER} are possible"
            )
        if 8 + length > size:
            raise CheckpointError(f"{path}: truncated: {8 + length} bytes needed for the header, the file has {size}")
        first = bytearray(min(1, length))
        self._pread(file, 8, memoryview(first))
        if first != b"{":
            raise CheckpointError(f"{path}: damaged header: it doesn't begin with '{{': not the JSON that safetensors files begin with")
        raw = bytearray(length)
        self._pread(file, 8, memoryview(raw))
        infos = parse_header(path, raw)
        needed = 8 + length + sum(info.nbytes for info in infos)
        if size < needed:
            raise CheckpointError(f"{path}: truncated: {needed} bytes needed, the file has {size}")
        if size > needed:
            raise CheckpointError(f"{path}: damaged: {size} bytes, {needed} of which its header speaks of")
        for info in infos:
            if info.name in self.tensors:
                raise CheckpointError(f"{path}: tensor {info.name} is in {self.tensors[info.name].file} as well")
            self.tensors[info.name] = info
        return SourceFile(file, size, hashlib.sha256(raw).hexdigest(), self._sample(file, 8 + length, size))

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


def _open_regular(path: Path) -> int:
    """A descriptor of a file that can be read at any place; a pipe or a folder in its place neither blocks nor opens."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path}: missing: a link to {os.readlink(path)}, which is not there") from error
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{path}: cannot be read: not a regular file")
    return fd


def _read_small(path: Path) -> bytes:
    """A whole file of at most `MAX_HEADER` bytes."""
    with open(_open_regular(path), "rb") as file:
        try:
            raw = file.read(MAX_HEADER + 1)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_HEADER:
        raise CheckpointError(f"{path}: damaged: over {MAX_HEADER} bytes")
    return raw


def _shards_of(folder: Path) -> tuple[list[str], dict[str, str]]:
    """File names of the weights, and the index's map from tensor to file (empty for a single file)."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if os.path.lexists(folder / SINGLE):
        return [SINGLE], {}
    path = folder / INDEX
    if not os.path.lexists(path):
        raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is there")
    index = parse_index(path, _read_small(path))
    shards = sorted(set(index.values()))
    for shard in shards:
        if shard in ("", ".", "..") or "/" in shard or not shard.isprintable() or len(shard.encode()) > 255:
            raise CheckpointError(f"{path}: {shown(shard)} is not a file name")
        if not os.path.lexists(folder / shard):
            raise CheckpointError(f"{folder / shard}: missing, {INDEX} names it")
    return shards, index
