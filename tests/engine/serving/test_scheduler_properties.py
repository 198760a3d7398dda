"""Whatever arrives, however small the pool, in every mode: each request gives what it gives alone, and all pages come back. About 12 seconds."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.engine.serving.scheduler import OBJECTIVES, Policy
from jaxmoe.engine.serving.simulated import Cost, SimRequest, simulate
from jaxmoe.engine.serving.types import ServeSpec
from tests.engine.serving.reference_loop import check_tokens, some_requests

MODES = ("chunked", "splitfuse", "layered", "whole")
COST = Cost(layers=2, experts=16, slots=6, expert_bytes=100_000, page_bytes=1_000, link=1e9)
TABLE = np.random.default_rng(0).integers(0, 16, (50, 2, 2))
SMALL = ServeSpec(slots=4, page=8, pages=12, positions=24, batch=4, chunk=16, wave=16, groups=3, burst=1, run=4, host_pages=16)


def routing(tokens: np.ndarray) -> np.ndarray:
    return TABLE[tokens]


@st.composite
def specs(draw) -> ServeSpec:
    slots = draw(st.integers(1, 6))
    page, run = draw(st.sampled_from([(4, 4), (8, 4), (8, 1)]))
    return ServeSpec(
        slots, page, draw(st.sampled_from((3, 5, 12, 40))), 3 * page, draw(st.integers(1, slots)), 16, draw(st.sampled_from((8, 32))),
        draw(st.sampled_from((1, 3, 9))), draw(st.sampled_from((1, 4))), run, draw(st.sampled_from((0, 3, 30))), sharing=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def policies(draw, spec: ServeSpec) -> Policy:
    least = -(-spec.slots // spec.batch) - 1
    return Policy(
        draw(st.sampled_from(MODES)), draw(st.sampled_from(("swap", "recompute"))), draw(st.sampled_from(sorted(OBJECTIVES))),
        draw(st.sampled_from((None, "greedy", "pairs", "by_expert", "random"))), draw(st.sampled_from((None, least, least + 2))),
        draw(st.sampled_from((0.2, 1.0))), draw(st.sampled_from((0.01, 60.0))), draw(st.sampled_from((0.0, 0.5, 2.0))), draw(st.booleans()),
        draw(st.sampled_from((math.inf, 10.0, 0.0))),
    )  # fmt: skip


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.data())
def test_every_request_gives_what_it_gives_alone(data):
    spec = data.draw(specs())
    policy = data.draw(policies(spec))
    requests = some_requests(data.draw(st.integers(0, 10_000)), 20, spec.positions, data.draw(st.sampled_from((2, spec.positions - 1))), 0.03)
    cancels = data.draw(st.lists(st.tuples(st.floats(0, 0.1), st.integers(0, 19)), max_size=5))
    result = simulate(requests, spec, policy, COST, routing, cancels)
    check_tokens(requests, result)
    if spec.batch >= spec.slots:
        assert result.stalls == 0


def test_a_prefix_is_kept_and_found_in_one_step():
    """The device gives up a page for one who comes in, and the next to come in takes it from host memory."""
    spec = dataclasses.replace(SMALL, slots=2, pages=5, batch=1, wave=32, groups=9, host_pages=3)
    policy = Policy("layered", objective="expert-aware", held_cost=0.2, longest=0.01, defer=0.0)
    requests = some_requests(1352, 20, 24, 23, 0.03)
    both = 0

    def watch(state, made):
        nonlocal both
        kept = {page for move in made.out if move.id < 0 for page in move.host}
        both += any(kept & set(move.host) for move in made.into)

    check_tokens(requests, simulate(requests, spec, policy, COST, routing, [(0.0, 0)], watch))
    assert both > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_three_pages_for_fifty_requests(mode, preemption):
    """A pool that holds one long request or three short ones: all have to make room for each other."""
    spec = dataclasses.replace(SMALL, pages=3, slots=3, batch=3, host_pages=9)
    requests = [dataclasses.replace(r, n=1) for r in some_requests(3, 50, 24, 2, 0.2)]
    result = simulate(requests, spec, Policy(mode, preemption), COST, routing)
    check_tokens(requests, result)
    assert result.stalls == 0 and result.state.counters.preemptions > 0


def test_a_storm_of_swaps_changes_nothing():
    """Users take turns by few tokens: at least 200 times one is put aside and taken up again, and some are cancelled on the way."""
    spec = dataclasses.replace(SMALL, pages=3, slots=3, batch=3, positions=24, host_pages=200)
    requests = [SimRequest((i % 50, 1), 20, 0.01 * i, i, (0, 50), user=str(i)) for i in range(75)]
    cancels = [(0.1 * i, 6 * i) for i in range(8)]
    result = simulate(requests, spec, Policy("layered", "swap", "fair", longest=math.inf, margin=8), cancels=cancels)
    check_tokens(requests, result)
    assert result.state.counters.swaps >= 200 and result.state.counters.recomputed == 0
    assert len(result.cancelled) >= 5


@pytest.mark.parametrize("mode", ["chunked", "splitfuse", "layered"])
def test_who_runs_advances_every_step(mode):
    """With pages for all, a sequence that decodes gets a token in every step until it ends, whoever comes."""
    spec = dataclasses.replace(SMALL, pages=40)
    requests = some_requests(5, 30, 24, 16, 0.05)
    rows: list[set[int]] = []
    ready: list[set[int]] = []

    def watch(state, made):
        rows.append({row.id for row in made.decode})
        ready.append({i for i in state.running if state.seqs[i].decodes})

    result = simulate(requests, spec, Policy(mode), watch=watch)
    check_tokens(requests, result)
    assert rows == ready and result.stalls == 0 and result.state.counters.preemptions == 0


@pytest.mark.parametrize("mode", MODES)
def test_steps_keep_their_size(mode):
    """No step has more prompt tokens than its buffer, in whole runs, or more rows than the batch."""
    spec = dataclasses.replace(SMALL, pages=40, slots=6, batch=4)

    def watch(state, made):
        runs = sum(-(-piece.count // spec.run) * spec.run for piece in made.chunk)
        assert len(made.decode) <= spec.batch and all(row.count == 1 for row in made.decode)
        if mode == "whole":
            assert len(made.chunk) <= 1
        else:
            assert runs <= spec.chunk and len(made.decode) + sum(piece.count for piece in made.chunk) <= spec.chunk
        assert made.group is None or made.group.tokens <= spec.wave
        assert set(made.tables) == {state.seqs[i].slot for i in state.running}

    requests = some_requests(6, 30, 24, 20, 0.01)
    check_tokens(requests, simulate(requests, spec, Policy(mode), watch=watch))


def test_ten_thousand_events():
    """A long random run at the edge of the pool: arrivals, cancels, plans and commits, with everything checked after each."""
    events = 0
    for seed, mode in enumerate(MODES):
        spec = dataclasses.replace(SMALL, slots=6, batch=6, pages=8, host_pages=20)
        requests = some_requests(seed, 250, 24, 14, 1.5)
        cancels = [(0.01 * i, (37 * i) % 250) for i in range(80)]
        result = simulate(requests, spec, Policy(mode, objective="priority", longest=0.5), cancels=cancels)
        check_tokens(requests, result)
        events += 2 * len(result.log) + len(requests) + len(cancels)
    assert events >= 10_000
