"""What a user asks for about devices: splits, streamed experts, plan files and placements of a converted checkpoint give the tokens of one device."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from checkpoints.convert import convert
from checkpoints.load import open_checkpoint
from jaxmoe.engine import planned, steps
from jaxmoe.engine.generate import Engine, Request
from jaxmoe.engine.model import load_model
from jaxmoe.engine.planned import ELSEWHERE, choose_devices, load_planned
from jaxmoe.engine.streaming import Streaming
from jaxmoe.experts import SlotBank
from sharding.hardware import parse_hardware
from sharding.memory import device_bytes
from sharding.placement import replicate, shuffled
from sharding.plan import Plan, load_plan, planned_spec, save_plan
from sharding.split import SplitError, layout_of, parse_split
from sharding.time_model import predict
from sharding.workload import Workload
from tests.checkpoints import hf_folders
from tests.mesh_models import mesh_logits
from tests.quick import QuickKernels

SPLIT = "data=2,expert=2"
KERNELS = QuickKernels("cpu")
REQUESTS = [Request(tuple(i % 37 for i in range(3 * n, 3 * n + length)), 18) for n, length in enumerate((9, 30, 4))]
ROWS, POSITIONS = len(REQUESTS), max(len(r.prompt_ids) + r.max_new_tokens for r in REQUESTS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    convert(hf_folders.tiny(folder / "hf", "olmoe", num_experts=8), folder / "converted")
    return open_checkpoint(folder / "converted")


@pytest.fixture(scope="module")
def spec(checkpoint):
    return checkpoint.spec.with_precision("float32")


@pytest.fixture(scope="module")
def expected(checkpoint) -> list[list[int]]:
    """One device's."""
    return tokens(Engine(load_model(checkpoint, "float32", KERNELS), ROWS, POSITIONS, True))


def tokens(engine: Engine) -> list[list[int]]:
    return [r.ids for r in engine.generate(REQUESTS)[0]]


def choose(spec, split=SPLIT, plan=None, streaming=None, placement=None):
    return choose_devices(spec, split, plan, streaming, ROWS, POSITIONS, placement)


def load(found, checkpoint, **how) -> Engine:
    return load_planned(found, checkpoint, KERNELS, ROWS, POSITIONS, True, **how)


def write_plan(path: Path, spec, split: str = SPLIT, **work) -> Path:
    """A plan's file for 16 devices."""
    work = Workload(**{"rows": 4, "prompt": 30, "new_tokens": 20, "dtype": "float32", "kv_dtype": "float32", **work})
    spec, machine = planned_spec(spec, work), parse_hardware("v5e:4x4")
    times = predict(spec, machine, layout_of(spec, parse_split(split)), work)
    save_plan(path, Plan("olmoe", spec.hash(), machine, parse_split(split), work, "latency", {"total": 1}, times, "jaxmoe 0"))
    return path


def write_placement(path: Path, layers: int = 2, experts: int = 8, devices: int = 2) -> Path:
    path.write_text(shuffled(layers, experts, devices, seed=1).to_json())
    return path


def test_a_split(checkpoint, spec, expected):
    found = choose(spec)
    assert str(found.on.layout.split) == "data=2,expert=2,attention=data,exchange=tokens" and found.on.mesh.size == 4
    assert found.offload is None and found.placement is None
    assert tokens(load(found, checkpoint)) == expected


def test_half_of_each_device_s_experts_streamed_by_option_and_by_a_plan(checkpoint, spec, expected, tmp_path):
    found = choose(spec, streaming=Streaming("75%"))
    assert found.offload.slots == (2, 2), "of the four that a device has; the rest of the budget is for staging"
    calls = []
    engine = load(found, checkpoint, progress=lambda done, total: calls.append((done, total)))
    assert isinstance(engine.model.bank, SlotBank) and calls[-1] == (4 * 8, 4 * 8)
    assert tokens(engine) == expected
    by_plan = choose(spec, None, write_plan(tmp_path / "plan.json", spec, slots=2, prefill_tokens=32))
    assert by_plan.offload.slots == 2 and by_plan.on == found.on and by_plan.spec.precision == spec.precision
    planned_engine = load(by_plan, checkpoint)
    assert planned_engine.token_buckets() == (32,) and engine.token_buckets()[-1] > 32
    assert tokens(planned_engine) == expected


