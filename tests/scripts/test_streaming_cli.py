"""The command line of streamed experts: what generate.py prints and writes about them, that they change no text, and how wrong options end.

And scripts/trace.py record, whose traces generate.py takes.
"""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore as ts

from checkpoints.convert import convert
from checkpoints.manifest import read_manifest, write_manifest
from jaxmoe.engine import memory, steps
from jaxmoe.experts.source import DiskSource
from jaxmoe.offload.super_experts import PinnedExperts
from jaxmoe.offload.super_experts import load as load_pinned
from jaxmoe.offload.trace import DECODE, PROMPT, TEACHER_FORCED, load, model_hash, save
from jaxmoe.report import opening, record
from jaxmoe.spec import ModelSpec
from pallas_kernels.dispatch import Kernels
from tests.checkpoints import hf_folders
from tests.offload import traces
from tests.quick import OPTIONS
from tests.scripts import commands
from tests.scripts.test_generate_cli import BOS, check_refused, files, generate, letter_tokenizer

trace_script = commands.load("trace")

CONFIG = {
    **hf_folders.CONFIGS["qwen3_moe"], "num_hidden_layers": 2, "mlp_only_layers": [], "num_experts": 16, "max_position_embeddings": 128,
}  # fmt: skip
SPEC = ModelSpec.from_hf(CONFIG)
LAYERS, EXPERTS, ACTIVE, SLOTS = 2, 16, 2, 8
RECORD = sum(SPEC.expert_bytes()) // LAYERS
ALL = LAYERS * EXPERTS * RECORD
MEMORY = f"{(LAYERS * SLOTS + 2) * RECORD}B"
PROMPT_TEXT, TOKENS = "the quick fox jumps", 40


def write_model(folder: Path) -> Path:
    """A random model that is certain enough of itself to write more than one letter."""
    tensors = {name: (3 if re.search("proj|gate|embed", name) else 1) * value for name, value in hf_folders.random_tensors(CONFIG).items()}
    small = {
        "tokenizer.json": letter_tokenizer().to_str(),
        "tokenizer_config.json": json.dumps({"bos_token": BOS}),
        "generation_config.json": json.dumps({"eos_token_id": []}),
    }
    return hf_folders.write_folder(folder, CONFIG, tensors, 1, small)


@pytest.fixture(scope="module", autouse=True)
def short_runs():
    """As in `test_generate_cli`; all programs are kept, for the host-driven mode has many small ones; and they are compiled in half the time."""
    name = "jax_persistent_cache_min_compile_time_secs"
    kept = getattr(jax.config, name)
    jax.config.update(name, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "measure_memory_bandwidth", lambda seconds, bytes: 12.5)
        patch.setattr(steps, "TOKEN_BUCKETS", steps.TOKEN_BUCKETS[:1])
        options = Kernels.compiler_options
        patch.setattr(Kernels, "compiler_options", lambda self: options(self) | OPTIONS)
        yield
    jax.config.update(name, kept)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the model in it, and a cache."""
    place = tmp_path_factory.mktemp("place")
    write_model(place / "hf")
    return place


def run(place: Path, *args, model: Path | None = None, tokens: int = TOKENS, **options) -> commands.Done:
    common = (model or place / "hf", "--cache", place / "cache", "--prompt", PROMPT_TEXT, "--max-new-tokens", tokens)
    return commands.call(generate, *common, *args, **options)


@pytest.fixture(scope="module")
def trace(place) -> Path:
    """What `trace.py record` makes of the run that the tests look at."""
    out = place / "t.npz"
    done = commands.call(trace_script, "record", place / "hf", "--cache", place / "cache", "--prompt", PROMPT_TEXT, "--max-new-tokens", TOKENS,
                         "--out", out)  # fmt: skip
    assert done.code == 0, done.err
    return out


RUNS = {
    "resident": [],
    "all resident": ["--expert-memory", "100%", "--link-gbps", "1"],
    "layer-grouped": ["--expert-memory", MEMORY],
    "fused": ["--expert-memory", MEMORY, "--expert-mode", "fused"],
    "fused, lru": ["--expert-memory", MEMORY, "--expert-mode", "fused", "--expert-policy", "lru"],
    "static": ["--expert-memory", MEMORY, "--expert-policy", "static", "--expert-trace", "TRACE"],
    "host-driven": ["--expert-memory", MEMORY, "--expert-mode", "host-driven"],
    "emulated link": ["--expert-memory", MEMORY, "--link-gbps", "0.01"],
    "disk": ["--expert-memory", MEMORY, "--host-memory", "40%"],
}


@pytest.fixture(scope="module")
def made(place, trace):
    """`name of a run -> (what it printed, the JSON that it wrote)`, each run once."""

    @functools.cache
    def made(name: str) -> tuple[commands.Done, dict]:
        out = place / f"{name}.json"
        done = run(place, *(str(trace) if arg == "TRACE" else arg for arg in RUNS[name]), "--json", out)
        assert done.code == 0, done.err
        return done, json.loads(out.read_text())

    return made


STREAMED = tuple(RUNS)[2:]


def test_what_looks_ahead_changes_nothing(place, made):
    """auto: the model's own routers foretell, the host sends ahead; its bytes are counted once, by what became of them."""
    resident, expected = made("resident")
    out = place / "auto.json"
    done = run(place, "--expert-memory", MEMORY, "--expert-policy", "auto", "--expert-mode", "host-driven", "--json", out)
    found = json.loads(out.read_text())
    assert done.code == 0 and done.out == resident.out and found["requests"] == expected["requests"], done.err
    assert found["prefetch"]["predictor"] == "gate" and "sent ahead by gate" in done.err
    sent = sum(found["prefetch"][name] for name in ("useful", "late", "wasted", "held"))
    assert sent % RECORD == 0 and found["bytes_per_token"] * (TOKENS - 1) >= sent


