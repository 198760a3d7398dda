"""scripts/generate.py on several devices: one run with its record, and what it refuses."""

import json

import pytest

from jaxmoe.engine import processes, steps
from jaxmoe.report import opening, record
from sharding.placement import contiguous
from tests.checkpoints import hf_folders
from tests.quick import QuickKernels
from tests.scripts import commands
from tests.scripts.test_generate_cli import BOS, PIECES, letter_tokenizer

generate = commands.load("generate")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a model with eight experts a layer."""
    config = hf_folders.CONFIGS["olmoe"] | {"num_experts": 8}
    files = {
        "tokenizer.json": letter_tokenizer().to_str(),
        "tokenizer_config.json": json.dumps({"bos_token": BOS}),
        "generation_config.json": json.dumps({"eos_token_id": []}),
    }
    return hf_folders.write_folder(tmp_path_factory.mktemp("mesh") / "hf", config, hf_folders.random_tensors(config), files=files)


def test_a_run_on_four_devices(model, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "measure_memory_bandwidth", lambda seconds, bytes: 12.5)
    monkeypatch.setattr(steps, "TOKEN_BUCKETS", steps.TOKEN_BUCKETS[:1])
    monkeypatch.setattr(opening, "find_kernels", lambda fast, pallas: QuickKernels("cpu"))
    (tmp_path / "prompts").write_text("the quick\nfox\njumps\n")
    files = ("--prompt-file", tmp_path / "prompts", "--json", tmp_path / "out.json", "--cache", tmp_path / "cache")
    done = commands.call(generate, model, *files, "--max-new-tokens", 6, "--split", "data=2,expert=2")
    assert done.code == 0, done.err
    made = json.loads((tmp_path / "out.json").read_text())
    assert (made["split"], made["devices"]) == ("data=2,expert=2,attention=data,exchange=tokens", 4) and "slots" not in made
    assert set(made["device_bytes"]) == {"params", "experts", "kv"} and made["device_bytes"] == made["bytes"]
    assert made["device_bytes"]["experts"] == 2 * 8 * 3 * 16 * 24 * 4 // 2, "two layers, eight experts, three matrices, float32; half of them"
    assert [len(r["ids"]) for r in made["requests"]] == [6] * 3
    assert made["requests"][1]["prompt_ids"] == [PIECES.index(piece) for piece in [BOS, *"fox"]]
    assert made["counters"]["decode_tokens"] == 15 and made["settings"]["requests"] == 3
    assert "4 devices (data=2,expert=2,attention=data,exchange=tokens); each holds params" in done.err
    for request in made["requests"]:
        assert request["text"] in done.out
    again = commands.call(generate, model, *files, "--max-new-tokens", 6, "--split", "data=2,expert=2", "--switch-exchange")
    assert again.code == 0 and again.out == done.out, again.err
    used = json.loads((tmp_path / "out.json").read_text())["exchanges"]
    assert sum(used.values()) >= 2 and set(used) <= {"tokens", "gather", "weights"} and "steps by exchange: " in again.err


@pytest.mark.parametrize(
    "args, says",
    [
        (("--split", "data=two"), "data = 'two' in the split 'data=two' is not a whole number"),
        (("--split", "datas=2"), "'datas=2' in the split 'datas=2': choose from data="),
        (("--split", "data=2,data=2"), "data is given twice"),
        (("--split", "data=64"), "data=64 takes 64 devices, there are 8"),
        (("--split", "expert=3"), "expert = 3 doesn't divide the model's 8 experts"),
        (("--switch-exchange",), "give --split or --plan too"),
        (("--split", "data=2", "--switch-exchange"), "has no exchange, it needs expert > 1"),
        (("--split", "expert=2,exchange=mail"), "exchange = 'mail': choose from tokens"),
        (("--split", "expert=2", "--expert-memory", "75%", "--link-gbps", 3), "link_gbps = 3.0 is for experts on one device"),
        (("--split", "expert=2", "--expert-policy", "lru"), "--expert-policy is for streamed experts"),
        (("--split", "expert=2", "--plan", "PLAN"), "leave out --split and --expert-memory"),
        (("--placement", "PLACEMENT"), "give --split or --plan too"),
        (("--split", "expert=4", "--placement", "PLACEMENT"), "for 2 devices"),
        (("--plan", "PLACEMENT"), "not a plan: format = 'jaxmoe-placement'"),
        (("--plan", "nowhere.json"), "nowhere.json: No such file"),
        (("--processes", 2, "--split", "data=2"), "--processes and --process are for runs of several processes: give --coordinator"),
        (("--process", 0), "give --coordinator HOST:PORT too"),
        (("--coordinator", "localhost:1234", "--processes", 2, "--process", 0), "--coordinator localhost:1234: say how the model is split"),
        (("--coordinator", "localhost", "--processes", 2, "--process", 0, "--split", "data=2"), "coordinator 'localhost': give HOST:PORT"),
        (("--coordinator", "a:1", "--processes", 2, "--process", 2, "--split", "data=2"), "process 2 of 2: they count from 0 to 1"),
    ],
)
def test_refusals_are_one_line(model, tmp_path, monkeypatch, args, says):
    monkeypatch.setattr(processes, "join", lambda group: pytest.fail("nothing is to be joined"))
    (tmp_path / "placement.json").write_text(contiguous(2, 8, 2).to_json())
    files = {"PLACEMENT": tmp_path / "placement.json", "PLAN": tmp_path / "plan.json"}
    done = commands.call(generate, model, "--prompt", "abc", "--max-new-tokens", 6, "--cache", tmp_path, *(files.get(arg, arg) for arg in args))
    assert done.code == 2 and done.out == "" and done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert says in done.err