def test_generating_on_a_mesh_compiles_nothing_after_warm_up(checkpoint, spec):
    """Streamed experts are carried from call to call, where they lie."""
    engine, names = load(choose(spec, streaming=Streaming("75%")), checkpoint), []

    def listen(event: str, seconds: float, **about) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        engine.warm_up(requests=REQUESTS)
        assert names, "warm-up makes at least what makes the first state"
        names.clear()
        for _ in range(2):
            engine.generate(REQUESTS)
        assert names == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_precision_of_a_plan(checkpoint, spec, tmp_path):
    """And its caches: what was predicted is what a run takes."""
    path = write_plan(tmp_path / "plan.json", spec, "data=2", kv_dtype="bfloat16")
    found, work = choose(spec, None, path), load_plan(path).workload
    engine, whole = load(found, checkpoint), load(choose(spec, "data=2"), checkpoint)
    assert engine.model.spec.precision == dataclasses.replace(spec.precision, kv="bfloat16")
    assert engine.kv_bytes() == device_bytes(found.spec, found.on.layout, work, "cpu").kv < whole.kv_bytes() // 2
    assert {x.dtype.name for x in jax.tree.leaves(engine.start().layers)} == {"uint16"}, "bfloat16 is held as bits"
    assert jax.tree.leaves(engine.model.params)[0].dtype == np.float32


def test_experts_of_which_all_fit_are_not_streamed(spec):
    assert choose(spec, streaming=Streaming("100%")).offload is None


def test_the_fused_mode_keeps_to_the_largest_step(spec):
    assert choose(spec, streaming=Streaming("75%", mode="fused")).prefill_tokens == steps.TOKEN_BUCKETS[-1]
    assert choose(spec, streaming=Streaming("75%")).prefill_tokens is None


def write_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_placement_gives_the_same_bits(checkpoint, spec, expected, tmp_path):
    placement = write_placement(tmp_path / "placement.json")
    found = choose(spec, placement=placement)
    placed, plain = load(found, checkpoint), load(choose(spec), checkpoint)
    assert (np.asarray(placed.model.bank.position_of_expert) == found.placement.position_of_expert).all()
    w_in, as_stored = np.asarray(placed.model.bank.own.w_in), np.asarray(plain.model.bank.w_in)
    for layer, order in enumerate(found.placement.order):
        assert np.array_equal(w_in[layer], as_stored[layer, order]) and not np.array_equal(w_in[layer], as_stored[layer])
    texts = [[*r.prompt_ids, *ids] for r, ids in zip(REQUESTS, expected, strict=True)]
    logits, same = (mesh_logits(engine.model, texts) for engine in (placed, plain))
    for prompt, ids, a, b in zip(REQUESTS, expected, logits, same, strict=True):
        assert np.array_equal(a.view(np.uint32), b.view(np.uint32))
        assert a[len(prompt.prompt_ids) - 1 : -1].argmax(1).tolist() == ids
    extra = replicate(np.random.default_rng(0).random((2, 8)) ** 4, 2, 4)
    assert extra.copies.max() == 2 and extra.copies.sum() == 2 * 12
    copied = load(choose(spec, placement=write_text(tmp_path / "replicas.json", extra.to_json())), checkpoint)
    assert copied.model.bank.own.w_in.shape[:2] == (2, 12)
    for a, b in zip(mesh_logits(copied.model, texts), same, strict=True):
        assert np.array_equal(a.view(np.uint32), b.view(np.uint32)), "a copy of an expert gives its bits"
    with_plan = choose(spec, None, write_plan(tmp_path / "plan.json", spec), placement=placement)
    assert with_plan.placement.devices == 2
    with pytest.raises(ValueError, match="has room for 2 copies of experts a layer, the placement has 4: plan with --expert-copies 4"):
        choose(spec, None, write_plan(tmp_path / "plan.json", spec, copies=2), placement=tmp_path / "replicas.json")
    assert choose(spec, None, write_plan(tmp_path / "plan.json", spec, copies=4), placement=tmp_path / "replicas.json").placement.devices == 2


