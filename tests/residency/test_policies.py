"""Policies against their definitions in plain Python, steps in blocks against steps one by one, and `choose` against every small case there is."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.residency import POLICIES, Knowledge, Shape, choose, choose_shared, find_policy
from jaxmoe.residency.policies import DEFAULT
from jaxmoe.residency.policy import DECAY, FORESEEN, PINNED, layer_row, with_row

EXPERTS = 9
PROFILE = np.random.default_rng(9).integers(0, 4, (1, EXPERTS)).astype(np.float32)


def uses(seed: int, steps: int) -> np.ndarray:
    """[S, E]; some steps ask for nothing, some experts are never asked for."""
    rng = np.random.default_rng(seed)
    used = rng.random((steps, EXPERTS)) < 1.0 / np.arange(1, EXPERTS + 1)
    used[rng.random(steps) < 0.2] = False
    used[:, EXPERTS - 1] = False
    return used


def knowledge(layers: int = 1) -> Knowledge:
    """All that any policy can need."""
    rng = np.random.default_rng(8)
    future = np.broadcast_to(uses(0, 70)[:, None], (70, layers, EXPERTS))
    return Knowledge(np.repeat(PROFILE, layers, 0), future, rng.integers(0, 4, (3, layers, EXPERTS)))


def row_of(name: str) -> dict:
    return layer_row(POLICIES[name].tables(Shape(1, EXPERTS, (4,)), knowledge()), 0)


@functools.cache
def jitted(name: str):
    return jax.jit(POLICIES[name].touch)


def touched(name: str, row: dict, used: np.ndarray, block: int) -> dict:
    touch = jitted(name)
    for start in range(0, len(used), block):
        steps = jnp.asarray(used[start : start + block])
        row = touch(row, steps, steps & (jnp.arange(EXPERTS) % 2 == 0))
    return {key: np.asarray(value) for key, value in row.items()}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("block", [5, 60])
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


LEARNING = [name for name in POLICIES if name != "static"]


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("block", [1, 12])
def test_tables_are_what_their_names_say(name, block):
    used = uses(3, 48)
    row = touched(name, row_of(name), used, block)
    active = used[used.any(1)]
    assert row["clock"] == len(active)
    for e in range(EXPERTS):
        when = np.flatnonzero(active[:, e])
        assert row["stamp"][e] == (when[-1] + 1 if len(when) else -1)
        if "count" in row:
            assert row["count"][e] == pytest.approx(sum(DECAY ** (len(active) - 1 - s) for s in when), rel=1e-5)
        if "total" in row:
            assert row["total"][e] == len(when) and row["total_high"][e] == len(when) * (e % 2 == 0)
    assert ("count" in row) == (name in ("lfu", "plec", "lookahead")) and ("total" in row) == (name in ("edgemoe", "hobbit", "eam"))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("steps", [1, 5])
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


@pytest.mark.parametrize("name", POLICIES)
def test_a_layers_row_is_its_own(name):
    policy = POLICIES[name]
    tables = policy.tables(Shape(3, EXPERTS, (4, 2, 3)), knowledge(3).replace(pinned=np.zeros((3, EXPERTS))))
    assert all(len(table) == 3 for table in tables.values())
    used = jnp.asarray(uses(0, 1) | True)
    row = jitted(name)(layer_row(tables, 1), used, used)
    assert row.keys() == tables.keys()
    for layer in (1, jnp.int32(1)):
        after = with_row(tables, layer, row)
        for key, table in after.items():
            np.testing.assert_array_equal(table[1], row[key])
            np.testing.assert_array_equal(table[jnp.array([0, 2])], tables[key][jnp.array([0, 2])])


def test_tables_are_what_was_asked_for():
    for name, policy in POLICIES.items():
        tables = policy.tables(Shape(2, EXPERTS, (4, 4)), knowledge(2).replace(horizon=3))
        assert (FORESEEN in tables) == policy.foresees == (name in ("plec", "lookahead")) and PINNED not in tables
        assert not policy.foresees or (tables[FORESEEN].shape == (2, 4, EXPERTS) and (tables[FORESEEN] == -1).all())
        assert policy.shared == (name in ("edgemoe", "hobbit", "eam", "plec")) and policy.bypass == (name in ("static", "opt", "plec", "lookahead"))
        assert (policy.restart is not None) == (name in ("edgemoe", "hobbit", "eam"))
        pinned = np.arange(2 * EXPERTS).reshape(2, -1) % 5 == 0
        tables = policy.tables(Shape(2, EXPERTS, (4, 4)), knowledge(2).replace(pinned=pinned))
        first, _ = jax.jit(policy.worth)(tables, 1)
        np.testing.assert_array_equal(first == np.inf, pinned if policy.shared else pinned[1])


def test_what_a_policy_lacks_is_named():
    with pytest.raises(ValueError, match="no residency policy 'mru': choose one of lru, lfu, static"):
        find_policy("mru")
    shape = Shape(1, EXPERTS, (4,))
    lacking = {"static": "needs a profile", "opt": "needs to know the future", "eam": "needs how earlier texts used"}
    for name, policy in POLICIES.items():
        if name in lacking:
            with pytest.raises(ValueError, match=f"the {name} policy {lacking[name]}"):
                policy.tables(shape, Knowledge())
        else:
            assert policy.tables(shape, Knowledge()) and not policy.needs
    for known in ({"profile": np.zeros((2, EXPERTS))}, {"pinned": np.zeros((2, EXPERTS))}, {"future": np.zeros((5, 2, EXPERTS))}):
        with pytest.raises(ValueError, match=rf"the {next(iter(known))} has \[2, 9\] layers and experts, the model \[1, 9\]"):
            POLICIES["lru"].tables(shape, Knowledge(**known))
    with pytest.raises(ValueError, match="5 experts are pinned in 4 slots of layer 0: pin fewer"):
        POLICIES["lru"].tables(shape, Knowledge(pinned=np.arange(EXPERTS)[None] < 5))
    wide = Shape(2, EXPERTS, (2, 4))
    assert POLICIES["edgemoe"].tables(wide, Knowledge(pinned=np.repeat(np.arange(EXPERTS)[None] < 3, 2, 0)))[PINNED].sum() == 6
    with pytest.raises(ValueError, match="8 experts are pinned in 6 slots of all layers together"):
        POLICIES["edgemoe"].tables(wide, Knowledge(pinned=np.repeat(np.arange(EXPERTS)[None] < 4, 2, 0)))
    assert find_policy(DEFAULT).name == DEFAULT
    assert [policy.name for policy in POLICIES.values()] == list(POLICIES)


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
    """Keys have ties, and some experts are pinned. Residents are as many as the slots, at most."""
    rng = np.random.default_rng(slots)
    for turn in range(4):
        keep = rng.integers(0, 3, SMALL).astype(np.float32), rng.integers(0, 3, SMALL).astype(np.int32)
        keep[0][rng.permutation(SMALL)[: max(0, turn - 1)]] = np.inf
        found = [np.asarray(field) for field in choices[bypass](keep, slots)]
        for r, resident in enumerate(SETS):
            if resident.sum() > slots:
                continue
            for n, need in enumerate(SETS):
                hit, enter, stream, leave = (field[r, n] for field in found)
                worth = [((not bypass) & (need[e] | (keep[0][e] == np.inf)), keep[0][e], keep[1][e], -e) for e in range(SMALL)]
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


def test_what_is_pinned_never_leaves(choices):
    """Whatever is asked for, as long as there is a slot for every one that is pinned."""
    keep = np.array([0, np.inf, 0, np.inf, 1], np.float32), np.zeros(SMALL, np.int32)
    for bypass in (False, True):
        leave = np.asarray(choices[bypass](keep, 2).leave)
        few = SETS.sum(1) <= 2
        assert not leave[few][..., [1, 3]].any() and leave[few][..., [0, 2, 4]].any()


LAYERS, FEW = 2, 3
POOLS = np.array(list(itertools.product([False, True], repeat=LAYERS * FEW))).reshape(-1, LAYERS, FEW)
ASKED = np.array(list(itertools.product([False, True], repeat=FEW)))


@pytest.mark.parametrize("most", [None, FEW])
@pytest.mark.parametrize("bypass", [False, True])
def test_choose_shared_is_right_in_every_small_case(bypass, most):
    """Told how many are asked for at most or not. Keys have ties, some experts are pinned, and residents are as many as the slots, at most."""
    over_need = jax.vmap(choose_shared, (None, None, 0, None, None, None, None))
    found_for = jax.jit(lambda keep, layer, slots: jax.vmap(lambda there: over_need(keep, there, ASKED, layer, slots, bypass, most))(POOLS))
    rng, places = np.random.default_rng(0), [(layer, e) for layer in range(LAYERS) for e in range(FEW)]
    for slots, layer in itertools.product(range(1, LAYERS * FEW + 1), range(LAYERS)):
        keep = rng.integers(0, 3, (LAYERS, FEW)).astype(np.float32), rng.integers(0, 2, (LAYERS, FEW)).astype(np.int32)
        keep[0].flat[rng.permutation(LAYERS * FEW)[: rng.integers(3)]] = np.inf
        (hit, enter, stream, own), leave = jax.tree.map(np.asarray, tuple(found_for(keep, layer, slots)))
        for r, n in itertools.product(np.flatnonzero(POOLS.sum((1, 2)) <= slots), range(len(ASKED))):
            asked = [(layer, e) for e in np.flatnonzero(ASKED[n])]
            there = [at for at in places if POOLS[r][at] or at in asked]
            worth = {at: (not bypass and (at in asked or keep[0][at] == np.inf), keep[0][at], keep[1][at], -i) for i, at in enumerate(places)}
            stays = set(sorted(there, key=worth.__getitem__, reverse=True)[:slots])
            held = POOLS[r] & ~leave[r, n]
            held[layer] |= enter[r, n]
            assert {tuple(at) for at in np.argwhere(held)} == stays
            assert not (leave[r, n] & ~POOLS[r]).any() and (own[r, n] == leave[r, n, layer]).all()
            assert (hit[r, n] == (POOLS[r, layer] & ASKED[n])).all() and not (enter[r, n] & stream[r, n]).any()
            assert ((enter[r, n] | stream[r, n]) == (ASKED[n] & ~POOLS[r, layer])).all()


def test_who_leaves_a_pool_of_real_size_is_who_sorting_puts_last():
    """Keys span what floats and integers can, and have ties at every level."""
    rng, shape = np.random.default_rng(0), (6, 40)
    run = {most: jax.jit(lambda *a, most=most: choose_shared(*a, False, most)[1]) for most in (None, 8)}
    left = 0
    for turn in range(60):
        keep0 = rng.choice([-np.inf, -3e38, -1e-30, 0.0, -0.0, 1e-30, 2.5, 3e38, np.inf], shape).astype(np.float32)
        keep1 = rng.choice([-1, 0, 2**24, 2**24 + 1, 2**31 - 1], shape).astype(np.int32)
        slots = int(rng.integers(8, 200))
        resident = np.zeros(shape, bool)
        resident.flat[rng.permutation(resident.size)[: slots - turn % 3]] = True
        need = np.isin(np.arange(shape[1]), rng.permutation(shape[1])[: rng.integers(9)])
        asked = np.zeros(shape, bool)
        asked[turn % 6] = need
        there = np.flatnonzero(resident | asked)
        first = (asked | (keep0 == np.inf)).flat[there]
        order = there[np.lexsort((-there, keep1.flat[there], keep0.flat[there], first))]
        gone = np.isin(np.arange(resident.size), order[: max(0, len(there) - slots)]).reshape(shape) & resident
        for most in (None, 8):
            np.testing.assert_array_equal(np.asarray(run[most]((keep0, keep1), resident, need, turn % 6, slots)), gone)
        left += int(gone.sum())
    assert left > 50
