"""`python scripts/serve.py` as a user would run it: a server in a process of its own, its clients in this one; and what it refuses."""

import asyncio
import json
import math
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import openai
import pytest
from safetensors.numpy import load_file

from checkpoints.load import load_hf_or_checkpoint, read_spec
from jaxmoe.engine.serving import build
from jaxmoe.engine.serving.paths import RequestPaths
from jaxmoe.offload.super_experts import Criterion, pinned_experts
from jaxmoe.report.serve_storm import Target, storm
from pallas_kernels.dispatch import Kernels
from tests.checkpoints import hf_folders
from tests.quick import environment
from tests.scripts.commands import call, load

ROOT = Path(__file__).resolve().parents[2]
KEY = "a-key"
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "tags"],
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
                   "tags": {"type": "array", "maxItems": 3, "items": {"enum": ["a", "b", "c"]}}},
}  # fmt: skip


def first_layers(folder: Path, n: int) -> Path:
    """The shipped model without its later layers, which are of the same shapes: it starts in a quarter of the time."""
    shipped = ROOT / "checkpoints" / "default"
    config = json.loads((shipped / "config.json").read_text()) | {"num_hidden_layers": n}
    later = [f"model.layers.{i}." for i in range(n, 8)]
    tensors = {name: value for name, value in load_file(shipped / "model.safetensors").items() if not name.startswith(tuple(later))}
    small = {name: (shipped / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")}
    return hf_folders.write_folder(folder, config, tensors, files=small)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with a quarter of the experts on the device; (its URL, its process)."""
    log = tmp_path_factory.mktemp("serve") / "log"
    model = first_layers(log.parent / "default", 2)
    command = [sys.executable, ROOT / "scripts" / "serve.py", model, "--expert-memory", "26%", "--max-num-seqs", 4, "--max-model-len", 256,
               "--wave-tokens", 128, "--layer-groups", 2, "--schedule-policy", "expert-aware", "--expert-regret", "--port", 0, "--api-key", KEY,
               "--cache", log.parent, "--log-interval", 0, "--drain-seconds", 20]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen([str(part) for part in command], stderr=out, stdout=out, cwd=ROOT, env=environment())
    url = None
    try:
        for _ in range(3000):
            found = [line.split()[-1] for line in log.read_text().splitlines() if line.startswith("default at http")]
            if found:
                url = found[0]
                break
            assert process.poll() is None, log.read_text()
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                pass
        assert url is not None, log.read_text()
        yield url, process
    finally:
        process.kill()
        process.wait()


def metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = [line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_the_official_client_and_curl_stream_the_same_text(server):
    url, _ = server
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY)
    asked = {"model": "default", "prompt": "And it came to pass, that", "max_tokens": 12, "temperature": 0.7, "seed": 3}
    whole = client.completions.create(**asked)
    assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length" and whole.choices[0].text
    streamed = "".join(part.choices[0].text for part in client.completions.create(**asked, stream=True))
    body = json.dumps(asked | {"stream": True})
    curl = shutil.which("curl")
    assert curl is not None, "this test needs curl"
    lines = subprocess.run(
        [curl, "-sN", f"{url}/v1/completions", "-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json", "-d", body],
        capture_output=True, check=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    assert streamed == whole.choices[0].text == "".join(json.loads(part)["choices"][0]["text"] for part in data[:-1])


def test_constrained_answers_all_parse(server, exhaustive):
    url, _ = server
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY)
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    for seed in range(0, 32 if exhaustive else 16, 16):
        answer = client.completions.create(model="default", prompt="A person: ", max_tokens=100, temperature=1.0, seed=seed, n=16,
                                           extra_body={"response_format": schema})  # fmt: skip
        for choice in answer.choices:
            found = json.loads(choice.text)
            assert choice.finish_reason == "stop" and sorted(found) == ["age", "name", "tags"] and 0 <= found["age"] <= 150
            assert len(found["name"]) <= 12 and set(found["tags"]) <= {"a", "b", "c"}


def test_a_storm_leaves_nothing_behind(server, exhaustive):
    url, process = server
    report = asyncio.run(storm(Target(url, "default", 256, KEY), clients=32, requests=200 if exhaustive else 80, seed=1, most_tokens=12))
    assert report.problems == []
    found = metrics(url)
    assert found['jaxmoe:kv_pages{state="held"}'] == 0 and found["jaxmoe:num_requests_running"] == 0
    assert found["jaxmoe:xla_compiles_after_warmup_total"] == 0 and found["jaxmoe:engine_errors_total"] == 0
    assert found["jaxmoe:expert_loads_total"] > 0 and found["jaxmoe:expert_best_loads_total"] > 0 and process.poll() is None


def test_it_drains_and_ends_well(server):
    """The last of the file: an answer that has begun is finished after SIGTERM, and the process ends with 0."""
    url, process = server
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY)
    stream = client.completions.create(model="default", prompt="And", max_tokens=60, stream=True, extra_body={"ignore_eos": True})
    first = next(iter(stream))
    process.send_signal(signal.SIGTERM)
    text = first.choices[0].text + "".join(part.choices[0].text for part in stream)
    assert len(text) > 60 and process.wait(30) == 0


@pytest.mark.parametrize("wrong,says", [
    (("--memory", "20MB"), "20,000,000 bytes .*smallest that works"), (("--memory", "much"), "much"), (("--page-size", 48), "48"),
    (("--layer-groups", 99), "99"), (("--max-num-seqs", 0), "0"), (("--wave-tokens", 5), "5"), (("--kv-memory", "1kB"), "1"),
    (("--host", "0.0.0.0"), "0.0.0.0.*key"), (("--link-gbps", -1), "-1"), (("--link-gbps", 1), "host-driven"), (("--expert-policy", "best"), "best"),
    (("--expert-slots", 8, "--expert-memory", "25%"), "8.*25%"), (("--max-num-batched-tokens", 8), "8"), (("--port", 70000), "70000"),
    (("--expert-mode", "host-driven"), "host-driven"), (("--dtype", "float8"), "float8"), (("--max-model-len", 0), "0"),
    (("--schedule-policy", "expert-aware"), "goes by experts.*all experts are on"), (("--expert-regret",), "regret.*all experts are on"),
    (("--decode-group", "greedy"), "greedy.*max-decode-seqs"), (("--preempt-margin", -1), "margin of -1"),
    (("--max-decode-seqs", 17), "17"),
])  # fmt: skip
def test_a_users_error_is_one_line(wrong, says):
    import re

    done = call(load("serve"), "--dry-run-memory", *wrong)
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1 and re.search(says, done.err), done.err
    assert ("KV pages" in done.out) == ("20MB" in wrong), "where a budget is too small, what it would go to is shown"


def test_what_memory_comes_to_is_printed_and_adds_up(tmp_path):
    how = ("--memory", "80MB", "--max-model-len", 512, "--host-kv-memory", 0, "--cache", tmp_path)
    done = call(load("serve"), "--dry-run-memory", *how)
    assert done.code == 0 and "KV pages" in done.out and "expert staging" in done.out and "tokens at a time" in done.out
    assert "put aside" not in done.out
    assert not list(tmp_path.iterdir()), "nothing was converted"


def test_a_plan_says_how_many_sequences_how_long_and_how_many_experts(tmp_path):
    plan, serve, path = load("plan"), load("serve"), tmp_path / "plan.json"
    how = ("--rows", 3, "--prompt", 200, "--new", 56, "--memory", "30MB", "--out", path)
    made = call(plan, ROOT / "checkpoints" / "default", "--hardware", "h100:1", *how)
    assert made.code == 0, made.err
    work = json.loads(path.read_text())["workload"]
    assert 4 <= work["slots"] < 32 and work["dtype"] == "bfloat16"
    done = call(serve, "--dry-run-memory", "--plan", path, "--host-kv-memory", 0, "--cache", tmp_path / "cache")
    assert done.code == 0, done.err
    assert f"{work['slots']} of 32 experts in each of 8 layers" in done.out and "of 256, the longest" in done.out and "of at most 3" in done.out
    done = call(serve, "--dry-run-memory", "--plan", path, "--max-num-seqs", 4)
    assert done.code == 2 and "brings its own --max-num-seqs: leave out 4" in done.err
    assert call(plan, ROOT / "checkpoints" / "default", "--hardware", "h100:2", "--split", "data=2", "--rows", 4, "--out", path).code == 0
    done = call(serve, "--dry-run-memory", "--plan", path)
    assert done.code == 2 and "a plan for 2 devices (data=2), and serving is for one" in done.err and done.err.count("\n") == 1, done.err


def test_options_reach_the_engine(tmp_path):
    serve = load("serve")
    how = {"expert_memory": "26%", "max_num_seqs": 6, "max_model_len": 256, "layer_groups": 4, "wave_tokens": 128}
    more = {"schedule_policy": "expert-aware", "preempt_margin": 5.0, "max_decode_seqs": 2, "decode_group": "greedy", "expert_regret": True}
    spec, kernels = read_spec(serve.DEFAULT_MODEL).with_precision("float32"), Kernels("cpu")
    checkpoint = load_hf_or_checkpoint(serve.DEFAULT_MODEL, tmp_path)
    pinned = pinned_experts(spec, "m", np.eye(8, 32, dtype=np.float32), Criterion(0.9, 0.1))
    (tmp_path / "pinned.json").write_text(pinned.to_json())
    more["pin_experts"] = tmp_path / "pinned.json"
    made = {}
    for name, options in (("plain", how), ("all", how | more)):
        plan = build.make_serving_plan(serve.asked(serve.Arguments(**options)), spec, kernels)
        made[name] = build.load_serving(plan, checkpoint, kernels, None, dtype="float32")
    engine = made["all"]
    assert (engine.policy.margin, engine.policy.group, engine.policy.objective) == (5.0, "greedy", "expert-aware")
    assert (engine.spec.batch, engine.spec.slots) == (2, 6) and engine.runner.record and engine.runner.regret is not None
    assert isinstance(engine._paths, RequestPaths)
    assert len(pinned.pinned) == 8 and np.array_equal(engine.runner.model.bank.knowledge.pinned, pinned.mask)
    plain = made["plain"]
    assert plain.spec.batch == 6 and not plain.runner.record and plain.runner.regret is None and plain._paths is None
    assert plain.policy.margin == math.inf and plain.policy.group is None and plain.runner.model.bank.knowledge.pinned is None
    many = np.zeros((8, 32), np.float32)
    many[0, :9] = 1
    (tmp_path / "pinned.json").write_text(pinned_experts(spec, "m", many, Criterion(0.9, 0.1)).to_json())
    with pytest.raises(ValueError, match="pinned.json: 9 experts are pinned in 8 slots of layer 0"):
        build.make_serving_plan(serve.asked(serve.Arguments(**how | more)), spec, kernels)
