"""The programs behind placements: brute force agrees on small ones, bounds are bounds, seeds decide."""

import dataclasses
import itertools

import numpy as np
import pytest

from sharding.placement import METHODS, node_links, plan, problem_of, solve, traffic
from sharding.placement.affinity import bound_of, kept_by_row, limits_of, place, swap_within
from sharding.placement.balance import lpt, pack, pack_layers, packing_bound
from sharding.placement.exact import cost_of, solve_whole
from tests.sharding.test_placement import random_ids


def partitions(experts: int, devices: int) -> list[np.ndarray]:
    """All ways to give every device as many experts."""
    even = np.repeat(np.arange(devices), experts // devices)
    return [np.array(row) for row in sorted(set(itertools.permutations(even.tolist())))]


def every_placement(layers: int, experts: int, devices: int):
    return (np.stack(rows) for rows in itertools.product(partitions(experts, devices), repeat=layers))


@pytest.mark.parametrize("seed", range(6))
def test_packing_agrees_with_brute_force(seed):
    rng = np.random.default_rng(seed)
    load, groups = rng.integers(0, 30, 6), (2, 3)[seed % 2]
    best = min(np.bincount(row, load, groups).max() for row in partitions(6, groups))
    found = pack(load, groups, seconds=2)
    assert found.value == found.bound == best == np.bincount(found.group, load, groups).max()
    assert packing_bound(load, groups) <= best <= np.bincount(lpt(load, groups), load, groups).max()
    assert (np.bincount(found.group, minlength=groups) == 6 // groups).all()


def test_the_program_packs_better_than_swaps_or_proves_them_best():
    rng = np.random.default_rng(3)
    load = rng.integers(1, 60, (12, 8))
    quick, slow = pack_layers(load, 2), pack_layers(load, 2, seconds=5)
    best = [min(np.bincount(row, one, 2).max() for row in partitions(8, 2)) for one in load]
    assert [found.value for found in slow] == [found.bound for found in slow] == best
    assert any(found.bound < found.value for found in quick)  # else HiGHS was not needed here
    assert all(a.bound <= b <= a.value for a, b in zip(quick, best, strict=True))


@pytest.mark.parametrize("objective", ["sum", "max"])
@pytest.mark.parametrize("uniform", [True, False])
def test_clusters_agree_with_brute_force(objective, uniform):
    rng = np.random.default_rng(7)
    moves = rng.integers(0, 9, (2, 3, 3))
    links = 1.0 - np.eye(3) if uniform else np.array([[0.0, 1, 4], [1, 0, 3], [4, 3, 0]])
    ways = list(itertools.permutations(range(3)))
    best = min(cost_of(np.array(rows), moves, links, objective) for rows in itertools.product(ways, repeat=3))
    found = traffic.assign(moves, links, objective, seconds=20)
    assert found.value == pytest.approx(best) == cost_of(found.device, moves, links, objective)
    assert traffic.bound_of(moves, links, objective) <= best + 1e-9 and found.bound <= best + 1e-6
    assert found.bound == pytest.approx(best)
    assert (np.sort(found.device, 1) == np.arange(3)).all()


@pytest.mark.parametrize("slack, spans", [(None, 0), (0.0, 0), (0.2, 0), (0.2, 3)])
@pytest.mark.parametrize("seed", range(2))
def test_affinity_agrees_with_brute_force(slack, spans, seed):
    problem = problem_of(random_ids(seed, experts=6 - 2 * seed), 6 - 2 * seed, 2, spans=spans)
    packed = pack_layers(problem.load, 2, 1)
    limits = None if slack is None else limits_of(problem, slack, packed)
    best = min(cost_of(device, problem.transitions, problem.links) for device in every_placement(3, problem.experts, 2) if fits(device, limits))
    found = place(problem, 20, slack, packed=packed)
    assert fits(found.device, limits) and found.value == best == cost_of(found.device, problem.transitions, problem.links)
    assert bound_of(problem, limits) <= best and found.bound == pytest.approx(best)


def fits(device: np.ndarray, limits) -> bool:
    """Whether every load of every device is within its limit."""
    if limits is None:
        return True
    checks = (
        np.bincount(device[layer], limits.load[r, layer]).max() <= limits.most[r, layer]
        for r in range(len(limits.load)) for layer in range(len(device))
    )  # fmt: skip
    return all(checks)


@pytest.mark.parametrize("seed", range(3))
def test_kept_pairs_are_bounded_by_what_fits(seed):
    rng = np.random.default_rng(seed)
    step, loads = rng.integers(0, 9, (4, 4)), rng.integers(0, 4, (2, 4))
    most = [np.bincount([0, 0, 1, 1], load).max() for load in loads]
    sets = [list(s) for size in range(3) for s in itertools.combinations(range(4), size)]
    best = sum(max(row[s].sum() for s in sets if all(load[s].sum() <= top for load, top in zip(loads, most, strict=True))) for row in step)
    found = kept_by_row(step, 2, zip(loads, most, strict=True))
    assert best <= found + 1e-9 and found <= kept_by_row(step, 2)


def test_the_program_alone_agrees_with_brute_force():
    problem = problem_of(random_ids(4, layers=2, experts=4), 4, 2)
    links = np.array([[0, 2.5], [2.5, 0]])
    solved = solve_whole(problem.transitions, links, 20)
    best = min(cost_of(device, problem.transitions, links) for device in every_placement(2, 4, 2))
    assert cost_of(solved.device, problem.transitions, links) == pytest.approx(best) == solved.bound


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_bounds_hold_for_what_searches_find(devices):
    for seed in range(3):
        problem = problem_of(random_ids(seed, 80, 4, 12, 3), 12, devices)
        quick = place(problem, 0.0)
        assert 0 < bound_of(problem) <= quick.bound <= quick.value
        packed = pack_layers(problem.load, devices)
        tight, limits = place(problem, 0.0, 0.1, packed=packed), limits_of(problem, 0.1, packed)
        assert fits(tight.device, limits) and bound_of(problem) <= bound_of(problem, limits) <= tight.value
    links = node_links(4, 2)
    dear = dataclasses.replace(problem, devices=4, links=links)
    found = place(dear, 0.0)
    assert bound_of(dear) <= found.value == cost_of(found.device, dear.transitions, links)


def test_a_swap_never_leaves_the_limit():
    rng = np.random.default_rng(0)
    cost, load, device = rng.random((12, 3)), rng.integers(1, 9, (2, 12)), np.repeat(np.arange(3), 4)
    most = np.array([np.bincount(device, row, 3).max() for row in load])
    after = swap_within(cost, load, device, most)
    assert all(np.bincount(after, row, 3).max() <= top for row, top in zip(load, most, strict=True)) and (np.bincount(after) == 4).all()
    assert cost[np.arange(12), after].sum() < cost[np.arange(12), device].sum()


@pytest.mark.parametrize("method", METHODS)
def test_plans_are_the_same_for_a_seed(method):
    ids = random_ids(9, 300, 4, 12, 4)  # too many pairs for one program
    made = [plan(ids[:150], 12, 4, method, 20, judged=ids[150:]) for _ in range(2)]
    table = "expert_of" if method == "eplb" else "order"
    np.testing.assert_array_equal(getattr(made[0].made, table), getattr(made[1].made, table))
    assert made[0].judged == made[1].judged and list(made[0].judged) == ["contiguous", "random", method]
    assert all(0 <= stage.gap < 1 and stage.bound <= stage.value for stage in made[0].report.stages) and made[0].report.seconds > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layers, devices", [(1, 4), (3, 1), (2, 4), (1, 2)])
def test_the_smallest_problems_are_solved(method, layers, devices):
    for ids in (random_ids(0, 5, layers, 4), np.full((2, layers, 2), -1)):
        made = plan(ids, 4, devices, method, 1)
        hops, (last, *_) = made.judged[method]["hops"], made.report.stages[::-1]
        assert last.bound <= last.value + 1e-9 and (hops == 0 or (layers > 1 and devices > 1))


def test_solve_refuses():
    ids = random_ids(0)
    for change, says in (
        ({"method": "best"}, "method = 'best': choose from moetuner, exflow, combined"),
        ({"devices": 5}, "devices = 5 doesn't divide"),
        ({"seconds": -1}, "seconds = -1"),
        ({"method": "combined", "slack": -0.1}, "slack = -0.1"),
        ({"method": "combined", "spans": -1}, "spans = -1"),
    ):
        with pytest.raises(ValueError, match=says):
            solve(**({"ids": ids, "experts": 6, "devices": 2, "method": "exflow"} | change))
    with pytest.raises(ValueError, match="extra = 2: only the method 'eplb'"):
        plan(ids, 6, 2, "exflow", extra=2)
