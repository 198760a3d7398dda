"""Policies against their definitions in plain Python, steps in blocks against steps one by one, and `choose` against every small case there is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.residency import POLICIES, choose, find_policy
from jaxmoe.residency.policies import DECAY, DEFAULT, layer_row, with_row

EXPERTS = 9
PROFILE = np.random.default_rng(9).integers(0, 4, (1, EXPERTS)).astype(np.float32)


def uses(seed: int, steps: int) -> np.ndarray:
    """[S, E]; some steps ask for nothing, some experts are never asked for."""
    rng = np.random.default_rng(seed)
    used = rng.random((steps, EXPERTS)) < 1.0 / np.arange(1, EXPERTS + 1)
    used[rng.random(steps) < 0.2] = False
    used[:, EXPERTS - 1] = False
    return used


def row_of(name: str) -> dict:
    return layer_row(POLICIES[name].init(1, EXPERTS, PROFILE), 0)


def touched(name: str, row: dict, used: np.ndarray, block: int) -> dict:
    touch = jax.jit(POLICIES[name].touch)
    for start in range(0, len(used), block):
        row = touch(row, jnp.asarray(used[start : start + block]))
    return {key: np.asarray(value) for key, value in row.items()}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("block", [2, 5, 60])
def test_steps_in_blocks_are_steps_one_by_one(name, block):
    for seed in range(3):
        used = uses(seed, 60)
        one, many = (touched(name, row_of(name), used, b) for b in (1, block))
        assert one.keys() == many.keys()
        for key, value in one.items():
            if key == "count":
                np.testing.assert_allclose(many[key], value, rtol=1e-6, atol=1e-6)
            else:
                np.testing.assert_array_equal(many[key], value)


@pytest.mark.parametrize("name", ["lru", "lfu"])
@pytest.mark.parametrize("block", [1, 12])
def test_tables_are_what_their_names_say(name, block):
    used = uses(3, 48)
    row = touched(name, row_of(name), used, block)
    active = used[used.any(1)]
    assert row["clock"] == len(active)
    for e in range(EXPERTS):
        when = np.flatnonzero(active[:, e])
        assert row["stamp"][e] == (when[-1] + 1 if len(when) else -1)
        if name == "lfu":
            assert row["count"][e] == pytest.approx(sum(DECAY ** (len(active) - 1 - s) for s in when), rel=1e-5)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("steps", [1, 4])
def test_steps_that_ask_for_nothing_change_nothing(name, steps):
    before = touched(name, row_of(name), uses(0, 20), 1)
    after = touched(name, before, np.zeros((steps, EXPERTS), bool), steps)
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)


def test_a_long_prompt_stays_finite_and_keeps_its_order():
    used = uses(4, 4000)
    row = touched("lfu", row_of("lfu"), used, 4000)
    assert np.isfinite(row["count"]).all() and row["count"][-1] == 0
    assert row["count"].max() <= 1 / (1 - DECAY) + 1e-4


def ranking(name: str, row: dict) -> list[int]:
    """Experts, the most worth keeping first."""
    first, second = (np.asarray(key) for key in POLICIES[name].keep({key: jnp.asarray(value) for key, value in row.items()}))
    return sorted(range(EXPERTS), key=lambda e: (-first[e], -second[e], e))


def test_the_recent_stay():
    row = {"clock": np.int32(5), "stamp": np.array([3, -1, 5, 5, 1, 2, -1, 4, 0], np.int32)}
    assert ranking("lru", row) == [2, 3, 7, 0, 5, 4, 8, 1, 6]


def test_stamps_that_a_float_cannot_tell_apart_are_told_apart():
    row = {"clock": np.int32(2**25), "stamp": np.arange(2**25 - EXPERTS, 2**25, dtype=np.int32)}
    assert ranking("lru", row) == list(range(EXPERTS))[::-1]


def test_the_frequent_stay_and_among_equals_the_recent():
    stamp, count = np.array([1, 2, 3, 3, 5, 4, -1, -1, 2], np.int32), np.array([2, 1, 1, 1, 0.5, 3, 0, 0, 1], np.float32)
    assert ranking("lfu", {"clock": np.int32(5), "stamp": stamp, "count": count}) == [5, 0, 2, 3, 1, 8, 4, 6, 7]


def test_the_profile_stays_whatever_is_asked_for():
    before, after = row_of("static"), touched("static", row_of("static"), uses(0, 30), 1)
    assert ranking("static", before) == ranking("static", after) == sorted(range(EXPERTS), key=lambda e: (-PROFILE[0, e], e))


def test_a_layers_row_is_its_own():
    tables = POLICIES["lfu"].init(3, EXPERTS, None)
    row = POLICIES["lfu"].touch(layer_row(tables, 1), jnp.asarray(uses(0, 1) | True))
    for layer in (1, jnp.int32(1)):
        after = with_row(tables, layer, row)
        for key, table in after.items():
            np.testing.assert_array_equal(table[1], row[key])
            np.testing.assert_array_equal(table[jnp.array([0, 2])], tables[key][jnp.array([0, 2])])


def test_what_a_policy_lacks_is_named():
    with pytest.raises(ValueError, match="no residency policy 'mru': choose one of lru, lfu, static"):
        find_policy("mru")
    with pytest.raises(ValueError, match="needs a profile"):
        POLICIES["static"].init(1, EXPERTS, None)
    with pytest.raises(ValueError, match=r"\[2, 9\] layers and experts, the model \[1, 9\]"):
        POLICIES["static"].init(1, EXPERTS, np.zeros((2, EXPERTS)))
    assert find_policy(DEFAULT).name == DEFAULT
    assert [policy.name for policy in POLICIES.values()] == list(POLICIES)
    assert {name for name, policy in POLICIES.items() if policy.needs_profile} == {"static"}


SMALL = 5
SETS = np.array(list(itertools.product([False, True], repeat=SMALL)))


@pytest.fixture(scope="module")
def choices():
    """`choose` of every set of residents and of requests, by `(keep, slots, bypass)`: each field [residents, requests, E]."""

    def make(bypass: bool):
        f = jax.vmap(jax.vmap(choose, (None, None, 0, None, None)), (None, 0, None, None, None))
        return jax.jit(lambda keep, slots: f(keep, SETS, SETS, slots, bypass))

    return {bypass: make(bypass) for bypass in (False, True)}


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("slots", range(1, SMALL + 1))
def test_choose_is_right_in_every_small_case(choices, bypass, slots):
    """Keys have ties. Residents are as many as the slots, at most."""
    rng = np.random.default_rng(slots)
    for _ in range(4):
        keep = rng.integers(0, 3, SMALL).astype(np.float32), rng.integers(0, 3, SMALL).astype(np.int32)
        found = [np.asarray(field) for field in choices[bypass](keep, slots)]
        for r, resident in enumerate(SETS):
            if resident.sum() > slots:
                continue
            for n, need in enumerate(SETS):
                hit, enter, stream, leave = (field[r, n] for field in found)
                worth = [((not bypass) & need[e], keep[0][e], keep[1][e], -e) for e in range(SMALL)]
                there = [e for e in range(SMALL) if resident[e] or need[e]]
                stays = set(sorted(there, key=lambda e: worth[e], reverse=True)[:slots])
                assert set(np.flatnonzero((resident & ~leave) | enter)) == stays
                assert (hit == (resident & need)).all() and ((enter | stream) == (need & ~resident)).all()
                assert not (enter & stream).any() and not (leave & ~resident).any()


def test_what_is_asked_for_stays_without_bypass(choices):
    """Where there are slots for all that is asked for, none of it streams and none of it leaves."""
    keep = np.arange(SMALL, dtype=np.float32), np.zeros(SMALL, np.int32)
    _, _, stream, leave = (np.asarray(field) for field in choices[False](keep, 3))
    few = SETS.sum(1) <= 3
    assert not stream[few][:, few].any() and not (leave & SETS[None])[few][:, few].any()
    assert np.asarray(choices[True](keep, 3).stream)[few][:, few].any()
