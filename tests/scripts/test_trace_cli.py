"""The command line of scripts/trace.py, which other tools rely on: what it takes, prints and writes, and how it refuses."""

import builtins
import json
import math

import pytest
import tokenizers

from checkpoints.load import read_spec
from jaxmoe.offload.trace import load, save
from jaxmoe.report import trace_report
from tests.checkpoints import hf_folders
from tests.offload import traces
from tests.offload.test_trace import CSV
from tests.scripts import commands

trace_script = commands.load("trace")


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.npz"
    save(path, traces.random_trace(0))
    return path


def test_import_writes_a_trace(tmp_path):
    source, out = tmp_path / "r.csv", tmp_path / "r.npz"
    source.write_text(CSV)
    done = commands.call(trace_script, "import", source, out)
    assert done.code == 0 and "Small-Q4, 2 layers of 8 experts, 2 tokens" in done.out, done.err
    assert load(out).experts == 8
    done = commands.call(trace_script, "replay", source, "--slots", 2, "--policy", "opt")
    assert done.code == 0, done.err


def test_replay_writes_its_json(small, tmp_path):
    out = tmp_path / "r.json"
    done = commands.call(trace_script, "replay", small, "--slots", 3, "--policy", "lru", "--json", out)
    assert done.code == 0 and "lru" in done.out and "by layer" in done.out, done.err
    made = json.loads(out.read_text())
    assert made["policy"] == "lru" and made["slots"] == 3 and made["warm"] is True
    assert made["hits"] + made["loads"] == made["requests"] and made["hit_rate"] == made["hits"] / made["requests"]
    assert made["opt_hit_rate"] >= made["hit_rate"] and 0 <= made["regret"] <= 1 and made["compulsory"] <= made["loads"]
    assert made["bytes"] == sum(row["bytes"] for row in made["by_layer"]) == sum(row["loads"] * (1000 + row["layer"]) for row in made["by_layer"])
    assert made["trace"]["model"] == "random" and made["versions"]["jax"]


def test_advise_writes_its_json(small, tmp_path):
    out = tmp_path / "a.json"
    done = commands.call(trace_script, "advise", small, "--slots", 4, "--link-gbps", 0.001, "--step-ms", 5, "--steps", 8, "--json", out)
    assert done.code == 0 and "tok/s foretold" in done.out and "of a layer's time to cross" in done.out, done.err
    made = json.loads(out.read_text())
    assert made["best"] in made["ways"] and made["slots"] == 4 and made["versions"]["jax"]
    done = commands.call(trace_script, "advise", small, "--slots", 4, "--link-gbps", 0.001, "--step-ms", 5, "--steps", 8, "--alone", "--json", out)
    assert done.code == 0 and json.loads(out.read_text())["best"]["tokens_per_second"] != made["best"]["tokens_per_second"], done.err
    done = commands.call(trace_script, "advise", small, "--link-gbps", 0.001, "--step-ms", 5, "--steps", 8, "--json", out)
    made = json.loads(out.read_text())
    assert done.code == 0 and [one["slots"] for one in made["sizes"]] == [3, 6, 9] and "generate.py --expert-memory" in done.out, done.err
    assert made["best"].items() <= next(one for one in made["sizes"] if one["slots"] == made["slots"]).items() and made["by_bits"] == {}


def test_advise_records_a_trace_and_times_the_model(tmp_path):
    folder, out = hf_folders.tiny(tmp_path / "hf", "olmoe", num_experts=8, vocab_size=96), tmp_path / "a.json"
    characters = {chr(ord(" ") + i): i for i in range(96)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(characters, unk_token=" ")).save(str(folder / "tokenizer.json"))
    own = ("--prompt", "a", "--max-new-tokens", 24, "--cache", tmp_path / "cache", "--link-gbps", 0.1)
    done = commands.call(trace_script, "advise", "--model", folder, *own, "--slots", 4, "--json", out)
    assert done.code == 0, done.err
    made, spec = json.loads(out.read_text()), read_spec(folder)
    assert "gate" in {way["predictor"] for way in made["ways"]} and made["by_bits"]["8"] and made["machine"]["link_gbps"] == 0.1
    assert 0 < made["machine"]["step_seconds"] < 1 and made["bytes"] == (4 * 2 + 2) * spec.with_precision("float32").expert_bytes()[0]


@pytest.mark.parametrize("args, what", [
    (("--link-gbps", 1, "--step-ms", 5), "give a trace, or --model to record one of"),
    (("SMALL", "--link-gbps", 1), "give --step-ms, or --model to measure it"),
    (("SMALL", "--step-ms", 1), "cross no link that could be measured: give --link-gbps"),
    (("SMALL", "--link-gbps", 1, "--step-ms", 5, "--slots", 4, "--expert-memory", "1GB"), "give either --slots or --expert-memory, or neither"),
    (("SMALL", "--link-gbps", 1, "--step-ms", 5, "--expert-memory", "auto"), "--expert-memory auto needs --model"),
    (("SMALL", "--link-gbps", 1, "--step-ms", 5, "--expert-memory", "banana"), "'banana' is not an amount of memory"),
    (("SMALL", "--link-gbps", 1, "--step-ms", 5, "--dtype", "float32"), "--dtype float32 goes with --model"),
    (("SMALL", "--link-gbps", 1, "--step-ms", 5, "--prompt", "a"), "--prompt a is for recording a trace"),
    (("SMALL", "--link-gbps", 1, "--model", trace_script.DEFAULT_MODEL), "small.npz: the trace is of"),
    (("--link-gbps", 1, "--model", trace_script.DEFAULT_MODEL), "give either --prompt or --prompt-file"),
    (("SMALL", "--link-gbps", 0, "--step-ms", 5), "link_gbps = 0.0: give a positive number"),
])  # fmt: skip
def test_advise_says_what_it_lacks(small, args, what):
    done = commands.call(trace_script, "advise", *(small if one == "SMALL" else one for one in args))
    assert done.code == 2 and what in done.err and done.err.strip().count("\n") == 0


