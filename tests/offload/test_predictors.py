"""Predictors against plain loops, their batches, and that none but the oracle sees the future."""

import dataclasses
import math

import numpy as np
import pytest

from jaxmoe.offload.predictors import PREDICTORS, Sizes, find_predictor, foresee, foresee_layers, sizes_of
from jaxmoe.offload.predictors.corrected import params_of
from jaxmoe.offload.predictors.eam import fit as fit_eam
from jaxmoe.offload.predictors.gate import ranked_scores
from jaxmoe.offload.predictors.interface import sequences
from jaxmoe.offload.predictors.oracle import mistaken
from jaxmoe.offload.predictors.transitions import LEAST, SCALE, SHRINK
from jaxmoe.offload.trace import used_steps
from jaxmoe.spec import ModelSpec
from tests.models import CONFIGS
from tests.offload.gated import with_gates
from tests.offload.traces import random_trace

L, E, A = 4, 9, 3
TRACE, OTHER = (random_trace(seed, rows=3, layers=L, experts=E, active=A) for seed in (0, 1))
CHEAP = ("frequency", "previous", "transitions", "eam", "oracle")


def steps_of(trace):
    """(rows, tokens, ids) of every step; a row a sequence."""
    _, row = np.unique(trace.sequence, return_inverse=True)
    for step in np.unique(trace.step):
        own = trace.step == step
        yield row[own], trace.tokens[own], trace.ids[own]


def fitted(name, trace=OTHER, **settings):
    return PREDICTORS[name].fit([trace], 0, **settings)


def walk(name, params, trace=TRACE):
    """(state's step, rows, tokens, ids, what is said before, what is said at each layer)."""
    predictor, out = PREDICTORS[name], []
    state = predictor.init(params, len(np.unique(trace.sequence)))
    for rows, tokens, ids in steps_of(trace):
        at = [predictor.at(params, state, layer, rows, ids[:, layer], None) for layer in range(L)]
        out.append((rows, ids, predictor.before(params, state, rows, tokens), at))
        state = predictor.after(params, state, rows, tokens, ids)
    return out


def combined(tables):
    """1 - prod(1 - p), entry by entry."""
    out = np.zeros_like(tables[0])
    for place in np.ndindex(out.shape):
        out[place] = 1 - math.prod(1 - float(table[place]) for table in tables)
    return out


def test_a_frequency_moves_towards_what_is_used():
    params = fitted("frequency", decay=0.8)
    start = np.zeros((L, E))
    for layer in range(L):
        for expert in range(E):
            start[layer, expert] = np.mean([expert in own for own in OTHER.ids[:, layer].tolist()])
    now = {row: start.copy() for row in range(7)}
    for rows, ids, said, _ in walk("frequency", params):
        expected = combined([now[row] for row in rows])
        np.testing.assert_allclose(said, [expected, expected], atol=1e-6)
        for row, own in zip(rows, ids.tolist(), strict=True):
            for layer in range(L):
                for expert in range(E):
                    now[row][layer, expert] = 0.8 * now[row][layer, expert] + 0.2 * (expert in own[layer])


def test_previous_says_the_last_token_again():
    last = {row: [[]] * L for row in range(7)}
    for rows, ids, said, _ in walk("previous", fitted("previous")):
        expected = [[float(any(e in last[row][layer] for row in rows)) for e in range(E)] for layer in range(L)]
        np.testing.assert_array_equal(said, [expected, expected])
        last |= {row: own for row, own in zip(rows, ids.tolist(), strict=True)}


def said_by_transitions(seen, layer, own):
    """One token's scores of the later layers, counted from all tokens [L, A] that were seen."""
    out = np.zeros((L, E))

    def log_odds(p):
        p = min(max(p, LEAST), 1 - LEAST)
        return math.log(p / (1 - p))

    for later in range(layer + 1, L):
        tokens = sum(any(e >= 0 for e in token[later]) for token in seen)
        for there in range(E):
            f = (sum(there in token[later] for token in seen) + 1) / (tokens + E / A)
            total = log_odds(f)
            for here in (e for e in own if e >= 0):
                uses = sum(here in token[layer] for token in seen)
                both = sum(here in token[layer] and there in token[later] for token in seen)
                total += SCALE * (log_odds((both + SHRINK * f) / (uses + SHRINK)) - log_odds(f))
            out[later, there] = 1 / (1 + math.exp(-total))
    return out if max(own) >= 0 else np.zeros((L, E))


