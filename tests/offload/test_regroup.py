"""Grouping by predicted paths, against brute force and plain loops; and that nobody waits longer than the bound says."""

import itertools
import json

import numpy as np
import pytest

from jaxmoe.offload import regroup, request_paths
from jaxmoe.offload.predictors import PREDICTORS
from jaxmoe.offload.predictors.interface import one_hot
from jaxmoe.offload.regroup import POLICIES, by_expert, expected_union, greedy_union, least_bound, pairs, top_paths, two_batches
from jaxmoe.offload.request_pool import Grouping, Pool
from jaxmoe.report import offload_tables
from jaxmoe.report import regroup_bench as bench
from tests.offload.traces import random_trace

SHAPE = (3, 7)


def random_paths(rng: np.random.Generator, requests: int, soft: bool) -> np.ndarray:
    """Of a few kinds of requests, so that there is something to find."""
    kinds = rng.dirichlet(np.full(SHAPE[1], 0.4), (3, SHAPE[0]))
    chance = np.clip(2.5 * kinds[rng.integers(0, 3, requests)], 0, 1)
    return (chance if soft else rng.random(chance.shape) < chance).astype(np.float32 if soft else bool)


def union(paths) -> float:
    """By a plain loop, in float64."""
    total = 0.0
    for place in np.asarray(paths, np.float64).reshape(len(paths), -1).T:
        missing = 1.0
        for p in place:
            missing *= 1 - p
        total += 1 - missing
    return total


def cost(paths, split) -> float:
    return sum(union(paths[list(part)]) for part in split)


