"""Keys of pages, and groups of prompts against every grouping there is. About 4 seconds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.engine.serving.prefix import fingerprint, page_keys, prefix_groups, request_order, tree_tokens

SALT = fingerprint("spec", "bfloat16", 4)
prompts_of = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=7).map(tuple), min_size=1, max_size=6)


def common(prompts) -> int:
    """Tokens that all begin with."""
    n = 0
    while all(len(ids) > n for ids in prompts) and len({ids[n] for ids in prompts}) == 1:
        n += 1
    return n


def partitions(items: list[int]):
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [items[0], *rest[i]], *rest[i + 1 :]]


def shareable(ids, page: int):
    return ids[: (len(ids) - 1) // page * page]


@settings(deadline=None, max_examples=300, derandomize=True)
@given(prompts_of, st.integers(1, 3))
def test_no_grouping_saves_more(prompts, page):
    groups = prefix_groups(prompts, page)
    cut = [shareable(ids, page) for ids in prompts]
    saved = [sum((len(part) - 1) * (common([cut[i] for i in part]) // page * page) for part in parts) for parts in partitions(list(range(len(cut))))]
    assert sum(group.saved for group in groups) == max(saved)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(prompts_of, st.integers(1, 3))
def test_groups_are_what_they_say(prompts, page):
    groups = prefix_groups(prompts, page)
    order = request_order(groups)
    assert sorted(order) == list(range(len(prompts)))
    for group in groups:
        cut = [shareable(prompts[i], page) for i in group.prompts]
        assert group.prefix % page == 0 and group.prefix <= common(cut)
        assert group.prefix == 0 or len(group.prompts) > 1
        assert group.uncached == sum(len(prompts[i]) for i in group.prompts) - group.saved
    assert [group.ratio for group in groups] == sorted((group.ratio for group in groups), reverse=True)
    pages = {ids[:end] for ids in prompts for end in range(page, len(shareable(ids, page)) + 1, page)}
    assert tree_tokens(prompts, page) == len(pages) * page + sum(len(ids) - len(shareable(ids, page)) for ids in prompts)
    assert tree_tokens(prompts, page) <= sum(group.uncached for group in groups)


def test_a_deep_prefix_beats_a_wide_one_where_it_saves_more():
    few, many = (0, 1) * 10, (0, 2) * 3
    prompts = [(*few, 7, i) for i in range(3)] + [(*many, 8, i) for i in range(2)]
    groups = prefix_groups(prompts)
    assert sorted((sorted(group.prompts), group.prefix) for group in groups) == [([0, 1, 2], 21), ([3, 4], 7)]
    # One prefix for all saves 4 * 1; two save 2 * 21 + 7.
    assert sum(group.saved for group in groups) == 49


def test_a_lone_branch_stays_with_its_parents_group():
    prompts = [(1, 2, 3, 4, 5, i) for i in range(3)] + [(1, 2, 3, 9, 9, 9)]
    # Apart: 2 * 5 saved. Together: 3 * 3.
    assert [(group.prompts, group.prefix) for group in prefix_groups(prompts)] == [((3,), 0), ((0, 1, 2), 5)][::-1]
    longer = [(1, 2, 3, 4, 5, i) for i in range(3)] + [(1, 2, 3, 4, 9, 9)]
    assert [(group.prompts, group.prefix) for group in prefix_groups(longer)] == [((0, 1, 2, 3), 4)]


def test_order_by_what_is_expected_per_uncached_token():
    prompts = [(5,) * 8, (6,) * 4, (7,) * 4]
    assert request_order(prefix_groups(prompts, expected=[8, 8, 1])) == [1, 0, 2]
    assert request_order(prefix_groups(prompts)) == [1, 2, 0]


def test_shared_heads_of_a_shuffled_batch_come_together():
    rng = np.random.default_rng(0)
    heads = rng.integers(0, 1000, (8, 384))
    prompts = [np.concatenate([heads[i % 8], rng.integers(0, 1000, 128)]) for i in rng.permutation(64)]
    groups = prefix_groups(prompts, page=16)
    assert [len(group.prompts) for group in groups] == [8] * 8 and {group.prefix for group in groups} == {384}
    assert sum(group.saved for group in groups) == 8 * 7 * 384
    assert tree_tokens(prompts, 16) == 64 * 512 - 8 * 7 * 384


def test_prompts_that_begin_each_other():
    prompts = [tuple(range(n)) for n in range(1, 400)]
    groups = prefix_groups(prompts)
    assert sorted(request_order(groups)) == list(range(399)) and tree_tokens(prompts) == 399 + 398
    assert sum(group.saved for group in groups) > 0


def test_empty_prompts_and_lists():
    assert prefix_groups([]) == [] and tree_tokens([]) == 0
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        prefix_groups([(1,), ()])
    with pytest.raises(ValueError, match="1 expectations of 2 prompts"):
        prefix_groups([(1,), (2,)], expected=[3])
    with pytest.raises(ValueError, match="pages of 0 tokens"):
        prefix_groups([(1,)], page=0)


# --- Keys


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(st.integers(0, 300_000), max_size=40), st.integers(1, 7), st.integers(0, 6))
def test_keys_go_on_from_any_page(ids, page, start):
    every = page_keys(ids, page, SALT)
    assert len(every) == len(ids) // page and all(len(key) == 16 for key in every)
    assert page_keys(np.asarray(ids, np.int32), page, SALT) == every
    start = min(start, len(every))
    assert page_keys(ids, page, SALT, every[start - 1] if start else None, start) == every[start:]


def test_keys_tell_apart_what_differs():
    ids = list(range(12))
    keys = page_keys(ids, 4, SALT)
    changed = page_keys([0, 1, 2, 9, *ids[4:]], 4, SALT)
    assert all(a != b for a, b in zip(keys, changed, strict=True)), "a page's key depends on all tokens before it"
    assert page_keys([*ids[:11], 99], 4, SALT)[:2] == keys[:2]
    repeated = page_keys([5] * 12, 4, SALT)
    assert len(set(repeated)) == 3, "the same tokens at another place are another page"
    assert not set(keys) & set(page_keys(ids, 4, fingerprint("spec", "int8", 4)))
    assert not set(keys) & set(page_keys(ids, 2, SALT))


def test_fingerprints_differ_in_every_part():
    given = {"model": "m", "kv_dtype": "int8", "page": 16, "policy": "", "tenant": "a"}
    others = [("model", "n"), ("kv_dtype", "bfloat16"), ("page", 32), ("policy", "drop 1"), ("tenant", "b")]
    found = [fingerprint(**given), *(fingerprint(**{**given, name: value}) for name, value in others)]
    assert all(a != b for a, b in itertools.combinations(found, 2))
    assert fingerprint("a", "b", 1, "c") != fingerprint("ab", "", 1, "c") and fingerprint(**given) == fingerprint(**given)


def test_keys_need_the_key_before():
    with pytest.raises(ValueError, match="keys from page 1 on with parent None"):
        page_keys([1] * 8, 4, SALT, None, 1)
    with pytest.raises(ValueError, match="none before page 0"):
        page_keys([1] * 8, 4, SALT, SALT, 0)
    with pytest.raises(ValueError, match="pages of 0 tokens"):
        page_keys([1], 0, SALT)
