"""Replay against published rates, against caches written out in plain Python, and against every cache there could have been."""

import collections
import itertools

import numpy as np
import pytest

from jaxmoe.offload.knowledge import knowledge
from jaxmoe.offload.replay import NAMES, first_uses, opt_hits, policy_hits, pool_opt_hits, prompt_profile, regret, replay, slots_by_layer
from jaxmoe.offload.trace import DECODE, PROMPT, concatenate, used_steps
from jaxmoe.residency import Knowledge, find_policy
from jaxmoe.residency.policy import DECAY
from tests.offload import traces

# Percent at 12 and at 24 slots a layer, decode steps only, the cache warmed by the prompt.
PUBLISHED = {
    traces.QWEN: {"lru": (52.2, 72.8), "lfu": (56.6, 75.5), "opt": (71.6, 86.7)},
    traces.GEMMA: {"lru": (52.3, 72.2), "lfu": (56.8, 74.0), "opt": (71.2, 85.4)},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_traces_give_the_published_rates(name):
    for policy, rates in PUBLISHED[name].items():
        found = [100 * replay(traces.real(name), slots, policy).hit_rate for slots in (12, 24)]
        assert found == pytest.approx(rates, abs=1 if policy != "opt" else 0.1), policy


def lru(sets: list[list[int]], slots: int) -> list[int]:
    """Hits by step. Experts of one step are used in falling order of their numbers, so that the smallest is the most recent."""
    cache, hits = collections.OrderedDict(), []
    for asked in sets:
        hits.append(sum(expert in cache for expert in asked))
        for expert in sorted(asked, reverse=True):
            cache[expert] = True
            cache.move_to_end(expert)
        while len(cache) > slots:
            cache.popitem(last=False)
    return hits


def lfu(sets: list[list[int]], slots: int) -> list[int]:
    """Hits by step: what was asked for enters, then the largest decayed counts stay, then the most recent, then the smallest numbers."""
    cache, count, last, hits = set(), collections.defaultdict(np.float32), {}, []
    for step, asked in enumerate(sets):
        hits.append(len(cache & set(asked)))
        if asked:
            for expert in count:
                count[expert] *= np.float32(DECAY)
        for expert in asked:
            count[expert] += np.float32(1)
            last[expert] = step
        worth = sorted(cache | set(asked), key=lambda e: (e not in asked, -count[e], -last[e], e))
        cache = set(worth[:slots])
    return hits


def static(sets: list[list[int]], slots: int, profile: np.ndarray) -> list[int]:
    """Hits by step: of what was ever asked for, the largest of the profile are there."""
    cache, hits = set(), []
    for asked in sets:
        hits.append(len(cache & set(asked)))
        cache = set(sorted(cache | set(asked), key=lambda e: (-profile[e], e))[:slots])
    return hits


def layer_sets(used_SLE: np.ndarray, layer: int) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in used_SLE[:, layer]]


@pytest.mark.parametrize("seed", range(4))
def test_policies_do_what_plain_python_does(seed):
    used_SLE, phase_S = used_steps(traces.random_trace(seed, decode=60))
    profile_LE = prompt_profile(used_SLE, phase_S)
    plain = {"lru": lru, "lfu": lfu}
    for slots in ((1, 1), (4, 2), (3, 9)):
        for policy in ("lru", "lfu", "static"):
            found_SL = policy_hits(used_SLE, np.array(slots), policy, Knowledge(profile_LE))
            for layer, count in enumerate(slots):
                sets = layer_sets(used_SLE, layer)
                wanted = static(sets, count, profile_LE[layer]) if policy == "static" else plain[policy](sets, count)
                assert found_SL[:, layer].tolist() == wanted, (policy, slots, layer)


def best_hits(sets: list[list[int]], slots: int) -> int:
    """The most hits over every choice of what to keep after every step, by trying them all."""
    reached = {frozenset(): 0}
    for asked in sets:
        after: dict[frozenset, int] = {}
        for cache, hits in reached.items():
            there = cache | set(asked)
            gained = hits + len(cache & set(asked))
            for kept in itertools.combinations(sorted(there), min(slots, len(there))):
                key = frozenset(kept)
                after[key] = max(after.get(key, 0), gained)
        reached = after
    return max(reached.values())


