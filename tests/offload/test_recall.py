"""Recall against a loop over tokens, layers and distances, and the split of domains."""

import dataclasses

import numpy as np
import pytest

from jaxmoe.offload.predictors import PREDICTORS
from jaxmoe.offload.recall import domains_split, recall
from jaxmoe.offload.trace import PROMPT
from tests.offload.traces import random_trace

L, E, A = 5, 8, 2
TRACE, OTHER = (random_trace(seed, prompt=5, decode=9, rows=3, layers=L, experts=E, active=A) for seed in (0, 1))


def with_gates(trace):
    rng = np.random.default_rng(2)
    gates = np.stack([rng.permutation(E)[: 3 * A] for _ in range(len(trace.ids) * L * 4)]).reshape(-1, L, 4, 3 * A).astype(np.int16)
    gates[:, np.arange(L)[:, None] + np.arange(1, 5) >= L] = -1
    return dataclasses.replace(trace, gates=gates)


def by_loop(predictor, params, trace, prompt):
    """{(sequence, layer, distance): [found at k, 2k, 3k, asked]}, one sequence after another at batch one."""
    out = {}
    for sequence in np.unique(trace.sequence):
        state, row = predictor.init(params, 1), np.array([0])
        for t in np.flatnonzero(trace.sequence == sequence):
            ids, tokens = trace.ids[t : t + 1], trace.tokens[t : t + 1]
            before = predictor.before(params, state, row, tokens)[0]
            for layer in range(L):
                for distance in range(1, 5):
                    source = layer - distance
                    if predictor.within and source < 0:
                        continue
                    scores = before
                    if predictor.within:
                        gates = None
                        if trace.gates is not None:
                            gates = np.array([[3 * A - g.index(e) if e in g else 0.0 for e in range(E)] for g in trace.gates[t, source].tolist()])
                        scores = predictor.at(params, state, source, row, ids[:, source], gates)
                    order = sorted(range(E), key=lambda e, s=scores[layer]: (-s[e], e))
                    asked = set(ids[0, layer][ids[0, layer] >= 0].tolist())
                    if prompt or trace.phase[t] != PROMPT:
                        found = [len(asked & set(order[: n * A])) for n in (1, 2, 3)]
                        out[sequence, layer, distance] = np.add(out.get((sequence, layer, distance), 0), [*found, len(asked)])
            state = predictor.after(params, state, row, tokens, ids)
    return out


@pytest.mark.parametrize(
    "name, settings",
    [("frequency", {}), ("previous", {}), ("transitions", {}), ("transitions", {"online": False}), ("eam", {}), ("gate", {})],
)
@pytest.mark.parametrize("prompt", (False, True))
def test_recall_is_what_a_loop_finds(name, settings, prompt):
    predictor = PREDICTORS[name]
    trace = with_gates(TRACE) if name == "gate" else TRACE
    params = predictor.fit([OTHER], **settings)
    found, expected = recall(predictor, params, trace, prompt), by_loop(predictor, params, trace, prompt)
    total = 0
    for n, sequence in enumerate(found.sequence):
        for layer in range(L):
            for distance in range(1, 5):
                counts = [*found.found[n, layer, distance - 1], found.asked[n, layer, distance - 1]]
                np.testing.assert_array_equal(counts, expected.get((sequence, layer, distance), np.zeros(4)))
                total += counts[-1]
    assert total > 100


def test_shares_are_of_what_was_asked():
    found = recall(PREDICTORS["frequency"], PREDICTORS["frequency"].fit([OTHER]), TRACE)
    chosen = np.array([0, 0, 2])
    np.testing.assert_allclose(found.share(2, chosen), found.found[chosen, :, 1].sum((0, 1)) / found.asked[chosen, :, 1].sum())
    np.testing.assert_allclose(found.by_layer(1)[3], found.found[:, 3, 0].sum(0) / found.asked[:, 3, 0].sum())
    assert (np.diff(found.share()) >= 0).all()


def test_an_oracle_finds_what_it_knows():
    oracle, trace = PREDICTORS["oracle"], random_trace(5, prompt=1, decode=80, rows=4, layers=L, experts=40, active=4)
    found = [recall(oracle, lambda own, r=r: oracle.fit([own], accuracy=r), trace) for r in (1.0, 0.6)]
    assert found[0].share()[0] == found[0].share(4)[0] == 1.0
    assert abs(found[1].share()[0] - 0.6) < 0.05
    assert np.isnan(found[0].by_layer(3)[2]).all() and (found[0].by_layer(3)[3:] == 1).all()


def test_a_trace_of_prompts_alone_is_refused():
    prompts = TRACE.take(TRACE.phase == PROMPT)
    with pytest.raises(ValueError, match="prompt=True"):
        recall(PREDICTORS["previous"], PREDICTORS["previous"].fit([OTHER]), prompts)


def test_domains_are_split_and_not_shared():
    traces = {name: TRACE for name in "abcdefg"}
    fit, judge = domains_split(traces, seed=3)
    assert sorted([*fit, *judge]) == sorted(traces) and len(judge) == 2
    assert list(domains_split(traces, seed=3)[1]) == list(judge)
    assert len({tuple(domains_split(traces, seed)[1]) for seed in range(9)}) > 1
    with pytest.raises(ValueError, match="two are needed"):
        domains_split({"a": TRACE})
