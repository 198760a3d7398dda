"""A second copy of each process's arrays in its neighbour's memory, so that a restart needs no disk.

After REFT (in-memory fault tolerance), by replication: process p keeps the bytes that its devices hold, and those of process p - 1, in a folder that
is held in memory and outlives the process. They travel by a collective, in blocks. One process that drives several groups of devices works alike: a
group then stands for a process. This file knows nothing of saving to disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoints import commit, trees
from checkpoints.errors import CheckpointError
from checkpoints.manifest import content_sha256, parse_json, write_text
from jaxmoe import formats

FORMAT = "jaxmoe-neighbour"
VERSION = 1
BLOCK_BYTES = 8 << 20
OWN, COPY = "own", "copy"

_GENERATION = re.compile(r"gen_(\d{8,})-([0-9a-f]{16})")
_LISTED = 4  # generations of a group that the others hear of
_CRC_BYTES = 4

Bounds = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where a slice of a leaf lies among a group's bytes."""

    path: str
    bounds: Bounds
    offset: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.path}[{', '.join(f'{a}:{b}' for a, b in self.bounds)}]"


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What every group holds; the same in all processes."""

    slots: tuple[tuple[_Slot, ...], ...]
    fingerprint: str

    def nbytes(self, group: int) -> int:
        return sum(slot.nbytes for slot in self.slots[group])


@dataclasses.dataclass(frozen=True)
class _Held:
    """A generation of which a group has its own bytes, its neighbour's, or both, undamaged."""

    generation: int
    token: str
    own: bool
    copy: bool


