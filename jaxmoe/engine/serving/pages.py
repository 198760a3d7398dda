"""Who holds which page: reference counts, contents by key, and an order in which kept pages are given up.

Pages are numbers here. This file knows neither what is in them nor the sequences that list them, and needs no device. A pool is a working copy that
changes in place; `copy` gives another that shares nothing visible with it, so that a planner can be a pure function.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Int

SHARDS = 512
"""Dicts that a map is cut into: a copy shares them all, and the first change of one copies that one."""


class _Map:
    """A dict whose copies cost little: keys are spread over small dicts, which copies share until one of them changes."""

    def __init__(self) -> None:
        self._shards: list[dict[Any, Any]] = [{}] * SHARDS
        self._own: set[int] = set()

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for shard in self._shards:
            yield from shard.items()

    def get(self, key: Hashable) -> Any:
        return self._shards[hash(key) % SHARDS].get(key)

    def set(self, key: Hashable, value: Any) -> None:
        self._changing(key)[key] = value

    def pop(self, key: Hashable) -> Any:
        return self._changing(key).pop(key)

    def copy(self) -> _Map:
        other = copy.copy(self)
        other._shards = self._shards.copy()
        self._own, other._own = set(), set()  # from now on neither may change what both see
        return other

    def _changing(self, key: Hashable) -> dict[Any, Any]:
        at = hash(key) % SHARDS
        if at not in self._own:
            self._shards[at] = self._shards[at].copy()
            self._own.add(at)
        return self._shards[at]


class PagePool:
    """Pages 0 to N - 1, each free, cached or held.

    A page with references is held. One without is cached if it is registered, for its contents may be asked for again by their key, and else free.

    Attributes:
        pages: N.
        group: pages that a sequence is given room for when it begins a new run, as long as there is room: runs make copies few and large
            (FastSwitch, arXiv 2411.18424).
    """

    def __init__(self, pages: int, group: int = 16):
        """
        Args:
            pages: N, at least 0.
            group: see above, at least 1.

        Raises:
            ValueError: a size is out of range.
        """
        if pages < 0 or group < 1:
            raise ValueError(f"a pool of {pages} pages in groups of {group}: give at least 0 pages and groups of at least 1")
        self.pages, self.group = pages, group
        self._ref_N = np.zeros(pages, np.int32)
        self._free_N = np.ones(pages, bool)
        self._room = np.full(-(-pages // group), group, np.int32)  # free pages of each group
        if pages % group:
            self._room[-1] = pages % group
        # A ring of the cached pages, least recently used first, closed by entry N: [page, (previous, next)].
        self._ring = np.full((pages + 1, 2), pages, np.int32)
        self._page_of, self._key_of = _Map(), _Map()
        self._free, self._cached = pages, 0

    # --- What there is

    @property
    def free(self) -> int:
        """Pages without references or contents."""
        return self._free

    @property
    def cached(self) -> int:
        """Pages without references, whose contents can be found by their key."""
        return self._cached

    @property
    def held(self) -> int:
        """Pages with references."""
        return self.pages - self._free - self._cached

    @property
    def available(self) -> int:
        """Pages that `take` could give."""
        return self._free + self._cached

    def refs(self, page: int) -> int:
        """References to a page."""
        return int(self._ref_N[self._known(page)])

    def key(self, page: int) -> bytes | None:
        """The key that a page is registered under, if any."""
        return self._key_of.get(self._known(page))

    def shared(self, page: int) -> bool:
        """Whether a page must be copied before it is written: others refer to it, or its contents are promised to its key."""
        return self.refs(page) > 1 or self.key(page) is not None

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest prefix of `keys` that is registered. Takes no reference: `hold` them before any `take`."""
        out = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            out.append(page)
        return out

    def oldest(self, n: int) -> list[int]:
        """The `n` cached pages that would be given up first, in that order; fewer where there are fewer."""
        out: list[int] = []
        after = self._ring[:, 1].item
        page = after(self.pages)
        while page != self.pages and len(out) < n:
            out.append(page)
            page = after(page)
        return out

    # --- Changes

    def copy(self) -> Self:
        """Another pool in the same state; changes of either do not show in the other."""
        other = copy.copy(self)
        other._ref_N, other._free_N, other._room = self._ref_N.copy(), self._free_N.copy(), self._room.copy()
        other._ring, other._page_of, other._key_of = self._ring.copy(), self._page_of.copy(), self._key_of.copy()
        return other

    def hold(self, pages: Sequence[int]) -> None:
        """One reference more to each page.

        Raises:
            ValueError: a page is free, is given twice, or is none of the pool.
        """
        at = self._several(pages)
        ref = self._ref_N[at]
        for page in at[ref == 0].tolist():
            if self._free_N[page]:
                raise ValueError(f"page {page} is free: it has no contents to be held; take it")
        for page in at[ref == 0].tolist():
            self._unlink(page)
        self._ref_N[at] += 1

    def take(self, n: int, near: int | None = None) -> list[int] | None:
        """Gives `n` pages with one reference each.

        Free pages come first, in as few ascending runs as there can be, the first right after `near` where those are free; then cached ones, the
        least recently used, whose keys are forgotten.

        Args:
            n: how many.
            near: the last page of the sequence that asks.

        Returns:
            Pages in the order in which a sequence should list them, or None, with nothing changed, where fewer are available.

        Raises:
            ValueError: n is negative, or `near` is no page of the pool.
        """
        if n < 0:
            raise ValueError(f"{n} pages can't be taken")
        if n > self.available:
            return None
        first = [] if near is None else self._after(self._known(near), min(n, self._free))
        self._occupy(first)
        rest: list[int] = []
        while len(first) + len(rest) < n and self._free:
            run = self._run(n - len(first) - len(rest))
            self._occupy(run)
            rest += run
        out = first + sorted(rest + self._evict(n - len(first) - len(rest)))
        self._ref_N[out] = 1
        return out

    def drop(self, pages: Sequence[int]) -> None:
        """One reference fewer to each page of a sequence, the last first: its end is given up before its beginning, which others may share.

        Raises:
            ValueError: a page has no references, is given twice, or is none of the pool.
        """
        at = self._several(pages)
        if (bad := at[self._ref_N[at] <= 0]).size:
            raise ValueError(f"page {bad[0]} has no references that could be dropped")
        self._ref_N[at] -= 1
        gone = at[self._ref_N[at] == 0][::-1].tolist()
        keyed = [page for page in gone if self._key_of.get(page) is not None]
        empty = gone if not keyed else [page for page in gone if self._key_of.get(page) is None]
        self._append(keyed)
        self._free_N[empty] = True
        np.add.at(self._room, np.asarray(empty, np.int64) // self.group, 1)
        self._free += len(empty)

    def register(self, page: int, key: bytes) -> None:
        """Says what a held page has in it, from now on for good; nothing happens where the key has a page already.

        Raises:
            ValueError: the page has no references, or is registered under another key.
        """
        if self.refs(page) == 0:
            raise ValueError(f"page {page} has no references: only held pages can be registered")
        if self._page_of.get(key) is not None:
            return
        if (known := self.key(page)) is not None:
            raise ValueError(f"page {page} is registered under {known.hex()} and can't get {key.hex()} too")
        self._page_of.set(key, page)
        self._key_of.set(page, key)

    def check(self) -> None:
        """AssertionError where the pool contradicts itself."""
        cached = self.oldest(self.pages + 1)
        keyed = np.zeros(self.pages, bool)
        keyed[[page for page, _ in self._key_of]] = True
        lies = np.zeros(self.pages, bool)
        lies[cached] = True
        assert (self._ref_N >= 0).all(), "a page has fewer than no references"
        assert (self._free_N == ((self._ref_N == 0) & ~keyed)).all(), "free pages are those without references and keys"
        assert (lies == ((self._ref_N == 0) & keyed)).all(), "cached pages are those without references and with a key"
        assert (self._free, self._cached) == (self._free_N.sum(), len(cached)), "counts of free and cached pages"
        assert self.free + self.cached + self.held == self.pages and self.held == (self._ref_N > 0).sum(), "free + cached + held"
        assert len(self._page_of) == len(self._key_of) == keyed.sum(), "a key for every registered page"
        assert all(self._page_of.get(key) == page for page, key in self._key_of), "key and page name each other"
        ends = np.append(np.arange(0, self.pages, self.group), self.pages)
        assert [int(self._free_N[a:b].sum()) for a, b in zip(ends, ends[1:], strict=False)] == self._room.tolist(), "free pages by group"
        ring = [self.pages, *cached, self.pages]
        assert all(self._ring[b, 0] == a for a, b in zip(ring, ring[1:], strict=False)), "the ring is closed both ways"

    # --- Inside

    def _known(self, page: int) -> int:
        if not 0 <= page < self.pages:
            raise ValueError(f"page {page} is none of the pool, whose pages are 0 to {self.pages - 1}")
        return page

    def _several(self, pages: Sequence[int]) -> Int[np.ndarray, "n"]:
        at = np.asarray(pages, np.int64).reshape(-1)
        if at.size and not 0 <= at.min() <= at.max() < self.pages:
            self._known(int(at.min() if at.min() < 0 else at.max()))
        if len(set(pages)) < len(at):
            raise ValueError(f"pages {list(pages)}: one is given twice")
        return at

    def _after(self, near: int, most: int) -> list[int]:
        """The free pages that follow `near` without a gap, at most so many."""
        wall = ~self._free_N[near + 1 : near + 1 + most]
        length = int(wall.argmax()) if wall.any() else len(wall)
        return list(range(near + 1, near + 1 + length))

    def _run(self, n: int) -> list[int]:
        """Up to `n` free pages in a row, of which there are some."""
        if n <= self.group:
            best = int(self._room.argmax())  # the first group that is free, with room to grow: sizes need no look at all pages
            if self._room[best] == self.group or n == 1:
                start = best * self.group
                start += int(self._free_N[start : start + self.group].argmax())
                return list(range(start, start + n))
        edges = np.flatnonzero(np.diff(self._free_N, prepend=False, append=False))
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        fits = np.flatnonzero(lengths >= n)
        chosen = fits[lengths[fits].argmin()] if len(fits) else lengths.argmax()
        return list(range(int(starts[chosen]), int(starts[chosen]) + min(n, int(lengths[chosen]))))

    def _occupy(self, pages: list[int]) -> None:
        self._free_N[pages] = False
        np.subtract.at(self._room, np.asarray(pages, np.int64) // self.group, 1)
        self._free -= len(pages)

    def _unlink(self, page: int) -> None:
        before, after = self._ring[page].tolist()
        self._ring[before, 1], self._ring[after, 0] = after, before
        self._cached -= 1

    def _evict(self, n: int) -> list[int]:
        """Gives up the `n` oldest cached pages."""
        old = self.oldest(n)
        if old:
            after = int(self._ring[old[-1], 1])
            self._ring[self.pages, 1], self._ring[after, 0] = after, self.pages
            self._cached -= len(old)
        for page in old:
            self._page_of.pop(self._key_of.pop(page))
        return old

    def _append(self, pages: list[int]) -> None:
        if pages:
            chain = [int(self._ring[self.pages, 0]), *pages, self.pages]
            self._ring[chain[1:], 0] = chain[:-1]
            self._ring[chain[:-1], 1] = chain[1:]
            self._cached += len(pages)


class HostPages(PagePool):
    """Pages in host memory, of sequences put aside and of prefixes that may come again, under the same rules as the device's."""
