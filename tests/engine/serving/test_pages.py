"""Pages of a pool against a plain model of it: who holds what, what is given up first, in how few runs pages come. About 1 second."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.engine.serving.pages import HostPages, PagePool

KINDS = ("take", "take near", "drop", "register", "hold match", "copy", "hold")


class Plain:
    """The same rules written the slow way: lists that are searched from end to end."""

    def __init__(self, pages: int):
        self.refs, self.keys, self.lru = [0] * pages, [None] * pages, []

    def free(self) -> list[int]:
        return [p for p, ref in enumerate(self.refs) if ref == 0 and self.keys[p] is None]

    def match(self, keys: list[bytes]) -> list[int]:
        out = []
        for key in keys:
            if key not in self.keys:
                break
            out.append(self.keys.index(key))
        return out

    def hold(self, pages: list[int]) -> None:
        for p in pages:
            if self.refs[p] == 0:
                self.lru.remove(p)
            self.refs[p] += 1

    def took(self, pages: list[int], evicted: list[int]) -> None:
        for p in evicted:
            self.lru.remove(p)
            self.keys[p] = None
        for p in pages:
            assert self.refs[p] == 0 and self.keys[p] is None
            self.refs[p] = 1

    def drop(self, pages: list[int]) -> None:
        for p in reversed(pages):
            self.refs[p] -= 1
            if self.refs[p] == 0 and self.keys[p] is not None:
                self.lru.append(p)

    def register(self, page: int, key: bytes) -> None:
        if key not in self.keys:
            self.keys[page] = key


def runs(pages: list[int]) -> list[list[int]]:
    """Pages cut where the next isn't the one after."""
    out: list[list[int]] = []
    for p in pages:
        if out and out[-1][-1] + 1 == p:
            out[-1].append(p)
        else:
            out.append([p])
    return out


def fewest(free: list[int], n: int) -> int:
    """Runs that `n` of these pages are in at least."""
    found = 0
    for length in sorted(map(len, runs(free)), reverse=True):
        if n <= 0:
            break
        found, n = found + 1, n - length
    return found


class Pair:
    """A pool and the plain model of it, driven by the same events."""

    def __init__(self, pages: int, group: int):
        self.pool, self.plain = PagePool(pages, group), Plain(pages)
        self.sequences: list[list[int]] = []
        self.keys = 0
        self.old: list[tuple] = []  # copies that were left behind, with what they looked like

    def event(self, kind: str, a: int, b: int) -> None:
        if kind in ("take", "take near"):
            self._take(1 + a % 9, b, kind == "take near")
        elif kind == "drop" and self.sequences:
            pages = self.sequences.pop(a % len(self.sequences))
            self.pool.drop(pages)
            self.plain.drop(pages)
        elif kind == "register" and self.sequences:
            self._register(self.sequences[a % len(self.sequences)], b)
        elif kind == "hold match":
            self._again(a, b)
        elif kind == "hold" and self.sequences:
            shared = self.sequences[a % len(self.sequences)][: 1 + b % 5]
            self._hold(shared)
        elif kind == "copy":
            self.old = [*self.old[-2:], (self.pool, state(self.pool))]
            self.pool = self.pool.copy()
        self.same()

    def _take(self, n: int, b: int, near: bool) -> None:
        own = self.sequences[b % len(self.sequences)] if near and self.sequences else []
        free, oldest = self.plain.free(), list(self.plain.lru)
        before = state(self.pool)
        pages = self.pool.take(n, own[-1] if own else None)
        if n > len(free) + len(oldest):
            assert pages is None and state(self.pool) == before
            return
        evicted = oldest[: max(0, n - len(free))]
        assert sorted(pages) == sorted(set(pages)) and set(pages) <= set(free) | set(evicted) and len(pages) == n
        assert set(pages) >= set(evicted) and (n < len(free) or set(pages) >= set(free)), "free ones first, then the oldest"
        head = []
        while own and len(head) < n and own[-1] + 1 + len(head) in free:
            head.append(own[-1] + 1 + len(head))
        assert pages[: len(head)] == head
        if not evicted:
            assert len(runs(pages[len(head) :])) <= fewest(sorted(set(free) - set(head)), n - len(head))
        assert pages[len(head) :] == sorted(pages[len(head) :])
        self.plain.took(pages, evicted)
        if own:
            own += pages
        else:
            self.sequences.append(pages)

    def _register(self, pages: list[int], b: int) -> None:
        page = pages[b % len(pages)]
        if self.plain.keys[page] is None:
            again = b % 3 == 0 and self.keys > 0
            key = str(b % self.keys if again else self.keys).encode()
            self.keys += 1
            self.pool.register(page, key)
            self.plain.register(page, key)

    def _again(self, a: int, b: int) -> None:
        keys = [str((a + i) % max(1, self.keys)).encode() for i in range(1 + b % 6)]
        found = self.pool.match(keys)
        assert found == self.plain.match(keys)
        self._hold(list(dict.fromkeys(found)))

    def _hold(self, pages: list[int]) -> None:
        if pages:
            self.pool.hold(pages)
            self.plain.hold(pages)
            self.sequences.append(pages)

    def same(self) -> None:
        pool, plain = self.pool, self.plain
        held = sum(ref > 0 for ref in plain.refs)
        assert (pool.free, pool.cached, pool.held) == (len(plain.free()), len(plain.lru), held)
        assert pool.available == pool.pages - held and pool.oldest(pool.pages) == plain.lru

    def deep(self) -> None:
        self.pool.check()
        assert state(self.pool) == (self.plain.refs, self.plain.keys, self.plain.lru)
        shared = [ref > 1 or key is not None for ref, key in zip(self.plain.refs, self.plain.keys, strict=True)]
        assert [self.pool.shared(p) for p in range(self.pool.pages)] == shared
        counts = np.bincount([p for pages in self.sequences for p in pages], minlength=self.pool.pages)
        assert counts.tolist() == self.plain.refs
        for pool, then in self.old:
            assert state(pool) == then, "a copy changed what it was made from"


