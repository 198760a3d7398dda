"""The command line of scripts/generate.py, which other tools rely on: what it takes, prints and writes, and how it refuses."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, processors

from checkpoints import store
from checkpoints.convert import convert
from checkpoints.load import open_checkpoint
from jaxmoe.engine import steps
from jaxmoe.engine.generate import Engine
from jaxmoe.engine.text import REPLACEMENT, Tokenizer
from jaxmoe.report import record
from jaxmoe.report.opening import find_kernels
from pallas_kernels.dispatch import Kernels
from tests.checkpoints import hf_folders
from tests.quick import OPTIONS, environment
from tests.scripts import commands

CONFIG = hf_folders.CONFIGS["mixtral"]
BOS, EOS, USER = "<s>", "</s>", "<user>"
PIECES = [BOS, EOS, USER, " ", *"abcdefghijklmnopqrstuvwxyz"]  # fewer than the model's 37: the rest of its ids have no text
TEMPLATE = "{{ bos_token }}{% for message in messages %}<user>{{ message.content }}{% endfor %}"
FULL_DISK = OSError(28, "No space left on device")

generate = commands.load("generate")


def letter_tokenizer(pieces: list[str] = PIECES) -> tokenizers.Tokenizer:
    """A token a letter, and a BOS before every text."""
    tokenizer = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.add_special_tokens([BOS, EOS, USER])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def write_model(folder: Path, shards: int = 1) -> Path:
    """A tiny random Hugging Face folder that has all that generate.py reads."""
    files = {
        "tokenizer.json": letter_tokenizer().to_str(),
        "tokenizer_config.json": json.dumps({"bos_token": BOS, "chat_template": TEMPLATE}),
        "generation_config.json": json.dumps({"eos_token_id": []}),
    }
    return hf_folders.write_folder(folder, CONFIG, hf_folders.random_tensors(CONFIG), shards, files)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def short_runs():
    """Measuring the bandwidth takes a second a run, and compiling for longer prompts and in full some; the run in a process of its own does all."""
    options = Kernels.compiler_options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "measure_memory_bandwidth", lambda seconds, bytes: 12.5)
        patch.setattr(steps, "TOKEN_BUCKETS", steps.TOKEN_BUCKETS[:1])
        patch.setattr(Kernels, "compiler_options", lambda self: options(self) | OPTIONS)
        yield


def run(folder: Path, cache: Path, *args, tokens: int = 12, **options) -> commands.Done:
    return commands.call(generate, folder, "--cache", cache, "--max-new-tokens", tokens, *args, **options)


def results(done: commands.Done, path: Path) -> list[dict]:
    """The requests in the JSON of a run that ended well."""
    assert done.code == 0, done.err
    return json.loads(path.read_text(encoding="utf-8"))["requests"]


@pytest.fixture(scope="module")
def greedy(model, cache, tmp_path_factory) -> dict:
    """What the model says greedily to one prompt."""
    path = tmp_path_factory.mktemp("greedy") / "out.json"
    return results(run(model, cache, "--prompt", "the quick fox", "--json", path), path)[0]


# --- what it prints and writes ----------------------------------------------------------------------------------------


def test_one_prompt(model, cache, greedy, tmp_path):
    done = run(model, cache, "--prompt", "the quick fox", "--json", tmp_path / "out.json")
    [request] = results(done, tmp_path / "out.json")
    assert request == greedy and set(request) == {"prompt_ids", "ids", "text", "finish_reason"}
    assert request["prompt_ids"] == [PIECES.index(piece) for piece in [BOS, *"the quick fox"]]
    assert len(request["ids"]) == 12 and request["finish_reason"] == "length"
    assert request["text"] == Tokenizer(model).decode(request["ids"])
    assert done.out == request["text"] + "\n"
    assert "tok/s" in done.err and "of 12.5 measured" in done.err
    assert os.listdir(tmp_path) == ["out.json"]


def test_the_json_is_a_record(model, cache, tmp_path):
    arguments = ["--stop", "zzz", "--stop", "qqq", "--seed", 7]
    assert run(model, cache, "--prompt", "abc", *arguments, "--json", tmp_path / "out.json").code == 0
    [made] = record.load_records(tmp_path)  # refuses a record that lacks a field
    checkpoint = open_checkpoint(next((cache / "converted").iterdir()))
    assert made["name"] == "generate" and made["spec_hash"] == checkpoint.spec.hash()
    assert made["settings"] == {
        "model": "mixtral", "dtype": "float32", "requests": 1, "max_new_tokens": 12, "temperature": 0.0, "top_k": 0, "top_p": 1.0,
        "min_p": 0.0, "stop": ["zzz", "qqq"], "row_invariant": True,
    }  # fmt: skip
    assert made["seeds"] == {"sampling": 7}
    assert made["bytes"]["params"] + made["bytes"]["experts"] == checkpoint.manifest.nbytes and made["bytes"]["kv"] > 0
    assert made["counters"]["prompt_tokens"] == 4 and made["counters"]["decode_tokens"] == made["counters"]["decode_steps"] == 11
    assert set(made["timings"]) == {"prefill", "decode", "first_token", "load"}
    assert 0 < made["timings"]["first_token"]["median"] <= made["timings"]["prefill"]["median"]
    bound = made["bound"]
    assert (bound["kind"], bound["ceiling"], bound["unit"]) == ("bandwidth", 12.5, "GB/s")
    assert bound["percent"] == pytest.approx(100 * bound["achieved"] / 12.5) and bound["achieved"] > 0


def test_text_streams(model, cache, monkeypatch):
    """Each piece is written when it is there, not when all is done."""
    calls, writes, decode = [], [], Engine._decode
    monkeypatch.setattr(Engine, "_decode", lambda *args: calls.append(1) or decode(*args))

    class Output(io.StringIO):
        def write(self, text):
            writes.append((len(calls), text))
            return super().write(text)

    done = run(model, cache, "--prompt", "abc", tokens=50, out=Output())
    assert done.code == 0 and done.out == "".join(text for _, text in writes)
    assert len({seen for seen, text in writes if text}) >= 3  # pieces between every two calls of the decode program
    assert len([text for _, text in writes if text]) > 20


PROMPTS = ["the quick fox", "[/bold] jumps", "over"]


def test_prompt_file_is_a_batch(model, cache, greedy, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\r\n".join([*PROMPTS[:2], "", PROMPTS[2]]).encode())
    done = run(model, cache, "--prompt-file", tmp_path / "prompts.txt", "--json", tmp_path / "out.json")
    requests = results(done, tmp_path / "out.json")
    assert [r["prompt_ids"] for r in requests] == [Tokenizer(model).encode(prompt) for prompt in PROMPTS]
    assert requests[0] == greedy  # the batch around a request changes nothing
    assert done.out == "".join(r["text"] + "\n" for r in requests)
    assert all(prompt in done.err for prompt in PROMPTS)  # also what looks like markup


def test_prompt_from_standard_input(model, cache, greedy, tmp_path):
    done = run(model, cache, "--json", tmp_path / "out.json", stdin=b"the quick fox")
    assert results(done, tmp_path / "out.json") == [greedy]


@pytest.mark.parametrize(
    ("data", "prompts"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"a\r\n\r\n  b ", ["a", "  b "]),
        ("page\fbreak\u2028é\n".encode(), ["page\fbreak\u2028é"]),
    ],
)
def test_lines_of_a_prompt_file(tmp_path, data, prompts):
    (tmp_path / "p").write_bytes(data)
    assert generate.read_prompts(generate.Arguments(prompt_file=tmp_path / "p")) == prompts


def test_chat_has_the_templates_special_tokens_and_no_others(model, cache, tmp_path):
    done = run(model, cache, "--chat", "--prompt", "hi", "--json", tmp_path / "out.json")
    [request] = results(done, tmp_path / "out.json")
    assert request["prompt_ids"] == [PIECES.index(piece) for piece in (BOS, USER, "h", "i")]


def test_end_tokens_come_from_generation_config(model, cache, greedy, tmp_path):
    end = next(i for i, id in enumerate(greedy["ids"]) if i > 1 and id not in greedy["ids"][:i])
    ended = shutil.copytree(model, tmp_path / "ended")
    (ended / "generation_config.json").write_text(json.dumps({"eos_token_id": [1000, greedy["ids"][end]]}))
    done = run(ended, cache, "--prompt", "the quick fox", "--json", tmp_path / "out.json")
    [request] = results(done, tmp_path / "out.json")
    assert request["ids"] == greedy["ids"][: end + 1] and request["finish_reason"] == "stop"
    assert request["text"] == Tokenizer(model).decode(greedy["ids"][:end]) and done.out == request["text"] + "\n"


def test_stop_text(model, cache, greedy, tmp_path):
    stop = greedy["text"][3:5]
    done = run(model, cache, "--prompt", "the quick fox", "--stop", "never", "--stop", stop, "--json", tmp_path / "out.json")
    [request] = results(done, tmp_path / "out.json")
    assert request["text"] == greedy["text"].split(stop)[0] and request["finish_reason"] == "stop"
    assert request["ids"] == greedy["ids"][: len(request["ids"])] and len(request["ids"]) < 12
    assert done.out == request["text"] + "\n"


def test_sampling_depends_on_its_arguments(model, cache, tmp_path):
    def draw(*args):
        done = run(model, cache, "--prompt", "abc", "--temperature", 1.5, *args, "--json", tmp_path / "out.json")
        return results(done, tmp_path / "out.json")[0]["ids"]

    first, greedy = draw("--seed", 1), draw("--top-k", 1)
    assert first == draw("--seed", 1) and first != draw("--seed", 2)
    assert greedy == draw("--top-p", 1e-6) == draw("--min-p", 1) == draw("--top-k", 1, "--seed", 5) != first


def test_ids_without_a_token_are_seen_in_the_text(model, cache, tmp_path):
    """The model has 37 rows of logits, the tokenizer 30 tokens."""
    done = run(model, cache, "--prompt", "abc", "--temperature", 100, "--json", tmp_path / "out.json", tokens=50)
    [request] = results(done, tmp_path / "out.json")
    assert request["text"].count(REPLACEMENT) == sum(id >= len(PIECES) for id in request["ids"]) > 0
    assert request["text"] == Tokenizer(model).decode(request["ids"])


@pytest.mark.parametrize(("asked", "layout"), [("pallas", "2fd"), ("xla", "d2f")])
def test_kernels_can_be_left_out(asked, layout, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cuda")
    kernels = find_kernels(False, asked == "pallas")
    assert kernels.pallas == (asked == "pallas") and kernels.backend == "gpu" and kernels.expert_layout == layout


def test_dtype(model, cache, tmp_path):
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        assert run(model, cache, "--prompt", "abc", "--dtype", dtype, "--json", tmp_path / f"{dtype}.json").code == 0
        made = json.loads((tmp_path / f"{dtype}.json").read_text())
        assert made["settings"]["dtype"] == dtype and len(made["requests"][0]["ids"]) == 12
        sizes[dtype] = made["bytes"]
    assert sizes["float32"] == {kind: 2 * size for kind, size in sizes["bfloat16"].items()}


def test_a_single_token(model, cache, greedy, tmp_path):
    done = run(model, cache, "--prompt", "the quick fox", "--json", tmp_path / "out.json", tokens=1)
    [request] = results(done, tmp_path / "out.json")
    assert request["ids"] == greedy["ids"][:1]
    assert record.load_records(tmp_path)[0]["bound"]["achieved"] == 0  # nothing was decoded after it


def test_converted_folder(model, cache, greedy, tmp_path):
    convert(model, tmp_path / "out")
    done = run(tmp_path / "out", tmp_path / "unused", "--prompt", "the quick fox", "--json", tmp_path / "out.json")
    assert results(done, tmp_path / "out.json") == [greedy]
    assert not (tmp_path / "unused" / "converted").exists()


def shell(*args, cwd: Path, **options) -> subprocess.CompletedProcess:
    """From another folder, without PYTHONPATH and these tests' devices, as one line in a shell; compiled in less time."""
    env = {key: value for key, value in environment("").items() if key != "PYTHONPATH"}
    command = [sys.executable, generate.__file__, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, **options)


