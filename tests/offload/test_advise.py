"""Advice from a trace: the way that the event model finds fastest, and what is said of it."""

import dataclasses

import numpy as np
import pytest
import tyro

from jaxmoe.engine.predicting import check_predictor
from jaxmoe.experts.planes import PlaneFormat
from jaxmoe.offload import budget
from jaxmoe.offload.advise import STAGING, Advice, Machine, Way, best_policy, bits_shares, compare, enough, sizes_to_compare, slots_for
from jaxmoe.offload.replay import replay
from jaxmoe.report import advice
from tests.offload import traces
from tests.offload.gated import with_gates
from tests.scripts import commands

FEW = ("lru", "lfu")
BITS = bits_shares(PlaneFormat(256, 128, dtype="bfloat16"))
WAY = Way("lru", None, 0, 0, 0, 0.5, 10.0, 11.0, 1.0)


def advise(trace, slots: int, machine: Machine, **more) -> Advice:
    (found,) = compare(trace, (slots,), machine, **more)
    return found


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
    size, most = int(np.sum(trace.expert_bytes)), STAGING * int(trace.expert_bytes.max())
    amounts = (4 * size + most + 1, 99 * size, 4 * size + most - 1)
    assert [slots_for(trace, budget.Amount("bytes", bytes=n)) for n in amounts] == [4, trace.experts, 3]
    with pytest.raises(budget.BudgetError):
        slots_for(trace, budget.Amount("bytes", bytes=3 * size + most - 1))
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
    sizes = int(trace.expert_bytes.sum()), STAGING * int(trace.expert_bytes.max())
    assert [one.bytes for one in found] == [3 * sizes[0] + sizes[1], 6 * sizes[0] + sizes[1], trace.experts * sizes[0]]
    table = advice.sizes_table(found, found[1])
    assert list(table.columns[0].cells) == ["", "*", ""] and len(advice.as_json(found[1], found)["sizes"]) == 3


def test_with_all_experts_on_the_device_nothing_is_streamed():
    """However slow the link and short the text."""
    trace = traces.random_trace(0)
    found = advise(trace, trace.experts, Machine(1e-6, 0.01), policies=FEW, shares=BITS)
    assert found.best.tokens_per_second == pytest.approx(100, rel=0.05) and found.best.hit_rate == 1 and len(found.ways) == 1
    assert found.by_bits == {} and found.options() == "--expert-memory 100%"


def test_a_percentage_buys_the_slots_that_were_advised_and_no_more():
    for layers, experts, active in ((8, 32, 4), (48, 128, 8), (2, 8, 3)):
        trace = traces.random_trace(0, decode=4, layers=layers, experts=experts, active=active)
        every = int(trace.expert_bytes.sum())
        for slots in sizes_to_compare(trace):
            held = slots * every + (STAGING * int(trace.expert_bytes.max()) if slots < experts else 0)
            found = Advice(WAY, (WAY,), slots, 1.0, Machine(1.0, 1.0), held, every * experts)
            assert slots_for(trace, budget.parse_memory(f"{found.percent}%")) >= slots, (layers, slots, found.percent)
        for percent in (60, 75, 90):
            slots = slots_for(trace, budget.parse_memory(f"{percent}%"))
            held = slots * every + STAGING * int(trace.expert_bytes.max())
            assert slots < experts and Advice(WAY, (WAY,), slots, 1.0, Machine(1.0, 1.0), held, every * experts).percent <= percent


def test_a_policy_that_would_be_told_more_is_not_compared():
    """In the engine a predictor that speaks before a step also tells plec what to keep, which no replay here does."""
    found = advise(with_gates(traces.random_trace(0)), 4, Machine(0.001, 0.01), policies=("lru", "plec"))
    by_policy = {name: {way.predictor for way in found.ways if way.policy == name} for name in ("lru", "plec")}
    assert by_policy["lru"] == {None, "frequency", "previous", "transitions", "gate"} and not by_policy["plec"] & {"frequency", "previous"}


def test_fewer_bits_are_fewer_bytes_on_the_link():
    assert BITS[8] == 0.625 and bits_shares(PlaneFormat(256, 128))[8] == 0.3125, "of bfloat16, and of float32"
    trace = traces.random_trace(0)
    found = advise(trace, 4, Machine(0.0001, 0.01), policies=FEW, shares=BITS)
    speeds = [found.by_bits[bits] for bits in (8, 4, 2)]
    assert speeds == sorted(speeds) and speeds[0] < speeds[2]
    assert f"{speeds[0] / found.best.tokens_per_second:.2f}x at 8 bits" in found.describe().splitlines()[2]
    same = advise(trace, 4, Machine(0.0001, 0.01), policies=FEW, shares={16: 1.0})
    assert same.by_bits == {16: next(w.tokens_per_second for w in same.ways if w.predictor is None and w.policy == same.best.policy)}


def test_a_way_is_written_as_options_that_generate_takes():
    found = Advice(WAY, (WAY,), 4, 1.0, Machine(1.0, 1.0), 50, 100)
    assert found.options() == "--expert-memory 50% --expert-policy lru"
    ahead = dataclasses.replace(found, best=dataclasses.replace(WAY, predictor="path", depth=1, width=2, staging=8))
    assert "the host's own work" in ahead.describe().splitlines()[-1] and "host" not in found.describe()
    text = ahead.options({"path": "p.npz", "readme": "r.npz"})
    assert text.endswith("--expert-mode host-driven --expert-predictor path --prefetch 8 --predictor-file p.npz")
    pair = dataclasses.replace(found, best=dataclasses.replace(ahead.best, predictor="path+gate")).options({"path": "p.npz", "readme": "r.npz"})
    assert pair.endswith("--expert-mode host-driven --expert-predictor path+gate --prefetch 8 --predictor-file p.npz")
    generate = commands.load("generate")
    for options in (found.options(), text, pair):
        read = tyro.cli(generate.Arguments, args=[*options.split(), "--prompt", "a"])
        assert (read.expert_memory, read.expert_policy) == ("50%", "lru")
    check_predictor(read.expert_predictor, read.predictor_file, None)