def test_replay_looks_ahead(small, tmp_path):
    rates = {}
    for args in ((), ("--predictor", "oracle", "--horizon", 4)):
        out = tmp_path / "r.json"
        done = commands.call(trace_script, "replay", small, "--slots", 3, "--policy", "plec", *args, "--json", out)
        assert done.code == 0, done.err
        rates[len(args)] = json.loads(out.read_text())
    assert rates[0]["hit_rate"] < rates[4]["hit_rate"] <= rates[4]["opt_hit_rate"] == rates[0]["opt_hit_rate"]


def test_replay_takes_slots_by_layer_and_a_profile(small, tmp_path):
    out = tmp_path / "r.json"
    done = commands.call(trace_script, "replay", small, "--slots", 3, 5, "--policy", "static", "--profile", small, "--cold", "--json", out)
    assert done.code == 0, done.err
    made = json.loads(out.read_text())
    assert made["slots"] == [3, 5] and [row["slots"] for row in made["by_layer"]] == [3, 5] and made["prompt_loads"] == 0


def test_report_writes_json_and_plots(small, tmp_path):
    pytest.importorskip("matplotlib")
    out, folder = tmp_path / "r.json", tmp_path / "plots"
    done = commands.call(trace_script, "report", small, "--slots", 3, 6, "--json", out, "--plots", folder)
    assert done.code == 0 and "distinct experts" in done.out, done.err
    made = json.loads(out.read_text())
    assert made["format"] == "jaxmoe-trace-report" and made["slots"] == [3, 6]
    names = ("lru", "lfu", "static", "arc", "fate", "edgemoe", "hobbit", "opt")
    assert {(row["policy"], row["slots"]) for row in made["replays"]} == {(p, s) for p in names for s in (3, 6)}
    at = {count: rate for count, rate in zip(made["curve"]["slots"], made["curve"]["lru"], strict=True)}
    assert {row["slots"]: row["hit_rate"] for row in made["replays"] if row["policy"] == "lru"} == {3: at[3], 6: at[6]}
    assert all(math.isfinite(row["hindsight_hit_rate"]) and row["hindsight_hit_rate"] >= row["uniform_hit_rate"] for row in made["allocation"])
    assert sorted(path.stem for path in folder.iterdir()) == ["distinct", "hit_rate", "layers", "stack_distance"]
    assert all(path.stat().st_size > 5000 for path in folder.iterdir())


def test_plots_without_matplotlib_are_refused_before_the_run(small, tmp_path, monkeypatch):
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(trace_report, "report", lambda *args, **kwargs: pytest.fail("it ran"))
    done = commands.call(trace_script, "report", small, "--plots", tmp_path / "p")
    assert done.code == 2 and "jaxmoe[plot]" in done.err


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("replay", "SMALL", "--slots", 10), "10 slots in a layer of 9 experts"),
        (("replay", "SMALL", "--slots", 1, 2, 3), "3 numbers of slots for 2 layers"),
        (("replay", "SMALL", "--slots", 3, "--json", "FOLDER/r.txt"), "a record goes to a .json file"),
        (("replay", "SMALL", "--slots", 3, "--profile", "SMALL"), "--profile is for the static and eam policies and for predictors, not for lfu"),
        (("replay", "SMALL", "--slots", 3, "--predictor", "previous"), "--predictor is for plec and lookahead, not for lfu"),
        (("replay", "SMALL", "--slots", 3, "--policy", "eam"), "the eam policy goes by another trace of the model: give --profile"),
        (("replay", "FOLDER/none.npz", "--slots", 3), "none.npz: No such file"),
        (("report", "SMALL", "--slots", 12), "12 slots in a layer of 9 experts"),
        (("import", "SMALL", "FOLDER/x.npz"), "small.npz: "),
        (("import", "SMALL", "FOLDER/x.csv"), "a trace goes to a .npz file"),
        (("record", "--prompt", "a", "--out", "FOLDER/none/x.npz"), "there is no folder"),
        (("record", "--out", "FOLDER/x.npz"), "give either --prompt or --prompt-file"),
    ],
)
def test_wrong_arguments_are_one_line(small, tmp_path, args, reason):
    done = commands.call(trace_script, *(str(arg).replace("SMALL", str(small)).replace("FOLDER", str(tmp_path)) for arg in args))
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert reason in done.err


def test_replay_refuses_a_profile_of_another_model(small, tmp_path):
    other = tmp_path / "other.npz"
    save(other, traces.random_trace(0, experts=8))
    done = commands.call(trace_script, "replay", small, "--slots", 3, "--policy", "static", "--profile", other)
    assert done.code == 2 and "a trace of another model: its experts is 8, not 9" in done.err
