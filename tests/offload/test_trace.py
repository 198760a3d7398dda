"""Traces on disk and in memory: what comes back, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from jaxmoe.offload import trace as traces_module
from jaxmoe.offload.trace import DECODE, PROMPT, TEACHER_FORCED, TraceBuilder, as_teacher_forced, check_model, concatenate, import_csv, load, save
from jaxmoe.spec import ModelSpec
from tests.checkpoints.hf_folders import CONFIGS
from tests.offload import traces
from tests.offload.gated import with_gates

CSV = """# route_trace v1
# model=/somewhere/Small-Q4.gguf arch=x n_layer=3 n_expert=8 n_expert_used=2
# layer=1 expert_bytes=100 dense_bytes=5
# layer=2 expert_bytes=70 dense_bytes=5
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,1,0,3,0.75,0,100
0,0,0,1,1,4,0.25,0,100
0,1,1,1,0,3,0.5,1,0
0,1,1,1,1,7,0.5,0,100
0,1,1,2,0,0,1,0,70
"""


def equal(a, b) -> bool:
    arrays = ("ids", "weights", "tokens", "sequence", "phase", "step")
    return a.meta == b.meta and all((getattr(a, name) == getattr(b, name)).all() for name in arrays)


def test_save_and_load_give_the_same_trace(tmp_path):
    trace = traces.random_trace(0)
    save(tmp_path / "a.npz", trace)
    assert equal(load(tmp_path / "a.npz"), trace)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_save_fails_whole(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    save(tmp_path / "a.npz", traces.random_trace(0))
    monkeypatch.setattr(traces_module.np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path / "a.npz", traces.random_trace(1))
    monkeypatch.undo()
    assert equal(load(tmp_path / "a.npz"), traces.random_trace(0))
    assert len(list(tmp_path.iterdir())) == 1


def test_load_refuses_what_is_no_trace(tmp_path):
    path = tmp_path / "a.npz"
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"a\.npz: not a trace file"):
        load(path)
    np.savez(path, ids=np.zeros(3))
    with pytest.raises(ValueError, match=r"a\.npz: not a trace file"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "b.npz")


def test_load_refuses_a_damaged_file(tmp_path):
    path = tmp_path / "a.npz"
    save(path, traces.random_trace(0))
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=r"a\.npz: damaged"):
        load(path)
    flipped = bytearray(raw)
    for at in range(60, 200):
        flipped[at] ^= 0xFF
    path.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match=r"a\.npz"):
        load(path)


def write_with_meta(path, trace, **changes):
    stored = json.dumps({"format": "jaxmoe-trace", "version": 1, **trace.meta} | changes).encode()
    arrays = {name: getattr(trace, name) for name in ("ids", "weights", "tokens", "sequence", "phase", "step")}
    np.savez(path, meta=np.frombuffer(stored, np.uint8), **arrays)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"version": 2}, "version 2"), ({"format": "x"}, "not a trace"), ({"experts": 4}, "outside the 4 experts"), ({"layers": 3}, "holds 2 layers")],
)
def test_load_refuses_wrong_meta_data(tmp_path, changes, reason):
    write_with_meta(tmp_path / "a.npz", traces.random_trace(0), **changes)
    with pytest.raises(ValueError, match=rf"a\.npz: .*{reason}"):
        load(tmp_path / "a.npz")


def test_a_trace_is_checked_when_it_is_made():
    trace = traces.random_trace(0)
    with pytest.raises(ValueError, match="ids are int64"):
        dataclasses.replace(trace, ids=trace.ids.astype(np.int64))
    with pytest.raises(ValueError, match="tokens are"):
        dataclasses.replace(trace, tokens=trace.tokens[:-1])
    with pytest.raises(ValueError, match="step 0 follows step"):
        dataclasses.replace(trace, step=np.append(trace.step[:-1], np.int32(0)))
    with pytest.raises(ValueError, match="mixes prompt and decode"):
        dataclasses.replace(trace, step=np.zeros_like(trace.step))
    with pytest.raises(ValueError, match="no phase 9"):
        dataclasses.replace(trace, phase=np.full_like(trace.phase, 9))
    with pytest.raises(ValueError, match="not finite"):
        dataclasses.replace(trace, weights=np.full_like(trace.weights, np.inf))


def test_builder_numbers_steps_and_drops_padding():
    builder = TraceBuilder(traces.meta(1, 4, 1))
    builder.add([[[0]], [[1]], [[2]]], np.ones((3, 1, 1)), [5, 6, 7], [0, 0, 0], PROMPT, [True, False, True])
    builder.add([[[3]], [[1]]], np.ones((2, 1, 1)), [8, 9], [0, 1], DECODE)
    builder.add([[[3]]], np.ones((1, 1, 1)), [8], [0], DECODE, [False])
    builder.add([[[-1]], [[1]]], np.ones((2, 1, 1)), [1, 2], [2, 2], TEACHER_FORCED)
    trace = builder.build()
    assert trace.step.tolist() == [0, 1, 2, 2, 3, 4] and len(builder) == 5
    assert trace.tokens.tolist() == [5, 7, 8, 9, 1, 2]
    used, phase = traces_module.used_steps(trace)
    assert phase.tolist() == [PROMPT, PROMPT, DECODE, TEACHER_FORCED, TEACHER_FORCED]
    assert [np.flatnonzero(row[0]).tolist() for row in used] == [[0], [2], [1, 3], [], [1]]
    with pytest.raises(ValueError, match="nothing was recorded"):
        TraceBuilder(traces.meta(1, 4, 1)).build()


def test_concatenate_numbers_on():
    a, b = traces.random_trace(0), traces.random_trace(1)
    both = concatenate([a, b])
    assert len(both.ids) == len(a.ids) + len(b.ids) and both.n_steps == a.n_steps + b.n_steps
    assert both.sequence[len(a.ids) :].min() > a.sequence.max()
    with pytest.raises(ValueError, match="experts is 9 in one, 8"):
        concatenate([a, traces.random_trace(0, experts=8)])


def test_teacher_forced_keeps_the_prompt_alone():
    trace = traces.random_trace(0)
    text = as_teacher_forced(trace)
    assert len(text.ids) == (trace.phase == PROMPT).sum() and (text.phase == TEACHER_FORCED).all()


def test_check_model_names_both():
    spec = ModelSpec.from_hf(CONFIGS["mixtral"])
    meta = traces_module.model_meta(spec, "tiny", "a test")
    builder = TraceBuilder(meta)
    builder.add(np.zeros((1, meta["layers"], 1)), np.ones((1, meta["layers"], 1)), [0], [0], DECODE)
    trace = builder.build()
    check_model(trace, spec)
    check_model(trace, spec.with_precision("bfloat16"))
    check_model(dataclasses.replace(trace, meta=meta | {"spec_hash": None}), spec)
    with pytest.raises(ValueError, match="the trace is of tiny .* the model is mixtral"):
        check_model(dataclasses.replace(trace, meta=meta | {"spec_hash": "0" * 12}), spec)
    with pytest.raises(ValueError, match="the trace is of random .* the model is mixtral"):
        check_model(traces.random_trace(0), spec)


def test_import_csv_reads_layers_with_experts(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text(CSV)
    trace = import_csv(path)
    assert trace.ids.tolist() == [[[3, 4], [-1, -1]], [[3, 7], [0, -1]]]
    assert trace.phase.tolist() == [PROMPT, DECODE] and trace.tokens.tolist() == [-1, -1]
    assert trace.meta["model"] == "Small-Q4" and trace.meta["expert_bytes"] == [100, 70] and trace.meta["source"] == "r.csv"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("n_expert=8 ", "", "n_expert=..."),
        ("turn,phase", "phase,turn", "the columns are"),
        ("# layer=2 expert_bytes=70 dense_bytes=5\n", "", "layer=2 expert_bytes"),
        ("0,1,1,2,0,0,1,0,70", "0,1,1,2,0,8,1,0,70", "expert 8 is outside the 8 experts"),
        ("0,1,1,2,0,0,1,0,70", "0,1,1,2,2,0,1,0,70", "the slot 2"),
        ("0,1,1,2,0,0,1,0,70", "0,1,1,1,0,0,1,0,70", "two rows"),
        ("0,1,1,2,0,0,1,0,70", "0,1,1,x,0,0,1,0,70", "x"),
        ("0,1,1,2,0,0,1,0,70", "0,1,1", "columns"),
        ("# route_trace v1\n", "\x00\n", "columns"),
    ],
)
def test_import_csv_refuses_wrong_rows(tmp_path, old, new, reason):
    path = tmp_path / "r.csv"
    path.write_text(CSV.replace(old, new))
    with pytest.raises(ValueError, match=rf"r\.csv: .*{reason}"):
        import_csv(path)


@pytest.mark.parametrize(("name", "layers", "prompt"), [(traces.QWEN, 48, 28), (traces.GEMMA, 30, 29)])
def test_real_traces_are_whole(name, layers, prompt):
    trace = traces.real(name)
    assert trace.ids.shape == (prompt + 128, layers, 6) and trace.experts == 128
    assert (trace.phase == PROMPT).sum() == prompt and (trace.phase == DECODE).sum() == 128


def test_gates_are_kept_saved_and_loaded(tmp_path):
    trace = with_gates(traces.random_trace(0))
    save(tmp_path / "a.npz", trace)
    assert (load(tmp_path / "a.npz").gates == trace.gates).all()
    kept = as_teacher_forced(trace).gates
    assert (kept == trace.gates[trace.phase == PROMPT]).all()
    both = concatenate([trace, trace])
    assert (both.gates == np.concatenate([trace.gates, trace.gates])).all()
    save(tmp_path / "b.npz", dataclasses.replace(trace, gates=None))
    assert load(tmp_path / "b.npz").gates is None and traces.real(traces.QWEN).gates is None
    with pytest.raises(ValueError, match="traces with gates and traces without can't be joined"):
        concatenate([trace, traces.random_trace(0)])


def test_gates_are_checked():
    trace = with_gates(traces.random_trace(0))
    with pytest.raises(ValueError, match=r"gates are int64\[.*needed: int16"):
        dataclasses.replace(trace, gates=trace.gates.astype(np.int64))
    with pytest.raises(ValueError, match=r"gates are int16\[.*, 2, 3, 9\]; needed: .*, 2, 4, 9\]"):
        dataclasses.replace(trace, gates=trace.gates[:, :, :3])
    for place, expert, layer in (((4, 0, 0, 1), 9, 1), ((4, 1, 0, 0), 3, 2), ((4, 0, 1, 0), 0, 2)):
        wrong = trace.gates.copy()
        wrong[place] = expert
        reason = f"token 4, layer {place[1]}: the gates foretell expert {expert} of layer {layer}; there are 2 layers of 9"
        with pytest.raises(ValueError, match=reason):
            dataclasses.replace(trace, gates=wrong)


def test_builder_takes_gates_of_every_call_or_of_none():
    gates = np.full((2, 1, traces_module.AHEAD, traces_module.WIDTH), -1)
    builder = TraceBuilder(traces.meta(1, 4, 1))
    builder.add([[[0]], [[1]]], np.ones((2, 1, 1)), [5, 6], [0, 0], PROMPT, [False, True], gates)
    with pytest.raises(ValueError, match="of every call or of none"):
        builder.add([[[3]]], np.ones((1, 1, 1)), [8], [0], DECODE)
    builder.add([[[3]]], np.ones((1, 1, 1)), [8], [0], DECODE, None, gates[:1])
    assert builder.build().gates.shape == (2, 1, 4, 3)
    builder = TraceBuilder(traces.meta(1, 4, 1))
    builder.add([[[3]]], np.ones((1, 1, 1)), [8], [0], DECODE)
    with pytest.raises(ValueError, match="of every call or of none"):
        builder.add([[[3]]], np.ones((1, 1, 1)), [8], [0], DECODE, None, gates[:1])
