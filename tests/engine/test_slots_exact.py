"""The model that comes with the project gives the same bits with a quarter of its experts on the device, over a thousand steps; prompts do as well.

Other models, dtypes, batches and budgets are in `test_slots_cover.py`. Empty slots and used staging slots hold NaN.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from checkpoints.load import load_hf_or_checkpoint
from jaxmoe.cache.layers import init_layers
from jaxmoe.engine import steps
from jaxmoe.engine.model import Model, Offload, load_model
from jaxmoe.engine.steps import committed
from pallas_kernels.dispatch import Kernels
from tests.engine.test_invariance import SHIPPED, bits
from tests.models import prefill_logits, random_model, slot_model

STEPS = 1000


def stepper(model: Model, positions: int) -> Callable:
    """`(token, position) -> logits [V]` of one sequence, and the state that it goes on with, in `stepper.state`."""
    step = steps.logits_step(model.spec, model.kernels)

    def call(token: int, position: int) -> np.ndarray:
        batch = steps.decode_batch(*(np.array([x], np.int32) for x in (0, token, position)), np.array([True]))
        logits, call.state = step(model.params, model.bank, call.state, batch)
        return np.asarray(logits)[0]

    layers = init_layers(model.spec, 1, positions, steps.run_length(steps.TOKEN_BUCKETS[-1]))
    call.state = committed(steps.EngineState(layers, model.bank.init_state()))
    return call


def test_a_thousand_steps_in_the_default_setting(tmp_path):
    """Tokens are drawn from the logits, so that the text does not run in circles."""
    checkpoint = load_hf_or_checkpoint(SHIPPED, tmp_path)
    resident = load_model(checkpoint, "bfloat16", Kernels("cpu"))
    experts, layers = resident.spec.moe[0].experts, len(resident.spec.moe_layers)
    offloaded = load_model(checkpoint, "bfloat16", Kernels("cpu"), offload=Offload(experts // 4))
    offloaded = dataclasses.replace(offloaded, bank=dataclasses.replace(offloaded.bank, poison=True))
    assert (offloaded.bank.slots, offloaded.bank.staging, offloaded.bank.policy) == ((8,) * 8, 2, "lfu")
    one, other, noise = stepper(resident, 1024), stepper(offloaded, 1024), np.random.default_rng(0)
    token, seen = 1, set()
    for position in range(STEPS):
        expected, got = one(token, position), other(token, position)
        assert (bits(got) == bits(expected)).all(), f"step {position} differs"
        gumbel = noise.gumbel(size=expected.shape)
        token = int(np.argmax(expected + gumbel))
        assert token == int(np.argmax(got + gumbel))
        seen.add(token)
    state = other.state.bank
    requests, hits, loads = (np.asarray(x) for x in (state.requests, state.hits, state.loads))
    assert len(seen) > 100 and requests.tolist() == [STEPS * resident.spec.moe[0].active] * layers
    np.testing.assert_array_equal(loads, requests - hits)
    assert (hits > requests // 4).all() and (loads > STEPS // 10).all()


def test_prompts_in_several_cuts():
    """Prompts ask for all experts in every step, and leave others behind than single tokens do."""
    resident = random_model("olmoe", "bfloat16", unroll=False)
    requests = [np.random.default_rng(i).integers(0, resident.spec.vocab, n).tolist() for i, n in enumerate((70, 31, 64, 2))]
    schedule = [[(0, 0, 64), (1, 0, 31)], [(2, 0, 50), (0, 64, 70)], [(3, 0, 2), (2, 50, 64)]]
    offloaded = slot_model(resident, (3, 2), staging=1)
    for got, expected in zip(*(prefill_logits(model, requests, schedule, 128) for model in (offloaded, resident)), strict=True):
        np.testing.assert_array_equal(bits(got), bits(expected))