def test_a_lossy_run_says_so_and_a_lossless_setting_is_exact(place, made):
    resident, expected = made("resident")
    out = place / "lossy.json"
    done = run(place, "--expert-memory", MEMORY, "--expert-mode", "fused", "--expert-policy", "plec", "--lossy", "high=1,cold=0", "--json", out)
    found = json.loads(out.read_text())
    assert done.code == 0 and done.out == resident.out and found["requests"] == expected["requests"], done.err
    assert found["lossy"]["miss_byte_ratio"] == 1 and "LOSSY: of all token-expert pairs 0.0 % degraded" in done.err
    done = run(place, "--expert-memory", MEMORY, "--expert-mode", "host-driven", "--lossy", "bits=4", "--json", out)
    found = json.loads(out.read_text())
    assert done.code == 0 and found["lossy"]["degraded"] == 1 and found["lossy"]["miss_byte_ratio"] <= 0.25, done.err


# --- what it prints and writes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STREAMED)
def test_text_and_ids_are_those_of_the_resident_run(made, name):
    resident, expected = made("resident")
    done, found = made(name)
    assert len(set(expected["requests"][0]["ids"])) > 5
    assert done.out == resident.out and found["requests"] == expected["requests"]
    assert 0 < found["hit_rate"] < 1  # something was streamed


@pytest.mark.parametrize("name", STREAMED)
def test_the_json_says_at_its_top_what_was_streamed(made, name):
    _, found = made(name)
    emulated = name == "emulated link"
    assert found["expert_mode"] == name.split(",")[0] or name in ("static", "emulated link", "disk")
    assert found["expert_policy"] == {"fused, lru": "lru", "static": "static"}.get(name, "lfu")
    assert found["hit_rate"] <= found["opt_hit_rate"] <= 1 and found["regret"] == pytest.approx(1 - found["hit_rate"] / found["opt_hit_rate"])
    assert sum(found["slots"]) == LAYERS * SLOTS and found["staging"] == 2
    assert found["slots"] == [SLOTS] * LAYERS or name == "static"
    requests = LAYERS * ACTIVE * (TOKENS - 1)
    assert found["bytes_per_token"] * (TOKENS - 1) == pytest.approx((1 - found["hit_rate"]) * requests * RECORD)
    assert found["prefill_bytes"] % RECORD == 0 and found["prefill_bytes_ratio"] == 1
    assert found["resident_device_bytes"] == sum(found["bytes"].values()) - found["bytes"]["experts"] + ALL
    assert found["resident_device_bytes"] - found["device_bytes"] == (LAYERS * (EXPERTS - SLOTS) - 2) * RECORD
    assert found["link_emulated"] is emulated and found["link_gbps"] == (0.01 if emulated else None)
    for field in ("link_bound_fraction", "serial_bound_fraction", "stall"):
        assert (0 < found[field] <= 1) if emulated else found[field] is None, field