class NeighbourCopy:
    """Keeps two copies of a sharded tree in memory: one with the process that it belongs to, one with the next. All processes make one, and call it
    alike.

    Each process keeps every different slice that its devices hold; of arrays that every process holds whole (numpy arrays, arrays on local devices)
    each keeps its own. One generation stays, and while the next is being kept there are two.

    Args:
        folder: in memory, on this machine; processes may share it. Default: below /dev/shm.
        groups: devices, group by group. Default: a group for each process.
        block_bytes: how much moves at a time.

    Raises:
        CheckpointError: there is one group only, or the folder isn't this user's.
    """

    def __init__(self, folder: str | os.PathLike | None = None, groups: Sequence[Sequence[jax.Device]] | None = None, block_bytes: int = BLOCK_BYTES):
        if groups is None:
            groups = [[d for d in jax.devices() if d.process_index == p] for p in range(jax.process_count())]
        if len(groups) < 2:
            raise CheckpointError("a neighbour's copy needs two processes, or two groups of devices")
        if folder is None and not os.path.isdir("/dev/shm"):
            raise CheckpointError("there is no /dev/shm here: name a folder that is held in memory")
        self.folder = Path(folder) if folder is not None else Path(f"/dev/shm/jaxmoe-{os.getuid()}")
        self._block = block_bytes
        self._group_of = {device: group for group, devices in enumerate(groups) for device in devices}
        self._count = len(groups)
        self._local = [group for group, devices in enumerate(groups) if devices[0].process_index == jax.process_index()]
        self._mesh = Mesh(np.array([devices[0] for devices in groups]), ("group",))
        self._by_group = NamedSharding(self._mesh, PartitionSpec("group"))
        self._rolls = {shift: jax.jit(lambda x, shift=shift: jnp.roll(x, shift, 0), out_shardings=self._by_group) for shift in (1, -1)}
        self._replicate = jax.jit(lambda x: x, out_shardings=NamedSharding(self._mesh, PartitionSpec()))
        with commit.writing(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise CheckpointError(f"{self.folder}: belongs to another user: name another folder")

    def keep(self, generation: int, tree: Any) -> None:
        """Keeps a tree as a generation, in place of all others; returns when both copies are there in all processes.

        Args:
            generation: such as the step.
            tree: arrays as for `trees.save_tree`; they may be donated afterwards.

        Raises:
            CheckpointError: a process has no room, or a leaf can't be kept.
        """
        if isinstance(generation, bool) or not isinstance(generation, int) or not 0 <= generation < 2**31:
            raise CheckpointError(f"generation {generation!r} must be a whole number from 0 to {2**31 - 1}")
        leaves, arrays = trees.describe(tree)
        layout = self._layout({path: (leaf.shape, leaf.dtype, arrays[path]) for path, leaf in leaves.items()})
        token = trees.shared_token()
        out = {group: self._group_folder(group) / f"gen_{generation:08d}-{token}" for group in self._local}
        partial = {group: commit.partial_of(path) for group, path in out.items()}
        self._together(lambda: self._begin(generation, partial, layout))
        self._together(lambda: self._write_own(partial, generation, token, layout, arrays))
        self._move(partial, generation, token, layout, OWN, set(range(self._count)))
        self._together(lambda: _rename(partial, out))
        for group in self._local:
            self._remove(group, lambda path, group=group: path != out[group])  # type: ignore[misc]

    def restore(self, like: Any, minimum: int = 0) -> tuple[int, Any]:
        """Restores the newest generation of which every shard is found, in its own process's memory or in the neighbour's.

        Both copies are there again afterwards, in all processes.

        Args:
            like: a tree of the paths, shapes, dtypes and shardings that were kept: jax arrays or `ShapeDtypeStruct`s with a sharding, numpy arrays,
                numbers.
            minimum: the oldest generation that will do, such as the newest step on disk.

        Returns:
            (generation, tree)

        Raises:
            CheckpointError: there is none, or shards of it are lost; they are named.
        """
        wanted = {path: value for path, (_, value) in trees.named_leaves(like).items()}
        found = {path: value if hasattr(value, "dtype") else np.asarray(value) for path, value in wanted.items()}
        layout = self._layout({path: (tuple(value.shape), np.dtype(value.dtype).name, value) for path, value in found.items()})
        table = self._inventory(layout)
        generation, token = self._choose(table, layout, minimum)
        here = [next((h for h in row if h.token == token and h.generation == generation), None) for row in table]
        folders = {group: self._group_folder(group) / f"gen_{generation:08d}-{token}" for group in self._local}
        for group in self._local:
            folders[group].mkdir(parents=True, exist_ok=True)
        self._move(folders, generation, token, layout, COPY, {g for g, held in enumerate(here) if held is None or not held.own})
        self._move(folders, generation, token, layout, OWN, {g for g, held in enumerate(here) if held is None or not held.copy})
        values = [self._build(path, value, found[path], layout, folders) for path, value in wanted.items()]
        return generation, jax.tree.unflatten(jax.tree.structure(like), values)

    def clear(self) -> None:
        """Gives this process's memory back."""
        for group in self._local:
            shutil.rmtree(self._group_folder(group), ignore_errors=True)

    def _group_folder(self, group: int) -> Path:
        return self.folder / f"group_{group}"

    def _layout(self, leaves: dict[str, tuple[tuple[int, ...], str, Any]]) -> _Layout:
        slots: list[list[_Slot]] = [[] for _ in range(self._count)]
        for path, (shape, dtype, value) in leaves.items():
            for group, held in enumerate(self._bounds(path, shape, value)):
                for bounds in held:
                    offset = slots[group][-1].offset + slots[group][-1].nbytes if slots[group] else 0
                    nbytes = math.prod(b - a for a, b in bounds) * trees.dtype_of(dtype).itemsize
                    slots[group].append(_Slot(path, bounds, offset, nbytes))
        content = [[(path, shape, dtype) for path, (shape, dtype, _) in leaves.items()], [[(s.path, s.bounds) for s in row] for row in slots]]
        return _Layout(tuple(map(tuple, slots)), hashlib.sha256(json.dumps(content).encode()).hexdigest())

    def _bounds(self, path: str, shape: tuple[int, ...], value: Any) -> list[list[Bounds]]:
        """The different slices of a leaf that each group holds."""
        sharding = getattr(value, "sharding", None)
        if sharding is None and isinstance(value, jax.ShapeDtypeStruct):
            raise CheckpointError(f"leaf {path} has no sharding: only an array in the sharding that it was kept in can be restored from memory")
        if sharding is None or (jax.process_count() > 1 and sharding.is_fully_addressable):
            return [[tuple((0, n) for n in shape)]] * self._count
        held: list[set[Bounds]] = [set() for _ in range(self._count)]
        for device, index in sharding.devices_indices_map(shape).items():
            if device not in self._group_of:
                raise CheckpointError(f"leaf {path} is on {device}, which is in no group")
            held[self._group_of[device]].add(_bounds_of(index, shape))
        return [sorted(bounds) for bounds in held]

    def _begin(self, generation: int, partial: dict[int, Path], layout: _Layout) -> None:
        """Clears away what isn't of the past, and takes the room that is needed."""
        for group, path in partial.items():
            # A generation that isn't before the new one is of a run that was given up for an older state.
            self._remove(group, lambda old: not (match := _GENERATION.fullmatch(old.name)) or int(match[1]) >= generation)
            path.mkdir(parents=True)
            sizes = {OWN: layout.nbytes(group), COPY: layout.nbytes((group - 1) % self._count)}
            if sum(sizes.values()) > commit.free_bytes(path):
                raise CheckpointError(f"{path}: {sum(sizes.values())} bytes are needed and {commit.free_bytes(path)} are free: name another folder")
            for kind, nbytes in sizes.items():
                with open(path / f"{kind}.bin", "wb") as file:
                    if nbytes:
                        os.posix_fallocate(file.fileno(), 0, nbytes)

    def _remove(self, group: int, doomed: Callable[[Path], bool]) -> None:
        folder = self._group_folder(group)
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if doomed(path):
                shutil.rmtree(path, ignore_errors=True)

    def _write_own(self, folders: dict[int, Path], generation: int, token: str, layout: _Layout, arrays: dict[str, Any]) -> None:
        for group, folder in folders.items():
            with _BlockWriter(folder, OWN, self._block) as writer:
                for slot in layout.slots[group]:
                    writer.write(_values(arrays[slot.path], slot.bounds))
            self._describe(folder, OWN, generation, token, group, layout, writer.crc32)

    def _describe(self, folder: Path, kind: str, generation: int, token: str, group: int, layout: _Layout, crc32: list[str]) -> None:
        data = {
            "format": FORMAT, "version": VERSION, "generation": generation, "token": token, "group": group, "groups": self._count,
            "layout": layout.fingerprint, "block": self._block, "crc32": crc32,
        }  # fmt: skip
        write_text(folder / f"{kind}.json", json.dumps({**data, "sha256": content_sha256(data)}))

    def _move(self, folders: dict[int, Path], generation: int, token: str, layout: _Layout, kind: str, needing: set[int]) -> None:
        """Sends own bytes to the next group as its copy, or copies back to the group before as its own, to those that need them; a collective."""
        if not needing:
            return
        shift, arrives = (1, COPY) if kind == OWN else (-1, OWN)
        whose = {group: group if kind == COPY else (group - 1) % self._count for group in range(self._count)}  # whose bytes a group receives
        writers = {group: _BlockWriter(folders[group], arrives, self._block) for group in needing.intersection(self._local)}
        errors: list[Exception] = []  # a process with an error goes on taking part, so that the others don't wait for it
        for start in range(0, max(layout.nbytes(whose[group]) for group in needing), self._block):
            size = {group: max(0, min(self._block, layout.nbytes(whose[group]) - start)) for group in needing}
            rows = {}
            for group in self._local:
                rows[group] = np.zeros(self._block + _CRC_BYTES, np.uint8)
                with _collected(errors):
                    _pack(rows[group], folders[group] / f"{kind}.bin", start, size.get((group + shift) % self._count, 0))
            for group, row in self._rolled(rows, shift).items():
                if group in writers:
                    with _collected(errors):
                        writers[group].write(_unpacked(row, size[group], folders[group]))
        for group, writer in writers.items():
            with _collected(errors):
                writer.close()
                self._describe(folders[group], arrives, generation, token, whose[group], layout, writer.crc32)
        self._together(lambda: _raise_first(errors))

    def _rolled(self, rows: dict[int, np.ndarray], shift: int) -> dict[int, np.ndarray]:
        moved = self._rolls[shift](self._stacked(rows))
        return {_row_of(shard.index): np.asarray(shard.data)[0] for shard in moved.addressable_shards}

    def _stacked(self, rows: dict[int, np.ndarray]) -> jax.Array:
        shape = (self._count, *next(iter(rows.values())).shape)
        return jax.make_array_from_callback(shape, self._by_group, lambda index: rows[_row_of(index)][None])

    def _gathered(self, rows: dict[int, np.ndarray]) -> np.ndarray:
        """[groups, ...] of every group's row; a collective."""
        return np.asarray(self._replicate(self._stacked(rows)).addressable_data(0))

    def _together(self, work: Callable[[], Any]) -> None:
        """Does this process's work; raises in all processes where it failed in one, so that none waits for it. A collective."""
        error: Exception | None = None
        try:
            work()
        except (CheckpointError, OSError) as caught:
            error = caught
        failed = self._gathered({group: np.array([error is not None], np.int32) for group in self._local})
        if error is not None:
            raise error if isinstance(error, CheckpointError) else CheckpointError(f"{self.folder}: {error}") from error
        if failed.any():
            raise CheckpointError(f"process {int(failed[:, 0].argmax())} couldn't keep its copy: its own message says why")

    def _inventory(self, layout: _Layout) -> list[list[_Held]]:
        """What each group has, newest first; a collective. Every byte is checked."""
        rows = {}
        for group in self._local:
            held = sorted(self._held(group, layout), key=lambda h: -h.generation)[:_LISTED]
            row = np.zeros((_LISTED, 5), np.int32)
            for i, h in enumerate(held):
                row[i] = (h.generation, *np.frombuffer(bytes.fromhex(h.token), np.int32), h.own, h.copy)
            rows[group] = row
        table = self._gathered(rows)
        return [[_Held(int(r[0]), r[1:3].astype(np.int32).tobytes().hex(), bool(r[3]), bool(r[4])) for r in row if r[3] or r[4]] for row in table]

    def _held(self, group: int, layout: _Layout) -> Iterator[_Held]:
        folder = self._group_folder(group)
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            match = _GENERATION.fullmatch(path.name)
            if match is not None:
                generation, token = int(match[1]), match[2]
                own = self._is_good(path, OWN, generation, token, group, layout)
                yield _Held(generation, token, own, self._is_good(path, COPY, generation, token, (group - 1) % self._count, layout))

    def _is_good(self, folder: Path, kind: str, generation: int, token: str, group: int, layout: _Layout) -> bool:
        try:
            data = parse_json(folder, (folder / f"{kind}.json").read_bytes())
            known = {"format": FORMAT, "version": VERSION, "generation": generation, "token": token, "group": group, "layout": layout.fingerprint}
            if data.get("sha256") != content_sha256(data) or any(data[key] != value for key, value in known.items()):
                return False
            block, sizes = data["block"], layout.nbytes(group)
            with open(folder / f"{kind}.bin", "rb") as file:
                found = [f"{zlib.crc32(file.read(block)):08x}" for _ in range(0, sizes, block)]
                return found == data["crc32"] and not file.read(1)
        except (CheckpointError, OSError, AttributeError, KeyError, TypeError):
            return False

    def _choose(self, table: list[list[_Held]], layout: _Layout, minimum: int) -> tuple[int, str]:
        """The newest generation that is there in full; a generation is of one `keep`, which its token tells apart from others of the same number."""
        found = sorted({(h.generation, h.token) for row in table for h in row}, reverse=True)
        if not found:
            raise CheckpointError(f"{self.folder}: no generation of this tree, in this sharding, is in memory: load from disk")
        lost = {which: self._lost(table, which) for which in found}
        good = [which for which in found if not lost[which]]
        if good and good[0][0] >= minimum:
            return good[0]
        if good:
            raise CheckpointError(f"{self.folder}: generation {good[0][0]} in memory is older than {minimum}: load from disk")
        newest = found[0]
        groups = "; ".join(self._lost_text(group, layout) for group in lost[newest])
        raise CheckpointError(f"{self.folder}: generation {newest[0]} can't be restored from memory: {groups}: load from disk")

    def _lost(self, table: list[list[_Held]], which: tuple[int, str]) -> list[int]:
        own = {g for g, row in enumerate(table) for h in row if (h.generation, h.token) == which and h.own}
        copied = {(g - 1) % self._count for g, row in enumerate(table) for h in row if (h.generation, h.token) == which and h.copy}
        return [group for group in range(self._count) if group not in own | copied]

    def _lost_text(self, group: int, layout: _Layout) -> str:
        slots = layout.slots[group]
        more = f" and {len(slots) - 3} more" if len(slots) > 3 else ""
        return f"process {group} and its neighbour {(group + 1) % self._count} have both lost {', '.join(map(str, slots[:3]))}{more}"

    def _build(self, path: str, like: Any, found: Any, layout: _Layout, folders: dict[int, Path]) -> Any:
        """One leaf, of the bytes that this process's groups hold."""
        shape, dtype = tuple(found.shape), np.dtype(found.dtype)
        whole = tuple(slice(0, n) for n in shape)
        slots = {slot.bounds: (group, slot) for group in self._local for slot in layout.slots[group] if slot.path == path}

        def read(index: Any) -> np.ndarray:
            bounds = _bounds_of(index, shape)
            if bounds not in slots:  # an array on several devices of one process, which that process keeps whole
                return read(whole)[index]
            group, slot = slots[bounds]
            out = formats.aligned_empty(tuple(b - a for a, b in slot.bounds), dtype)
            with open(folders[group] / f"{OWN}.bin", "rb") as file:
                file.seek(slot.offset)
                if file.readinto(out.reshape(-1).view(np.uint8).data) != slot.nbytes:
                    raise CheckpointError(f"{folders[group]}: leaf {path} is damaged: its bytes end early")
            return out

        if trees.is_host_leaf(like):
            return trees.as_like(like, read(whole))
        return trees.place(path, shape, dtype, like, None, lambda slices: [read(index) for index in slices])


def _bounds_of(index: Any, shape: tuple[int, ...]) -> Bounds:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


class _BlockWriter:
    """Writes bytes one after another, and has a checksum for every block of them."""

    def __init__(self, folder: Path, kind: str, block: int):
        (folder / f"{kind}.json").unlink(missing_ok=True)  # what describes other bytes
        self._file: IO = open(folder / f"{kind}.bin", "r+b" if (folder / f"{kind}.bin").exists() else "wb")
        self._block, self._at, self._crc = block, 0, 0
        self.crc32: list[str] = []

    def write(self, data: np.ndarray) -> None:
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
        if self._at:
            self._end_block()
        self._file.truncate()
        self._file.close()

    def __enter__(self) -> _BlockWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _values(array: Any, bounds: Bounds) -> np.ndarray:
    """A slice as bytes; on accelerators one shard at a time comes to the host."""
    if isinstance(array, jax.Array):
        shard = next((s.data for s in array.addressable_shards if _bounds_of(s.index, array.shape) == bounds), None)
        array = np.asarray(trees.own_view(shard) if shard is not None else jnp.copy(array))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _pack(row: np.ndarray, path: Path, start: int, size: int) -> None:
    """Fills a row with `size` bytes at `start` of a file, and their checksum at its end, which is checked where they arrive."""
    if size:
        with open(path, "rb") as file:
            file.seek(start)
            if file.readinto(row[:size].data) != size:
                raise CheckpointError(f"{path}: damaged: it ends early")
    row[-_CRC_BYTES:] = np.frombuffer(zlib.crc32(row[:size].data).to_bytes(_CRC_BYTES, "little"), np.uint8)


def _unpacked(row: np.ndarray, size: int, where: Path) -> np.ndarray:
    row = np.ascontiguousarray(row)
    if zlib.crc32(row[:size].data) != int.from_bytes(row[-_CRC_BYTES:].tobytes(), "little"):
        raise CheckpointError(f"{where}: bytes arrived damaged from a neighbour")
    return row[:size]


def _row_of(index: Any) -> int:
    return index[0].start or 0


def _rename(old: dict[int, Path], new: dict[int, Path]) -> None:
    for group, path in old.items():
        os.replace(path, new[group])


@contextlib.contextmanager
def _collected(errors: list[Exception]) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, OSError) as error:
        errors.append(error)


def _raise_first(errors: list[Exception]) -> None:
    if errors:
        raise errors[0]
