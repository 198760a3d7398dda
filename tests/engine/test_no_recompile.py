"""After `Engine.warm_up`, generating compiles nothing: neither a step nor a small op on the host's side."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.engine import steps
from jaxmoe.engine.generate import Engine, Request, Sampling
from jaxmoe.engine.host_driven import HostDriven
from jaxmoe.engine.predicting import make_foresight
from jaxmoe.experts.source import ExpertSource
from jaxmoe.offload.prefetch import Prefetch, Switch
from jaxmoe.offload.staging import Counters
from tests.models import random_model, slot_model
from tests.quick import QuickKernels

COMPILED = "/jax/core/compile/backend_compile_duration"
"""What jax calls each compilation by the backend, of whole steps and of single ops alike."""

ROWS, LONGEST = 4, 300
LENGTHS = sorted(
    {1, 2, 16, 48, LONGEST - 1, LONGEST}
    | {edge + d for edge in (32, 64, 128, 256) for d in (-1, 0, 1)}  # of token buckets, runs and cache sizes
    | {80, 95, 96, 97, 110, 120, 140, 150, 159, 160, 161, 175, 191, 192, 193, 200, 210, 220, 230, 240, 270, 285}
)
"""Of prompts; a few at once also fill the largest token bucket."""

NEW_TOKENS = (1, 2, 7, steps.CHUNK, steps.CHUNK + 1, steps.CHUNK + 2, 2 * steps.CHUNK + 3)


class Compilations:
    """Names of what has been compiled; a listener."""

    def __init__(self):
        self.names: list[str] = []

    def __call__(self, event: str, seconds: float, **about) -> None:
        if event == COMPILED:
            self.names.append(str(about.get("fun_name")))

    def take(self) -> list[str]:
        """What has been compiled since the last call."""
        names, self.names = self.names, []
        return names


@pytest.fixture(scope="module")
def compilations():
    listener = Compilations()
    jax.monitoring.register_event_duration_secs_listener(listener)
    yield listener
    jax.monitoring.unregister_event_duration_listener(listener)


@pytest.fixture(scope="module")
def warm(compilations) -> tuple[Engine, list[str]]:
    """An engine that has been warmed up, and what that compiled."""
    model = random_model("mixtral", kernels=QuickKernels("cpu"))
    jax.clear_caches()  # what other tests have compiled would hide what warm-up forgets
    engine = Engine(model, ROWS, LONGEST + max(NEW_TOKENS), greedy=False, eos=(5,))
    compilations.take()
    engine.warm_up()
    return engine, compilations.take()


def batches(seed: int) -> list[list[Request]]:
    """Greedy and sampled requests of all lengths, one to `ROWS` at a time."""
    rng = random.Random(seed)
    rest = rng.sample(LENGTHS, len(LENGTHS))
    out = []
    while rest:
        n = min(1 + len(out) % ROWS, len(rest))
        out.append([random_request(rng, rest.pop()) for _ in range(n)])
    return out


def random_request(rng: random.Random, length: int) -> Request:
    how = Sampling(rng.choice((0.0, 0.7, 1)), rng.choice((0, 5)), rng.choice((1, 0.9)), rng.choice((0, 0.05)), rng.randrange(2**32))
    return Request(tuple(rng.choices(range(96), k=length)), rng.choice(NEW_TOKENS), how)


def test_the_listener_hears_compilations(compilations):
    compilations.take()
    jax.jit(lambda x: x * 3 + 1)(np.arange(5)).block_until_ready()
    assert len(compilations.take()) == 1
    jnp.arange(977) * 2  # on the host's side, op by op; a size that nothing else has
    assert compilations.take()


def test_warm_up_compiles_every_step(warm):
    engine, names = warm
    assert sum("prefill" in name for name in names) == len(engine.token_buckets()) == len(steps.TOKEN_BUCKETS)
    assert sum("decode" in name for name in names) == len(engine.row_buckets()) == sum(b <= ROWS for b in steps.ROW_BUCKETS)


def test_generating_compiles_nothing(warm, compilations):
    engine, _ = warm
    assert len(LENGTHS) == 40 and (LENGTHS[0], LENGTHS[-1]) == (1, LONGEST)
    reasons = set()
    compilations.take()
    for requests in batches(0):
        results, _ = engine.generate(requests)
        assert compilations.take() == [], f"by prompts of {[len(r.prompt_ids) for r in requests]} tokens"
        reasons |= {result.finish_reason for result in results}
    assert reasons == {"stop", "length"}


def test_warming_up_again_compiles_nothing(warm, compilations):
    """Nor does another engine of the same size for the same model."""
    engine, _ = warm
    compilations.take()
    engine.warm_up()
    Engine(engine.model, ROWS, LONGEST, greedy=False, eos=(7, 8)).warm_up()
    assert compilations.take() == []


def test_prefetching_turns_on_and_off_without_compiling(compilations):
    model = slot_model(random_model("qwen3_moe", kernels=QuickKernels("cpu")), 3)
    source, bank = ExpertSource(model.spec, np.asarray(model.bank.store)), dataclasses.replace(model.bank, store=None)
    programs = HostDriven(model.spec, bank, model.kernels, True, source, prefetch=Prefetch(4), foresight=make_foresight("gate", model.spec, 1))
    engine = Engine(dataclasses.replace(model, bank=bank), 1, 64, True, programs=programs)
    requests = [Request((5, 6, 7), 40)]
    engine.warm_up(requests=requests)
    assert programs.ahead.switch == Switch() and programs.ahead.counters == Counters()
    compilations.take()
    engine.generate(requests)
    assert compilations.take() == [] and programs.ahead.switch.gain is not None  # a trial came to its end
