"""From a request to an engine that streams: what a plan buys and refuses, and that an engine stays usable, warm and compiled from call to call."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest

from checkpoints.convert import convert
from checkpoints.load import Checkpoint, open_checkpoint
from jaxmoe.engine import memory, steps
from jaxmoe.engine.generate import Request
from jaxmoe.engine.streaming import MODES, Plan, Streamed, Streaming, foretell, load_streamed, make_plan, make_source
from jaxmoe.experts import ResidentBank, SlotBank
from jaxmoe.experts.source import DiskSource, ExpertSource, least_host_memory
from jaxmoe.offload.budget import BudgetError, format_bytes
from jaxmoe.offload.replay import replay
from jaxmoe.offload.trace import DECODE, PROMPT, TraceBuilder, load, model_meta, save
from jaxmoe.spec import ModelSpec
from jaxmoe.train import path_predictor
from pallas_kernels.dispatch import Kernels
from tests.checkpoints import hf_folders
from tests.engine.test_no_recompile import Compilations
from tests.models import CONFIGS
from tests.quick import OPTIONS

CONFIG = {
    **hf_folders.CONFIGS["qwen3_moe"], "num_hidden_layers": 2, "mlp_only_layers": [], "num_experts": 8, "max_position_embeddings": 256,
}  # fmt: skip
POSITIONS = 256
SPEC = ModelSpec.from_hf(CONFIG)
RECORD, ALL = 4 * 3 * 16 * 16, 2 * 8 * 4 * 3 * 16 * 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    convert(hf_folders.write_folder(folder / "hf", CONFIG, hf_folders.random_tensors(CONFIG)), folder / "out")
    return open_checkpoint(folder / "out")


def plan(memory: str, spec: ModelSpec = SPEC, **asked) -> Plan:
    return make_plan(Streaming(memory, **asked), spec, 1, POSITIONS)


def loaded(made: Plan, checkpoint: Checkpoint) -> Streamed:
    return load_streamed(made, checkpoint, "float32", Kernels("cpu"), 1, POSITIONS, True)


def write_trace(path: Path, spec: ModelSpec = SPEC, phases=(PROMPT, DECODE), seed: int = 0) -> Path:
    """A trace whose first layer uses two experts alone, and whose second uses all of them evenly."""
    builder, rng = TraceBuilder(model_meta(spec, "a test", "random")), np.random.default_rng(seed)
    router, layers = spec.moe[0], len(spec.moe_layers)
    for phase in phases:
        for _ in range(30):
            ids = np.stack([rng.permutation(2 if layer == 0 else router.experts)[: router.active] for layer in range(layers)])
            builder.add(ids[None], np.ones(ids[None].shape), [3], [0], phase)
    save(path, builder.build())
    return path


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["100%", "auto", "1GB", f"{ALL}B"])
def test_memory_for_all_experts_makes_a_resident_bank(checkpoint, memory):
    made = plan(memory, mode="host-driven", link_gbps=1.0)
    streamed = loaded(made, checkpoint)
    assert made.budget.all_resident and isinstance(streamed.model.bank, ResidentBank)
    assert streamed.link is None and streamed.source is None and streamed.model.bytes()["experts"] == ALL


AUTO = {
    "nothing else": ({}, ("gate", 8)),
    "the user's number": ({"prefetch": 3}, ("gate", 3)),
    "the user's predictor": ({"predictor": "transitions"}, ("transitions", 8)),
    "a compiled step": ({"mode": "fused"}, (None, None)),
    "fewer bits": ({"lossy": "bits=4"}, (None, None)),
    "a disk": ({"host_memory": "60%"}, (None, None)),
}


@pytest.mark.parametrize("name", AUTO)
def test_auto_chooses_for_what_else_was_asked(name):
    more, wanted = AUTO[name]
    found = plan("50%", policy="auto", **({"mode": "host-driven"} | more)).asked
    assert (found.predictor, found.prefetch) == wanted and found.policy == "lfu"
    assert plan("100%", policy="auto", mode="host-driven").budget.all_resident


def test_auto_takes_what_a_trained_predictor_says_and_has_routers_correct_it(tmp_path, checkpoint):
    trace = load(write_trace(tmp_path / "t.npz"))
    file = tmp_path / "p.npz"
    path_predictor.save(file, path_predictor.train([trace], "path", path_predictor.FitSettings(steps=1)), trace.meta)
    found = plan("50%", policy="auto", predictor_file=file)
    assert (found.mode, found.asked.predictor, found.asked.prefetch, found.asked.policy) == ("host-driven", "path+gate", 8, "lfu")
    request = Request((1, 2, 3), 40)
    resident, streamed = loaded(plan("100%"), checkpoint), loaded(found, checkpoint)
    assert streamed.engine.generate([request])[0][0].ids == resident.engine.generate([request])[0][0].ids
    assert streamed.staging is not None and streamed.staging.counters.demand > 0
    assert plan("100%", policy="auto", predictor_file=file).budget.all_resident
    with pytest.raises(ValueError, match="--predictor-file needs --expert-mode host-driven, not fused"):
        plan("50%", policy="auto", mode="fused", predictor_file=file)


@pytest.mark.parametrize(("memory", "slots"), [("50%", 3), ("62.5%", 4), (f"{10 * RECORD}B", 4), (f"{10 * RECORD - 1}B", 3), ("99%", 6)])
def test_memory_buys_as_many_slots_in_every_layer_or_one_more(memory, slots):
    found = plan(memory).budget
    assert found.staging == 2 and not found.all_resident
    assert min(found.slots) == slots and max(found.slots) <= slots + 1
    assert found.device_bytes == (sum(found.slots) + 2) * RECORD <= found.budget_bytes and found.resident_bytes == ALL


def test_what_a_plan_will_bring_is_foretold(tmp_path):
    """Even routing hits slots of 8; a trace, one of whose layers asks for two experts alone, says more."""
    made = plan("50%")
    without, with_link = (foretell(made, SPEC, 1, POSITIONS, link).splitlines()[1] for link in (None, 1e-3))
    active = SPEC.moe[0].active
    missing = round(sum(active * RECORD * (1 - n / 8) for n in made.budget.slots))
    assert without == f"at {100 * sum(made.budget.slots) / 16:.0f} % hits (even routing) {format_bytes(missing)} a token cross the link"
    assert with_link == f"{without}: at most {1e6 / missing:,.1f} tok/s"
    traced = plan("50%", trace=write_trace(tmp_path / "t.npz"))
    hits = replay(load(tmp_path / "t.npz"), traced.budget.slots, "lfu").hit_rate
    assert hits > sum(traced.budget.slots) / 16
    assert foretell(traced, SPEC, 1, POSITIONS, None).splitlines()[1].startswith(f"at {100 * hits:.0f} % hits ")


def test_what_is_streamed_takes_the_bytes_that_the_plan_says(checkpoint):
    made = plan("62.5%")
    streamed = loaded(made, checkpoint)
    assert isinstance(streamed.model.bank, SlotBank) and streamed.model.bank.slots == made.budget.slots
    assert streamed.model.bytes()["experts"] == made.budget.device_bytes == sum(x.nbytes for x in streamed.model.bank.init_state().pools)


def test_half_the_precision_is_half_the_minimum():
    assert plan(f"{6 * RECORD}B").budget.slots == (2, 2)
    with pytest.raises(BudgetError, match=f"the minimum is {6 * RECORD:,} bytes"):
        plan(f"{6 * RECORD - 1}B")
    assert plan(f"{3 * RECORD}B", SPEC.with_precision("bfloat16")).budget.slots == (2, 2)


def test_a_trace_gives_layers_their_slots(tmp_path):
    made = plan(f"{10 * RECORD}B", trace=write_trace(tmp_path / "t.npz"))
    assert made.budget.slots == (2, 6) and made.budget.staging == 2


def test_a_trace_of_prompts_alone_gives_layers_their_slots_too(tmp_path):
    assert plan(f"{10 * RECORD}B", trace=write_trace(tmp_path / "t.npz", phases=(PROMPT,))).budget.slots == (2, 6)


def test_the_static_policy_takes_its_profile_from_the_trace(tmp_path, checkpoint):
    made = plan(f"{10 * RECORD}B", trace=write_trace(tmp_path / "t.npz"), policy="static")
    streamed = loaded(made, checkpoint)
    used = np.asarray(streamed.model.bank.knowledge.profile)
    assert used.shape == (2, 8) and used[0].tolist() == [30, 30, 0, 0, 0, 0, 0, 0] and used[1].sum() == 60


def test_the_mode_is_what_was_asked_for_or_what_is_needed():
    assert plan("50%").mode == "layer-grouped"
    assert plan("50%", link_gbps=1.0).mode == plan("50%", host_memory="50%").mode == "host-driven"
    assert [plan("50%", mode=mode).mode for mode in MODES] == list(MODES)


OTHER = ModelSpec.from_hf(CONFIGS["qwen3_moe"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"mode": "banana"}, "there is no expert mode 'banana'"),
        ({"policy": "banana"}, "banana"),
        ({"policy": "static"}, "the policy 'static' goes by a trace of the model: give --expert-trace"),
        ({"policy": "eam"}, "the policy 'eam' goes by a trace of the model: give --expert-trace"),
        ({"policy": "opt"}, "the policy 'opt' goes by a trace of the model: give --expert-trace"),
        ({"mode": "fused", "link_gbps": 1.0}, "--link-gbps needs --expert-mode host-driven, not fused"),
        ({"mode": "layer-grouped", "host_memory": "1GB"}, "--host-memory needs --expert-mode host-driven, not layer-grouped"),
        ({"link_gbps": 0.0}, "a link of 0.0 GB/s: its speed has to be positive"),
        ({"link_gbps": math.inf}, "a link of inf GB/s: its speed has to be finite"),
        ({"host_memory": "banana"}, "'banana' is not an amount of memory"),
        ({"host_memory": "auto"}, "--host-memory auto: give an amount"),
        ({"host_memory": "1%"}, f"bytes of host memory are too few for experts: at least {4 * RECORD:,} are needed"),
        ({"staging": 0}, "staging = 0 slots"),
        ({"fill": "mosaic_tma"}, "--expert-fill mosaic_tma is for NVIDIA GPUs, and this device is cpu"),
        ({"fill": "while", "mode": "host-driven"}, "--expert-fill while is for compiled steps"),
    ],
)
@pytest.mark.parametrize("memory", ["50%", "100%"])
def test_options_that_make_no_sense_are_refused_whatever_the_memory(memory, asked, message):
    with pytest.raises(ValueError, match=message):
        plan(memory, **asked)


def test_a_trace_of_another_model_is_refused_by_its_path(tmp_path):
    path = write_trace(tmp_path / "t.npz", OTHER.with_precision("bfloat16"))
    with pytest.raises(ValueError, match=rf"^{path}: the trace is of a test \(2 layers of 8 experts, spec \w+\), the model is qwen3_moe"):
        plan("50%", trace=path)
    made = write_trace(tmp_path / "mine.npz", SPEC.with_precision("bfloat16"))
    assert plan("50%", trace=made).trace is not None  # the same model in another precision is the same


def test_experts_that_do_not_fit_into_host_memory_are_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_host_memory", lambda: ALL - 1)
    assert plan("100%").budget.all_resident  # on a device with memory of its own they would pass through only
    with pytest.raises(ValueError, match=r"of experts do not fit into the 49.2 kB of host memory that is available: --host-memory 50% keeps"):
        plan("50%")
    assert plan("50%", host_memory="50%").mode == "host-driven"
    with pytest.raises(ValueError, match=r"do not fit into .*--host-memory 50% keeps"):
        plan("50%", host_memory="100%")
    monkeypatch.setattr(memory, "available_host_memory", lambda: 5 * RECORD)
    with pytest.raises(ValueError, match=r"--host-memory 25% keeps"):  # half of 5 would be less than what is needed
        plan("50%")
    assert plan("50%", host_memory="25%").mode == "host-driven"
    monkeypatch.setattr(memory, "available_host_memory", lambda: 4 * RECORD - 1)
    for host_memory in (None, "25%"):
        with pytest.raises(ValueError, match=r"do not fit into .*, and at least 12.3 kB are needed$"):
            plan("50%", host_memory=host_memory)
    monkeypatch.setattr(memory, "available_host_memory", lambda: None)
    assert not plan("50%").budget.all_resident


def test_this_machine_says_what_host_memory_it_has():
    free = memory.available_host_memory()
    assert free is None or 1e7 < free < 1e15


def test_host_memory_decides_where_experts_come_from(checkpoint):
    everything = make_source(plan("50%", mode="host-driven"), checkpoint, SPEC, lambda done, total: None)
    some = make_source(plan("50%", host_memory="25%"), checkpoint, SPEC, lambda done, total: None)
    assert isinstance(everything, ExpertSource) and isinstance(some, DiskSource)
    assert (everything.host_bytes, some.host_bytes) == (ALL, ALL // 4) and some.host_bytes == least_host_memory(SPEC)
    for layer, expert in ((0, 0), (1, 7), (0, 3)):
        np.testing.assert_array_equal(some.ask(layer, expert)(), everything.ask(layer, expert)())


# --- engines ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compilations():
    listener = Compilations()
    jax.monitoring.register_event_duration_secs_listener(listener)
    yield listener
    jax.monitoring.unregister_event_duration_listener(listener)


@pytest.fixture(scope="module", params=["layer-grouped", "host-driven"])
def warm(request, checkpoint, compilations):
    """A streaming engine that has been warmed up: few programs, and not optimized, for they take long to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "TOKEN_BUCKETS", (32, 256))
        options = Kernels.compiler_options
        patch.setattr(Kernels, "compiler_options", lambda self: options(self) | OPTIONS)
        made = loaded(plan("50%", mode=request.param), checkpoint)
        assert made.engine.token_buckets() == (32, 256) and made.engine.row_buckets() == (1,)
        jax.clear_caches()  # what other tests have compiled would hide what warm-up forgets
        made.engine.warm_up()
        assert compilations.take()
        yield made


