"""Brings pieces from devices to the host, ahead of their writing, within a bound of the host's memory.

jax arrays can't be changed, so a snapshot is a reference; what is donated too early is named. This file knows nothing of files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.trees.leaves import as_array, named_leaves
from checkpoints.trees.pieces import Piece, on_host, own_view


def snapshot(tree: Any, copy: bool) -> Any:
    """The tree with numpy arrays copied, which can change, and on request jax arrays too; deleted ones are refused."""
    paths = iter(named_leaves(tree))

    def leaf(value: Any) -> Any:
        array = as_array(next(paths), value)
        if isinstance(array, jax.Array):
            return jnp.copy(array) if copy else array
        return np.array(array)

    return jax.tree.map(leaf, tree)


class HostCopies:
    """Copies of one tree's pieces.

    Attributes:
        copied: set when no device array is needed any more.
        hurry: to be set by who waits for that.
        peak_bytes: most bytes of device arrays that were held on the host.

    Args:
        limit: most bytes of device arrays that are held on the host at a time, if a single piece isn't larger.
    """

    def __init__(self, limit: int):
        self._limit, self.peak_bytes = limit, 0
        self.copied, self.hurry = threading.Event(), threading.Event()

    def run(self, pieces: list[Piece]) -> Generator[tuple[Piece, np.ndarray]]:
        """Every piece with its values on the host, in order; copies run ahead by as much as there is room for. The list is emptied.

        What is in the host's memory anyway is written from there while nobody waits for the arrays, which takes a quarter off the work.
        """
        waiting = deque(_batches(pieces, self._limit))
        pieces.clear()
        ahead: deque[_Batch] = deque()
        held = 0
        while waiting or ahead:
            if not ahead and waiting[0].in_place and not self.hurry.is_set():
                with waiting[0].donation_named():
                    found = waiting[0].seen()
                waiting.popleft()
                yield found
                del found
                if not waiting:
                    self.copied.set()
                continue
            while waiting and (not ahead or held + waiting[0].nbytes <= self._limit):
                ahead.append(_started(waiting.popleft()))
                held += ahead[-1].nbytes
                self.peak_bytes = max(self.peak_bytes, held)
            for batch in ahead if not waiting else [ahead[0]]:
                with batch.donation_named():
                    batch.take()
            if not waiting:
                self.copied.set()
            batch = ahead.popleft()
            for _ in range(len(batch.pieces)):
                yield batch.pop()
            held -= batch.nbytes


class _Batch:
    """Pieces whose values come to the host together: those of one shard, or a single one."""

    def __init__(self, pieces: list[Piece], whole: bool):
        self.pieces, self._whole = deque(pieces), whole
        self._host: np.ndarray | None = None
        self._view: jax.Array | None = None
        self.in_place = is_on_host(pieces[0].source)
        self.nbytes = 0 if isinstance(pieces[0].source, np.ndarray) else sum(piece.nbytes for piece in pieces)

    @contextlib.contextmanager
    def donation_named(self) -> Iterator[None]:
        """Says which leaf was donated too early, where that is why jax fails."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if not ("deleted" in str(error) or "donated" in str(error)):
                raise
            which = f"leaf {self.pieces[0].path}"
            raise CheckpointError(f"{which} was donated while it was being saved: call before_donation() first, or save with copy=True") from error

    def start(self) -> None:
        """Starts the copy, where that can be done without waiting for it."""
        piece = self.pieces[0]
        if self._whole:
            self._view = own_view(piece.source)
        elif not is_on_host(piece.source):
            self._view = _slice(piece)
        if self._view is not None:
            self._view.copy_to_host_async()

    def take(self) -> None:
        """Finishes the copy; the device array isn't needed any more then."""
        if self._host is not None:
            return
        piece = self.pieces[0]
        if self._view is not None:
            self._host = np.asarray(self._view)
        elif isinstance(piece.source, np.ndarray):
            self._host = piece.source[piece.inner]
        else:
            self._host = np.array(on_host(piece.source)[piece.inner], order="C")
        self._view = None
        self.pieces = deque(dataclasses.replace(p, source=None) for p in self.pieces)

    def seen(self) -> tuple[Piece, np.ndarray]:
        """The only piece, where it is."""
        piece = self.pieces[0]
        return dataclasses.replace(piece, source=None), on_host(piece.source)[piece.inner]

    def pop(self) -> tuple[Piece, np.ndarray]:
        """The next piece, after `take`."""
        assert self._host is not None
        piece = self.pieces.popleft()
        return piece, self._host[piece.inner] if self._whole else self._host


def _started(batch: _Batch) -> _Batch:
    with batch.donation_named():
        batch.start()
    return batch


def _batches(pieces: list[Piece], limit: int) -> list[_Batch]:
    """On accelerators a shard goes whole where it is no larger than `limit`, and else chunk by chunk, cut on the device; on CPUs always by chunk."""
    shards: list[list[Piece]] = []
    for piece in pieces:
        if shards and shards[-1][0].source is piece.source:
            shards[-1].append(piece)
        else:
            shards.append([piece])
    out = []
    for shard in shards:
        if not is_on_host(shard[0].source) and sum(piece.nbytes for piece in shard) <= limit:
            out.append(_Batch(shard, True))
        else:
            out += [_Batch([piece], False) for piece in shard]
    return out


def is_on_host(source: Any) -> bool:
    """Whether a piece's source is in the host's memory."""
    return isinstance(source, np.ndarray) or all(device.platform == "cpu" for device in source.sharding.device_set)


@functools.partial(jax.jit, static_argnums=2)
def _dynamic_slice(x: jax.Array, starts: tuple[int, ...], sizes: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(x, starts, sizes)


def _slice(piece: Piece) -> jax.Array:
    """A piece, cut on its device; one program for all pieces of a size."""
    starts = tuple(np.int32(s.start) for s in piece.inner)
    return _dynamic_slice(piece.source, starts, tuple(s.stop - s.start for s in piece.inner))
