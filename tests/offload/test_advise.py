"""Advice from a trace: the way that the event model finds fastest, and what is said of it."""

import numpy as np
import pytest

from jaxmoe.offload.advise import Machine, advise, best_policy, slots_for
from jaxmoe.offload.replay import replay
from jaxmoe.report import advice
from tests.offload import traces
from tests.offload.gated import with_gates

FEW = ("lru", "lfu")


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