def request_of(length: int, new: int = 12) -> Request:
    return Request(tuple(np.random.default_rng(length).integers(0, 37, length).tolist()), new)


def ids_of(streamed: Streamed, request: Request, on_text=lambda i, text: None) -> list[int]:
    [result], _ = streamed.engine.generate([request], on_text=on_text)
    return result.ids


def test_warm_up_leaves_no_expert_behind(warm):
    warm.engine.warm_up()
    assert (np.asarray(warm.engine.experts().slot_of_expert) == -1).all()
    assert not any(n.any() for n in warm.model.bank.counters(warm.engine.experts()).values())


def test_generating_compiles_nothing(warm, compilations):
    compilations.take()
    for length in (1, 2, 31, 32, 33, 100, 200, 244):
        assert len(ids_of(warm, request_of(length))) == 12
        assert compilations.take() == [], f"by a prompt of {length} tokens"


def test_experts_stay_from_call_to_call(warm):
    warm.engine.forget()
    request = request_of(20)
    [first], cold = warm.engine.generate([request])
    [again], kept = warm.engine.generate([request])
    assert first.ids == again.ids
    assert cold.prefill_experts["hits"].sum() == 0 < kept.prefill_experts["hits"].sum()
    for timings in (cold, kept):
        for found in (timings.prefill_experts, timings.decode_experts):
            np.testing.assert_array_equal(found["loads"], found["requests"] - found["hits"])