def test_runs_of_one_policy_count_alike(made):
    counted = ("hit_rate", "opt_hit_rate", "regret", "bytes_per_token", "prefill_bytes", "device_bytes", "resident_device_bytes", "slots")
    first = made("layer-grouped")[1]
    for name in ("fused", "host-driven", "emulated link", "disk"):
        assert [made(name)[1][field] for field in counted] == [first[field] for field in counted], name


def test_the_terminal_says_the_same(made):
    done, found = made("emulated link")
    say = done.err.splitlines()
    assert f"{100 * found['hit_rate']:.1f} % hits, {100 * found['opt_hit_rate']:.1f} % at best (regret {100 * found['regret']:.0f} %)" in say[2]
    assert f"{SLOTS} of {EXPERTS} a layer and 2 in staging, lfu, host-driven" in say[2] and "bytes a token over the link" in say[2]
    assert "1.00x the experts it lacked" in say[3]
    percents = [f"{100 * found[field]:.0f} %" for field in ("link_bound_fraction", "serial_bound_fraction", "stall")]
    assert say[4].startswith(f"link of 0.01 GB/s: {percents[0]} of the overlapped bound, {percents[1]} of the serial one, stalled {percents[2]} of")
    saved = 100 * (1 - found["device_bytes"] / found["resident_device_bytes"])
    assert re.match(rf"device bytes \d+ kB with KV, resident \d+ kB \({saved:.0f} % saved\)", say[5])
    assert say[6].startswith("foretold from the budget: at ") and len(say) == 7


def test_every_line_of_a_run_with_an_emulated_link_says_so(made, place):
    one_token = run(place, *RUNS["emulated link"], tokens=1)
    for done in (made("emulated link")[0], one_token):
        assert done.code == 0 and len(done.err.splitlines()) >= 5
        assert all("EMULATED" in line for line in done.err.splitlines()), done.err
    for name in set(RUNS) - {"emulated link"}:
        assert "EMULATED" not in made(name)[0].err


@pytest.mark.parametrize("name", ["layer-grouped", "fused", "host-driven"])
def test_without_a_link_there_are_counts_and_no_speeds_of_one(made, name):
    done, _ = made(name)
    assert "no speed of a link is claimed" in done.err and "bound" not in done.err and "stall" not in done.err


def test_an_emulated_link_takes_its_time(made):
    """Decoding can't be faster than what crosses the link, whatever the machine."""
    _, found = made("emulated link")
    sent = found["bytes_per_token"] * (TOKENS - 1)
    assert found["timings"]["decode"]["median"] >= sent / 0.01e9 * found["stall"]
    assert found["link_bound_fraction"] == pytest.approx(sent / 0.01e9 / found["timings"]["decode"]["median"])


def test_memory_for_all_experts_runs_the_resident_model(made):
    (resident, expected), (done, found) = made("resident"), made("all resident")
    assert done.out == resident.out and found["requests"] == expected["requests"] and found["bytes"] == expected["bytes"]
    assert found["expert_mode"] == "resident" and found["device_bytes"] == found["resident_device_bytes"]
    assert (found["hit_rate"], found["bytes_per_token"], found["link_gbps"]) == (1, 0, None)
    assert set(made("layer-grouped")[1]) == set(found)  # whoever reads the JSON finds the same fields
    assert "all 16 of every layer on the device" in done.err and "0 % saved" in done.err
    assert not {"hit_rate", "slots"} & set(expected)


# --- traces -----------------------------------------------------------------------------------------------------------


def test_record_writes_the_routing_of_the_run(made, trace):
    [request] = made("resident")[1]["requests"]
    found, prompt = load(trace), request["prompt_ids"]
    assert found.tokens.tolist() == [*prompt, *request["ids"][:-1]]
    assert found.phase.tolist() == [PROMPT] * len(prompt) + [DECODE] * (TOKENS - 1)
    assert (found.layers, found.experts, found.ids.shape[2]) == (LAYERS, EXPERTS, ACTIVE)
    assert found.meta["expert_bytes"] == [RECORD] * LAYERS and found.meta["model"] == "qwen3_moe"
    np.testing.assert_allclose(found.weights.astype(np.float32).sum(2), 1, atol=2e-3)  # the model's router normalizes them


