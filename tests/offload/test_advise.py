"""Advice from a trace: the way that the event model finds fastest, and what is said of it."""

import dataclasses

import numpy as np
import pytest

from jaxmoe.experts.planes import PlaneFormat
from jaxmoe.offload import budget
from jaxmoe.offload.advise import STAGING, Advice, Machine, Way, advise, best_policy, bits_shares, compare, enough, sizes_to_compare, slots_for
from jaxmoe.offload.replay import replay
from jaxmoe.report import advice
from tests.offload import traces
from tests.offload.gated import with_gates

FEW = ("lru", "lfu")
WAY = Way("lru", None, 0, 0, 0, 0.5, 10.0, 11.0, 1.0)


def test_the_fastest_way_is_advised_and_checked_on_steps_that_did_not_choose_it():
    trace = with_gates(traces.random_trace(0))
    found = advise(trace, 4, Machine(0.001, 0.01), policies=FEW)
    assert {way.predictor for way in found.ways} == {None, "frequency", "previous", "transitions", "gate"}
    speeds = [way.tokens_per_second for way in found.ways]
    assert speeds == sorted(speeds, reverse=True) and found.best.tokens_per_second >= 0.99 * speeds[0]
    assert found.best.error == pytest.approx(found.best.held_out / found.best.tokens_per_second - 1)
    assert found.x == pytest.approx(trace.expert_bytes.mean() / 1e6 / (0.01 / trace.layers))
    table = advice.table(found)
    assert "*" in list(table.columns[0].cells) and found.describe().splitlines()[0].startswith(found.best.policy)
    assert advice.as_json(found)["best"]["policy"] == found.best.policy


def test_nothing_is_sent_ahead_over_a_link_that_costs_nothing():
    found = advise(traces.random_trace(0), 4, Machine(1e6, 0.01), policies=FEW)
    assert found.best.predictor is None and found.best.tokens_per_second == pytest.approx(100, rel=0.05)


def test_the_policy_with_the_most_hits():
    trace = traces.real(traces.QWEN)
    rates = {name: replay(trace, 12, name).hit_rate for name in ("lru", "lfu", "arc")}
    assert best_policy(trace, 12, ("lru", "lfu", "arc")) == max(rates, key=rates.__getitem__) == "lfu"


def test_bad_input_is_named():
    trace = traces.random_trace(0)
    size = int(np.sum(trace.expert_bytes))
    assert slots_for(trace, 4 * size + 1) == 4 and slots_for(trace, 99 * size) == trace.experts
    with pytest.raises(ValueError, match=f"buy 2 slots a layer, and a token uses 3 experts: give at least {3 * size:,}"):
        slots_for(trace, 3 * size - 1)
    with pytest.raises(ValueError, match="link_gbps = 0: give a positive number"):
        Machine(0, 1.0)
    with pytest.raises(ValueError, match="front_share = 2: give 0 to 1"):
        Machine(1.0, 1.0, 2)


def test_slots_are_compared_and_enough_of_them_advised():
    trace = traces.random_trace(0)
    assert sizes_to_compare(trace) == (3, 6, trace.experts)
    found = compare(trace, sizes_to_compare(trace), Machine(0.001, 0.01), policies=FEW)
    speeds = [one.best.tokens_per_second for one in found]
    assert [one.slots for one in found] == [3, 6, trace.experts] and speeds == sorted(speeds)
    assert [one.best for one in found] == [advise(trace, one.slots, Machine(0.001, 0.01), policies=FEW).best for one in found]
    for share in (0.0, speeds[1] / speeds[2], 1.0):
        assert enough(found, share).slots == min(one.slots for one in found if one.best.tokens_per_second >= share * speeds[-1])
    assert [one.bytes for one in found] == [n * int(trace.expert_bytes.sum()) for n in (3, 6, trace.experts)]
    table = advice.sizes_table(found, found[1])
    assert list(table.columns[0].cells) == ["", "*", ""] and len(advice.as_json(found[1], found)["sizes"]) == 3


def test_a_percentage_buys_the_slots_that_were_advised():
    for layers, experts, active in ((8, 32, 4), (48, 128, 8), (2, 8, 3)):
        shapes = budget.ExpertShapes("m", layers, experts, active, (1000,) * layers, 0, 0, 0)
        for slots in sizes_to_compare(traces.random_trace(0, layers=layers, experts=experts, active=active)):
            found = Advice(WAY, (WAY,), slots, 1.0, Machine(1.0, 1.0), slots * 1000 * layers, layers, experts)
            bought = budget.solve(shapes, budget.parse_memory(f"{found.percent}%"), STAGING, None)
            assert min(bought.slots) >= slots, (layers, slots, found.percent)


def test_fewer_bits_are_fewer_bytes_on_the_link():
    shares = bits_shares()
    assert shares[8] == 0.625 and shares == bits_shares(PlaneFormat(256, 128, dtype="bfloat16"))
    assert bits_shares(PlaneFormat(256, 128))[8] == 0.3125, "of experts that are stored in float32"
    trace = traces.random_trace(0)
    found = advise(trace, 4, Machine(0.0001, 0.01), policies=FEW, shares=shares)
    speeds = [found.by_bits[bits] for bits in (8, 4, 2)]
    assert found.best.tokens_per_second < speeds[0] < speeds[1] < speeds[2]
    assert f"{speeds[0] / found.best.tokens_per_second:.2f}x at 8 bits" in found.describe().splitlines()[2]
    same = advise(trace, 4, Machine(0.0001, 0.01), policies=FEW, shares={16: 1.0})
    assert same.by_bits == {16: same.best.tokens_per_second}


def test_a_way_is_written_as_options():
    found = Advice(WAY, (WAY,), 4, 1.0, Machine(1.0, 1.0), 1, 1, 8)
    assert found.options == "--expert-policy lru"
    ahead = dataclasses.replace(WAY, predictor="gate", depth=1, width=2, staging=8)
    assert dataclasses.replace(found, best=ahead).options == "--expert-policy lru --expert-mode host-driven --expert-predictor gate --prefetch 8"
