"""Copies of hot experts: brute force agrees, requests take turns, files are checked."""

import itertools
import json

import numpy as np
import pytest

from sharding.placement import Replicas, read_placement, replicate, shuffled
from sharding.placement.replicas import copies_of
from sharding.split import SplitError
from tests.sharding.test_placement import random_ids


@pytest.mark.parametrize("seed", range(5))
def test_copies_agree_with_brute_force(seed):
    load = np.random.default_rng(seed).integers(0, 40, 4)
    found = copies_of(load, devices=4, extra=4)
    ways = [np.array(count) for count in itertools.product(range(1, 5), repeat=4) if sum(count) == 8]
    assert found.sum() == 8 and found.min() >= 1
    assert (load / found).max() == min((load / count).max() for count in ways)


def test_packing_is_near_the_best_of_all():
    for seed in range(4):
        load = np.random.default_rng(seed).integers(1, 40, (1, 4))
        made = replicate(load, 2, 2)
        each = load[0] / made.copies[0]
        slots = np.repeat(np.arange(4), made.copies[0])
        best = min(max(each[list(a)].sum(), each.repeat(made.copies[0]).sum() - each[list(a)].sum()) for a in itertools.combinations(slots, 3))
        assert best - 1e-9 <= made.device_loads(load).max() <= 1.25 * best
        assert made.device_loads(load).sum() == pytest.approx(load.sum())


def test_no_extra_slots_is_a_packing():
    load = np.random.default_rng(0).integers(1, 40, (2, 6))
    made = replicate(load, 3, 0)
    assert (np.sort(made.expert_of, 1) == np.arange(6)).all() and (made.copies == 1).all()


def test_copies_are_on_different_devices_and_none_is_needless():
    made = replicate(np.array([[1000, 1, 1, 1]]), 4, 4)
    assert made.copies[0, 0] == 4
    assert all((made.expert_of[0].reshape(4, 2) == 0).sum(1) == 1)


def test_requests_take_turns():
    ids = random_ids(1, 40)
    load = np.stack([np.bincount(ids[:, layer][ids[:, layer] >= 0], minlength=6) for layer in range(3)])
    made = replicate(load, 2, 4)
    slot = made.choose(ids)
    layer = np.broadcast_to(np.arange(3)[None, :, None], ids.shape)
    asked = ids >= 0
    np.testing.assert_array_equal(made.expert_of[layer[asked], slot[asked]], ids[asked])
    assert (slot[~asked] == -1).all() and (made.devices_of(ids)[asked] == slot[asked] // 5).all()
    expert = int(made.copies[0].argmax())
    same = made.choose(np.full((6, 3, 1), expert))[:, 0, 0]
    assert len(set(same)) == made.copies[0, expert] > 1
    np.testing.assert_array_equal(made.choose(ids, np.arange(40) + 12 * 5), slot)  # all counts of copies divide 60
    assert sorted(made.slots_of[0][made.slots_of[0] >= 0]) == list(range(10))
    where = made.position_of_expert
    turns = where.shape[2]
    assert all(turns % n == 0 for n in made.copies.ravel()) and turns > 1
    np.testing.assert_array_equal(np.where(asked, where[layer, ids, np.arange(40)[:, None, None] % turns], -1), slot)
    for l, expert in np.ndindex(3, 6):
        slots, shares = np.unique(where[l, expert], return_counts=True)
        assert len(slots) == made.copies[l, expert] and len(set(shares)) == 1, "copies have equal shares"


def test_many_counts_of_copies_take_few_turns():
    load = np.array([[64.0, 49, 36, 25, 16, 9, 4, 1]])
    made = replicate(load, 8, 24)
    where = made.position_of_expert[0]
    assert np.lcm.reduce(made.copies[0]) > where.shape[1] == 64
    for expert, row in enumerate(where):
        _, shares = np.unique(row, return_counts=True)
        assert len(shares) == made.copies[0, expert] and shares.max() - shares.min() <= 1


def test_either_file_is_read():
    made, order = replicate(np.ones((1, 4)), 2, 2), shuffled(1, 4, 2, 0)
    assert (read_placement(made.to_json()).order == made.expert_of).all() and (read_placement(order.to_json()).order == order.order).all()
    for text, says in (("{", "not a placement"), ("[]", "not a placement"), ('{"format": "x"}', "not a placement")):
        with pytest.raises(ValueError, match=says):
            read_placement(text)


def test_json_holds_the_replicas():
    made = replicate(np.array([[5, 1, 1, 1], [1, 1, 9, 1]]), 2, 2)
    again = Replicas.from_json(made.to_json())
    np.testing.assert_array_equal(again.expert_of, made.expert_of)
    assert (again.experts, again.devices, again.spec_hash) == (4, 2, None)
    good = json.loads(made.to_json())
    for change, says in (
        ({"format": "jaxmoe-placement"}, "not a table of replicas"),
        ({"experts": 5}, "layer 0 lacks expert 4|don't divide"),
        ({"slots": 8}, "layer 0 has 6 entries, not 8"),
        ({"expert_of": [[0, 1, 2, 3, 0, 0], [0, 1, 1, 3, 0, 0]]}, "layer 1 lacks expert 2"),
        ({"expert_of": [[0, 1, 2, 4, 0, 0], [0, 1, 2, 3, 0, 0]]}, "layer 0: expert 4 is outside"),
        ({"devices": 4}, "4 \\+ 2 slots don't divide among 4 devices: choose 4"),
    ):
        with pytest.raises(ValueError, match=says):
            Replicas.from_json(json.dumps(good | change))


def test_slots_must_divide():
    load = np.ones((1, 4))
    for extra, says in ((1, "extra = 1: 4 \\+ 1 slots don't divide among 2 devices: choose 2"), (-2, "extra = -2"), (6, "0 to 4 further copies")):
        with pytest.raises(SplitError, match=says):
            replicate(load, 2, extra)
