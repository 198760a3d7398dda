"""Placements: what they are made from, how they are judged and kept, against plain loops."""

import json

import numpy as np
import pytest

from sharding.placement import Placement, baselines, contiguous, judge, judge_devices, node_links, placement_of, problem_of, shuffled
from sharding.split import SplitError


def random_ids(seed: int, tokens: int = 20, layers: int = 3, experts: int = 6, active: int = 2) -> np.ndarray:
    """Skewed routing without repeats, some of it missing."""
    rng = np.random.default_rng(seed)
    chance = rng.dirichlet(np.ones(experts), layers)
    ids = np.stack([[rng.choice(experts, active, False, chance[layer]) for layer in range(layers)] for _ in range(tokens)])
    return np.where(rng.random(ids.shape) < 0.1, -1, ids).astype(np.int16)


def test_problem_counts_as_a_loop_does():
    ids = random_ids(0)
    problem = problem_of(ids, 6, 2)
    load, moves = np.zeros((3, 6), int), np.zeros((2, 6, 6), int)
    for token in ids:
        for layer, row in enumerate(token):
            for e in row[row >= 0]:
                load[layer, e] += 1
                for f in token[layer + 1] if layer < 2 else []:
                    if f >= 0:
                        moves[layer, e, f] += 1
    np.testing.assert_array_equal(problem.load, load)
    np.testing.assert_array_equal(problem.transitions, moves)
    np.testing.assert_array_equal(problem.spans, [problem_of(ids[at : at + 5], 6, 2, spans=0).load for at in range(0, 20, 5)])
    assert (problem.layers, problem.experts, problem.room, problem.uniform) == (3, 6, 3, True)
    links = node_links(4, 2, 1, 5)
    np.testing.assert_array_equal(links, [[0, 1, 5, 5], [1, 0, 5, 5], [5, 5, 0, 1], [5, 5, 1, 0]])
    assert not problem_of(random_ids(0, experts=8), 8, 4, links).uniform


@pytest.mark.parametrize(
    "change, says",
    [
        ({"devices": 4}, "devices = 4 doesn't divide the model's 6 experts: choose one of 1, 2, 3, 6"),
        ({"devices": 0}, "devices = 0: a placement needs"),
        ({"experts": 4, "devices": 2}, "is outside the 4 experts"),
        ({"ids": np.zeros((3, 2), int)}, "needed: whole numbers"),
        ({"ids": np.zeros((3, 2, 1))}, "needed: whole numbers"),
        ({"links": np.ones((2, 2))}, "zero from a device to itself"),
        ({"links": np.zeros((3, 3))}, "2 devices need"),
        ({"links": np.array([[0, 1], [2, 0]])}, "the same both ways"),
    ],
)
def test_problem_refuses(change, says):
    given = {"ids": random_ids(0), "experts": 6, "devices": 2} | change
    with pytest.raises(ValueError, match=says):
        problem_of(**given)
    with pytest.raises(SplitError, match="per_node = 3 doesn't divide 8 devices"):
        node_links(8, 3)


def test_permuted_experts_give_the_same_results():
    placement, ids = shuffled(3, 6, 2, seed=1), random_ids(2)
    weights = np.random.default_rng(3).normal(size=(3, 6))
    for layer in range(3):
        permuted = weights[layer][placement.order[layer]]
        asked = ids[:, layer] >= 0
        np.testing.assert_array_equal(permuted[placement.place(ids)[:, layer][asked]], weights[layer][ids[:, layer][asked]])
        for device in range(2):
            mine = placement.order[layer, device * 3 : device * 3 + 3]
            assert (placement.device_of[layer, mine] == device).all()
    assert (placement.place(ids)[ids < 0] == -1).all()
    again = placement_of(placement.device_of, 2)
    np.testing.assert_array_equal(again.device_of, placement.device_of)
    assert (np.diff(again.order.reshape(3, 2, 3), axis=2) > 0).all()


