"""Policies that look ahead, against optima found by trying everything and against their definitions."""


import numpy as np
import pytest

from jaxmoe.offload.replay import Steps, opt_hits, policy_hits, residents, steps_of
from jaxmoe.residency import Knowledge
from jaxmoe.residency.ahead import NEVER, next_uses, steps_until_use, until_turn
from tests.offload import traces


def foretold(used_SLE: np.ndarray, horizon: int) -> np.ndarray:
    """[S, M + 1, L, E]: what will be used, known for certain."""
    padded = np.concatenate([used_SLE, np.zeros((horizon, *used_SLE.shape[1:]), bool)])
    return np.stack([padded[s : s + horizon + 1] for s in range(len(used_SLE))]).astype(np.float32)


def test_next_uses():
    used = traces.random_used(0, steps=12, layers=2, experts=4, share=0.3)
    found = next_uses(used, 99)
    for s, layer, e in np.ndindex(used.shape):
        assert found[s, layer, e] == next((n for n in range(s + 1, 12) if used[n, layer, e]), 99)


@pytest.mark.parametrize("share", [0.15, 0.4])
def test_opt_as_a_policy_has_the_hits_of_the_optimum(share):
    for seed in range(3):
        used = traces.random_used(seed, steps=60, layers=3, experts=8, share=share)
        slots = np.array([1, 3, 6])
        np.testing.assert_array_equal(policy_hits(used, slots, "opt", Knowledge(future=used)), opt_hits(used, slots))


def test_opt_goes_by_recency_where_its_knowledge_ends():
    used = traces.random_used(1, steps=80, layers=2, experts=8, share=0.3)
    known = Knowledge(future=used[:30])
    there = residents(used, np.array([3, 3]), "opt", known)
    assert (there[40:].sum(2) == 3).all()
    for layer in range(2):
        last = np.full(8, -1)
        for s in range(80):
            last[used[s, layer]] = s
            if s >= 60 and s < 79:  # long after: what is there is what was used last
                worth = sorted(np.flatnonzero(there[s, layer] | used[s, layer]), key=lambda e: (-last[e], e))
                assert set(np.flatnonzero(there[s + 1, layer])) == set(worth[:3])


@pytest.mark.parametrize("share", [0.2, 0.45])
def test_a_lookahead_that_sees_everything_is_the_optimum(share):
    for seed in range(6):
        used = traces.random_used(seed, steps=10, layers=3, experts=6, share=share)
        slots = np.array([1, 2, 3])
        found = policy_hits(steps_of(used, foretold(used, 10)), slots, "lookahead")
        assert found.sum(0).tolist() == opt_hits(used, slots).sum(0).tolist()


def test_a_longer_sight_brings_more_hits():
    used = traces.random_used(3, steps=300, layers=2, experts=16, share=0.2)
    slots = np.array([6, 6])
    hits = [int(policy_hits(steps_of(used, foretold(used, m)), slots, "lookahead").sum()) for m in (1, 2, 4, 40)]
    blind = int(policy_hits(used, slots, "lookahead").sum())
    assert blind < hits[0] < hits[1] < hits[2] < hits[3] == opt_hits(used, slots).sum()


def test_steps_until_use_is_the_mean_wait():
    """Against the sum over all ways it can go; beyond what is foretold the wait is geometric with the rate."""
    rng = np.random.default_rng(0)
    p, count = rng.random((3, 5)).astype(np.float32), rng.random(5).astype(np.float32) * 5
    rate = np.clip(count * 0.1, 1e-3, 1)
    for known in range(4):
        found = np.asarray(steps_until_use(p[:known], {"count": count}))
        for e in range(5):
            chance, mean = 1.0, 0.0
            for m in range(known):
                mean, chance = mean + chance * p[m, e] * m, chance * (1 - p[m, e])
            geometric = sum((1 - rate[e]) ** (k - 1) * rate[e] * (k + max(0, known - 1)) for k in range(1, 40000))
            assert found[e] == pytest.approx(mean + chance * geometric, rel=1e-3)


def test_until_turn():
    assert np.asarray(until_turn(4, 1)).tolist() == [3, 4, 1, 2] and np.asarray(until_turn(4, 3)).tolist() == [1, 2, 3, 4]


def test_plec_takes_the_first_layers_place_before_the_last():
    """Four layers and a pool of four: what is foretold for later layers of this step stays, what has had its turn leaves."""
    used = np.zeros((3, 4, 3), bool)
    used[:, :, 0] = True
    used[1, 3] = used[2, 3] = [False, True, False]
    foreseen = np.concatenate([used[:, None], np.concatenate([used[1:], used[:1] * False])[:, None]], axis=1).astype(np.float32)
    seen = Steps(used, used, np.arange(3) == 0, foreseen)
    hits = policy_hits(seen, np.ones(4, int), "plec", Knowledge())
    assert hits.tolist() == [[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]] and NEVER > 2**30
