"""The folder in memory: a group's folder in it, in that one for each generation, and in it the group's own bytes and those of the group before.

It knows files and checksums, and nothing of devices or of how bytes travel. Of each kind of bytes there is a file of them and one that describes it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from checkpoints import commit
from checkpoints.errors import CheckpointError
from checkpoints.manifest import content_sha256, parse_json, write_text
from checkpoints.neighbour.layout import Layout

FORMAT = "jaxmoe-neighbour"
VERSION = 1
OWN, COPY = "own", "copy"
"""A group's own bytes; a copy of those of the group before."""

_NAME = re.compile(r"gen_(\d{8,})-([0-9a-f]{16})")


class Generation(NamedTuple):
    """What one `keep` kept: its number, and what tells it apart from others of the same number."""

    number: int
    token: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"gen_{self.number:08d}-{self.token}"


@dataclasses.dataclass(frozen=True)
class Held:
    """A generation of which a group has its own bytes, its neighbour's, or both, undamaged."""

    generation: Generation
    own: bool
    copy: bool


def whose(kind: str, group: int, count: int) -> int:
    """The group whose bytes those of a kind are that a group of `count` has."""
    return group if kind == OWN else (group - 1) % count


class Memory:
    """The folder.

    Args:
        folder: is made.
        count: how many groups there are.
        block: bytes that have a checksum of their own.

    Raises:
        CheckpointError: it can't be made, or isn't this user's.
    """

    def __init__(self, folder: Path, count: int, block: int):
        self.folder, self._count, self._block = folder, count, block
        with commit.writing(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise CheckpointError(f"{folder}: belongs to another user: name another folder")

    def of(self, group: int) -> Path:
        """A group's folder."""
        return self.folder / f"group_{group}"

    def make_room(self, path: Path, group: int, number: int, layout: Layout) -> None:
        """Clears away what isn't of a group's past, and takes the room that generation `number` needs, in the folder `path`.

        Raises:
            CheckpointError: there is too little of it.
        """
        # A generation that isn't before the new one is of a run that was given up for an older state.
        self.remove(group, lambda old: not (found := _parse(old.name)) or found.number >= number)
        path.mkdir(parents=True)
        sizes = {kind: layout.nbytes(whose(kind, group, self._count)) for kind in (OWN, COPY)}
        if sum(sizes.values()) > commit.free_bytes(path):
            raise CheckpointError(f"{path}: {sum(sizes.values())} bytes are needed and {commit.free_bytes(path)} are free: name another folder")
        for kind, nbytes in sizes.items():
            with open(path / f"{kind}.bin", "wb") as file:
                if nbytes:
                    os.posix_fallocate(file.fileno(), 0, nbytes)

    def remove(self, group: int, doomed: Callable[[Path], bool]) -> None:
        """Removes those of a group's generations that are to go."""
        for path in _entries(self.of(group)):
            if doomed(path):
                shutil.rmtree(path, ignore_errors=True)

    def writer(self, path: Path, kind: str) -> BlockWriter:
        """Writes a kind of bytes in the folder of a generation."""
        return BlockWriter(path, kind, self._block)

    def describe(self, path: Path, kind: str, generation: Generation, group: int, layout: Layout, crc32: list[str]) -> None:
        """Says what the bytes of a kind are, now that they are there; `group` is whose they are."""
        data = {**self._about(generation, group, layout), "groups": self._count, "block": self._block, "crc32": crc32}
        write_text(path / f"{kind}.json", json.dumps({**data, "sha256": content_sha256(data)}))

    def held(self, group: int, layout: Layout) -> Iterator[Held]:
        """What a group has of a layout; every byte is read and checked."""
        for path in _entries(self.of(group)):
            generation = _parse(path.name)
            if generation is not None:
                own, copy = (self._is_good(path, kind, generation, whose(kind, group, self._count), layout) for kind in (OWN, COPY))
                yield Held(generation, own, copy)

    def _about(self, generation: Generation, group: int, layout: Layout) -> dict[str, Any]:
        about = {"format": FORMAT, "version": VERSION, "generation": generation.number, "token": generation.token}
        return {**about, "group": group, "layout": layout.fingerprint}

    def _is_good(self, folder: Path, kind: str, generation: Generation, group: int, layout: Layout) -> bool:
        try:
            data = parse_json(folder, (folder / f"{kind}.json").read_bytes())
            known = self._about(generation, group, layout)
            if data.get("sha256") != content_sha256(data) or any(data[key] != value for key, value in known.items()):
                return False
            block, sizes = data["block"], layout.nbytes(group)
            with open(folder / f"{kind}.bin", "rb") as file:
                found = [f"{zlib.crc32(file.read(block)):08x}" for _ in range(0, sizes, block)]
                return found == data["crc32"] and not file.read(1)
        except (CheckpointError, OSError, AttributeError, KeyError, TypeError):
            return False


def read_into(out: np.ndarray, folder: Path, kind: str, start: int) -> None:
    """Fills a contiguous array with the bytes of a kind from `start` on.

    Raises:
        CheckpointError: there are fewer.
    """
    data = out.reshape(-1).view(np.uint8)
    with open(folder / f"{kind}.bin", "rb") as file:
        file.seek(start)
        if file.readinto(data.data) != data.nbytes:
            raise CheckpointError(f"{folder}: {kind}.bin is damaged: it ends early")


class BlockWriter:
    """Writes bytes one after another, and has a checksum for every block of them."""

    def __init__(self, folder: Path, kind: str, block: int):
        (folder / f"{kind}.json").unlink(missing_ok=True)  # what describes other bytes
        self._file: IO = open(folder / f"{kind}.bin", "r+b" if (folder / f"{kind}.bin").exists() else "wb")
        self._block, self._at, self._crc = block, 0, 0
        self.crc32: list[str] = []

    def write(self, data: np.ndarray) -> None:
        """Writes uint8 [n]."""
        while len(data):
            some, data = data[: self._block - self._at], data[self._block - self._at :]
            self._file.write(some.data)
            self._crc, self._at = zlib.crc32(some.data, self._crc), self._at + len(some)
            if self._at == self._block:
                self._end_block()

    def _end_block(self) -> None:
        self.crc32.append(f"{self._crc:08x}")
        self._at = self._crc = 0

    def close(self) -> None:
        """Ends the last block, and the file with it."""
        if self._at:
            self._end_block()
        self._file.truncate()
        self._file.close()

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _parse(name: str) -> Generation | None:
    match = _NAME.fullmatch(name)
    return Generation(int(match[1]), match[2]) if match else None


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
