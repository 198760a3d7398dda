"""Exports and reshardings that are killed: their output is whole or not there, and the next run makes it."""

import shutil

import pytest

from checkpoints.commit import partial_of
from checkpoints.convert import convert
from tests.checkpoints import faults, hf_folders
from tests.checkpoints.faults import Fault

ACTS = {"export": "checkpoints.export:export_checkpoint", "reshard": "checkpoints.reshard:reshard"}
POINTS, MANY = 4, 8
"""Between the first and the last calls, and with `--exhaustive`."""


def tree_bytes(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def server():
    with faults.Server("checkpoints.export", "checkpoints.reshard") as server:
        yield server


@pytest.mark.parametrize("act", ACTS)
def test_killed_and_begun_again(tmp_path, server, act, exhaustive):
    hf = hf_folders.tiny(tmp_path / "hf", "olmoe", "bfloat16", shards=2, num_hidden_layers=1)
    convert(hf, tmp_path / "in")
    source, out = tree_bytes(tmp_path / "in"), tmp_path / "out"
    straight = server.run(ACTS[act], [tmp_path / "in", tmp_path / "straight"], below=tmp_path)
    assert straight.outcome == "returned", straight.output
    wanted, total = tree_bytes(tmp_path / "straight"), len(straight.calls)
    assert total > 10
    points = MANY if exhaustive else POINTS
    for n in sorted({1, 2, *(3 + (total - 6) * i // points for i in range(points)), *range(total - 3, total + 1)}):
        run = server.run(ACTS[act], [tmp_path / "in", out], below=tmp_path, fault=Fault(n))
        where = f"killed at call {n} of {total}: {run.calls[-1:]}"
        assert run.outcome == "killed", where
        if out.exists():
            assert tree_bytes(out).items() >= wanted.items(), where
            shutil.rmtree(out)
        run = server.run(ACTS[act], [tmp_path / "in", out], below=tmp_path)
        assert run.outcome == "returned", where + run.output
        assert tree_bytes(out) == wanted and not partial_of(out).exists(), where
        shutil.rmtree(out)
    assert tree_bytes(tmp_path / "in") == source
