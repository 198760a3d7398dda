"""Benchmarks of policies and predictors: replay of many at once against replay of one, batches against traces put side by side, tables of records."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.offload import calibrate, replay, replay_many
from jaxmoe.offload.predictors import PREDICTORS, foresee
from jaxmoe.offload.recall import recall
from jaxmoe.offload.sequences import batched, by_sequence
from jaxmoe.offload.trace import DECODE, PROMPT, TraceBuilder, used_steps
from jaxmoe.report import event_bench, policy_bench, policy_claims, policy_records, policy_tables, predictor_bench, record
from jaxmoe.residency import Knowledge, choose_shared
from jaxmoe.train import path_predictor
from scripts.update_readme import write
from tests.offload import traces
from tests.offload.gated import with_gates

LAYERS, EXPERTS, ACTIVE, SLOTS = 2, 6, 2, 3


@functools.cache
def made(seed: int, sequences: int = 3):
    """A trace of equally long sequences: 3 prompt and 9 other tokens each."""
    rng = np.random.default_rng(seed)
    builder, chance = TraceBuilder(traces.meta(LAYERS, EXPERTS, ACTIVE)), rng.dirichlet(np.ones(EXPERTS))
    for sequence in range(sequences):
        for phase, count in ((PROMPT, 3), (DECODE, 9)):
            for _ in range(count):
                ids = np.stack([rng.choice(EXPERTS, ACTIVE, False, chance) for _ in range(LAYERS)])[None]
                builder.add(ids, rng.random(ids.shape), rng.integers(0, 50, 1), [sequence], phase)
    return builder.build()


@functools.cache
def parts():
    found = policy_bench.folds({name: made(i) for i, name in enumerate("abcd")})
    return [policy_bench.part_of(fold, {"frequency": PREDICTORS["frequency"].fit(list(fold.fit.values()))}) for fold in found]


@pytest.mark.parametrize(("policy", "looks"), [("hobbit", False), ("lookahead", True)])
def test_many_at_once_hold_what_each_would_by_itself(policy, looks):
    trace = made(0)
    seen = replay_many.sequences_of([trace])
    said = replay_many.future(seen, 1) * np.float16(0.75) if looks else None
    found = replay_many.residents_many(seen, np.full(LAYERS, SLOTS), policy, None, said)
    for i in range(len(seen.used)):
        steps = dataclasses.replace(replay.steps_of(seen.used[i]), high=seen.high[i], foreseen=None if said is None else said[i])
        np.testing.assert_array_equal(found[i], replay.residents(steps, np.full(LAYERS, SLOTS), policy))
    assert (seen.used & ~seen.high).any()


def test_what_leaves_many_pools_at_once_is_what_leaves_each():
    rng = np.random.default_rng(0)
    each, at_once = jax.jit(choose_shared, static_argnums=5), jax.jit(replay_many.kept)
    for trial in range(20):
        keep = jnp.asarray(rng.integers(0, 3, (3, 4)), jnp.float32), jnp.asarray(rng.integers(0, 2, (3, 4)), jnp.int32)
        resident, need, bypass = rng.random((3, 4)) < 0.5, rng.random(4) < 0.5, bool(trial % 2)
        choice, leave = each(keep, resident, need, 1, 4, bypass)
        want = resident & ~np.asarray(leave)
        want[1] |= np.asarray(choice.enter)
        wanted = np.zeros((3, 4), bool)
        wanted[1] = need
        got = at_once(keep, resident | wanted, None if bypass else wanted, 4)
        np.testing.assert_array_equal(np.asarray(got), want)


def test_the_optimum_of_one_pool_is_beladys_on_the_turns_of_layers():
    seen = replay_many.sequences_of([made(1)])
    found = replay_many.opt_pool_many(seen, LAYERS * SLOTS)
    for used, hits in zip(seen.used, found, strict=True):
        turns = np.zeros((len(used) * LAYERS, 1, LAYERS * EXPERTS), bool)
        for s, layer in np.ndindex(len(used), LAYERS):
            turns[s * LAYERS + layer, 0, layer * EXPERTS : (layer + 1) * EXPERTS] = used[s, layer]
        np.testing.assert_array_equal(hits.reshape(-1), replay.opt_hits(turns, np.array([LAYERS * SLOTS]))[:, 0])
    each = replay_many.opt_many(seen, np.full(LAYERS, SLOTS))
    np.testing.assert_array_equal(each[2], replay.opt_hits(seen.used[2], np.full(LAYERS, SLOTS)))
    assert found.sum() >= each.sum()


def test_groups_ask_for_what_traces_side_by_side_ask_for():
    trace = made(2, 4)
    seen, groups = replay_many.sequences_of([trace]), [[0, 2], [3, 1]]
    joined = replay_many.side_by_side(seen, groups)
    used, phase = used_steps(batched(by_sequence(trace), groups))
    np.testing.assert_array_equal(joined.used[:, joined.counted].reshape(-1, LAYERS, EXPERTS), used[phase != PROMPT])
    said = np.stack([np.full((1, 1, 1, 2), p, np.float16) for p in ([0.5, 0.25], [0.5, -1], [0, 1])])
    np.testing.assert_allclose(replay_many.together(said, [[0, 2], [0, 1]]).reshape(2, 2), [[0.5, 1], [0.75, -1]])


def test_what_is_foreseen_of_each_is_what_is_foreseen_of_it_alone():
    trace = made(3)
    seen, own = replay_many.sequences_of([trace]), by_sequence(trace)[1]
    params = PREDICTORS["frequency"].fit([made(4)])
    np.testing.assert_array_equal(replay_many.foresee_each(PREDICTORS["frequency"], params, seen)[1], foresee(PREDICTORS["frequency"], params, own))
    oracle = PREDICTORS["oracle"]
    np.testing.assert_array_equal(replay_many.future(seen, 2)[1], foresee(oracle, oracle.fit([own], horizon=2), own, 2))
    with pytest.raises(ValueError, match="'transitions' has nothing to say"):
        replay_many.foresee_each(PREDICTORS["transitions"], None, seen)


def test_sequences_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="12 and 11 tokens"):
        replay_many.sequences_of([made(0, 1), made(1, 1).take(np.arange(11))])


def test_domains_are_judged_with_what_others_know():
    found = policy_bench.folds({name: made(i) for i, name in enumerate("abc")})
    assert sorted([*found[0].judged, *found[1].judged]) == ["a", "b", "c"]
    assert all(not set(fold.fit) & set(fold.judged) for fold in found)
    groups = policy_bench.mixed_groups("aaaabbbbcc", 3)
    assert len({i for group in groups for i in group}) == 9
    assert [len({"aaaabbbbcc"[i] for i in group}) for group in groups] == [3, 3, 2]


def test_rows_stand_beside_their_optimum():
    arms = [("lfu", ""), ("plec", "frequency"), policy_bench.OPT, policy_bench.OPT_POOL]
    rows = {(row["policy"], row["variant"]): row for row in policy_bench.measure(parts(), arms, SLOTS)}
    seen = [part.seen for part in parts()]
    hits = sum(replay_many.opt_many(s, np.full(LAYERS, SLOTS))[:, s.counted].sum() for s in seen)
    requests = sum(s.used[:, s.counted].sum() for s in seen)
    assert rows["opt", ""]["hit"] == pytest.approx(hits / requests, abs=1e-5)
    assert rows["opt", ""]["regret"] == rows["opt", "one pool"]["regret"] == rows["lfu", ""]["gain"] == 0
    assert rows["opt", ""]["gain"] == pytest.approx(rows["opt", ""]["hit"] - rows["lfu", ""]["hit"], abs=2e-5)
    assert rows["lfu", ""]["loads"] == pytest.approx((1 - rows["lfu", ""]["hit"]) * LAYERS * ACTIVE, abs=1e-4)
    assert 0 < rows["plec", "frequency"]["regret"] < 1


def test_what_an_oracle_brings_ahead_is_all_there():
    part = dataclasses.replace(parts()[0], foreseen={"oracle": replay_many.future(parts()[0].seen, 0)})
    hits, brought = policy_bench.brought_ahead(part, "oracle", SLOTS)
    np.testing.assert_array_equal(hits, part.seen.used.sum(3))
    fresh = sum(int((used & ~before).sum()) for row in part.seen.used for before, used in zip(row[2:], row[3:], strict=False))
    assert 0 < brought <= fresh


def test_recall_by_step_adds_up_to_recall():
    trace = by_sequence(made(5))[0]
    params = PREDICTORS["transitions"].fit([], sizes=predictor_bench.sizes_of(trace))
    found, asked = predictor_bench.by_step(PREDICTORS["transitions"], params, trace)
    whole = recall(PREDICTORS["transitions"], params, trace)
    np.testing.assert_array_equal(found.sum(0), whole.found.sum((0, 1)))
    np.testing.assert_array_equal(asked.sum(0), whole.asked.sum((0, 1)))
    rows = predictor_bench.rows({"previous": (found, asked), "transitions": (found, asked)})
    assert [row["distance"] for row in rows] == [1, 1]  # two layers are one apart
    assert rows[1]["over_previous"] == [[0.0, 0.0, 0.0]] * 3


def test_calibrated_weights_are_the_best_that_were_tried():
    seen = replay_many.sequences_of([made(6)])
    mix, loads = calibrate.hobbit_mix(seen, SLOTS, points=2)
    tried = [calibrate._loads(seen, SLOTS, other) for other in calibrate.candidates(2, np.random.default_rng(1))[:9]]
    assert loads == calibrate._loads(seen, SLOTS, mix) <= min(tried)
    hits = replay_many.hits_many(seen, np.full(LAYERS, SLOTS), "hobbit", Knowledge(mix=mix))[:, seen.counted].sum()
    assert loads == seen.used[:, seen.counted].sum() - hits


def test_events_are_those_of_the_gates_in_units_of_a_layer():
    trace = with_gates(made(0, 1))
    ahead = event_bench._gated(trace.gates)
    assert ahead[4] == [[(1, int(e)) for e in trace.gates[4, 0, 0] if e >= 0], []]
    used = np.broadcast_to(np.arange(EXPERTS) < ACTIVE, (1, 5, LAYERS, EXPERTS))
    setting = event_bench.settings()[0]
    assert event_bench._seconds(used, used, 9.0, ACTIVE, None, setting) == pytest.approx([5 * LAYERS])
    assert event_bench._seconds(used, ~used, 9.0, ACTIVE, None, setting)[0] > 5 * LAYERS * ACTIVE * 9.0


def test_predictors_are_trained_once_a_half_and_kept(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(path_predictor, "train", lambda traces, kind, settings, seed: trained.append((kind, len(traces), settings.steps)) or kind)
    monkeypatch.setattr(path_predictor, "save", lambda path, found, meta: path.write_text(found))
    monkeypatch.setattr(path_predictor, "load", lambda path, meta, kind: path.read_text())
    given = {name: made(i) for i, name in enumerate("abc")}
    for _ in range(2):
        params = policy_records.Given(given, [], tmp_path / "kept", steps=7).params
        assert [fitted["path"] for fitted in params] == ["path", "path"] and "oracle" not in params[0]
    assert sorted(trained) == [("path", 1, 7), ("path", 2, 7), ("readme", 1, 7), ("readme", 2, 7)]
    with pytest.raises(ValueError, match="no such folder"):
        policy_records.write("policies", policy_records.Given(given, []), tmp_path / "none")


def _record(name: str, **counters) -> dict:
    settings = {"domains": ["a"], "model": "m", "experts": EXPERTS}
    return record.make_record(name, "", settings, {}, {}, 0.0, {}, counters, record.make_bound("capacity", 1.0, 0.5, "hits"))


def _recalls(name: str, k: float, over: float) -> dict:
    row = {"predictor": name, "distance": 1} | {w: [k, k - 0.1, k + 0.1] for w in ("k", "2k", "3k")}
    return row | {f"over_{other}": [[over, over - 0.05, over + 0.05]] * 3 for other in ("frequency", "previous")}


def test_records_become_tables_and_verdicts_on_the_page(tmp_path):
    arms = [("lfu", ""), ("arc", ""), ("fate", ""), policy_bench.OPT]
    rows = [
        {"policy": policy, "variant": variant, "slots": slots, "hit": 0.4, "low": 0.3, "high": 0.5, "regret": 0.25, "loads": 7.0}
        | {"gain": 0.01, "gain_low": -0.02, "gain_high": 0.03}
        for slots in (2, 3) for policy, variant in arms
    ]  # fmt: skip
    predicted = [_recalls("frequency", 0.3, 0.0), _recalls("previous", 0.2, 0.0), _recalls("path", 0.5, 0.2), _recalls("gate", 0.4, 0.02)]
    records = [_record("policies", rows=rows), _record("predictors", rows=predicted)]
    tables = policy_tables.tables(records)
    assert set(tables) == {"policies", "predictors", "claims"}
    verdicts = {claim.claim.split()[0]: claim.holds for claim in policy_claims.claims(records)}
    assert verdicts == {"a": "yes", "the": "no", "keeping": "no"}  # of the gate's lead 0 is not excluded
    page = tmp_path / "offloading.md"
    page.write_text("".join(f"<!-- records:{name} -->\n<!-- end -->\n" for name in tables))
    write(page, tables)
    assert "| lfu |  | 40.0 (30.0 to 50.0) | 40.0 (30.0 to 50.0) | 25 | 7.0 |  |" in page.read_text()
    assert "+1.0 (-2.0 to +3.0)" in page.read_text()
    page.write_text("")
    with pytest.raises(ValueError, match="0 times"):
        write(page, tables)
