"""Two processes with four devices each restore one folder together: bits, outputs, and what each of them reads."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from checkpoints.load import open_checkpoint
from checkpoints.orbax import open_orbax
from jaxmoe.spec import ModelSpec
from tests.checkpoints import restore_process
from tests.checkpoints.restore_process import WIDE, logits, restore, write
from tests.quick import environment

TOLERANCE = 2e-5
PROCESSES = 2

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(folder) -> list[dict]:
    """What each process wrote."""
    checkpoint = write(folder, WIDE)
    leaves = restore(checkpoint, None)
    np.savez(folder / "whole.npz", logits=logits(checkpoint.spec, leaves), **{path: np.asarray(leaf) for path, leaf in leaves.items()})
    root = Path(restore_process.__file__).resolve().parents[2]
    env = {**environment("--xla_force_host_platform_device_count=4"), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, restore_process.__file__, str(checkpoint.folder), str(folder / "whole.npz"), address, str(PROCESSES)]
    outs = [folder / f"{i}.json" for i in range(PROCESSES)]
    logs = [open(folder / f"{i}.log", "w+") for i in range(PROCESSES)]
    running = [
        subprocess.Popen([*command, str(i), str(out)], env=env, cwd=root, stdout=log, stderr=subprocess.STDOUT)
        for i, (out, log) in enumerate(zip(outs, logs, strict=True))
    ]
    try:
        codes = [process.wait(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
        for log in logs:
            log.seek(0)
        said = [log.read()[-3000:] for log in logs]
        for log in logs:
            log.close()
    assert codes == [0] * PROCESSES, "\n".join(said)
    return [json.loads(out.read_text()) for out in outs]


def test_every_slice_has_the_right_bits(found):
    """Three ways to split, four devices each, and every leaf and both arrays of the bank on each."""
    assert [one["shards"] for one in found] == [3 * 4 * (found[0]["leaves"] + 2)] * PROCESSES


def test_outputs_are_those_of_one_device(found):
    for one in found:
        assert set(one["logits"]) == {"aligned", "not aligned"} and all(0 <= worst <= TOLERANCE for worst in one["logits"].values()), one["logits"]


@pytest.mark.parametrize("name", ["aligned", "hidden over processes", "not aligned"])
def test_bytes_are_counted_right(found, name):
    """By the file driver's own count to the byte, and by the operating system's, which has all else that a process reads."""
    for one in found:
        counts = one["counts"][name]
        assert counts["read"] == counts["driver"] and counts["owned"] == counts["held"]
        assert counts["read"] <= counts["system"] <= 1.02 * counts["read"] + 8192, counts
        assert counts["ratio"] == counts["read"] / counts["owned"]


@pytest.mark.parametrize("name", ["aligned", "hidden over processes"])
def test_each_process_reads_what_it_owns(found, name):
    for one in found:
        assert 1 <= one["counts"][name]["ratio"] <= 1.05


def test_a_split_across_chunks_is_reported(found):
    """Half of every row: whole chunks are read for it."""
    for one in found:
        assert 1.5 < one["counts"]["not aligned"]["ratio"] < 2.2


def test_stock_orbax_restores_it_in_both_processes(found):
    assert [one["stock_shards"] for one in found] == [4 * found[0]["leaves"]] * PROCESSES


def test_what_stock_orbax_saved_from_both_processes_is_read_here(found, folder):
    save, ours = open_orbax(folder / "stock", ModelSpec.from_hf(WIDE)), open_checkpoint(folder / "out")
    for path in ours.manifest.leaves:
        np.testing.assert_array_equal(save.read(path), ours.read(path), err_msg=path)