def test_the_shipped_model_in_a_process_of_its_own(tmp_path):
    """Every option by its name, the prompt from a pipe, and a bandwidth that is measured."""
    options = "--max-new-tokens 20 --temperature 0 --top-k 9 --top-p 0.9 --min-p 0.01 --seed 3 --stop zzz --dtype float32".split()
    done = shell("--cache", "cache", *options, "--json", "out.json", cwd=tmp_path, input="And it came to pass, that")
    assert done.returncode == 0, done.stderr
    [made] = record.load_records(tmp_path)
    [request] = made["requests"]
    tokenizer = Tokenizer(generate.DEFAULT_MODEL)
    assert request["prompt_ids"] == tokenizer.encode("And it came to pass, that")
    assert done.stdout == request["text"] + "\n" == tokenizer.decode(request["ids"]) + "\n"
    assert len(request["text"].split()) >= 5  # words: it was trained
    assert made["bound"]["ceiling"] > 0.1 and made["bound"]["percent"] > 0
    assert sorted(os.listdir(tmp_path)) == ["cache", "out.json"]


def test_an_error_in_a_process_of_its_own(model, tmp_path):
    """What other libraries write on standard error would show here."""
    (write_model(tmp_path / "hf", shards=2) / "model-00001-of-00002.safetensors").unlink()
    done = shell("hf", "--cache", "cache", "--prompt", "a", "--max-new-tokens", "4", cwd=tmp_path)
    check_refused(commands.Done(done.returncode, done.stdout, done.stderr), "model-00001-of-00002.safetensors: missing")
    assert os.listdir(tmp_path) == ["hf"]