@pytest.mark.parametrize("online", (False, True))
def test_transitions_count_pairs_of_experts(online):
    short, seen = TRACE.take(np.arange(20)), OTHER.ids.tolist()
    for _, ids, said, at in walk("transitions", fitted("transitions", online=online), short):
        assert not said.any()
        for layer in (0, L - 2, L - 1):
            expected = combined([said_by_transitions(seen, layer, own[layer]) for own in ids.tolist()])
            np.testing.assert_allclose(at[layer], expected, atol=2e-5)
        seen = seen + (ids.tolist() if online else [])


def test_transitions_look_no_further_than_told():
    params = fitted("transitions", distances=2)
    said = PREDICTORS["transitions"].at(params, PREDICTORS["transitions"].init(params, 1), 0, np.array([0]), OTHER.ids[:1, 0], None)
    assert said[1:3].all() and not said[3:].any()


def matrix(tokens):
    """How often a sequence's tokens [T, L, A] use each expert."""
    out = np.zeros((L, E))
    for token in tokens:
        for layer in range(L):
            for expert in token[layer]:
                out[layer, expert] += expert >= 0
    return out


def rows_normalised(counts):
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def nearest(patterns, counts):
    flat = rows_normalised(counts).ravel()
    cosines = [float(p[: len(counts)].ravel() @ flat / (np.linalg.norm(p[: len(counts)]) * np.linalg.norm(flat))) for p in patterns]
    return patterns[int(np.argmax(cosines))]


def test_activation_matrices_follow_the_nearest():
    patterns = [rows_normalised(matrix(OTHER.ids[places].tolist())) for places in sequences(OTHER)]
    past = {row: [] for row in range(7)}
    for rows, ids, said, at in walk("eam", fitted("eam")):
        before = [np.minimum(A * nearest(patterns, matrix(past[r])), 1) if matrix(past[r]).any() else np.zeros((L, E)) for r in rows]
        np.testing.assert_allclose(said[0], combined(before), atol=1e-5)
        layer, later = 1, []
        for row, own in zip(rows, ids, strict=True):
            counts = matrix(past[row])[: layer + 1]
            counts[layer] += matrix([own.tolist()])[layer]
            rest = np.zeros((L, E))
            if counts.any():
                for x in range(layer + 1, L):
                    rest[x] = np.minimum(A * nearest(patterns, counts)[x], 1) * (1 - (x - layer) / (L + 1))
            later.append(rest)
        np.testing.assert_allclose(at[layer], combined(later), atol=1e-5)
        for row, own in zip(rows, ids.tolist(), strict=True):
            past[row].append(own)


def test_of_many_sequences_some_stand_for_all():
    trace = random_trace(3, prompt=1, decode=20, rows=12, layers=L, experts=E, active=A)
    everything, some = fit_eam([trace])["patterns"], fit_eam([trace], seed=4, most=5)["patterns"]
    assert 1 <= len(some) <= 5 < len(everything) == 12
    assert all((everything == pattern).all((1, 2)).any() for pattern in some)


def test_the_oracle_knows_and_errs_as_told():
    used, _ = used_steps(TRACE)
    params = fitted("oracle", TRACE, horizon=3)
    for s, (_, _, said, at) in enumerate(walk("oracle", params)):
        for m in range(4):
            np.testing.assert_array_equal(said[m], used[s + m] if s + m < len(used) else 0)
        np.testing.assert_array_equal(at[1], np.where(np.arange(L)[:, None] > 1, used[s], 0))
    wide = np.random.default_rng(0).random((400, 5, 64)) < 0.1
    found = mistaken(wide, 0.7, np.random.default_rng(1))
    np.testing.assert_array_equal(found.sum(-1), wide.sum(-1))
    assert abs((found & wide).sum() / wide.sum() - 0.7) < 0.02


