"""One of several processes that run a small model together; a program.

    python mesh_process.py COORDINATOR PROCESSES PROCESS SPLIT OUT.json

It writes the tokens that it got, and goes on generating until one of the processes, the last, ends itself in the middle.
"""

import json
import os
import sys
import threading
from pathlib import Path

from jaxmoe.engine import processes
from jaxmoe.engine.generate import Engine, Request
from jaxmoe.report.command import run_command

REQUESTS = [Request(tuple(range(3, 3 + n)), 12) for n in (9, 20, 5)]


def small_model():
    from tests.models import random_model
    from tests.quick import QuickKernels  # compiles something, which has to wait until processes have joined

    return random_model("olmoe", kernels=QuickKernels("reference"), unroll=False)


def tokens(model) -> list[list[int]]:
    return [r.ids for r in Engine(model, len(REQUESTS), 64, True).generate(REQUESTS)[0]]


def run(coordinator: str, count: int, index: int, split: str, out: Path) -> None:
    processes.join(processes.Group(coordinator, count, index))
    from tests.mesh_models import on_split

    model = on_split(small_model(), split)
    with processes.together():
        out.write_text(json.dumps(tokens(model)))
        if index == count - 1:
            threading.Timer(1.0, lambda: os._exit(9)).start()
        for _ in range(1000):
            tokens(model)


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))))