def best_cost(paths) -> float:
    everyone = range(len(paths))
    firsts = itertools.combinations(everyone, len(paths) // 2)
    return min(cost(paths, (first, [i for i in everyone if i not in first])) for first in firsts)


@pytest.mark.parametrize("soft", (False, True))
def test_a_union_is_what_a_loop_counts(soft):
    paths = random_paths(np.random.default_rng(0), 5, soft)
    assert expected_union(paths) == pytest.approx(union(paths), rel=1e-6)
    if not soft:
        assert expected_union(paths) == paths.any(0).sum()


@pytest.mark.parametrize("soft", (False, True))
@pytest.mark.parametrize("size", (1, 2, 3))
def test_small_batches_are_split_as_well_as_can_be(size, soft):
    for seed in range(6):
        paths = random_paths(np.random.default_rng(seed), 2 * size, soft)
        assert cost(paths, two_batches(paths, size)) == pytest.approx(best_cost(paths), rel=1e-5)


@pytest.mark.parametrize("soft", (False, True))
def test_larger_batches_are_within_five_percent_of_the_best_split(monkeypatch, soft):
    monkeypatch.setattr(regroup, "EXHAUSTIVE", 0)
    for seed in range(12):
        paths = random_paths(np.random.default_rng(seed), 8, soft)
        found, arrived = cost(paths, two_batches(paths, 4)), cost(paths, (range(4), range(4, 8)))
        assert found <= 1.05 * best_cost(paths) + 1e-4 and found <= arrived + 1e-4


def test_two_kinds_of_requests_are_told_apart():
    kind = np.arange(24) % 2
    paths = np.stack([np.arange(40) // 20 == k for k in kind])
    paths &= np.random.default_rng(0).random(paths.shape) < 0.8
    first, second = two_batches(paths, 12)
    assert set(kind[first]) == {0} and set(kind[second]) == {1}
    assert 0 in first and sorted([*first, *second]) == list(range(24))


def greedy_by_loop(paths, waited, size, bound) -> list[int]:
    """Without a bound that binds later than now."""
    waited, late = list(waited), [i for i, w in enumerate(waited) if w >= bound]
    group = sorted(late, key=lambda i: (-waited[i], i))[:1] or [int(np.argmax(waited))]
    while len(group) < size:
        rest = [i for i in (late if set(late) - set(group) else range(len(paths))) if i not in group]
        group.append(min(rest, key=lambda i: (round(union(paths[[*group, i]]) - union(paths[group]), 4), i)))
    return group


@pytest.mark.parametrize("soft", (False, True))
def test_greedy_union_adds_what_grows_least(soft):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        paths, waited = random_paths(rng, 12, soft), rng.integers(0, 6, 12)
        waited[:2] = 30  # at the bound
        assert greedy_union(paths, waited, 4, 30).tolist() == greedy_by_loop(paths, waited, 4, 30)


def test_greedy_union_counts_an_expert_by_its_cost():
    paths = np.asarray([[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0]], bool)
    assert greedy_union(paths, [1, 0, 0], 2, None).tolist() == [0, 2]
    assert greedy_union(paths, [1, 0, 0], 2, None, cost=[1, 0.3, 0.3, 1, 1]).tolist() == [0, 1]
    with pytest.raises(ValueError, match="costs of 2 experts, paths of 5"):
        greedy_union(paths, [1, 0, 0], 2, None, cost=[1, 0.3])


@pytest.mark.parametrize("name", POLICIES)
def test_nobody_waits_longer_than_the_bound(name):
    """Requests come and go at random, the pool as full as the bound allows."""
    reached = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        size, bound = int(rng.integers(1, 5)), int(rng.integers(1, 6))
        rows = size * (bound + 1) if seed % 2 else int(rng.integers(1, size * (bound + 1) + 1))
        waited: list[int] = []
        kinds: list[int] = []
        for _ in range(40):
            while len(waited) < rows and rng.random() < 0.9:
                waited.append(0)
                kinds.append(int(rng.integers(0, 2)))  # one kind is never chosen willingly
            if not waited:
                continue
            paths = np.zeros((len(kinds), 2, 6), bool)
            paths[np.arange(len(kinds)), :, np.where(kinds, rng.integers(1, 6, len(kinds)), 0)] = True
            picked = POLICIES[name](paths, waited, size, bound).tolist()
            assert len(set(picked)) == min(size, len(waited))
            ended = {i for i in picked if rng.random() < 0.2}
            after = [(0 if i in picked else w + 1, k) for i, (w, k) in enumerate(zip(waited, kinds, strict=True)) if i not in ended]
            waited, kinds = [w for w, _ in after], [k for _, k in after]
            reached = max(reached, max(waited, default=0) - bound)
            assert max(waited, default=0) <= bound
    assert reached == 0  # the bound was met, so it was what kept them from waiting


def test_a_bound_that_can_not_be_kept_is_refused():
    paths = np.zeros((9, 1, 4), bool)
    assert least_bound(9, 4) == 2 and least_bound(8, 4) == 1 and least_bound(3, 4) == 0
    with pytest.raises(ValueError, match="bound of 1 rounds can't be kept by 9 requests in batches of 4: give at least 2"):
        greedy_union(paths, np.zeros(9, int), 4, 1)
    with pytest.raises(ValueError, match="5 requests must run within 1 rounds of 4"):
        greedy_union(paths, [5] * 5 + [0] * 4, 4, 5)
    with pytest.raises(ValueError, match="batch of 0"):
        greedy_union(paths, np.zeros(9, int), 0, 5)


def test_without_a_bound_requests_run_in_the_order_of_arrival():
    assert POLICIES["arrival"](np.zeros((6, 1)), [0, 9, 9, 0, 99, 0], 3, None).tolist() == [0, 1, 2]


def test_queues_by_expert_are_emptied_longest_first():
    own = np.asarray([1, 2, 1, 3, 2, 1, 0])
    paths = np.zeros((7, 2, 5), np.float32)
    paths[np.arange(7), 0, own] = 1
    paths[:, 1, 4] = 1  # all want it: a layer whose queue is everybody's
    paths[np.arange(7), 1, own] = 0.5
    waited = [0, 0, 3, 0, 1, 0, 0]
    assert by_expert(paths, waited, 5, None).tolist() == [2, 0, 5, 4, 1]
    assert by_expert(paths, waited, 5, 3).tolist()[0] == 2


def test_pairs_runs_the_group_of_the_oldest_then_the_other():
    paths = np.stack([np.arange(8) // 4 == i % 2 for i in range(8)])
    assert sorted(pairs(paths, [2, 2, 2, 2, 0, 0, 0, 0], 2, 5)) == [0, 2]
    assert sorted(pairs(paths, [0, 3, 0, 3, 1, 0, 1, 0], 2, 5)) == [1, 3]


def test_tops_are_sets_of_the_best():
    scores = np.asarray([[0.1, 0.5, 0.5, 0.2], [0.0, 0.0, 0.0, 0.0]])
    assert top_paths(scores, 2).tolist() == [[False, True, True, False], [True, True, False, False]]
    with pytest.raises(ValueError, match=r"paths between 0.0 and 1.5"):
        regroup.flat(3 * scores)


def test_recent_paths_forget_at_their_rate():
    rng = np.random.default_rng(1)
    prior, ids = rng.random(SHAPE).astype(np.float32), rng.integers(-1, SHAPE[1], (9, SHAPE[0], 2))
    source = request_paths.recent(prior, 0.8)
    state = source.after(source.init(3), 2, np.zeros(9), ids)
    state = source.after(source.after(state, 1, np.zeros(4), ids[:4]), 1, np.zeros(5), ids[4:])
    expected = prior.astype(np.float64)
    for step in ids:
        seen = np.zeros(SHAPE)
        for layer, chosen in enumerate(step):
            seen[layer, [e for e in chosen if e >= 0]] = 1
        expected = 0.8 * expected + 0.2 * seen
    np.testing.assert_allclose(source.paths(state, np.arange(3), np.zeros(3)), [prior, expected, expected], rtol=1e-5)
    np.testing.assert_allclose(source.paths(source.begin(state, 1, 7), np.arange(3), np.zeros(3)), [prior, prior, expected], rtol=1e-5)


def test_paths_by_token_are_averages_of_what_it_used():
    trace = random_trace(0)
    source = request_paths.by_token([trace], weight=2.0)
    used = np.zeros((len(trace.ids), trace.layers, trace.experts))
    for t, layer, a in np.argwhere(trace.ids >= 0):
        used[t, layer, trace.ids[t, layer, a]] = 1
    token, mean = int(trace.tokens[3]), used.mean(0)
    mine = used[trace.tokens == token]
    expected = (mine.sum(0) + 2 * mean) / (len(mine) + 2)
    unseen = [max(trace.tokens) + 1, -1]
    np.testing.assert_allclose(source.paths(None, np.arange(3), np.asarray([token, *unseen])), [expected, mean, mean], rtol=1e-5)
    sets = request_paths.as_sets(source, 3).paths(None, np.zeros(1, int), np.asarray([token]))
    assert sets.dtype == bool and (sets[0] == top_paths(expected, 3)).all()


def test_a_predictor_gives_each_row_its_own_path():
    trace = random_trace(0)
    predictor = PREDICTORS["previous"]
    source = request_paths.by_predictor(predictor, predictor.fit([trace], 0))
    ids = trace.ids[[3, 7]].astype(int)
    state = source.init(3)
    for row in (0, 1):
        state = source.after(state, row, trace.tokens[[0, 3 + 4 * row]], np.stack([ids[1 - row], ids[row]]))
    state = source.begin(source.after(state, 2, trace.tokens[:1], ids[:1]), 2, 5)
    paths = source.paths(state, np.arange(3), trace.tokens[:3])
    assert (top_paths(paths[:2], 3) >= one_hot(ids, trace.experts)).all() and paths.shape == (3, trace.layers, trace.experts)
    assert (paths[2] == source.paths(source.init(1), np.zeros(1, int), trace.tokens[:1])[0]).all()


def test_an_unknown_policy_is_refused_by_name():
    with pytest.raises(ValueError, match="no grouping 'best': choose one of arrival, random"):
        regroup.find_group_policy("best")


# --- What the benchmark counts


def recorded_traces() -> dict:
    return {f"domain {d}": random_trace(d, prompt=8, decode=14, rows=6, experts=9) for d in range(2)}


def test_a_queue_runs_every_token_once_and_counts_distinct_experts():
    sequences = bench.recorded(recorded_traces())
    sources = bench.learn(recorded_traces())(sequences, 2)
    groupings = {Grouping(3, "arrival", None): "", Grouping(3, "greedy", 3, 2): "oracle", Grouping(3, "greedy", 3, 1, 0.5): "token"}
    for grouping, name in groupings.items():
        arm, source = bench.Arm(grouping, 3 if grouping.bound is None else 6, name), sources[name]
        run = bench.simulate(sequences, arm, source, 9)
        decoded = sum(len(s.tokens) - s.prompt for s in sequences)
        least = max(int(one_hot(s.ids[s.prompt :], 9).sum()) for s in sequences)
        assert run.tokens == decoded and -(-decoded // 3) <= len(run.used) <= decoded
        assert least <= run.used.sum() <= sum(one_hot(s.ids[s.prompt :], 9).sum() for s in sequences)
        assert run.waited <= (arm.grouping.bound or 0) and run.seconds > 0
    alone = bench.simulate(sequences, bench.Arm(Grouping(1, "arrival", None), 1), sources[""], 9)
    in_turn = np.concatenate([one_hot(s.ids[s.prompt :], 9) for s in sequences])
    assert (alone.used == in_turn).all()
    assert bench.loads(alone, 1.0) == in_turn.any(0).sum()  # everything fits, so each is brought once


def test_the_oracle_knows_the_next_steps():
    sequences = bench.recorded(recorded_traces())
    source = bench.oracle(sequences, 9, 3)
    state = source.after(source.begin(source.init(2), 1, 1), 1, sequences[1].tokens[:9], sequences[1].ids[:9])
    found = source.paths(state, np.ones(1, int), np.zeros(1)).reshape(3, 2, 9)
    assert (found == one_hot(sequences[1].ids[9:12], 9)).all()


def test_records_are_compared_with_arrival_and_shown():
    halves = {name: bench.halves(trace) for name, trace in recorded_traces().items()}
    fit, measured = ({name: pair[k] for name, pair in halves.items()} for k in range(2))
    assert all(not set(a.sequence) & set(b.sequence) for a, b in halves.values())
    chosen = [arm for arm in bench.arms(2, 2, 4) if arm.source in ("", "oracle") and arm.grouping.every == 1][:4]
    records = json.loads(json.dumps(bench.compare(bench.learn(fit), measured, chosen, orders=2)))
    base = records[0]
    assert base["policy"] == "arrival" and base["reduction"] == 0 and base["caches"]["0.25"]["reduction"] == 0
    for r in records:
        assert r["reduction"] == pytest.approx(1 - r["distinct"] / base["distinct"]) and r["low"] <= r["reduction"] <= r["high"]
        slow = r["caches"]["0.5"]["net_reduction"]["0.02"]
        assert slow < r["caches"]["0.5"]["reduction"]  # the scheduler's own time is taken off
    assert offload_tables.terminal(offload_tables.REGROUP, records).row_count == len(chosen) == 4


def test_a_pool_counts_rounds_that_pass_a_request_over():
    pool = Pool().admit((4, 5, 6)).commit((5,), ()).admit((7,)).commit((4, 7), (7,))
    assert pool == Pool((4, 5, 6), (0, 1, 2))
    assert pool.choose(np.zeros((3, 2)), Grouping(2, "greedy", 2)) == (6, 4)
    assert pool.choose(np.zeros((3, 2)), Grouping(8)) == (4, 5, 6)
