"""Sequences that carry more than keys and values, or less, are put aside and taken up again: latents without values, and a delta rule's states.

About 20 seconds, most of them compiling.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jaxmoe.engine.generate import Engine, Request, Sampling
from jaxmoe.engine.serving.core import ServingEngine
from jaxmoe.engine.serving.requests import ServeRequest
from jaxmoe.engine.serving.runner import Runner
from jaxmoe.engine.serving.scheduler import Objective, Policy
from jaxmoe.engine.serving.types import ServeSpec
from jaxmoe.spec import DeltaSpec
from tests.engine.serving import small
from tests.families import goldens
from tests.quick import QuickKernels

SPEC = ServeSpec(slots=3, page=16, pages=12, positions=96, batch=3, chunk=32, wave=32, groups=1, burst=2, run=16, host_pages=40, move=4)


@pytest.mark.parametrize("case", ["deepseek_v2_greedy", "qwen3_next_named"])
def test_swaps_and_cancels_lose_and_change_no_token(case, tmp_path):
    goldens.forget_programs()
    model = goldens.make_run(case, Path(tmp_path)).load("float32", QuickKernels("cpu"), False)
    delta = any(isinstance(kind, DeltaSpec) for kind in model.spec.state_kinds)
    spec, vocab, rng = dataclasses.replace(SPEC, sharing=not delta), model.spec.vocab, np.random.default_rng(0)
    asked = [
        Request(tuple(rng.integers(0, vocab, int(rng.integers(3, 30))).tolist()), int(rng.integers(8, 40)), Sampling(0.8 * (i % 2), seed=i))
        for i in range(14)
    ]
    plain = Engine(model, 1, SPEC.positions, False)
    expected = [plain.generate([request])[0][0].ids for request in asked]
    minds = [Policy(prefill="layered", objective=Objective(priority=sign), margin=0.5) for sign in (1.0, -1.0)]
    engine, gone = ServingEngine(Runner(model, spec), None, (), minds[0]), {5, 9}
    for i, request in enumerate(asked):
        engine.submit(ServeRequest(request.prompt_ids, request.max_new_tokens, request.sampling, priority=int(rng.integers(0, 4)) + i % 3))
    got: dict = {}
    for step in range(10_000):
        if engine.idle:
            break
        engine.policy = minds[step // 2 % 2]
        if step == 6:
            engine.cancel(gone)
        small.take(got, engine.step())
        engine.state.check()
    for i, ids in enumerate(expected):
        assert list(got[i][0]) == (ids[: len(got[i][0])] if i in gone else ids), i
        assert got[i][1] == ("abort" if i in gone else "length")
    assert engine.errors == 0 and engine.state.counters.swaps >= 10, engine.state.counters
    assert engine.state.pool.held == 0 and engine.state.host.held == 0 and engine.runner.host.bytes_in > 0