def test_the_gate_hands_on_what_it_is_given():
    gate, params, gates = PREDICTORS["gate"], fitted("gate"), np.random.default_rng(0).random((2, E)).astype(np.float32)
    expected = np.zeros((L, E), np.float32)
    expected[2:4] = gates
    np.testing.assert_array_equal(gate.at(params, {}, 1, np.array([0]), TRACE.ids[:1, 1], gates), expected)
    np.testing.assert_array_equal(gate.at(params, {}, 2, np.array([0]), TRACE.ids[:1, 2], gates)[3], gates[0])
    with pytest.raises(ValueError, match="gates"):
        gate.at(params, {}, 1, np.array([0]), TRACE.ids[:1, 1], None)


def test_listed_ids_become_scores_in_their_order():
    np.testing.assert_allclose(ranked_scores(np.array([[[3, 0, -1, -1]]], np.int16), 5)[0, 0], [0.75, 0, 0, 1, 0])


@pytest.mark.parametrize("name", CHEAP[:4])
def test_a_row_that_was_reset_is_new(name):
    predictor, params = PREDICTORS[name], fitted(name, **({"online": False} if name == "transitions" else {}))
    state = predictor.init(params, 2)
    for i in range(3):
        state = predictor.after(params, state, np.array([0, 1]), np.array([i, i]), TRACE.ids[2 * i : 2 * i + 2])
    state, new, row = predictor.reset(params, state, np.array([1])), predictor.init(params, 2), np.array([1])
    tokens, ids = np.array([5]), np.abs(TRACE.ids[9:10])
    np.testing.assert_array_equal(predictor.before(params, state, row, tokens), predictor.before(params, new, row, tokens))
    np.testing.assert_array_equal(predictor.at(params, state, 1, row, ids[:, 1]), predictor.at(params, new, 1, row, ids[:, 1]))


@pytest.mark.parametrize("name", CHEAP)
def test_foreseen_tables_are_what_is_said_step_by_step(name):
    params = fitted(name, TRACE if name == "oracle" else OTHER)
    table, said = foresee(PREDICTORS[name], params, TRACE, 2), walk(name, params)
    assert table.dtype == np.float16 and table.shape == (TRACE.n_steps, 3, L, E)
    if PREDICTORS[name].ahead:
        np.testing.assert_allclose(table[:, :2], [step[2] for step in said], atol=1e-3)
        assert (table[:, 2] == -1).all()
    else:
        assert (table == -1).all()
    for (s, layer, scores) in foresee_layers(PREDICTORS[name], params, TRACE):
        expected = said[s][3][layer] if PREDICTORS[name].within else np.where(np.arange(L)[:, None] > layer, said[s][2][0], 0)
        np.testing.assert_array_equal(scores, expected)
    assert (s, layer) == (TRACE.n_steps - 1, L - 1)


@pytest.mark.parametrize("name", CHEAP[:4])
def test_nothing_is_foreseen_from_the_future(name):
    params, half = fitted(name), len(TRACE.ids) // 2
    half += int(np.argmax(np.diff(TRACE.step[half - 1 :]) > 0))
    ids = TRACE.ids.copy()
    ids[half:] = (ids[half:] + 1) % E
    changed, steps = dataclasses.replace(TRACE, ids=ids), len(np.unique(TRACE.step[:half]))
    np.testing.assert_array_equal(*(foresee(PREDICTORS[name], params, t)[: steps + 1] for t in (TRACE, changed)))
    for one, other in zip(*(foresee_layers(PREDICTORS[name], params, t) for t in (TRACE, changed)), strict=True):
        if one[0] == steps:
            break
        np.testing.assert_array_equal(one[2], other[2])