# --- how it refuses ---------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def check_refused(done: commands.Done, message: str) -> None:
    assert done.code == 2
    assert done.err.startswith("error: ") and done.err.endswith("\n") and done.err.count("\n") == 1, done.err
    assert message in done.err
    assert done.out == ""


ARGUMENTS = {
    "dtype": (["--dtype", "float8"], "unsupported dtype 'float8'"),
    "both_prompts": (["--prompt-file", "prompts.txt"], "give --prompt or --prompt-file, not both"),
    "negative_temperature": (["--temperature", "-1"], "temperature = -1.0"),
    "temperature_nan": (["--temperature", "nan"], "temperature = nan"),
    "top_p_0": (["--top-p", "0"], "top_p = 0.0 is outside (0, 1]"),
    "negative_top_p": (["--top-p", "-0.5"], "top_p = -0.5"),
    "top_p_above_1": (["--top-p", "1.5"], "top_p = 1.5"),
    "negative_top_k": (["--top-k", "-1"], "top_k = -1"),
    "negative_min_p": (["--min-p", "-0.1"], "min_p = -0.1"),
    "min_p_above_1": (["--min-p", "1.1"], "min_p = 1.1"),
    "negative_seed": (["--seed", "-1"], "seed = -1"),
    "seed_beyond_32_bits": (["--seed", str(2**32)], f"seed = {2**32}"),
    "huge_seed": (["--seed", str(2**70)], "seed"),
    "no_tokens": (["--max-new-tokens", "0"], "max_new_tokens = 0 must be at least 1"),
    "negative_tokens": (["--max-new-tokens", "-3"], "max_new_tokens = -3"),
    "empty_stop": (["--stop", ""], "a stop string is empty"),
    "json_without_folder": (["--json", "nowhere/out.json"], "there is no folder nowhere"),
    "json_in_a_file": (["--json", "prompts.txt/out.json"], "there is no folder prompts.txt"),
    "json_is_a_folder": (["--json", "folder.json"], "folder.json: is a folder"),
    "json_by_another_name": (["--json", "out.txt"], "a record goes to a .json file, got out.txt"),
    "json_in_a_folder_that_takes_no_files": (["--json", "/proc/out.json"], "/proc: no file can be made here"),
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder to stand in, with a few things in it."""
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (tmp_path / "folder.json").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def nothing_is_read(monkeypatch):
    """An argument's fault must be found before a model is converted or loaded."""
    monkeypatch.setattr("checkpoints.load.load_hf_or_checkpoint", None)
    monkeypatch.setattr("jaxmoe.engine.model.load_model", None)


@pytest.mark.parametrize(("args", "message"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_wrong_arguments(model, place, nothing_is_read, args, message):
    before = files(place)
    check_refused(commands.call(generate, model, "--cache", place / "cache", "--prompt", "abc", *args), message)
    assert files(place) == before


PROMPT_FILES = {
    "empty": (b"", "holds no prompt"),
    "blank": (b"\n\r\n\n", "holds no prompt"),
    "latin_1": ("na\xefve".encode("latin-1"), "p: not UTF-8: invalid continuation byte at byte 2"),
    "too_many": (b"a\n" * 129, "129 prompts are more than the 128 that one run takes"),
}


@pytest.mark.parametrize(("data", "message"), PROMPT_FILES.values(), ids=PROMPT_FILES.keys())
def test_wrong_prompt_files(model, place, nothing_is_read, data, message):
    (place / "p").write_bytes(data)
    check_refused(run(model, place / "cache", "--prompt-file", "p"), message)


def test_other_wrong_prompts(model, place, nothing_is_read, monkeypatch):
    cache = place / "cache"
    check_refused(run(model, cache, "--prompt", ""), "the prompt is empty")
    check_refused(run(model, cache, "--prompt", "caf\udce9"), "can't encode 'caf\\udce9'")  # how Python holds an argument that is not UTF-8
    check_refused(run(model, cache, stdin=b""), "standard input: holds no prompt")
    check_refused(run(model, cache, stdin=b"\xff"), "standard input: not UTF-8")
    check_refused(run(model, cache, "--prompt-file", "nowhere"), "nowhere: No such file or directory")
    check_refused(run(model, cache, "--prompt-file", "folder.json"), "folder.json: Is a directory")

    def forbidden(path, encoding):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", forbidden)
    check_refused(run(model, cache, "--prompt-file", "prompts.txt"), "prompts.txt: Permission denied")
    assert not cache.exists()


def edit(name: str, **changes):
    """Changes fields of a JSON file of the folder; ... removes one."""

    def damage(hf):
        found = json.loads((hf / name).read_text()) | changes
        (hf / name).write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))

    return damage


def cut_shard(hf):
    path = hf / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def reshape(hf):
    tensors = hf_folders.random_tensors(CONFIG)
    tensors["model.norm.weight"] = np.zeros(17, np.float32)
    hf_folders.write_folder(hf, CONFIG, tensors, shards=2)


def write(name: str, text: str):
    return lambda hf: (hf / name).write_text(text)


FOLDERS = {
    "no_folder": (shutil.rmtree, [], "hf: no such folder"),
    "no_config": (lambda hf: (hf / "config.json").unlink(), [], "hf: neither a Hugging Face folder (no config.json) nor"),
    "damaged_config": (write("config.json", "{"), [], "config.json: damaged"),
    "unknown_model_type": (edit("config.json", model_type="gpt9"), [], "unknown model_type 'gpt9'"),
    "unknown_field": (edit("config.json", secret_gate=1), [], "'secret_gate'"),
    "field_of_another_type": (edit("config.json", hidden_size="16"), [], "hidden_size = '16' must be a positive integer"),
    "missing_shard": (lambda hf: (hf / "model-00002-of-00002.safetensors").unlink(), [], "model-00002-of-00002.safetensors: missing"),
    "truncated": (cut_shard, [], "model-00002-of-00002.safetensors: truncated"),
    "wrong_shape": (reshape, [], "tensor model.norm.weight has shape [17], the config needs [16]"),
    "no_tokenizer": (lambda hf: (hf / "tokenizer.json").unlink(), [], "hf/tokenizer.json"),
    "damaged_tokenizer": (write("tokenizer.json", "{"), [], "tokenizer.json is damaged"),
    "special_token_of_another_type": (edit("tokenizer_config.json", bos_token={"id": 0}), [], "bos_token"),
    "no_template": (edit("tokenizer_config.json", chat_template=...), ["--chat"], "has no chat template"),
    "damaged_template": (edit("tokenizer_config.json", chat_template="{% if"), ["--chat"], "chat template of"),
    "failing_template": (edit("tokenizer_config.json", chat_template="{{ messages + 1 }}"), ["--chat"], "chat template of"),
    "template_of_another_type": (edit("tokenizer_config.json", chat_template=3), [], "chat_template"),
    "too_many_end_tokens": (edit("generation_config.json", eos_token_id=list(range(9))), [], "9 end-of-text ids"),
    "prompt_too_long": (lambda hf: None, ["--prompt", "a" * 64], "prompt 0 has 65 tokens and max_new_tokens is 12: 77 positions, but the model"),
    "prompt_that_leaves_no_room": (lambda hf: None, ["--max-new-tokens", "63"], "65 positions"),
    "tokenizer_of_another_model": (
        lambda hf: letter_tokenizer([*PIECES, *(f"[{i}]" for i in range(9)), "é"]).save(str(hf / "tokenizer.json")),
        ["--prompt", "é"],
        "holds the id 39, outside the vocabulary of 37",
    ),
}


@pytest.mark.parametrize(("damage", "args", "message"), FOLDERS.values(), ids=FOLDERS.keys())
def test_wrong_model_folders(place, damage, args, message):
    """Where the model itself was fine, its conversion stays in the cache, whole; otherwise nothing does."""
    damage(write_model(place / "hf", shards=2))
    before, cache = files(place), place / "cache"
    prompt = [] if "--prompt" in args else ["--prompt", "a"]
    check_refused(run(Path("hf"), cache, "--json", "out.json", *prompt, *args), message)
    for folder in cache.glob("converted/*"):
        open_checkpoint(folder).verify()
    assert {name: data for name, data in files(place).items() if not name.startswith("cache")} == before
    assert not [name for name in files(place) if name.endswith((".partial", ".tmp"))]


def test_other_wrong_folders(model, place):
    (place / "empty").mkdir()
    check_refused(run(Path("empty"), place / "cache", "--prompt", "a"), "empty: neither a Hugging Face folder")
    check_refused(run(Path("prompts.txt"), place / "cache", "--prompt", "a"), "prompts.txt: no such folder")
    check_refused(run(model, place / "prompts.txt", "--prompt", "a"), "prompts.txt")  # a file where the cache should be
    check_refused(run(model, Path("/proc/jaxmoe"), "--prompt", "a"), "/proc/jaxmoe")
    convert(model, place / "out")
    (place / "out" / "experts.1.up" / "2.0.3").unlink()
    check_refused(run(place / "out", place / "cache", "--prompt", "a"), "leaf experts.1.up is damaged")


def test_device_that_is_not_there(model, place, nothing_is_read, monkeypatch):
    def missing():
        raise RuntimeError("Unable to initialize backend 'cuda':\n no GPU was found")

    monkeypatch.setattr(jax, "default_backend", missing)
    check_refused(run(model, place / "cache", "--prompt", "a"), "backend 'cuda': no GPU was found")


@pytest.mark.parametrize("args", [["--no-such-flag"], ["--top-k", "many"], ["--max-new-tokens"]])
def test_arguments_that_cannot_be_read(model, args):
    assert commands.call(generate, model, "--prompt", "a", *args).code == 2


# --- runs that are stopped --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(FULL_DISK, 2, "error: {cache}/converted/"), (KeyboardInterrupt(), 130, "interrupted\n")],
    ids=["full_disk", "interrupt"],
)
def test_conversion_that_is_stopped(model, greedy, place, monkeypatch, error, code, message):
    """What was converted is named as unfinished; the next run goes on from there."""
    cache, real, writes = place / "cache", store.write_chunk, []

    def stop(*args):
        writes.append(args)
        if len(writes) == 20:
            raise error
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_chunk", stop)
        done = run(model, cache, "--prompt", "the quick fox", "--json", "out.json")
    assert (done.code, done.out) == (code, "") and done.err.startswith(message.format(cache=cache)) and done.err.count("\n") == 1
    if code == 2:
        assert "the disk is full" in done.err
    [left] = (cache / "converted").iterdir()
    assert left.name.endswith(".partial") and not (place / "out.json").exists()
    check_refused(run(left, cache, "--prompt", "a"), "an unfinished conversion")
    done = run(model, cache, "--prompt", "the quick fox", "--json", "out.json")
    assert results(done, place / "out.json") == [greedy]
    assert [folder.name for folder in (cache / "converted").iterdir()] == [left.name.removesuffix(".partial")]


@pytest.mark.parametrize("before", [None, "an older file"])
def test_disk_that_is_full_when_the_json_is_written(model, cache, place, monkeypatch, before):
    if before is not None:
        (place / "out.json").write_text(before)
    there = files(place)

    def full(fd):
        raise FULL_DISK

    monkeypatch.setattr(os, "fsync", full)
    done = run(model, cache, "--prompt", "abc", "--json", "out.json")
    assert done.code == 2 and len(done.out) > 1  # the text was shown before
    assert done.err.splitlines()[-1].startswith("error: ") and "No space left on device" in done.err
    assert files(place) == there


def test_interrupt_while_it_generates(model, cache, place, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "_decode_all", interrupt)
    there = files(place)
    done = run(model, cache, "--prompt", "abc", "--json", "out.json")
    assert done.code == 130 and done.err == "interrupted\n"
    assert files(place) == there
