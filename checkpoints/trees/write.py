"""Writes a tree into a folder: every process its pieces, and process 0 the rest when all of them are done.

It knows what is written and by whom, and not when: `checkpoints.saver` calls `TreeWriter` from a thread.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from checkpoints import commit, store
from checkpoints.errors import CheckpointError
from checkpoints.manifest import write_text
from checkpoints.trees.format import BEGUN, PART, TREE, TreeInfo, TreeLeaf, crc32, dtype_of, read_tree, write_orbax_metadata, write_tree
from checkpoints.trees.leaves import describe, empty_nodes
from checkpoints.trees.pieces import CHUNK_BYTES, Piece, on_host, pieces_of
from jaxmoe.spec import Leaf

_POLL_SECONDS = 0.02


def save_tree(
    folder: str | os.PathLike, tree: Any, step: int = 0, metadata: Any = None, chunk_bytes: int = CHUNK_BYTES, timeout: float = 600.0
) -> TreeInfo:
    """Saves a pytree of arrays; returns when it is on the disk. All processes call it, with the same folder.

    Args:
        folder: is made; may not be there.
        tree: jax or numpy arrays and numbers, of any sharding, in dicts, lists, tuples and registered dataclasses.
        step, metadata: kept with it; metadata is anything JSON can say.
        chunk_bytes: most bytes in a chunk.
        timeout: seconds that processes wait for each other.

    Raises:
        CheckpointError: a leaf can't be saved (it's named), the folder is there, or writing fails; nothing is left then.
    """
    out = Path(folder)
    writer = TreeWriter(out, tree, step, metadata, shared_token(), chunk_bytes, timeout)
    if out.exists():
        raise CheckpointError(f"{out}: is there already")
    try:
        writer.begin()
        for _, shard in itertools.groupby(writer.pieces, lambda piece: id(piece.source)):
            pieces = list(shard)
            whole = on_host(pieces[0].source)  # on accelerators: one shard at a time comes to the host
            for piece in pieces:
                writer.write(piece, whole[piece.inner])
        writer.finish()
    except BaseException as error:
        writer.abort(error)
        raise
    return read_tree(out)


def shared_token() -> str:
    """A random name that all processes agree on (a collective)."""
    words = np.frombuffer(secrets.token_bytes(8), np.uint32)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        words = np.asarray(multihost_utils.broadcast_one_to_all(words), np.uint32)
    return words.tobytes().hex()


class TreeWriter:
    """One process's part in the writing of one folder: `begin`, `write` for each of `pieces`, `finish`; `abort` where something failed.

    Args:
        folder: is made; may not be there.
        tree: arrays; those on devices must stay as they are until their pieces are copied.
        step, metadata: kept with it; metadata is JSON.
        token: the same in all processes, and for no other save.
        timeout: seconds that processes wait for each other.

    Raises:
        CheckpointError: the tree or the metadata can't be saved.
    """

    def __init__(self, folder: Path, tree: Any, step: int, metadata: Any, token: str, chunk_bytes: int = CHUNK_BYTES, timeout: float = 600.0):
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise CheckpointError(f"step {step!r} must be a whole number, 0 or more")
        try:
            self._metadata = json.loads(json.dumps(metadata, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"the metadata of step {step} isn't JSON: {error}") from error
        self.folder, self.partial, self._step, self._token, self._timeout = folder, commit.partial_of(folder), step, token, timeout
        self.leaves, arrays = describe(tree, chunk_bytes)
        self._empty = empty_nodes(tree)
        self.pieces = [piece for path, array in arrays.items() for piece in pieces_of(path, self.leaves[path], array)]
        self._crc32: dict[str, dict[str, str]] = {}
        self._open = functools.lru_cache(maxsize=1)(self._array)

    def begin(self) -> None:
        """Makes the unfinished folder and its empty arrays (process 0), or waits for them."""
        if jax.process_index():
            self._await(self.partial / BEGUN)
            return
        with commit.writing(self.partial):
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            for path in self.leaves:
                self._array(path)
            write_text(self.partial / BEGUN, json.dumps({"token": self._token}))

    def write(self, piece: Piece, data: np.ndarray) -> None:
        """Writes one chunk, and returns when its bytes are no longer needed."""
        data = np.asarray(data, order="C").view(dtype_of(self.leaves[piece.path].stored))
        array = self._open(piece.path)
        try:
            done = store.write_chunk(array, piece.region, data)
            self._crc32.setdefault(piece.path, {})[piece.key] = crc32(data)  # while it is being written
            done.result()
        except (ValueError, OSError) as error:
            raise commit.failure(self.partial / piece.path, error) from error

    def finish(self) -> None:
        """Publishes the folder when all processes have written their parts (process 0), or waits for that."""
        with commit.writing(self.partial):
            if jax.process_index():
                commit.sync_tree(self.partial)
                self._report({"crc32": self._crc32})
                self._await(self.folder / TREE)
                return
            leaves = self._gather()
            for name in (BEGUN, *(PART.format(p) for p in range(jax.process_count()))):
                (self.partial / name).unlink(missing_ok=True)
            info = TreeInfo(self._step, self._metadata, leaves, self._empty, self._token)
            write_orbax_metadata(self.partial, info)
            write_tree(self.partial, info)
            commit.publish(self.partial, self.folder)

    def abort(self, error: BaseException) -> None:
        """Tells the other processes that this one failed, and removes the unfinished folder (alone)."""
        if jax.process_count() == 1:
            shutil.rmtree(self.partial, ignore_errors=True)
        elif self.partial.is_dir():
            try:
                self._report({"failed": store.one_line(error)})  # type: ignore[arg-type]
            except OSError:
                pass  # the others will wait for as long as they do

    def _array(self, path: str) -> ts.TensorStore:
        leaf = self.leaves[path]
        try:
            return store.create_array(self.partial, path, Leaf(leaf.shape, dtype_of(leaf.stored), (None,) * len(leaf.shape)), leaf.chunk)
        except (ValueError, OSError) as error:
            raise commit.failure(self.partial / path, error) from error

    def _gather(self) -> dict[str, TreeLeaf]:
        parts = [self._crc32, *(self._await(self.partial / PART.format(p))["crc32"] for p in range(1, jax.process_count()))]
        leaves = {}
        for path, leaf in self.leaves.items():
            found = {key: crc for part in parts for key, crc in part.get(path, {}).items()}
            absent = [key for key, _ in leaf.chunks() if key not in found]
            if absent:
                raise CheckpointError(f"{self.partial}: leaf {path}: no process wrote chunk {absent[0]}: do all of them save the same tree?")
            leaves[path] = dataclasses.replace(leaf, crc32=found)
        return leaves

    def _report(self, data: dict[str, Any]) -> None:
        write_text(self.partial / PART.format(jax.process_index()), json.dumps({"token": self._token, **data}))

    def _await(self, path: Path) -> dict[str, Any]:
        """Another process's file of this save, when it is there."""
        end = time.monotonic() + self._timeout
        while time.monotonic() < end:
            for process in range(jax.process_count()):
                failed = _read_json(self.partial / PART.format(process))
                if failed.get("token") == self._token and "failed" in failed:
                    raise CheckpointError(f"{self.folder}: process {process} failed: {failed['failed']}")
            data = _read_json(path)
            if data.get("token") == self._token:
                return data
            time.sleep(_POLL_SECONDS)
        raise CheckpointError(f"{self.folder}: waited {self._timeout:g} s for {path.name} of another process")


def _read_json(path: Path) -> dict[str, Any]:
    """A file that other processes replace, or nothing."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
