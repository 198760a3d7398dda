"""`NeighbourCopy`: keeps generations of a tree twice, and restores the newest that is there in full.

It says who needs which bytes; `ring` moves them, `memory` holds them, `layout` knows what they are.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoints import commit, trees
from checkpoints.errors import CheckpointError
from checkpoints.neighbour.layout import Layout, bytes_of, layout_of
from checkpoints.neighbour.memory import COPY, OWN, Generation, Held, Memory, read_into, whose
from checkpoints.neighbour.ring import CRC_BYTES, Ring, seal, unseal
from checkpoints.reading import Box, Target, within

BLOCK_BYTES = 8 << 20
_LISTED = 4  # generations of a group that the others hear of


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
        self._block, self._ring = block_bytes, Ring(groups)
        self._memory = Memory(self.folder, self._ring.count, block_bytes)

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
        layout = layout_of({path: (leaf.shape, leaf.dtype, arrays[path]) for path, leaf in leaves.items()}, self._ring)
        new = Generation(generation, trees.shared_token())
        out = self._folders(new)
        partial = {group: commit.partial_of(path) for group, path in out.items()}

        def make_room() -> None:
            for group, path in partial.items():
                self._memory.make_room(path, group, generation, layout)

        self._ring.together(make_room, self.folder)
        self._ring.together(lambda: self._write_own(partial, new, layout, arrays), self.folder)
        self._move(partial, new, layout, OWN, set(range(self._ring.count)))
        self._ring.together(lambda: _rename(partial, out), self.folder)
        for group in self._ring.local:
            self._memory.remove(group, lambda path, group=group: path != out[group])  # type: ignore[misc]

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
        layout = layout_of({path: (tuple(value.shape), np.dtype(value.dtype).name, value) for path, value in found.items()}, self._ring)
        table = self._inventory(layout)
        chosen = self._choose(table, layout, minimum)
        here = [next((held for held in row if held.generation == chosen), None) for row in table]
        folders = self._folders(chosen)
        for path in folders.values():
            path.mkdir(parents=True, exist_ok=True)
        self._move(folders, chosen, layout, COPY, {g for g, held in enumerate(here) if held is None or not held.own})
        self._move(folders, chosen, layout, OWN, {g for g, held in enumerate(here) if held is None or not held.copy})
        values = [self._build(path, value, found[path], layout, folders) for path, value in wanted.items()]
        return chosen.number, jax.tree.unflatten(jax.tree.structure(like), values)

    def clear(self) -> None:
        """Gives this process's memory back."""
        for group in self._ring.local:
            shutil.rmtree(self._memory.of(group), ignore_errors=True)

    def _folders(self, generation: Generation) -> dict[int, Path]:
        return {group: self._memory.of(group) / generation.name for group in self._ring.local}

    def _write_own(self, folders: dict[int, Path], generation: Generation, layout: Layout, arrays: dict[str, Any]) -> None:
        for group, folder in folders.items():
            with self._memory.writer(folder, OWN) as writer:
                for slot in layout.slots[group]:
                    writer.write(bytes_of(arrays[slot.path], slot.box))
            self._memory.describe(folder, OWN, generation, group, layout, writer.crc32)

    def _move(self, folders: dict[int, Path], generation: Generation, layout: Layout, kind: str, needing: set[int]) -> None:
        """Sends own bytes to the next group as its copy, or copies back to the group before as its own, to those that need them; a collective."""
        if not needing:
            return
        shift, arrives = (1, COPY) if kind == OWN else (-1, OWN)
        source = {group: whose(arrives, group, self._ring.count) for group in needing}  # whose bytes a group receives
        writers = {group: self._memory.writer(folders[group], arrives) for group in needing.intersection(self._ring.local)}
        errors: list[Exception] = []  # a process with an error goes on taking part, so that the others don't wait for it
        for start in range(0, max(layout.nbytes(group) for group in source.values()), self._block):
            size = {group: max(0, min(self._block, layout.nbytes(source[group]) - start)) for group in needing}
            rows = {}
            for group in self._ring.local:
                rows[group] = np.zeros(self._block + CRC_BYTES, np.uint8)
                with _collected(errors):
                    _pack(rows[group], folders[group], kind, start, size.get((group + shift) % self._ring.count, 0))
            for group, row in self._ring.roll(rows, shift).items():
                if group in writers:
                    with _collected(errors):
                        writers[group].write(unseal(row, size[group], folders[group]))
        for group, writer in writers.items():
            with _collected(errors):
                writer.close()
                self._memory.describe(folders[group], arrives, generation, source[group], layout, writer.crc32)
        self._ring.together(lambda: _raise_first(errors), self.folder)

    def _inventory(self, layout: Layout) -> list[list[Held]]:
        """What each group has, newest first; a collective. Every byte is checked."""
        rows = {}
        for group in self._ring.local:
            row = rows[group] = np.zeros((_LISTED, 5), np.int32)
            for i, held in enumerate(sorted(self._memory.held(group, layout), key=lambda held: -held.generation.number)[:_LISTED]):
                row[i] = (held.generation.number, *np.frombuffer(bytes.fromhex(held.generation.token), np.int32), held.own, held.copy)
        table = self._ring.gather(rows)
        return [[_held_of(entry) for entry in row if entry[3] or entry[4]] for row in table]

    def _choose(self, table: list[list[Held]], layout: Layout, minimum: int) -> Generation:
        """The newest generation that is there in full."""
        found = sorted({held.generation for row in table for held in row}, reverse=True)
        if not found:
            raise CheckpointError(f"{self.folder}: no generation of this tree, in this sharding, is in memory: load from disk")
        lost = {generation: self._lost(table, generation) for generation in found}
        good = [generation for generation in found if not lost[generation]]
        if good and good[0].number >= minimum:
            return good[0]
        if good:
            raise CheckpointError(f"{self.folder}: generation {good[0].number} in memory is older than {minimum}: load from disk")
        groups = "; ".join(self._lost_text(group, layout) for group in lost[found[0]])
        raise CheckpointError(f"{self.folder}: generation {found[0].number} can't be restored from memory: {groups}: load from disk")

    def _lost(self, table: list[list[Held]], generation: Generation) -> list[int]:
        count, there = self._ring.count, set()
        for group, row in enumerate(table):
            for held in row:
                if held.generation == generation:
                    there |= {whose(kind, group, count) for kind, good in ((OWN, held.own), (COPY, held.copy)) if good}
        return [group for group in range(count) if group not in there]

    def _lost_text(self, group: int, layout: Layout) -> str:
        slots = layout.slots[group]
        more = f" and {len(slots) - 3} more" if len(slots) > 3 else ""
        return f"process {group} and its neighbour {(group + 1) % self._ring.count} have both lost {', '.join(map(str, slots[:3]))}{more}"

    def _build(self, path: str, like: Any, found: Any, layout: Layout, folders: dict[int, Path]) -> Any:
        """One leaf, of the bytes that this process's groups hold."""
        shape, dtype = tuple(found.shape), np.dtype(found.dtype)
        whole: Box = tuple((0, n) for n in shape)
        slots = {slot.box: (group, slot) for group in self._ring.local for slot in layout.slots[group] if slot.path == path}

        def fill(targets: Sequence[Target]) -> None:
            for box, out in targets:
                if box in slots:
                    group, slot = slots[box]
                    read_into(out, folders[group], OWN, slot.offset)
                else:  # an array on several devices of one process, which that process keeps whole
                    all_of_it = Target(whole, np.empty(shape, dtype))
                    fill([all_of_it])
                    out[...] = all_of_it.out[within(box, whole)]

        if trees.is_host_leaf(like):
            target = Target(whole, np.empty(shape, dtype))
            fill([target])
            return trees.as_like(like, target.out)
        return trees.place(path, shape, dtype, like, None, fill)


def _pack(row: np.ndarray, folder: Path, kind: str, start: int, size: int) -> None:
    """Fills a row with `size` bytes of a kind."""
    if size:
        read_into(row[:size], folder, kind, start)
    seal(row, size)


def _held_of(entry: np.ndarray) -> Held:
    return Held(Generation(int(entry[0]), entry[1:3].astype(np.int32).tobytes().hex()), bool(entry[3]), bool(entry[4]))


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
