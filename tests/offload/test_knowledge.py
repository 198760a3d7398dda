"""What policies are told of a trace, against plain Python over its tokens."""

import dataclasses

import numpy as np
import pytest

from jaxmoe.offload.knowledge import HIGH, high_steps, knowledge, new_texts, patterns_of, profile_of
from jaxmoe.offload.trace import DECODE, PROMPT, TraceBuilder, concatenate, used_steps
from jaxmoe.residency import POLICIES
from tests.offload import traces


def tokens_of(trace):
    """`(row of its step, sequence, layer, experts, weights)` of every token and layer."""
    numbers = sorted(set(trace.step.tolist()))
    for t in range(len(trace.step)):
        for layer in range(trace.layers):
            there, weights = trace.ids[t, layer] >= 0, trace.weights[t, layer].astype(np.float32)
            yield numbers.index(trace.step[t]), int(trace.sequence[t]), layer, trace.ids[t, layer][there], weights[there]


@pytest.mark.parametrize("seed", [0, 1])
def test_everything_is_what_the_tokens_say(seed):
    trace = traces.random_trace(seed)
    used, phase = used_steps(trace)
    high, profile, patterns = np.zeros_like(used), np.zeros(used.shape[1:]), np.zeros((len(np.unique(trace.sequence)), *used.shape[1:]))
    rows = np.unique(trace.sequence).tolist()
    for step, sequence, layer, ids, weights in tokens_of(trace):
        for e, w in zip(ids, weights, strict=True):
            patterns[rows.index(sequence), layer, e] += 1
            high[step, layer, e] |= sum(weights[weights > w]) <= HIGH * weights.sum()
    for step in np.flatnonzero(phase == PROMPT):
        profile += used[step]
    np.testing.assert_array_equal(high_steps(trace), high)
    np.testing.assert_array_equal(profile_of(trace), profile)
    np.testing.assert_array_equal(patterns_of(trace), patterns)
    assert (high <= used).all() and 0 < high.sum() < used.sum()


def test_a_trace_without_a_prompt_gives_its_profile_too():
    trace = traces.random_trace(2)
    decoded = dataclasses.replace(trace, phase=np.full_like(trace.phase, DECODE))
    np.testing.assert_array_equal(profile_of(decoded), used_steps(decoded)[0].sum(0))


def test_of_many_sequences_evenly_spaced_ones_are_patterns():
    trace = traces.random_trace(3)
    many = concatenate([trace] * 9)
    every = patterns_of(many)
    assert len(every) == len(np.unique(many.sequence)) > 5
    chosen = np.linspace(0, len(every) - 1, 5).round().astype(int)
    np.testing.assert_array_equal(patterns_of(many, most=5), every[chosen])


def test_a_text_is_new_where_no_sequence_goes_on():
    builder, ids = TraceBuilder(traces.meta(1, 4, 1)), np.zeros((2, 1, 1), int)
    for first, second in ((0, 1), (0, 1), (1, 2), (3, 4), (4, 4), (0, 0)):
        builder.add(ids, np.ones(ids.shape), [0, 0], [first, second], DECODE)
    assert new_texts(builder.build()).tolist() == [True, False, False, True, False, True]


def test_policies_are_told_what_they_need_and_no_more():
    trace = traces.random_trace(4)
    pinned = np.zeros((trace.layers, trace.experts))
    for name, policy in POLICIES.items():
        known = knowledge(trace, policy, horizon=3, pinned=pinned if name == "lru" else None)
        given = {field for field in ("profile", "future", "patterns") if getattr(known, field) is not None}
        assert given == {"static": {"profile"}, "opt": {"future"}, "eam": {"patterns"}}.get(name, set())
        assert known.horizon == 3 and (known.pinned is not None) == (name == "lru")
    np.testing.assert_array_equal(knowledge(trace, POLICIES["opt"]).future, used_steps(trace)[0])
