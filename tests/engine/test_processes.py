"""Processes with a device each give the tokens of one device; when one of them is lost, the others end with an error, soon."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxmoe.engine.processes import Group
from tests.engine import mesh_process
from tests.more import more

ROOT = Path(mesh_process.__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return mesh_process.tokens(mesh_process.small_model())


@pytest.mark.parametrize(("count", "split"), [(4, "data=2,expert=2"), more(2, "expert=2")])
def test_processes_give_the_tokens_of_one_and_end_when_one_is_lost(expected, tmp_path, count, split):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    outs, logs = ([tmp_path / f"{i}.{kind}" for i in range(count)] for kind in ("json", "log"))
    command = [sys.executable, mesh_process.__file__, address, str(count)]
    running = []
    for i in range(count):
        with open(logs[i], "w") as log:
            own = [*command, str(i), split, str(outs[i])]
            running.append(subprocess.Popen(own, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
    try:
        assert running[-1].wait(timeout=240) == 9, logs[-1].read_text()[-2000:]
        lost = time.monotonic()
        codes = [process.wait(timeout=60) for process in running[:-1]]
        seconds = time.monotonic() - lost
    finally:
        for process in running:
            process.kill()
    for out in outs:
        assert json.loads(out.read_text()) == expected
    for code, log in zip(codes, logs, strict=False):
        said = log.read_text()
        assert code != 0, said[-2000:]
        assert "has lost another one" in said or "another task died" in said, said[-2000:]
    assert seconds < 30, "they end within seconds of the loss"


@pytest.mark.parametrize(
    "fields, message",
    [
        (("localhost", 2, 0), "coordinator 'localhost': give HOST:PORT"),
        (("localhost:1234", None, 0), "needs the number of processes"),
        (("localhost:1234", 2, 2), "process 2 of 2: they count from 0 to 1"),
        (("auto", 2, 0), "'auto' asks the cluster"),
    ],
)
def test_a_group_that_can_not_be(fields, message):
    with pytest.raises(ValueError, match=message):
        Group(*fields)
