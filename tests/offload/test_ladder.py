"""Plans for the ladder: against brute force, and against what was counted in real traces."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from jaxmoe.experts.lossy import Lossy
from jaxmoe.offload.ladder import calibrate, edgemoe_widths, fifo, hebf, idle_seconds, popularity_widths, replay_ladder, sensitivities
from jaxmoe.offload.trace import DECODE, PROMPT, Trace, load

DATA = Path(__file__).parent / "data"


def shares(triple: tuple[int, int, int]) -> list[float]:
    return [n / sum(triple) for n in triple]


def test_hobbits_shares_and_bytes_in_real_traces():
    """Published replays: 54 / 40 / 6 % of assignments high, low and left out, and 0.55 to 0.61 of the bytes with low ones at a quarter of them."""
    lossy = Lossy(high=0.6, low=0.9, low_bits=4)
    found = {}
    for name in ("qwen3_30b_a3b", "gemma4_26b_a4b"):
        found[name] = replay_ladder(load(DATA / f"{name}.npz"), 12, "lru", lossy)
    assert shares(found["qwen3_30b_a3b"].demanded) == pytest.approx([0.54, 0.40, 0.06], abs=0.005)
    for one in found.values():
        assert 0.55 <= one.missed_ratio(0.25) <= 0.615
        # A pool in which low-precision experts take slots brings them again when they are wanted as they are stored.
        assert one.missed_ratio(0.25) + 0.05 < one.miss_byte_ratio(lambda bits: bits or 16) < 0.75


def tiny_trace(steps: int = 30, tokens: int = 2, layers: int = 2, experts: int = 6, active: int = 3) -> Trace:
    rng = np.random.default_rng(4)
    n = steps * tokens
    ids = rng.permuted(np.broadcast_to(np.arange(experts), (n, layers, experts)), axis=2)[..., :active].astype(np.int16)
    weights = -np.sort(-rng.dirichlet([0.7] * active, (n, layers)), axis=2).astype(np.float16)
    phase = np.where(np.arange(n) < 4 * tokens, PROMPT, DECODE).astype(np.uint8)
    meta = {"model": "tiny", "spec_hash": None, "layers": layers, "experts": experts, "active": active, "expert_bytes": [100] * layers}
    zeros = np.zeros(n, np.int32)
    return Trace(ids, weights, zeros - 1, zeros, phase, (np.arange(n) // tokens).astype(np.int32), meta)


def plain_replay(trace: Trace, slots: int, high: float, low: float, bits: int) -> dict:
    """HOBBIT on LRU caches, step after step, in dicts."""
    out = {"skipped": 0, "degraded": 0, "stored": 0, "low": 0, "exact": 0}
    for layer in range(trace.layers):
        held: dict[int, int] = {}  # bits of what is there, in the order of last use
        for step in np.unique(trace.step):
            level: dict[int, int] = {}
            tokens = np.flatnonzero(trace.step == step)
            for t in tokens:
                weights = trace.weights[t, layer].astype(np.float64)
                before = 0.0
                for e, w in zip(trace.ids[t, layer], weights, strict=True):  # sorted by weight
                    level[e] = max(level.get(e, 0), 2 if before <= high else 1 if before <= low else 0)
                    before += w / weights.sum()
            use = {e: 16 if n == 2 else bits for e, n in level.items() if n}
            use = {e: max(n, held.get(e, 0)) for e, n in use.items()} | {e: held[e] for e, n in level.items() if not n and e in held}
            brought = {e for e in use if held.get(e, 0) < use[e]}
            if trace.phase[tokens[0]] == DECODE:
                out["exact"] += sum(e not in held for e in level)
                for e in brought:
                    out["stored" if use[e] == 16 else "low"] += 1
                pairs = [e for t in tokens for e in trace.ids[t, layer]]
                out["skipped"] += sum(e not in use for e in pairs)
                out["degraded"] += sum(use.get(e, 16) < 16 for e in pairs)
            kept = {e: n for e, n in held.items() if e not in use} | {e: use[e] for e in sorted(use, reverse=True)}  # of one step, low ids stay
            held = dict(list(kept.items())[-slots:])
    return out


def test_a_replay_is_that_of_a_plain_loop():
    trace, slots = tiny_trace(), 3
    found = replay_ladder(trace, slots, "lru", Lossy(high=0.5, low=0.85, low_bits=2))
    plain = plain_replay(trace, slots, 0.5, 0.85, 2)
    assert {"stored": found.loads[0], "low": found.loads[2]} == {key: plain[key] for key in ("stored", "low")}
    assert (found.skipped, found.degraded, found.exact) == (plain["skipped"], plain["degraded"], plain["exact"])
    assert found.pairs == 26 * 2 * 2 * 3 and sum(found.missed) <= sum(found.demanded) == found.pairs


def test_what_cant_be_replayed_is_refused():
    with pytest.raises(ValueError, match="prior = 0.1 can't be replayed"):
        replay_ladder(tiny_trace(), 3, "lru", Lossy(prior=0.1))
    with pytest.raises(ValueError, match="'hobbit' shares one pool"):
        replay_ladder(tiny_trace(), 3, "hobbit", Lossy())
    trace = tiny_trace()
    with pytest.raises(ValueError, match="nothing but its prompt"):
        replay_ladder(dataclasses.replace(trace, phase=np.full_like(trace.phase, PROMPT)), 3, "lru", Lossy())


def test_the_least_sensitive_experts_get_the_fewest_bits():
    rng = np.random.default_rng(0)
    error, frequency = rng.random((3, 4)), rng.integers(0, 9, (3, 4)).astype(float)
    harm = {0: 0.0, 8: 0.01, 4: 0.1, 2: 1.0}

    def loss(widths: np.ndarray) -> float:
        return sum(float((error * frequency)[widths == b].sum()) * h for b, h in harm.items())

    found = sensitivities(lambda layer, expert, bits: error[layer, expert] * harm[bits], frequency, 2)
    np.testing.assert_allclose(found, error * frequency)
    for bound in (0.0, 0.2, 1.0, 3.0, 100.0):
        widths = edgemoe_widths(found, loss, bound)
        assert loss(widths) <= bound
        order = np.argsort(found, axis=None, kind="stable")
        size = np.where(widths == 0, 99, widths).reshape(-1)[order]
        assert (np.diff(size) >= 0).all()  # the more sensitive, the more bits
        if (size > 2).any():  # one more at two bits would have been too much
            more = widths.copy()
            more.reshape(-1)[order[(size == 2).sum()]] = 2
            assert loss(more) > bound
    assert (edgemoe_widths(found, loss, 100.0) == 2).all()


def test_the_least_popular_missing_experts_are_narrow():
    rows, missing = np.array([5, 1, 0, 1, 7, 2, 1, 9]), np.array([1, 1, 0, 1, 1, 0, 1, 1], bool)
    assert popularity_widths(rows, missing, 0.5, 2).tolist() == [0, 2, 0, 2, 0, 0, 2, 0]
    assert popularity_widths(rows, missing, 0.4, 3).tolist() == [0, 0, 0, 3, 0, 0, 3, 0]
    assert not popularity_widths(rows, missing, 0.1, 2).any()


def test_calibration_finds_the_largest_value_within_the_bound():
    found = calibrate(lambda x: x**2, 0.25, steps=12)
    assert 0.49 < found.value <= 0.5 and found.loss == found.value**2 and found.tried[0] == (1.0, 1.0) and len(found.tried) == 13
    assert calibrate(lambda x: 0.1 * x, 0.2)[:2] == (1.0, 0.1)
    assert calibrate(lambda x: 1.0, 0.5, steps=3)[:2] == (0.0, 0.0)


def wanted(seed: int, experts: int, planes: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 6, (experts, planes))


def orders(jobs: list[tuple[int, int]]):
    """Every order that brings low planes before high ones."""
    for order in itertools.permutations(jobs):
        if all(order.index((e, p - 1)) < n for n, (e, p) in enumerate(order) if p):
            yield order


def test_hebf_waits_no_longer_than_fifo_and_is_near_the_best_order():
    ours, theirs, best = [], [], []
    for seed in range(25):
        demand = wanted(seed, 3, 2)
        how = (demand, (2, 1), 1.0, 0.5)
        jobs = hebf(demand, (2, 1))
        assert sorted(jobs) == sorted(fifo(demand)) and all(p == 0 or (e, p - 1) in jobs[:n] for n, (e, p) in enumerate(jobs))
        ours.append(idle_seconds(jobs, *how))
        theirs.append(idle_seconds(fifo(demand), *how))
        best.append(min(idle_seconds(order, *how) for order in orders(jobs)) if jobs else 0.0)
    assert np.mean(ours) < np.mean(theirs) and np.mean(ours) <= 1.05 * np.mean(best)
    assert all(a >= b for a, b in zip(ours, best, strict=True))


def test_hebf_is_the_best_order_of_planes_of_one_size():
    """With one plane an expert, ordering by demand is Johnson's rule."""
    for seed in range(20):
        demand = wanted(seed, 5, 1)
        jobs = hebf(demand, (2,))
        found = idle_seconds(jobs, demand, (2,), 1.0, 0.7)
        assert found == pytest.approx(min(idle_seconds(order, demand, (2,), 1.0, 0.7) for order in itertools.permutations(jobs)))
        assert found <= idle_seconds(fifo(demand), demand, (2,), 1.0, 0.7) + 1e-9


def test_hebf_keeps_to_its_budget_and_leaves_out_what_few_want():
    demand = np.array([[4, 1], [0, 0], [1, 3], [2, 0]])
    assert hebf(demand, (4, 1)) == [(0, 0), (0, 1), (2, 0), (2, 1), (3, 0)]
    assert hebf(demand, (4, 1), 10) == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert hebf(demand, (4, 1), 3) == []