def test_judge_counts_as_a_loop_does():
    ids, placement = random_ids(4), shuffled(3, 6, 3, seed=5)
    device = placement.device_of
    load, hops, pairs, spread = np.zeros((3, 3)), 0, 0, []
    for token in ids:
        for layer, row in enumerate(token):
            mine = [device[layer, e] for e in row if e >= 0]
            spread += [len(set(mine))] if mine else []
            for d in mine:
                load[layer, d] += 1
            after = [device[layer + 1, f] for f in token[layer + 1] if f >= 0] if layer < 2 else []
            pairs += len(mine) * len(after)
            hops += sum(c != d for c in mine for d in after)
    found = judge(placement, ids)
    assert found["max_over_mean"] == pytest.approx(np.mean(load.max(1) / load.mean(1)))
    assert found["worst_layer"] == pytest.approx(np.max(load.max(1) / load.mean(1)))
    assert found["all_layers"] == pytest.approx(load.sum(0).max() / load.sum(0).mean())
    assert found["hops"] == pytest.approx(hops / pairs) and found["devices"] == pytest.approx(np.mean(spread))
    first = ids[:, :, :1]
    assert found["top_hops"] == judge(placement, first)["hops"]
    both = baselines(ids, 6, 3)
    assert both["contiguous"] == judge(contiguous(3, 6, 3), ids)
    assert both["random"]["hops"] == pytest.approx(np.mean([judge(shuffled(3, 6, 3, seed), ids)["hops"] for seed in range(20)]))
    with pytest.raises(ValueError, match="the trace has 2 layers of experts, the placement 3"):
        judge(placement, ids[:, :2])


def test_a_placement_of_one_device_never_hops():
    ids = random_ids(6)
    found = judge(contiguous(3, 6, 1), ids)
    assert found["hops"] == 0 and found["max_over_mean"] == found["devices"] == 1
    nothing = judge_devices(np.full((2, 3, 1), -1), 2)
    assert nothing["hops"] == 0 and nothing["max_over_mean"] == 1 and nothing["devices"] == 0


def test_json_holds_the_placement():
    placement = Placement(shuffled(3, 6, 2, 0).order, 2, "abc", {"method": "x", "bytes": 3})
    again = Placement.from_json(placement.to_json())
    np.testing.assert_array_equal(again.order, placement.order)
    assert (again.devices, again.spec_hash, again.meta) == (2, "abc", {"method": "x", "bytes": 3})
    again.check_model(3, 6, "abc")
    again.check_model(3, 6, None)
    for given, says in (((4, 6, "abc"), "3 layers of experts, this one has 4"), ((3, 8, "abc"), "6 experts a layer"), ((3, 6, "d"), "the model abc")):
        with pytest.raises(ValueError, match=says):
            again.check_model(*given)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"format": "other"}, "not a placement: its format is 'other'"),
        ({"version": 2}, "version 2; this program reads version 1"),
        ({"experts": 8}, "layer 0 has 6 entries, not 8"),
        ({"layers": 2}, "has 3 rows, not one for each of 2 layers"),
        ({"layers": "3"}, "layers is '3'"),
        ({"devices": 4}, "devices = 4 doesn't divide"),
        ({"devices": True}, "devices is True"),
        ({"spec_hash": 5}, "spec_hash is 5"),
        ({"order": None}, "has no rows"),
        ({"order": [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 4, 5]]}, "layer 1 is not a permutation: expert 4 stands there twice"),
        ({"order": [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 6]]}, "layer 2: expert 6 is outside the 6 experts"),
        ({"order": [[0, 1, 2, 3, 4, 5.0]] * 3}, "layer 0 holds an entry that is not a whole number"),
    ],
)
def test_json_is_checked(change, says):
    made = json.loads(contiguous(3, 6, 2).to_json())
    with pytest.raises(ValueError, match=says):
        Placement.from_json(json.dumps(made | change))
    with pytest.raises(ValueError, match="not a placement"):
        Placement.from_json("{")


def test_devices_must_hold_equal_numbers():
    with pytest.raises(ValueError, match="layer 1: 2 devices are to hold 2 experts each, they hold \\[3, 1\\]"):
        placement_of(np.array([[0, 0, 1, 1], [0, 0, 0, 1]]), 2)