def test_foreseen_gates_are_those_of_the_trace():
    rng = np.random.default_rng(2)
    gates = np.stack([rng.permutation(E) for _ in range(len(TRACE.ids) * L * 4)]).reshape(-1, L, 4, E).astype(np.int16)
    gates[:, np.arange(L)[:, None] + np.arange(1, 5) >= L] = -1
    trace = dataclasses.replace(TRACE, gates=gates)
    first = [places for places in np.split(np.arange(len(trace.ids)), np.flatnonzero(np.diff(trace.step)) + 1)]
    for s, layer, scores in foresee_layers(PREDICTORS["gate"], fitted("gate"), trace):
        for d in range(1, L - layer):
            expected = combined([(E - np.argsort(gates[t, layer, d - 1])) / E for t in first[s]])
            np.testing.assert_allclose(scores[layer + d], expected, atol=1e-6)


def test_two_predictors_are_one_that_is_corrected_as_layers_are_routed():
    """The path of what was said before, and from what the second says of the layers that it reaches."""
    pair, trace = find_predictor("previous+gate"), with_gates(TRACE)
    params = params_of(pair.name, fitted)
    assert params["sizes"] == sizes_of(TRACE) and (pair.ahead, pair.within, pair.shared) == (True, True, False)
    before = foresee(PREDICTORS["previous"], params["first"], trace)
    np.testing.assert_array_equal(foresee(pair, params, trace), before)
    gate = {(s, layer): scores for s, layer, scores in foresee_layers(PREDICTORS["gate"], params["second"], trace)}
    kept = 0
    for s, layer, scores in foresee_layers(pair, params, trace):
        reached = gate[s, layer].any(1)
        np.testing.assert_array_equal(scores[reached], gate[s, layer][reached])
        kept += (~reached[layer + 1 :]).sum()
        assert not scores[: layer + 1].any()
    assert kept == 0, "these gates look as far as the model has layers"
    near = dataclasses.replace(trace, gates=np.where(np.arange(trace.gates.shape[2])[:, None] < 1, trace.gates, -1))
    said = {(s, layer): scores for s, layer, scores in foresee_layers(pair, params, near)}
    for s in range(1, trace.n_steps):
        np.testing.assert_allclose(said[s, 0][2:], before[s, 0, 2:], atol=1e-3)
    state = pair.init(params, 1)
    state = pair.after(params, state, np.array([0]), np.array([1]), np.abs(TRACE.ids[:1]))
    row, new = np.array([0]), pair.init(params, 1)
    assert pair.before(params, state, row, np.array([2])).any()
    state = pair.reset(params, state, row)
    np.testing.assert_array_equal(pair.before(params, state, row, np.array([2])), pair.before(params, new, row, np.array([2])))


def test_sizes_come_from_traces_or_models():
    assert sizes_of(TRACE) == Sizes(L, E, A)
    assert sizes_of(ModelSpec.from_hf(CONFIGS["olmoe"])) == Sizes(2, 8, 2)
    assert PREDICTORS["frequency"].fit([], sizes=Sizes(2, 8, 2))["start"].shape == (2, 8)
    with pytest.raises(ValueError, match="different models"):
        PREDICTORS["frequency"].fit([TRACE], sizes=Sizes(2, 8, 2))
    with pytest.raises(ValueError, match="needs a trace"):
        PREDICTORS["transitions"].fit([])


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: find_predictor("tea leaves"), "tea leaves"),
        (lambda: find_predictor("path+tea leaves"), "there is no predictor 'tea leaves'"),
        (lambda: find_predictor("path+gate+gate"), "at most two"),
        (lambda: find_predictor("gate+path"), "'gate' says nothing before a step"),
        (lambda: find_predictor("path+previous"), "'previous' says nothing as layers are routed"),
        (lambda: fitted("frequency", decay=1.5), "1.5"),
        (lambda: fitted("oracle", horizon=17), "17"),
        (lambda: fitted("oracle", accuracy=-0.1), "-0.1"),
        (lambda: PREDICTORS["oracle"].fit([TRACE, OTHER]), "one trace"),
        (lambda: PREDICTORS["path"].fit([TRACE]), "train="),
        (lambda: PREDICTORS["eam"].fit([]), "needs a trace"),
        (lambda: foresee(PREDICTORS["previous"], fitted("previous"), TRACE, -1), "-1"),
    ],
)
def test_what_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