@pytest.mark.parametrize("share", [0.2, 0.45])
def test_opt_is_the_best_that_any_cache_can_do(share):
    for seed in range(15):
        used_SLE = traces.random_used(seed, steps=10, layers=3, experts=6, share=share)
        found = opt_hits(used_SLE, np.array([1, 2, 3])).sum(0)
        assert found.tolist() == [best_hits(layer_sets(used_SLE, layer), layer + 1) for layer in range(3)], seed


def test_no_policy_beats_opt():
    """That of each layer's own slots, or of the pool that all share."""
    for seed in range(1):
        trace = traces.random_trace(seed)
        used_SLE, _ = used_steps(trace)
        pool = pool_opt_hits(used_SLE, 6).sum()
        for policy in NAMES:
            found = replay(trace, 3, policy, known=knowledge(trace, find_policy(policy)))
            if find_policy(policy).shared:
                assert 0 < found.hits_SL.sum() <= pool
                continue
            best = replay(trace, found.slots_L.tolist(), "opt")
            assert found.slots_L.sum() == 6 and (found.hits_SL.cumsum(0)[-1] <= best.hits_SL.cumsum(0)[-1]).all()
            assert 0 <= regret(found, best) <= 1
        assert pool >= replay(trace, 3, "opt").hits_SL.sum()


def test_counts_belong_together():
    trace = traces.random_trace(5)
    used_SLE, phase_S = used_steps(trace)
    found = replay(trace, [2, 5], "lru")
    decode = phase_S == DECODE
    assert found.requests_L.tolist() == used_SLE[decode].sum((0, 2)).tolist()
    assert (found.hits_L + found.loads_L == found.requests_L).all()
    assert found.bytes_L.tolist() == [found.loads_L[0] * 1000, found.loads_L[1] * 1001]
    assert (found.compulsory_L <= found.loads_L).all()
    assert (found.prompt_loads_L + found.loads_L >= used_SLE.any(0).sum(1)).all()
    assert first_uses(used_SLE).sum(0).max() == 1
    everything = replay(trace, trace.experts, "lfu")
    assert everything.loads_L.tolist() == everything.compulsory_L.tolist()
    assert replay(trace, 0, "lru").hit_rate == 0
    assert replay((used_SLE, phase_S), [2, 5], "lru").bytes_L is None


def test_a_cold_cache_leaves_the_prompt_out():
    trace = traces.random_trace(6)
    used_SLE, phase_S = used_steps(trace)
    cold = replay(trace, 4, "opt", warm=False)
    assert cold.hits_SL.tolist() == opt_hits(used_SLE[phase_S == DECODE], np.array([4, 4])).tolist()
    assert cold.prompt_loads_L.sum() == 0 and cold.compulsory_L.sum() >= replay(trace, 4, "opt").compulsory_L.sum()


def test_the_cache_stays_warm_across_sequences():
    trace = traces.random_trace(7)
    assert replay(concatenate([trace, trace]), 9, "lru").compulsory_L.tolist() == replay(trace, 9, "lru").compulsory_L.tolist()


def test_replay_refuses_what_makes_no_sense():
    trace = traces.random_trace(8)
    used_SLE, phase_S = used_steps(trace)
    with pytest.raises(ValueError, match="no residency policy 'mru'"):
        replay(trace, 3, "mru")
    with pytest.raises(ValueError, match="10 slots in a layer of 9 experts"):
        replay(trace, 10, "lru")
    with pytest.raises(ValueError, match="3 numbers of slots for 2 layers"):
        slots_by_layer([1, 2, 3], 2, 9)
    with pytest.raises(ValueError, match="nothing but its prompt"):
        replay((used_SLE, np.full_like(phase_S, PROMPT)), 3, "lru")
    with pytest.raises(ValueError, match="no prompt to take it from"):
        replay((used_SLE, np.full_like(phase_S, DECODE)), 3, "static")
    with pytest.raises(ValueError, match="the profile has"):
        replay(trace, 3, "static", np.ones((1, 9)))
    with pytest.raises(ValueError, match="the eam policy needs how earlier texts used the experts"):
        replay(trace, 3, "eam")
