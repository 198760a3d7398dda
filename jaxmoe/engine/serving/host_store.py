"""Pages in host memory: what was put aside of sequences, and prefixes that may come again.

Copies go on while the device computes: what `put` is given is on its way, and is waited for when it is asked for, or when more than `IN_FLIGHT` are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

IN_FLIGHT = 4
"""Blocks on their way to the host: each takes its bytes of the device's memory until it has arrived."""


class HostStore:
    """Attributes: `bytes_out`, `bytes_in` moved so far."""

    def __init__(self, pages: int):
        """Room for so many pages, taken from the host when the first block shows what a page is."""
        self._pages = pages
        self._held: Any = None
        self._rows: dict[int, Any] = {}
        self._coming: deque[tuple[Any, tuple[int, ...], int | None]] = deque()
        self.bytes_out = self.bytes_in = 0

    def shape(self, block: Any) -> None:
        """Learns from a block (`programs.read_pages`) what a page is."""
        pools, _ = block
        self._held = jax.tree.map(lambda leaf: np.zeros((self._pages, leaf.shape[0], *leaf.shape[2:]), leaf.dtype), pools)

    def put(self, block: Any, pages: Sequence[int], owner: int) -> None:
        """Takes a block of pages, of which the first len(pages) are meant; does not wait.

        Args:
            block: of `programs.read_pages`, on the device.
            pages: places in host memory.
            owner: the sequence whose states come with it.
        """
        jax.tree.map(lambda leaf: leaf.copy_to_host_async(), block)
        self._coming.append((block, tuple(pages), owner))
        while len(self._coming) > IN_FLIGHT:
            self._land()

    def get(self, pages: Sequence[int], owner: int, count: int) -> Any:
        """A block of `count` pages that begins with these, for `programs.write_pages`."""
        while self._coming:
            self._land()
        at = list(pages)

        def gather(held: np.ndarray) -> np.ndarray:
            out = np.zeros((held.shape[1], count, *held.shape[2:]), held.dtype)
            out[:, : len(at)] = held[at].swapaxes(0, 1)
            self.bytes_in += held[0].nbytes * len(at)
            return out

        return jax.tree.map(gather, self._held), self._rows.get(owner, [])

    def forget(self, owner: int) -> None:
        """Drops the states of a sequence that is gone, those under way too."""
        self._rows.pop(owner, None)
        self._coming = deque((block, pages, None if by == owner else by) for block, pages, by in self._coming)

    def clear(self) -> None:
        """Drops everything; what is under way is not waited for."""
        self._coming.clear()
        self._rows.clear()

    def _land(self) -> None:
        block, pages, owner = self._coming.popleft()
        pools, rows = jax.device_get(block)
        if self._held is None:
            self.shape((pools, rows))

        def store(held: np.ndarray, leaf: np.ndarray) -> None:
            held[list(pages)] = leaf[:, : len(pages)].swapaxes(0, 1)
            self.bytes_out += held[0].nbytes * len(pages)

        jax.tree.map(store, self._held, pools)
        if rows and owner is not None:
            self._rows[owner] = rows