def replayed(place: Path, trace: Path, policy: str) -> dict:
    done = commands.call(trace_script, "replay", trace, "--slots", SLOTS, "--policy", policy, "--json", place / f"replay-{policy}.json")
    assert done.code == 0, done.err
    return json.loads((place / f"replay-{policy}.json").read_text())


def test_replay_gives_the_hit_rate_of_the_run(made, place, trace):
    """For LRU it is the same number. For LFU the step reads a prompt in one block and keeps what it used most, where replay goes token by token and
    so keeps what the last token used, whatever its count: what a layer holds after the prompt may differ, until decoding has replaced it. Measured:
    no difference here; with the model that ships, 8 of 32 slots and 64 tokens after three prompts, 0, 1 and 1 of 2,016 hits. One a layer is allowed.
    """
    lru = replayed(place, trace, "lru")
    assert lru["hit_rate"] == made("fused, lru")[1]["hit_rate"] and lru["requests"] == LAYERS * ACTIVE * (TOKENS - 1)
    lfu, found = replayed(place, trace, "lfu"), made("layer-grouped")[1]
    assert lfu["opt_hit_rate"] == found["opt_hit_rate"] == lru["opt_hit_rate"]
    assert abs(lfu["hit_rate"] - found["hit_rate"]) * lfu["requests"] <= LAYERS


# --- pinned experts ---------------------------------------------------------------------------------------------------


def pin(place: Path, out: Path, *args) -> commands.Done:
    return commands.call(trace_script, "pin", place / "hf", "--cache", place / "cache", "--out", out, *args)


def test_pin_writes_the_experts_whose_outputs_are_largest(place, tmp_path):
    (tmp_path / "texts").write_text(f"{PROMPT_TEXT}\nthe lazy dog\n")
    done = pin(place, tmp_path / "p.json", "--prompt-file", tmp_path / "texts", "--quantile", "0.9")
    assert done.code == 0 and "times the median" in done.out and "p.json: qwen3_moe, 4 of 32 experts are above " in done.out, done.err
    found, read = load_pinned(tmp_path / "p.json"), json.loads((tmp_path / "p.json").read_text())
    found.check_model(SPEC)
    largest = [row[2] for row in found.pinned]
    assert largest == sorted(largest, reverse=True) and largest[-1] > read["criterion"]["threshold"] and found.mask.sum() == 4
    assert read["criterion"] | {"threshold": 0, "used": 0} == {
        "quantile": 0.9, "share": 0.1, "layers": 1.0, "threshold": 0, "prompts": 2, "tokens": 20 + 13, "used": 0,
    }  # fmt: skip
    assert LAYERS * ACTIVE <= read["criterion"]["used"] <= LAYERS * EXPERTS
    done = pin(place, tmp_path / "q.json", "--prompt", PROMPT_TEXT, "--layers", "0.5", "--quantile", "0.5")
    assert done.code == 0 and {row[0] for row in load_pinned(tmp_path / "q.json").pinned} == {0}, done.err


def pinned_file(path: Path, pinned: list[tuple[int, int]], spec: ModelSpec = SPEC) -> Path:
    router, _ = spec.moe
    rows = tuple((layer, expert, 1.0) for layer, expert in pinned)
    path.write_text(PinnedExperts("a test", model_hash(spec), len(spec.moe_layers), router.experts, rows).to_json())
    return path