class Broken(Exception):
    pass


def check_usable(warm: Streamed, request: Request, expected: list[int]) -> None:
    """The engine gives what it gave, and its counters are those of this call."""
    [result], timings = warm.engine.generate([request])
    assert result.ids == expected
    for found in (timings.prefill_experts, timings.decode_experts):
        np.testing.assert_array_equal(found["loads"], found["requests"] - found["hits"])


@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_error_while_text_is_taken_leaves_the_engine_usable(warm, compilations, after):
    request, seen = request_of(20, 40), []
    expected = ids_of(warm, request)

    def on_text(index, text):
        seen.append(text)
        if len(seen) > after:
            raise Broken

    with pytest.raises(Broken):
        ids_of(warm, request, on_text)
    compilations.take()
    check_usable(warm, request, expected)
    assert compilations.take() == []


@pytest.mark.parametrize("share", [0, 0.3, 0.6, 0.99])
def test_an_expert_that_can_not_be_had_leaves_the_engine_usable(warm, monkeypatch, share):
    """From the prompt's first expert to decoding's last one; the reader's error is the caller's."""
    if warm.source is None:
        return  # a compiled step reads host memory, which does not fail
    request, asked, ask = request_of(20, 40), [], warm.source.ask
    monkeypatch.setattr(warm.source, "ask", lambda layer, expert: asked.append(1) or ask(layer, expert))
    warm.engine.forget()
    expected, left = ids_of(warm, request), int(share * len(asked))

    def fails(layer, expert):
        nonlocal left
        left -= 1
        if left < 0:
            raise Broken
        return ask(layer, expert)

    monkeypatch.setattr(warm.source, "ask", fails)
    warm.engine.forget()
    with pytest.raises(Broken):
        ids_of(warm, request)
    monkeypatch.setattr(warm.source, "ask", ask)
    check_usable(warm, request, expected)
