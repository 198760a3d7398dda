"""What users see, counted by hand where it can be, and a bisection that ends where it should. Under 1 second."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.report.serve_stats import Limits, Search, Served, attainment, best_rate, goodput, limits_of, percentiles, span, stalls, summary

A = Served(1.0, ((3.0, 1), (4.0, 1), (7.0, 3)), prompt=10)
B = Served(2.0, ((2.5, 1),), prompt=5)
LOST = Served(0.5, (), done=False, prompt=7)


def test_one_request_by_hand():
    assert (A.ttft, A.e2e, A.tokens, A.gaps) == (2.0, 6.0, 5, [1.0, 3.0])
    assert A.tpot == 1.0, "(6 - 2) / (5 - 1)"
    assert (B.ttft, B.e2e, B.tpot, B.gaps) == (0.5, 0.5, None, [])
    assert (LOST.ttft, LOST.e2e, LOST.tpot, LOST.tokens) == (None, None, None, 0)


def test_a_run_by_hand():
    found = summary([A, B, LOST], Limits(ttft=2.0, tpot=1.0))
    assert (found["requests"], found["done"], found["tokens"], found["prompt_tokens"]) == (3, 2, 6, 22)
    assert found["duration"] == 6.5 and found["tokens_per_time"] == pytest.approx(6 / 6.5) and found["tokens_per_event"] == 1.5
    assert found["attainment"] == 2 / 3 and found["goodput"] == 2 / 6.5 and found["limits"] == {"ttft": 2.0, "tpot": 1.0}
    assert found["ttft"] == pytest.approx({"p50": 1.25, "p90": 1.85, "p99": 1.985, "mean": 1.25, "max": 2.0, "n": 2})
    assert found["itl"]["max"] == 3.0 and found["tpot"]["n"] == 1


def test_every_limit_counts():
    every = [A, B, LOST]
    assert attainment(every, Limits()) == 2 / 3, "who got nothing kept nothing"
    assert attainment(every, Limits(ttft=1.9)) == attainment(every, Limits(tpot=0.9)) == attainment(every, Limits(gap=2.9)) == 1 / 3
    assert not Limits().kept(Served(0.0, ((1.0, 1),), done=False))
    assert stalls(every, 0.5) == 2 and stalls(every, 1.0) == 1 and stalls(every, 3.0) == 0


def test_nothing_at_all():
    assert attainment([], Limits()) == 1.0 and goodput([], Limits()) == 0.0 and span([]) == 0.0
    assert summary([])["ttft"] == {"n": 0} == percentiles([None])
    assert summary([LOST])["tokens_per_time"] == 0.0


def test_limits_from_an_unloaded_run():
    assert limits_of([A, A, B]) == Limits(ttft=10.0, tpot=2.0)
    with pytest.raises(ValueError, match="of 1 unloaded requests none got two tokens"):
        limits_of([B])


def test_times_must_not_go_back():
    with pytest.raises(ValueError, match="go back"):
        Served(1.0, ((0.5, 1),))
    with pytest.raises(ValueError, match="at least one token"):
        Served(1.0, ((1.5, 0),))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.floats(0.01, 50), st.floats(0.01, 100), st.floats(0.001, 5), st.floats(0.1, 40))
def test_bisection_ends_at_the_edge(low, more, width, edge):
    high = low + more
    found = best_rate(lambda rate: 1.0 if rate <= edge else 0.5, low, high, width)
    if edge < low:
        assert found.rate == 0.0
    elif edge >= high:
        assert found == Search(high, ((low, 1.0), (high, 1.0)), False)
    else:
        assert found.rate <= edge < found.rate + width * (1 + 1e-9) and found.bounded
        assert len(found.probes) <= 2 + max(0, math.ceil(math.log2(more / width) + 1e-6))
    assert found.violation == 0.0 and list(found.probes) == sorted(found.probes)


def test_attainment_that_rises_is_reported():
    assert Search(1.0, ((1.0, 0.9), (2.0, 0.8), (3.0, 0.87)), True).violation == pytest.approx(0.07)
    for bad in ((0, 1, 1), (2, 1, 1), (1, 2, 0)):
        with pytest.raises(ValueError, match="needs 0 < low < high"):
            best_rate(lambda rate: 1.0, *bad)


def test_a_queue_with_one_server_saturates_where_it_should():
    """Requests of 1 unit each, one at a time: at most about one a unit of time can be on time."""

    def attained(rate: float) -> float:
        times = np.cumsum(np.random.default_rng(0).exponential(1 / rate, 2000))
        free, served = 0.0, []
        for t in times:
            free = max(free, t) + 1.0
            served.append(Served(t, ((free, 1),)))
        return attainment(served, Limits(ttft=5.0))

    found = best_rate(attained, 0.1, 2.0, 0.02)
    assert 0.6 < found.rate < 0.95 and found.violation <= 0.05
