"""The command line of scripts/train.py that makes predictors: what it writes is what replay takes, and how it refuses."""

import json

import pytest

from jaxmoe.offload.trace import save
from jaxmoe.train import path_predictor
from tests.offload import traces
from tests.scripts import commands

train, trace_script = commands.load("train"), commands.load("trace")


def test_a_trained_predictor_feeds_a_replay(tmp_path):
    trace, out = traces.random_trace(0), tmp_path / "p.npz"
    save(tmp_path / "t.npz", trace)
    done = commands.call(train, "predictor", tmp_path, "--out", out, "--kind", "readme", "--steps", 3)
    assert done.code == 0 and f"readme predictor of random, trained on {len(trace.ids):,} tokens" in done.out, done.err
    assert path_predictor.load(out, trace.meta).kind == "readme"
    hits = []
    for more in (("--predictor", "readme", "--predictor-file", out), ()):
        result = tmp_path / "r.json"
        done = commands.call(trace_script, "replay", tmp_path / "t.npz", "--slots", 3, "--policy", "lookahead", *more, "--json", result)
        assert done.code == 0, done.err
        hits.append(json.loads(result.read_text())["hits"])
    assert hits[0] != hits[1]  # what it foretells decides


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("predictor", "EMPTY", "--out", "p.npz"), "no traces there"),
        (("predictor", "QWEN", "--out", "p.npz"), "the trace holds no token ids"),
        (("predictor", "QWEN", "--out", "p.npz", "--steps", 0), "steps = 0: give at least 1"),
        (("predictor", "QWEN", "--out", "p.txt"), "p.txt"),
        (("pregate", "EMPTY", "EMPTY", "out"), "no Hugging Face folder: it has no config.json"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": tmp_path / "empty", "QWEN": traces.DATA / f"{traces.QWEN}.npz"}
    done = commands.call(train, *(places.get(arg, arg) for arg in args))
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
