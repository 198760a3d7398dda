"""Every residency policy leaves every bit of the logits as it is, in prompt and decode steps.

One sequence of tokens goes through all of them, so that what they ask for is known beforehand: to policies that need a future, a profile or patterns.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxmoe.cache.batch import make_batch
from jaxmoe.cache.layers import init_layers
from jaxmoe.decode.sampling import sampling_params
from jaxmoe.engine import steps
from jaxmoe.engine.host_driven import HostDriven
from jaxmoe.engine.model import Model
from jaxmoe.experts.source import ExpertSource
from jaxmoe.offload.knowledge import knowledge
from jaxmoe.offload.trace import DECODE, PROMPT, Trace, TraceBuilder, model_meta, used_steps
from jaxmoe.residency import POLICIES
from jaxmoe.residency.policy import FORESEEN
from tests.models import random_model, slot_model
from tests.quick import QuickKernels

PROMPT_TOKENS, DECODED, ROWS = 6, 12, 2
SLOTS = (3, 2)
DRIVEN = ("arc", "hobbit", "plec", "opt")
"""Also with the host sending experts: one policy of every kind (slots of its own, a pool, foresight, bypass); resolving is the same code in both."""


@functools.cache
def resident() -> Model:
    return random_model("qwen3_moe", kernels=QuickKernels("cpu"))


def batches() -> list:
    """A prompt in one step, then tokens one by one, all of one shape; steps that are single tokens are in tests/experts."""
    tokens = np.random.default_rng(3).integers(0, resident().spec.vocab, PROMPT_TOKENS + DECODED).tolist()
    cuts = [(0, PROMPT_TOKENS), *((at, at + 1) for at in range(PROMPT_TOKENS, len(tokens)))]
    return [make_batch([(0, start, tokens[start:stop])], 8, 8, n_logits=ROWS) for start, stop in cuts]


def run(model: Model, step) -> tuple[list[np.ndarray], steps.EngineState]:
    """Logits of every batch, and the state after them; `step` is `(state, batch) -> (logits, state)`."""
    state = steps.committed(steps.EngineState(init_layers(model.spec, ROWS, 64, 64), model.bank.init_state()))
    out = []
    for batch in batches():
        logits, state = step(state, batch)
        out.append(np.asarray(logits)[:1])
    return out, state


def run_fused(model: Model):
    step = steps.logits_step(model.spec, model.kernels)
    return run(model, lambda state, batch: step(model.params, model.bank, state, batch))


def run_host_driven(model: Model, record: bool = False):
    """Programs that don't depend on the policy are compiled once."""
    source = ExpertSource(model.spec, np.asarray(model.bank.store))
    bank = dataclasses.replace(model.bank, store=None)
    runner = HostDriven(model.spec, bank, model.kernels, True, source, record=record)
    for name, program in common().items():
        setattr(runner.programs, name, program)
    seen = []

    def step(state, batch):
        _, logits, state, routed = runner.step(committed_params(), state, batch, sampling_params(ROWS), np.zeros(ROWS, np.int32))
        seen.append(routed)
        return logits, state

    return *run(dataclasses.replace(model, bank=bank), step), seen


@functools.cache
def common() -> dict:
    model = slot_model(resident(), SLOTS)
    programs = HostDriven(model.spec, dataclasses.replace(model.bank, store=None), model.kernels, True, None).programs
    return {name: getattr(programs, name) for name in ("hits", "land", "begin", "tail")}


@functools.cache
def committed_params():
    return steps.committed(resident().params)


@functools.cache
def expected() -> list[np.ndarray]:
    """The resident model's logits."""
    return run_fused(resident())[0]


@functools.cache
def recorded() -> Trace:
    """What the run asks for."""
    _, _, seen = run_host_driven(slot_model(resident(), SLOTS, policy="lru"), record=True)
    builder = TraceBuilder(model_meta(resident().spec, "a test", "random"))
    for batch, (ids, weights) in zip(batches(), seen, strict=True):
        live = np.asarray(batch.segments) >= 0
        phase = PROMPT if live.sum() > 1 else DECODE
        builder.add(np.asarray(ids)[live], np.asarray(weights)[live], np.asarray(batch.tokens)[live], np.zeros(live.sum(), int), phase)
    return builder.build()


def same_bits(got: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    for step, (one, other) in enumerate(zip(got, wanted, strict=True)):
        assert np.isfinite(other).all() and (one.view(np.uint32) == other.view(np.uint32)).all(), f"step {step} differs"


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_gives_the_resident_models_bits(name):
    trace, policy = recorded(), POLICIES[name]
    model = slot_model(resident(), SLOTS, staging=1, policy=name, knowledge=knowledge(trace, policy, horizon=2))
    fused, state = run_fused(model)
    same_bits(fused, expected())
    states = [state]
    if name in DRIVEN:
        driven, other, _ = run_host_driven(model)
        same_bits(driven, expected())
        states.append(other)
    counts = [jax.tree.map(np.asarray, s.bank) for s in states]
    for field in ("slot_of_expert", "requests", "hits", "loads"):
        np.testing.assert_array_equal(getattr(counts[0], field), getattr(counts[-1], field), err_msg=field)
    assert counts[0].tables.keys() == counts[-1].tables.keys() and (FORESEEN in counts[0].tables) == policy.foresees
    used, _ = used_steps(trace)
    asked = used[:PROMPT_TOKENS].any(0).sum(1) + used[PROMPT_TOKENS:].sum((0, 2))
    assert counts[0].requests.tolist() == asked.tolist()
    np.testing.assert_array_equal(counts[0].loads, counts[0].requests - counts[0].hits)
    assert 0 < counts[0].hits.sum() < counts[0].requests.sum()