def test_pinned_experts_change_no_text_and_hit_as_replay_says(place, made, trace, tmp_path):
    """Three experts of each layer that the prompt uses and the rest of the run hardly does: without pins they would not stay."""
    resident, expected = made("resident")
    ids, phase = load(trace).ids, load(trace).phase
    uses = [[((ids[phase == p][:, layer] == e).any(1)).sum() for e in range(EXPERTS)] for p in (PROMPT, DECODE) for layer in range(LAYERS)]
    prompt, later = np.array(uses).reshape(2, LAYERS, EXPERTS)
    rarest = np.argsort(np.where(prompt > 0, later, TOKENS), axis=1, kind="stable")[:, :3]
    file = pinned_file(tmp_path / "p.json", [(layer, int(e)) for layer in range(LAYERS) for e in rarest[layer]])
    done = run(place, *RUNS["fused, lru"], "--pin-experts", file, "--json", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert done.code == 0 and done.out == resident.out and found["requests"] == expected["requests"], done.err
    assert found["pinned_experts"] == 6 and "lru, fused, 6 pinned: " in done.err and made("fused, lru")[1]["pinned_experts"] == 0
    done = commands.call(trace_script, "replay", trace, "--slots", SLOTS, "--policy", "lru", "--pin", file, "--json", tmp_path / "s.json")
    said = json.loads((tmp_path / "s.json").read_text())
    assert done.code == 0 and said["hit_rate"] == found["hit_rate"] and said["pinned_experts"] == 6, done.err
    assert said["hit_rate"] < made("fused, lru")[1]["hit_rate"] and said["opt_hit_rate"] == made("fused, lru")[1]["opt_hit_rate"]


@pytest.mark.parametrize("policy", ["static", "eam"])
def test_replay_pins_what_a_policy_knows_nothing_of(trace, tmp_path, policy):
    file = pinned_file(tmp_path / "p.json", [(0, 1)])
    profile = ["--profile", trace] if policy == "eam" else []
    done = commands.call(trace_script, "replay", trace, "--slots", SLOTS, "--policy", policy, "--pin", file, *profile)
    assert done.code == 0 and policy in done.out, done.err


PINS = {
    "no_prompt": ([], "give either --prompt or --prompt-file"),
    "no_file": (["--prompt-file", "none"], "none: No such file or directory"),
    "quantile": (["--prompt", "a", "--quantile", "2"], "quantile = 2.0 of super experts: give 0 to 1"),
    "layers": (["--prompt", "a", "--layers", "0"], "layers = 0.0 of super experts: give more than 0"),
    "too_long": (["--prompt", "a" * 128], "prompt 0 has 129 tokens"),
    "suffix": (["--prompt", "a", "--out", "p.npz"], "a list of pinned experts goes to a .json file, got p.npz"),
    "dtype": (["--prompt", "a", "--dtype", "float8"], "unsupported dtype 'float8'"),
}


@pytest.mark.parametrize(("args", "message"), PINS.values(), ids=PINS.keys())
def test_wrong_arguments_of_pin(place, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(opening, "load_model", None)  # nothing is loaded
    check_refused(pin(place, tmp_path / "x.json", *args), message)
    assert not any(tmp_path.iterdir())


PIN_REPLAYS = {
    "another_model": ("lru", [(0, 1)], "qwen3_moe (2 layers of 16 experts, spec "),
    "too_many": ("lru", [(1, e) for e in range(9)], "9 experts are pinned in 8 slots of layer 1: pin fewer"),
    "opt": ("opt", [(0, 1)], "opt is the bound of what a policy can do without pinned experts"),
}


@pytest.mark.parametrize(("policy", "pinned", "message"), PIN_REPLAYS.values(), ids=PIN_REPLAYS.keys())
def test_pins_that_replay_refuses(trace, tmp_path, policy, pinned, message):
    other = dataclasses.replace(SPEC, vocab=SPEC.vocab + 1) if "spec" in message else SPEC
    file = pinned_file(tmp_path / "p.json", pinned, other)
    check_refused(commands.call(trace_script, "replay", trace, "--slots", SLOTS, "--policy", policy, "--pin", file), message)


def record_trace(place: Path, out: Path, *args) -> commands.Done:
    return commands.call(trace_script, "record", place / "hf", "--cache", place / "cache", "--out", out, *args)


def test_record_of_the_prompt_alone(place, trace, tmp_path):
    done = record_trace(place, tmp_path / "p.npz", "--prompt", PROMPT_TEXT, "--teacher-forced")
    assert done.code == 0, done.err
    found, whole = load(tmp_path / "p.npz"), load(trace)
    assert (found.phase == TEACHER_FORCED).all() and found.tokens.tolist() == whole.tokens[whole.phase == PROMPT].tolist()
    np.testing.assert_array_equal(found.ids, whole.ids[whole.phase == PROMPT])
    assert "2 layers of 16 experts, 20 tokens in 20 steps" in done.out


RECORDS = {
    "no_tokens": (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens = 0 must be at least 1"),
    "too_long": (["--prompt", "a" * 128], "prompt 0 has 129 tokens"),
    "no_prompt": (["--prompt", ""], "there is no prompt"),
    "both": (["--prompt", "a", "--prompt-file", "p"], "give either --prompt or --prompt-file"),
    "dtype": (["--prompt", "a", "--max-new-tokens", "4", "--dtype", "float8"], "unsupported dtype 'float8'"),
    "too_many": (["--prompt-file", "many", "--max-new-tokens", "4"], "129 prompts are more than the 128 that one run takes"),
    "no_file": (["--prompt-file", "none"], "none: No such file or directory"),
    "folder_that_takes_no_files": (["--prompt", "a", "--out", "/proc/x.npz"], "/proc: no file can be made here"),
}


@pytest.mark.parametrize(("args", "message"), RECORDS.values(), ids=RECORDS.keys())
def test_wrong_arguments_of_record(place, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "many").write_text("a\n" * 129)
    monkeypatch.setattr(opening, "load_model", None)  # nothing is loaded
    check_refused(record_trace(place, tmp_path / "x.npz", *args), message)
    assert not (tmp_path / "x.npz").exists()


# --- how it refuses ---------------------------------------------------------------------------------------------------

HALF = ["--expert-memory", "50%"]
MINIMUM = (LAYERS * ACTIVE + 2) * RECORD

ARGUMENTS = {
    "below_the_minimum": (["--expert-memory", f"{MINIMUM - 1}B"], f"are too few for experts: the minimum is {MINIMUM:,} bytes"),
    "one_byte": (["--expert-memory", "1B"], f"the minimum is {MINIMUM:,} bytes"),
    "static_needs_more": ([*HALF, "--expert-policy", "static"], "the policy 'static' goes by a trace of the model: give --expert-trace"),
    "nothing": (["--expert-memory", "0%"], "'0%' is no amount of memory to give"),
    "no_bytes": (["--expert-memory", "0GB"], "'0GB' is no amount of memory to give"),
    "negative": (["--expert-memory", "-5GB"], "'-5GB' is not an amount of memory: write it like 4GB"),
    "negative_share": (["--expert-memory", "-5%"], "'-5%' is not an amount of memory"),
    "more_than_all": (["--expert-memory", "200%"], "'200%' is no amount of memory to give: it has to be more than nothing, and at most 100%"),
    "banana": (["--expert-memory", "banana"], "'banana' is not an amount of memory"),
    "empty": (["--expert-memory", ""], "'' is not an amount of memory"),
    "no_unit": (["--expert-memory", "4"], "'4' is not an amount of memory"),
    "no_staging": ([*HALF, "--expert-staging", "0"], "staging = 0 slots"),
    "negative_staging": ([*HALF, "--expert-staging", "-1"], "staging = -1 slots"),
    "more_staging_than_memory": ([*HALF, "--expert-staging", "20"], "the minimum is"),
    "no_speed": ([*HALF, "--link-gbps", "0"], "a link of 0.0 GB/s: its speed has to be positive"),
    "negative_speed": ([*HALF, "--link-gbps", "-1"], "a link of -1.0 GB/s: its speed has to be positive"),
    "speed_nan": ([*HALF, "--link-gbps", "nan"], "a link of nan GB/s: its speed has to be positive"),
    "speed_inf": ([*HALF, "--link-gbps", "inf"], "a link of inf GB/s: its speed has to be finite"),
    "link_and_fused": ([*HALF, "--link-gbps", "1", "--expert-mode", "fused"], "--link-gbps needs --expert-mode host-driven, not fused"),
    "disk_and_fused": ([*HALF, "--host-memory", "1GB", "--expert-mode", "fused"], "--host-memory needs --expert-mode host-driven, not fused"),
    "host_memory_too_small": ([*HALF, "--host-memory", "1%"], f"of host memory are too few for experts: at least {2 * ACTIVE * RECORD:,} are needed"),
    "host_memory_auto": ([*HALF, "--host-memory", "auto"], "--host-memory auto: give an amount"),
    "host_memory_banana": (["--expert-memory", "100%", "--host-memory", "banana"], "'banana' is not an amount of memory"),
    "fill_of_a_gpu": ([*HALF, "--expert-fill", "mosaic_tma"], "--expert-fill mosaic_tma is for NVIDIA GPUs, and this device is cpu"),
    "fill_and_host_driven": ([*HALF, "--expert-fill", "while", "--expert-mode", "host-driven"], "--expert-fill while is for compiled steps"),
    "pins_and_no_memory": (["--pin-experts", "pins.json"], "--pin-experts is for streamed experts: give --expert-memory too"),
    "pins_on_a_split": ([*HALF, "--split", "data=1", "--pin-experts", "pins.json"], "is for experts on one device: leave it or the split out"),
    "no_pins": ([*HALF, "--pin-experts", "none.json"], "none.json: No such file or directory"),
    "pins_that_are_none": ([*HALF, "--pin-experts", "text.npz"], "text.npz: not a file of pinned experts: Expecting value"),
    "pins_of_another_model": ([*HALF, "--pin-experts", "other.json"], "other.json: pins experts of a test (2 layers of 16 experts, spec "),
    "too_many_pins": (["--expert-memory", MEMORY, "--pin-experts", "pins.json"], "pins.json: 9 experts are pinned in 8 slots of layer 1: pin fewer"),
    "pins_and_opt": ([*HALF, "--pin-experts", "pins.json", "--expert-policy", "opt", "--expert-trace", "TRACE"], "choose another one"),
    "no_predictor": ([*HALF, "--prefetch", "4"], "--prefetch goes with --expert-predictor"),
    "no_prefetch": ([*HALF, "--prefetch", "0", "--expert-predictor", "gate"], "staging = 0 of prefetching: give at least 1"),
    "prefetch_and_fused": ([*HALF, "--prefetch", "4", "--expert-mode", "fused"], "--prefetch needs --expert-mode host-driven, not fused"),
    "an_untrained_predictor": ([*HALF, "--prefetch", "4", "--expert-predictor", "path"], "the predictor 'path' is trained: give --predictor-file"),
    "an_unknown_predictor": ([*HALF, "--prefetch", "4", "--expert-predictor", "tea"], "there is no predictor 'tea': choose one of frequency"),
    "a_pair_that_does_not_go": ([*HALF, "--prefetch", "4", "--expert-predictor", "gate+previous"], "'gate' says nothing before a step"),
    "a_predictor_for_nothing": ([*HALF, "--expert-predictor", "gate"], "--expert-predictor gate has no use without --prefetch, or a policy"),
    "eam_needs_more": ([*HALF, "--expert-policy", "eam"], "the policy 'eam' goes by a trace of the model: give --expert-trace"),
    "lossy_nonsense": ([*HALF, "--lossy", "maybe"], "--lossy maybe: give hobbit"),
    "lossy_bits_and_fused": ([*HALF, "--lossy", "bits=4"], "--lossy bits=4 brings experts in 4 bits, which needs --expert-mode host-driven"),
    "trace_that_is_not_there": ([*HALF, "--expert-trace", "none.npz"], "none.npz: No such file or directory"),
    "trace_that_is_a_folder": ([*HALF, "--expert-trace", "."], ".: Is a directory"),
    "trace_that_is_none": ([*HALF, "--expert-trace", "text.npz"], "text.npz: not a trace file"),
    "damaged_trace": ([*HALF, "--expert-trace", "cut.npz"], "cut.npz: "),
    "trace_of_another_model": ([*HALF, "--expert-trace", "other.npz"], "other.npz: the trace is of random (2 layers of 9 experts"),
    "trace_of_another_model_and_all_resident": (["--expert-memory", "auto", "--expert-trace", "other.npz"], "other.npz: the trace is of random"),
} | {
    f"{option}_alone": ([f"--{option}", value], f"--{option} is for streamed experts: give --expert-memory too")
    for option, value in {
        "expert-mode": "fused", "expert-policy": "lfu", "expert-staging": "2", "expert-trace": "none.npz", "expert-fill": "while",
        "host-memory": "1GB", "link-gbps": "1",
    }.items()
}  # fmt: skip


@pytest.mark.parametrize(("args", "message"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_wrong_options(place, trace, tmp_path, monkeypatch, args, message):
    """Each is one line and exit code 2, before a model is converted or read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("checkpoints.load.load_hf_or_checkpoint", None)
    Path("text.npz").write_text("no trace")
    Path("cut.npz").write_bytes(trace.read_bytes()[:-300])
    save("other.npz", traces.random_trace(0))
    pinned_file(Path("pins.json"), [(1, e) for e in range(9)])
    pinned_file(Path("other.json"), [(0, 1)], dataclasses.replace(SPEC, vocab=SPEC.vocab + 1))
    before = files(tmp_path)
    check_refused(run(place, *(str(trace) if arg == "TRACE" else arg for arg in args)), message)
    assert files(tmp_path) == before


@pytest.mark.parametrize("option", ["--expert-policy", "--expert-mode", "--expert-fill"])
def test_a_choice_that_is_none(place, option):
    done = run(place, *HALF, option, "banana")
    assert done.code == 2 and "banana" in done.err and option in done.err and done.out == ""


def test_host_memory_that_is_too_small_for_all_experts(place, monkeypatch):
    monkeypatch.setattr("checkpoints.load.load_hf_or_checkpoint", None)
    monkeypatch.setattr(memory, "available_host_memory", lambda: ALL // 2)
    check_refused(run(place, *HALF), "do not fit into the 49.2 kB of host memory that is available: --host-memory 25% keeps that share of them")


# --- damaged experts --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(place) -> Path:
    convert(place / "hf", place / "converted")
    return place / "converted"


def alter_manifest(folder: Path, leaf: str, expert: int) -> None:
    """The manifest says another checksum of an expert."""
    manifest = read_manifest(folder)
    found = manifest.leaves[leaf]
    crc32 = tuple("00000000" if i == expert else crc for i, crc in enumerate(found.crc32))
    write_manifest(folder, dataclasses.replace(manifest, leaves={**manifest.leaves, leaf: dataclasses.replace(found, crc32=crc32)}))


def alter_numbers(folder: Path, leaf: str, expert: int) -> None:
    """Other numbers in a chunk whose own checksum is right."""
    array = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder / leaf}/"}}).result()
    array[expert, 0, 0] = array[expert, 0, 0].read().result() + 1


def flip_a_byte(folder: Path, leaf: str, expert: int) -> None:
    chunk = sorted((folder / leaf).glob(f"{expert}.*"))[0]
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)


DAMAGES = {
    "manifest": (alter_manifest, "leaf experts.1.up, expert {}, has checksum"),
    "numbers": (alter_numbers, "leaf experts.1.up is damaged: chunk {}.0.0 is not the one that was written"),
    "byte": (flip_a_byte, "leaf experts.1.up is damaged"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("mode", ["fused", "host-driven"])
def test_a_damaged_expert_ends_the_run_before_any_text(place, converted, tmp_path, mode, damage, message):
    folder = shutil.copytree(converted, tmp_path / "out")
    damage(folder, "experts.1.up", 7)
    check_refused(run(place, *HALF, "--expert-mode", mode, model=folder), message.format(7))


@pytest.fixture(scope="module")
def asked(place, converted) -> list[tuple[int, int]]:
    """Which (MoE layer, expert) the run with a disk behind host memory asks for, in the order of the first time, warm-up included."""
    asked, ask = [], DiskSource.ask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiskSource, "ask", lambda self, layer, expert: asked.append((layer, expert)) or ask(self, layer, expert))
        assert run(place, *RUNS["disk"], model=converted).code == 0
    return list(dict.fromkeys(asked))


@pytest.mark.parametrize(("damage", "message"), [(alter_manifest, ", expert {}, has checksum"), (alter_numbers, " is damaged: chunk {}.0.0 is not")])
def test_a_damaged_expert_on_disk_ends_the_run_when_it_is_asked_for(place, converted, made, asked, tmp_path, damage, message):
    """No token is computed with it: what has been written is how the right text begins."""
    folder = shutil.copytree(converted, tmp_path / "out")
    layer, expert = asked[-1]
    damage(folder, f"experts.{layer}.gate", expert)
    done = run(place, *RUNS["disk"], model=folder)
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert f"leaf experts.{layer}.gate{message.format(expert)}" in done.err
    assert made("resident")[0].out.startswith(done.out) and 0 < len(done.out) < TOKENS


def test_a_damaged_expert_on_disk_that_nobody_asks_for_is_not_read(place, converted, made, asked, tmp_path):
    never = next((layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS) if (layer, expert) not in asked)
    folder = shutil.copytree(converted, tmp_path / "out")
    alter_manifest(folder, f"experts.{never[0]}.gate", never[1])
    done = run(place, *RUNS["disk"], model=folder)
    assert done.code == 0 and done.out == made("resident")[0].out, done.err
