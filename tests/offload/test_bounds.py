"""Bounds against replay, against brute force, and against the figures published for the real traces."""

import itertools

import numpy as np
import pytest

from jaxmoe.offload import bounds
from jaxmoe.offload.replay import replay
from jaxmoe.offload.trace import DECODE, PROMPT, TraceBuilder
from tests.offload import traces


@pytest.mark.parametrize("rows", [1, 3])
def test_stack_distances_give_lru_at_every_size(rows):
    for seed in range(3):
        trace = traces.random_trace(seed, rows=rows)
        curves_LC = bounds.marginal_hits(trace)
        assert curves_LC.shape == (2, 10)
        for slots in range(10):
            assert replay(trace, slots, "lru").hits_L.tolist() == curves_LC[:, slots].tolist(), (seed, slots)


def test_stack_distances_give_lru_on_a_real_trace():
    trace = traces.real(traces.GEMMA)
    histogram_LD = bounds.distance_histogram(trace)
    for slots in (5, 24):
        assert (replay(trace, slots, "lru").hits_L == histogram_LD.cumsum(1)[:, slots]).all()
    assert (histogram_LD[:, -1] == replay(trace, 1, "opt").compulsory_L).all()


def brute_allocation(curves_LC: np.ndarray, total: int, minimum: int) -> float:
    layers, sizes = curves_LC.shape
    choices = itertools.product(range(minimum, sizes), repeat=layers)
    return max(sum(curves_LC[layer, c] for layer, c in enumerate(choice)) for choice in choices if sum(choice) == total)


@pytest.mark.parametrize("concave", [True, False])
def test_allocate_finds_the_best(concave):
    rng = np.random.default_rng(0)
    for _ in range(20):
        gains = rng.integers(0, 20, (3, 5))
        gains = -np.sort(-gains, axis=1) if concave else gains
        curves_LC = np.concatenate([np.zeros((3, 1), int), gains.cumsum(1)], axis=1)
        for total, minimum in ((0, 0), (4, 0), (7, 1), (15, 2)):
            slots = bounds.allocate(curves_LC, total, minimum)
            assert slots.sum() == total and slots.min() >= minimum
            assert curves_LC[np.arange(3), slots].sum() == brute_allocation(curves_LC, total, minimum)


def test_allocate_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="give 4 to 10"):
        bounds.allocate(np.zeros((2, 6)), 3, 2)
    with pytest.raises(ValueError, match="give 0 to 10"):
        bounds.allocate(np.zeros((2, 6)), 11)


def one_layer(decode: list[list[int]], prompt: tuple[list[int], ...] = (), experts: int = 8) -> bounds.Trace:
    builder = TraceBuilder(traces.meta(1, experts, len(decode[0])))
    for phase, tokens in ((PROMPT, prompt), (DECODE, decode)):
        for ids in tokens:
            builder.add([[ids]], np.ones((1, 1, len(ids))), [0], [0], phase)
    return builder.build()


def test_reuse_counts_steps():
    found = bounds.reuse(one_layer([[0], [1], [0], [0], [2]], prompt=([1],)))
    assert found == {"median": 2.0, "within_1": 0.2, "within_8": 0.6, "first": 0.4}


def test_overlap_and_distinct_of_a_known_trace():
    trace = one_layer([[0, 1], [1, 2], [0, 1]])
    assert bounds.overlap(trace, (1, 2, 3)) == [0.5, 1.0, None]
    rows = bounds.distinct_experts(trace, (1, 2, 3, 4))
    assert [row["batch"] for row in rows] == [1, 2, 3]
    assert [row["consecutive"] for row in rows] == [2, 3, 3] and rows[2]["random"] == 3
    assert rows[1]["iid"] == pytest.approx(8 * (1 - 0.75**2))


def test_distinct_experts_repeat_with_their_seed():
    trace = traces.random_trace(0)
    assert bounds.distinct_experts(trace, seed=3) == bounds.distinct_experts(trace, seed=3) != bounds.distinct_experts(trace, seed=4)


def test_srp_of_known_traces():
    assert bounds.srp(one_layer([[0, 1]] * 6), 4) == {"srp": 1.0, "rho": 1.0}
    # Every stretch of two uses two experts once each: a group of both offers four uses and two are wanted.
    assert bounds.srp(one_layer([[0], [1], [0], [1]]), 2) == {"srp": pytest.approx(2 / 3), "rho": 2.0}
    assert bounds.srp(one_layer([[0]]), 2) is None


def test_srp_agrees_with_its_definition():
    trace = traces.random_trace(2, rows=1, decode=20)
    counts = [run[start : start + 4].sum(0) for run in bounds.used_tokens(trace) for start in range(len(run) - 3)]
    n = np.stack(counts)
    f1 = [2 * n[n >= alpha].sum() / ((n >= alpha).sum() * 4 + n.sum()) for alpha in range(1, 5)]
    assert bounds.srp(trace, 4)["srp"] == pytest.approx(max(f1))


def test_foresight_grows_to_the_optimum():
    for name in (traces.QWEN, traces.GEMMA):
        trace = traces.real(name)
        best = replay(trace, 12, "opt").hit_rate
        rates = [bounds.lookahead(trace, window, 12) for window in (0, 1, 4, 16, 1000)]
        assert rates == sorted(rates) and rates[-1] == best
        assert rates[0] == pytest.approx(replay(trace, 12, "lru").hit_rate, abs=0.02)
        assert all(bounds.sch(trace, window, 12) <= best for window in (4, 1000))


def test_sch_keeps_what_comes_most_often():
    # After step 1 one slot must choose between 0, which comes once and first, and 1, which comes twice.
    trace = one_layer([[0], [1], [0], [1], [1]])
    assert bounds.sch(trace, 4, 1) == pytest.approx(2 / 5)
    assert bounds.sch(trace, 4, 2) == pytest.approx(3 / 5)


def test_real_traces_give_the_published_statistics():
    """Overlap at lags 1, 2, 4, 8 and 16, in percent; it falls within a point."""
    published = {traces.QWEN: (38, 29, 28, 27, 28), traces.GEMMA: (36, 29, 28, 26, 24)}
    for name, wanted in published.items():
        found = [100 * share for share in bounds.overlap(traces.real(name), (1, 2, 4, 8, 16))]
        assert found == pytest.approx(wanted, abs=1)
    assert bounds.reuse(traces.real(traces.QWEN))["first"] == pytest.approx(0.029, abs=0.001)
    assert bounds.reuse(traces.real(traces.GEMMA))["first"] == pytest.approx(0.036, abs=0.001)
