"""The command line of scripts/place.py: what it prints and writes, and how it refuses."""

import json

import numpy as np
import pytest

from jaxmoe.offload.trace import load, save
from sharding.placement import Placement, Replicas
from tests.offload import traces
from tests.scripts import commands

place = commands.load("place")


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.npz"
    save(path, traces.random_trace(0, prompt=9, decode=9, layers=3, experts=6, active=2))
    return path


@pytest.mark.parametrize("method", ["moetuner", "exflow", "combined", "eplb"])
def test_a_placement_is_printed_and_written(small, tmp_path, method):
    out = tmp_path / "p.json"
    done = commands.call(place, small, "--devices", 3, "--method", method, "--seconds", 1, "--out", out)
    assert done.code == 0, done.err
    for words in ("judged on what it is made from", "made from first half", "contiguous", "random", method, "proven to be at least", "p.json"):
        assert words in done.out
    made = (Replicas if method == "eplb" else Placement).from_json(out.read_text())
    assert (made.layers, made.experts, made.devices) == (3, 6, 3)
    assert made.meta == {"model": "random", "method": method, "tokens": len(load(small).ids)}
    if method == "eplb":
        assert made.slots == 9


def test_nodes_and_copies(small, tmp_path):
    done = commands.call(place, small, "--devices", 6, "--method", "moetuner", "--per-node", 3, "--seconds", 0.2)
    assert done.code == 0 and "groups' traffic" in done.out, done.err
    out = tmp_path / "p.json"
    done = commands.call(place, small, "--devices", 2, "--method", "eplb", "--extra", 4, "--out", out)
    assert done.code == 0 and np.shape(json.loads(out.read_text())["expert_of"]) == (3, 10), done.err


@pytest.mark.parametrize(
    "args, says",
    [
        (("--devices", 4), "devices = 4 doesn't divide the model's 6 experts: choose one of 1, 2, 3, 6"),
        (("--devices", 2, "--extra", 2), "only the method 'eplb' makes copies"),
        (("--devices", 2, "--method", "eplb", "--extra", 3), "6 + 3 slots don't divide among 2 devices: choose 4"),
        (("--devices", 2, "--method", "eplb", "--per-node", 2), "--per-node is for moetuner"),
        (("--devices", 2, "--method", "exflow", "--slack", 0.1), "--slack is for combined, not for exflow"),
        (("--devices", 2, "--slack", -1), "slack = -1"),
        (("--devices", 6, "--per-node", 4), "per_node = 4 doesn't divide 6 devices"),
        (("--devices", 2, "--seconds", -1), "seconds = -1"),
        (("--devices", 2, "--out", "p.txt"), "goes to a .json file"),
    ],
)
def test_wrong_arguments_are_one_line(small, args, says):
    done = commands.call(place, small, *args)
    assert done.code == 2 and done.err.startswith("error: ") and says in done.err and done.err.count("\n") == 1