# --- refusals


def one_line(error: BaseException, *names: str) -> None:
    text = str(error)
    assert "\n" not in text and all(name in text for name in names), text


GIVEN = (Path("t.npz"), 4.5, "1GB", "gate", Path("p.npz"), "hobbit", 3, Path("p.json"))


@pytest.mark.parametrize("option, value", [*zip(ELSEWHERE, GIVEN, strict=True)])
def test_options_of_one_device(spec, option, value):
    with pytest.raises(SplitError) as refused:
        choose(spec, streaming=Streaming("75%", **{option: value}))
    one_line(refused.value, f"{option} = {value!r}", "leave it or the split out")


CASES = {
    "host-driven": ({"streaming": Streaming("75%", mode="host-driven")}, "'host-driven' is for one device"),
    "too little memory": ({"streaming": Streaming("100B")}, "100 bytes", "are too few"),
    "more devices than there are": ({"split": "data=16"}, "data=16 takes 16 devices, there are 8"),
    "no such field": ({"split": "datas=2"}, "'datas=2' in the split 'datas=2': choose from data="),
    "a model that doesn't divide": ({"split": "expert=3"}, "expert = 3 doesn't divide the model's 8 experts"),
    "a placement alone": ({"split": None, "placement": (2, 8, 2)}, "--placement", "--split or --plan"),
    "a placement for others": ({"placement": (2, 8, 4)}, "4 devices", "expert = 2"),
    "a placement of another model": ({"placement": (2, 16, 2)}, "16 experts a layer, this one has 8"),
    "a placement of more layers": ({"placement": (3, 8, 2)}, "3 layers of experts, this one has 2"),
    "a placement of streamed experts": ({"placement": (2, 8, 2), "streaming": Streaming("75%")}, "leave out the placement or the expert memory"),
    "a plan and a split": ({"plan": {}}, "--plan", "leave out --split and --expert-memory"),
    "a plan and expert memory": ({"split": None, "plan": {}, "streaming": Streaming("75%")}, "--plan", "leave out --split and --expert-memory"),
    "a plan for more devices": ({"split": None, "plan": {"split": "data=8,expert=2", "rows": 16}}, "takes 16 devices, there are 8"),
    "a plan with slots, and a placement": ({"split": None, "plan": {"slots": 2}, "placement": (2, 8, 2)}, "leave out the placement"),
    "a plan, and a placement for others": ({"split": None, "plan": {}, "placement": (2, 8, 4)}, "4 devices", "expert = 2"),
}


@pytest.mark.parametrize("case", CASES)
def test_refusals(spec, tmp_path, case):
    asked, *names = CASES[case]
    asked = dict(asked)
    if asked.get("plan") is not None:
        asked["plan"] = write_plan(tmp_path / "plan.json", spec, **asked["plan"])
    if asked.get("placement") is not None:
        asked["placement"] = write_placement(tmp_path / "placement.json", *asked["placement"])
    with pytest.raises(ValueError) as refused:
        choose(spec, **asked)
    one_line(refused.value, *names)


def test_files_that_are_none_are_named(spec, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps({"format": "else"}))
    for asked in ({"split": None, "plan": tmp_path / "bad.json"}, {"placement": tmp_path / "bad.json"}):
        with pytest.raises(ValueError) as refused:
            choose(spec, **asked)
        one_line(refused.value, str(tmp_path / "bad.json"))
    with pytest.raises(OSError, match="none.json"):
        choose(spec, placement=tmp_path / "none.json")


def test_a_plan_of_another_model(spec, tmp_path):
    other = dataclasses.replace(spec, vocab=36)
    with pytest.raises(ValueError) as refused:
        choose(spec, None, write_plan(tmp_path / "plan.json", other))
    one_line(refused.value, "the plan is for olmoe", "plan it anew")


def test_nothing_asked_for_is_one_device(spec):
    assert choose(spec, None) == planned.Planned(spec)
