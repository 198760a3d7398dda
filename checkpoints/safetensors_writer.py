"""Writes safetensors files whose tensors are known beforehand, in pieces, and folders of them that are there whole or not at all.

A file's bytes are those of the reference's own `save_file`: the header first, compact JSON padded with spaces to 8 bytes, then the tensors back to
back, those of wider dtypes first and otherwise by name (github.com/huggingface/safetensors, "Format"). This file knows nothing of models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from checkpoints import commit
from checkpoints.errors import CheckpointError
from checkpoints.safetensors_header import DTYPES
from checkpoints.safetensors_reader import INDEX, SINGLE

MARKER = "_export.json"
"""In an unfinished folder: what tells it from anything else, and how many bytes it will have."""

MAX_SHARD_BYTES = 5_000_000_000
"""Of tensors in one file, if no single one is larger."""

_ORDER = ("F16", "BF16", "F32")  # as the reference sorts dtypes, the last first


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to be written; `dtype` as files spell it ('BF16')."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file: its tensors in the order in which they lie there, and what comes before them."""

    file: str
    tensors: tuple[Tensor, ...]
    header: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


Pieces = Callable[[Tensor], Iterable[np.ndarray]]
"""Gives a tensor's numbers: contiguous arrays that follow each other in C order. An array isn't looked at any more once the next is asked for."""

Wrote = Callable[[int, str], None]
"""Called with (bytes, tensor's name) after each piece."""


def plan_shards(tensors: Sequence[Tensor], max_shard_bytes: int | None = MAX_SHARD_BYTES) -> tuple[Shard, ...]:
    """Which tensor goes into which file: as they come, a new file where the next one doesn't fit; a tensor is never parted.

    Args:
        tensors: in the order in which they are spread over files.
        max_shard_bytes: None puts everything into one file.

    Raises:
        CheckpointError: a limit that isn't positive, or a name that occurs twice.
    """
    if max_shard_bytes is not None and max_shard_bytes <= 0:
        raise CheckpointError(f"files of at most {max_shard_bytes} bytes hold nothing: give a positive limit")
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise CheckpointError("a tensor's name occurs twice")
    groups: list[list[Tensor]] = [[]]
    used = 0
    for tensor in tensors:
        if groups[-1] and max_shard_bytes is not None and used + tensor.nbytes > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += tensor.nbytes
    names = [SINGLE] if len(groups) == 1 else [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    return tuple(_shard(name, group) for name, group in zip(names, groups, strict=True))


def _shard(file: str, tensors: list[Tensor]) -> Shard:
    ordered = sorted(tensors, key=lambda tensor: (-_ORDER.index(tensor.dtype), tensor.name.encode()))
    header: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in ordered:
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return Shard(file, tuple(ordered), len(text).to_bytes(8, "little") + text)


def write_shards(folder: Path, shards: Sequence[Shard], pieces: Pieces, wrote: Wrote | None = None) -> None:
    """Writes the files, and the index where there are several; memory holds one piece at a time.

    Args:
        folder: is there; files of these names in it are overwritten.
        shards: from `plan_shards`.
        pieces: gives each tensor's numbers, in the dtype in which `DTYPES` holds it.
        wrote: see `Wrote`.

    Raises:
        OSError: it can't be written.
    """
    for shard in shards:
        write_file(folder / shard.file, shard, pieces, wrote)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard.tensors)},
            "weight_map": dict(sorted((tensor.name, shard.file) for shard in shards for tensor in shard.tensors)),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, shard: Shard, pieces: Pieces, wrote: Wrote | None = None) -> None:
    """Writes one file, whatever its name; see `write_shards`."""
    with open(path, "wb") as file:
        file.write(shard.header)
        for tensor in shard.tensors:
            left = tensor.nbytes
            for piece in pieces(tensor):
                assert piece.dtype == DTYPES[tensor.dtype] and piece.nbytes <= left, (tensor, piece.dtype, piece.nbytes, left)
                file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
                left -= piece.nbytes
                if wrote is not None:
                    wrote(piece.nbytes, tensor.name)
            assert left == 0, (tensor, left)


@contextlib.contextmanager
def new_folder(out: Path, nbytes: int) -> Iterator[Path]:
    """An unfinished folder that gets the name `out` when the block ends, and goes away with all that is in it when the block fails.

    Args:
        out: not there, or an empty folder.
        nbytes: how much will be written.

    Raises:
        CheckpointError: `out` or `OUT.partial` holds something else, another process writes there, or there is no room or no permission.
    """
    _refuse_taken(out)
    partial = commit.partial_of(out)
    _refuse_foreign(partial)
    with commit.locked(partial):
        try:
            with commit.writing(partial):
                _refuse_taken(out)  # by another process, between our first look and the lock
                _clear(partial)
                if nbytes > commit.free_bytes(partial):
                    raise CheckpointError(f"{out}: {nbytes} bytes are to be written, the disk has {commit.free_bytes(partial)} free: free some room")
                (partial / MARKER).write_text(json.dumps({"nbytes": nbytes}) + "\n", encoding="utf-8")
                yield partial
                commit.publish(partial, out, (MARKER, commit.LOCK))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _refuse_taken(out: Path) -> None:
    if out.is_dir():
        if any(out.iterdir()):
            raise CheckpointError(f"{out}: exists and is not empty: choose another output folder")
    elif out.exists() or out.is_symlink():
        raise CheckpointError(f"{out}: exists and is not a folder: choose another output folder")


def _refuse_foreign(partial: Path) -> None:
    """What is there may only be an earlier run's, which was killed."""
    if not partial.exists() and not partial.is_symlink():
        return
    if partial.is_dir() and not any(path.is_dir() for path in partial.iterdir()):
        if (partial / MARKER).is_file() or {path.name for path in partial.iterdir()} <= {commit.LOCK}:
            return
    raise CheckpointError(f"{partial}: exists and is not an unfinished export: remove it or choose another output folder")


def _clear(partial: Path) -> None:
    for path in partial.iterdir():
        if path.name != commit.LOCK:
            path.unlink()
