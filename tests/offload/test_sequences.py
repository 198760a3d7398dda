"""Batches made of sequences that were recorded apart, against a plain loop; and recordings by domain, taken apart again."""

import dataclasses

import numpy as np
import pytest

from jaxmoe.engine.generate import Engine
from jaxmoe.offload.sequences import batched, by_sequence
from jaxmoe.offload.trace import DECODE, PROMPT, TEACHER_FORCED, concatenate, used_steps
from jaxmoe.report.domain_traces import gate_recall, load_domains, record_domains, save_domains
from jaxmoe.train.pregate import pregated
from tests.models import random_model
from tests.offload import traces
from tests.offload.gated import with_gates
from tests.quick import QuickKernels

COLUMNS = ("ids", "weights", "tokens")


def test_sequences_come_apart_token_by_token():
    trace = with_gates(traces.random_trace(0))
    found = by_sequence(trace)
    assert [one.sequence[0] for one in found] == sorted(set(trace.sequence.tolist()))
    for one in found:
        own = [t for t in range(len(trace.ids)) if trace.sequence[t] == one.sequence[0]]
        assert one.step.tolist() == list(range(len(own))) and one.phase.tolist() == [trace.phase[t] for t in own]
        for name in (*COLUMNS, "gates"):
            np.testing.assert_array_equal(getattr(one, name), [getattr(trace, name)[t] for t in own])


def test_batches_are_what_a_plain_loop_makes():
    singles = by_sequence(concatenate([traces.random_trace(seed, prompt=4, decode=5 + seed) for seed in range(3)]))
    assert len({len(one.ids) for one in singles}) > 2
    groups = [[3, 0, 5], [1], [4, 0]]
    trace = batched(singles, groups)
    rows, sequence, step = [], 0, 0
    for group in groups:
        for n, i in enumerate(group):
            for t in np.flatnonzero(singles[i].phase == PROMPT):
                rows.append((i, t, sequence + n, PROMPT, step))
                step += 1
        others = [np.flatnonzero(singles[i].phase != PROMPT) for i in group]
        for turn in range(max(map(len, others))):
            rows += [(i, others[n][turn], sequence + n, DECODE, step) for n, i in enumerate(group) if turn < len(others[n])]
            step += 1
        sequence += len(group)
    assert list(zip(trace.sequence, trace.phase, trace.step, strict=True)) == [row[2:] for row in rows]
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(trace, name), [getattr(singles[i], name)[t] for i, t, *_ in rows])


def test_a_batch_asks_for_what_its_members_ask_for():
    singles = by_sequence(traces.random_trace(3, prompt=3, decode=6))
    used, phase = used_steps(batched(singles, [range(len(singles))]))
    alone = [used_steps(one) for one in singles]
    others = [steps[kind != PROMPT] for steps, kind in alone]
    for turn, together in enumerate(used[phase == DECODE]):
        np.testing.assert_array_equal(together, np.any([steps[turn] for steps in others if turn < len(steps)], axis=0))


def test_text_that_was_read_decodes_in_batches_too():
    one = by_sequence(traces.random_trace(0))[0]
    text = dataclasses.replace(one, phase=np.full_like(one.phase, TEACHER_FORCED))
    trace = batched([text, one], [[0, 1]])
    assert (trace.phase[trace.sequence == 0] == DECODE).all() and (trace.phase == PROMPT).sum() == (one.phase == PROMPT).sum()


def test_wrong_groups_are_refused():
    singles = by_sequence(traces.random_trace(0))
    for groups, reason in (([], "0 groups"), ([[0], []], r"of \[1, 0\] sequences"), ([[9]], "names sequence 9: there are")):
        with pytest.raises(ValueError, match=reason):
            batched(singles, groups)
    with pytest.raises(ValueError, match="take them apart by by_sequence"):
        batched([traces.random_trace(0)], [[0]])


def test_gate_recall_counts_as_a_plain_loop_does():
    trace = with_gates(traces.random_trace(1, layers=3))
    found = gate_recall(trace)
    _, layers, active = trace.ids.shape
    for layer in range(layers):
        for distance in range(1, 5):
            for width in range(1, 4):
                asked = there = 0
                for t in np.flatnonzero(trace.phase == DECODE):
                    guess = trace.gates[t, layer - distance, distance - 1, : width * active].tolist() if distance <= layer else []
                    wanted = [i for i in trace.ids[t, layer].tolist() if i >= 0]
                    asked, there = asked + len(wanted), there + sum(i in guess for i in wanted)
                got = found[layer, distance - 1, width - 1]
                assert np.isnan(got) if distance > layer else got == there / asked
    with pytest.raises(ValueError, match="a trace with gates and with tokens of the phase 'decode'"):
        gate_recall(dataclasses.replace(trace, gates=None))


def test_domains_are_recorded_with_what_gates_foretell(tmp_path):
    """Of a pre-gated model a gate foretells the next layer's choice exactly, for both read the same."""
    model = random_model("mixtral", kernels=QuickKernels("cpu"))
    model = dataclasses.replace(model, spec=pregated(model.spec))
    rng = np.random.default_rng(0)
    for domain in ("letters", "numbers"):
        np.save(tmp_path / f"{domain}.npy", rng.integers(0, model.spec.vocab, 30).astype(np.uint16))
    found = record_domains(model, tmp_path, prompts_per_domain=2, prompt_tokens=7, new_tokens=5, seed=3)
    assert set(found) == {"letters", "numbers"}
    for domain, trace in found.items():
        assert trace.meta["domain"] == domain and trace.meta["tokens"] == {"prompt": 14, "decode": 8} and trace.meta["seed"] == 3
        text = np.load(tmp_path / f"{domain}.npy")
        first, second = by_sequence(trace)
        assert first.tokens[:7].tolist() == text[:7].tolist() and len(first.ids) == len(second.ids) == 11
        active = trace.ids.shape[2]
        assert (trace.gates[:, 0, 0, :active] == trace.ids[:, 1]).all() and (trace.gates[:, 1] == -1).all()
    save_domains(tmp_path / "traces", found)
    again = load_domains(tmp_path / "traces")
    assert again.keys() == found.keys() and all((again[d].gates == found[d].gates).all() and again[d].meta == found[d].meta for d in found)


def test_gates_need_a_recording():
    with pytest.raises(ValueError, match="gates = True needs record = True and the fused steps"):
        Engine(random_model("mixtral"), 1, 16, greedy=True, gates=True)


def test_wrong_domains_are_refused(tmp_path):
    model = random_model("mixtral")
    with pytest.raises(ValueError, match=r"neither corpus\.json nor token streams"):
        record_domains(model, tmp_path)
    with pytest.raises(ValueError, match="there are no traces"):
        load_domains(tmp_path)
    np.save(tmp_path / "short.npy", np.zeros(5, np.uint16))
    with pytest.raises(ValueError, match="no domain 'long' in .*; it has short"):
        record_domains(model, tmp_path, domains=["long"])
    with pytest.raises(ValueError, match="text of 'short' has 5 tokens, a prompt needs 65"):
        record_domains(model, tmp_path)
    np.save(tmp_path / "short.npy", np.zeros(5))
    with pytest.raises(ValueError, match="expected one row of uint16 tokens"):
        record_domains(model, tmp_path)