def state(pool: PagePool) -> tuple:
    every = range(pool.pages)
    return [pool.refs(p) for p in every], [pool.key(p) for p in every], pool.oldest(pool.pages)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.integers(0, 40), st.integers(1, 9),
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 99), st.integers(0, 99)), max_size=60),
)  # fmt: skip
def test_events_of_any_kind(pages, group, events):
    pair = Pair(pages, group)
    for event in events:
        pair.event(*event)
    pair.deep()


@pytest.mark.parametrize("pages,group,seed", [(64, 16, 0), (37, 8, 1)])
def test_ten_thousand_events(pages, group, seed):
    rng = np.random.default_rng(seed)
    pair = Pair(pages, group)
    weights = np.array([3, 3, 4, 4, 2, 1, 1]) / 18
    kinds = rng.choice(len(KINDS), 5000, p=weights)
    for i, (kind, a, b) in enumerate(zip(kinds, *rng.integers(0, 10_000, (2, 5000)), strict=True)):
        pair.event(KINDS[kind], int(a), int(b))
        if i % 100 == 0:
            pair.deep()
    for pages_of in pair.sequences:
        pair.pool.drop(pages_of)
    assert pair.pool.held == 0 and pair.pool.available == pages
    pair.pool.check()


def test_life_of_a_page():
    pool = PagePool(8, group=4)
    assert (pool.free, pool.cached, pool.held, pool.available) == (8, 0, 0, 8)
    a = pool.take(3)
    assert a == [0, 1, 2] and pool.held == 3
    pool.register(0, b"x")
    assert pool.shared(0) and not pool.shared(1) and pool.match([b"x", b"y"]) == [0] and pool.match([b"y", b"x"]) == []
    pool.drop(a)
    assert (pool.free, pool.cached, pool.held) == (7, 1, 0)
    pool.hold(pool.match([b"x"]))
    assert (pool.cached, pool.held, pool.refs(0)) == (0, 1, 1)
    pool.drop([0])
    assert pool.take(9) is None
    assert pool.take(8) == list(range(8)) and pool.match([b"x"]) == [] and pool.key(0) is None


def test_the_end_of_a_prefix_goes_first():
    pool = PagePool(6)
    pages = pool.take(6)
    for i, page in enumerate(pages):
        pool.register(page, bytes([i]))
    pool.drop(pages)
    assert pool.oldest(9) == [5, 4, 3, 2, 1, 0]
    assert pool.take(2) == [4, 5] and pool.match([bytes([i]) for i in range(6)]) == [0, 1, 2, 3]


def test_a_key_keeps_its_first_page():
    pool = PagePool(4)
    pool.take(2)
    pool.register(0, b"k")
    pool.register(1, b"k")
    assert pool.match([b"k"]) == [0] and pool.key(1) is None
    with pytest.raises(ValueError, match="page 0 is registered under 6b"):
        pool.register(0, b"other")


def test_sequences_that_grow_stay_in_one_run_each():
    pool = PagePool(256, group=16)
    mine = [pool.take(1) for _ in range(16)]
    for _ in range(15):
        for pages in mine:
            pages += pool.take(1, near=pages[-1])
    assert all(len(runs(pages)) == 1 for pages in mine)


def test_a_long_prompt_takes_the_tightest_run():
    pool = PagePool(100, group=4)
    every = pool.take(100)
    pool.drop(every[10:30] + every[40:52] + every[60:90])
    assert pool.take(12) == every[40:52]
    assert pool.take(40) == every[10:20] + every[60:90], "the longest run whole, then the tightest"


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda pool: pool.hold([5]), "page 5 is free"),
        (lambda pool: pool.hold([0, 0]), "given twice"),
        (lambda pool: pool.hold([8]), "page 8 is none of the pool, whose pages are 0 to 7"),
        (lambda pool: pool.drop([0, 6]), "page 6 has no references"),
        (lambda pool: pool.drop([1, 1]), "given twice"),
        (lambda pool: pool.drop([-1]), "page -1 is none"),
        (lambda pool: pool.register(7, b"k"), "page 7 has no references"),
        (lambda pool: pool.take(-1), "-1 pages"),
        (lambda pool: pool.take(1, near=8), "page 8 is none"),
        (lambda pool: pool.shared(99), "page 99 is none"),
    ],
)
def test_misuse_is_refused_and_changes_nothing(call, message):
    pool = PagePool(8)
    pool.take(2)
    before = state(pool)
    with pytest.raises(ValueError, match=message):
        call(pool)
    assert state(pool) == before
    pool.check()


@pytest.mark.parametrize("pages,group", [(-1, 4), (4, 0)])
def test_sizes_are_checked(pages, group):
    with pytest.raises(ValueError, match=f"a pool of {pages} pages in groups of {group}"):
        PagePool(pages, group)


def test_no_host_pages_at_all():
    pool = HostPages(0)
    assert pool.take(0) == [] and pool.take(1) is None and pool.match([b"k"]) == []
    assert isinstance(pool.copy(), HostPages)
    pool.check()


def test_a_copy_of_a_hundred_thousand_pages_costs_next_to_nothing():
    pool = PagePool(100_000)
    pages = pool.take(60_000)
    for page in pages:
        pool.register(page, page.to_bytes(8, "little"))
    pool.drop(pages[:30_000])
    took = []
    for _ in range(50):
        began = time.perf_counter()
        pool.copy()
        took.append(time.perf_counter() - began)
    assert min(took) < 3e-4, took
