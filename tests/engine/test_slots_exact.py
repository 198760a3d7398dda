"""A model whose experts live in host memory gives the bits of one whose experts are all on the device.

First the model that comes with the project, over a thousand decode steps in the default setting with a quarter of its experts on the device; then
few combinations that hold every pair of model, dtype, batch, budget, staging, policy and mode. Empty slots and used staging slots hold NaN.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import numpy as np
import pytest

from checkpoints.load import Checkpoint, load_hf_or_checkpoint
from jaxmoe.cache.contiguous import init_kv
from jaxmoe.engine import steps
from jaxmoe.engine.model import Model, Offload, load_model
from pallas_kernels.dispatch import Kernels
from tests.engine.test_invariance import SHIPPED, bits
from tests.models import committed, decode_logits, random_model, slot_model

STEPS = 1000
LENGTHS = (64, 64, 40, 64, 17, 64, 64, 5)
"""Sequences of a batch of 8; rows become padding as the shorter ones end."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return load_hf_or_checkpoint(SHIPPED, tmp_path_factory.mktemp("converted"))


def stepper(model: Model, positions: int) -> Callable:
    """`(token, position) -> logits [V]` of one sequence, and the state that it goes on with, in `stepper.state`."""
    step = steps.logits_step(model.spec, model.kernels)

    def call(token: int, position: int) -> np.ndarray:
        batch = steps.decode_batch(*(np.array([x], np.int32) for x in (0, token, position)), np.array([True]))
        logits, call.state = step(model.params, model.bank, call.state, batch)
        return np.asarray(logits)[0]

    layers = init_kv(model.spec, 1, positions, steps.run_length(steps.TOKEN_BUCKETS[-1]))
    call.state = committed(steps.EngineState(layers, model.bank.init_state()))
    return call


def test_a_thousand_steps_in_the_default_setting(checkpoint):
    """Tokens are drawn from the logits, so that the text does not run in circles."""
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


FACTORS = {
    "model": ("shipped", "qwen3_moe", "olmoe", "mixtral"),
    "dtype": ("float32", "bfloat16"),
    "batch": (1, 8),
    "budget": ("minimum", "half", "all"),
    "staging": (1, 3),
    "policy": ("lru", "lfu", "static"),
    "mode": ("fused",),
}
MODES: dict[str, Callable] = {"fused": decode_logits}
"""How a model is run for its logits, by mode: `(model, requests, batch) -> logits of each`."""


def pairs_of(choice: tuple) -> set:
    """Every two factors of a combination, with their values."""
    return set(itertools.combinations(enumerate(choice), 2))


def cover(factors: dict[str, tuple]) -> list[tuple]:
    """Few combinations of values, one a factor, that hold every pair of values of every two factors: greedily, the first best."""
    every = list(itertools.product(*factors.values()))
    left, chosen = set().union(*map(pairs_of, every)), []
    while left:
        chosen.append(max(every, key=lambda choice: len(pairs_of(choice) & left)))
        left -= pairs_of(chosen[-1])
    return chosen


COVER = cover(FACTORS)


def test_every_pair_is_held():
    for (a, some), (b, others) in itertools.combinations(enumerate(FACTORS.values()), 2):
        assert {(choice[a], choice[b]) for choice in COVER} == set(itertools.product(some, others))
    assert len(COVER) <= 14


def first_layers(model: Model, n: int) -> Model:
    """A model of stacked layers without its later ones."""
    (segment,) = model.spec.segments
    spec = dataclasses.replace(model.spec, segments=(dataclasses.replace(segment, repeats=n),))
    params, bank = jax.tree.map(lambda leaf: leaf[:n], (model.params["segments"], model.bank))
    return dataclasses.replace(model, spec=spec, params=model.params | {"segments": params}, bank=bank)


@pytest.fixture(scope="module")
def model_of(checkpoint) -> Callable[[str, str], Model]:
    """Resident models by (name, dtype), scanned over stacked layers: a program compiles in less time, and knows its layer only as it runs."""

    @functools.cache
    def make(name: str, dtype: str) -> Model:
        if name == "shipped":
            return first_layers(load_model(checkpoint, dtype, Kernels("cpu"), unroll=False), 2)
        return random_model(name, dtype, unroll=False)

    return make


def requests_of(model: Model) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, model.spec.vocab, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def resident_logits(model_of) -> Callable[[str, str], list[np.ndarray]]:
    """Of all requests side by side; that a request alone has the same bits is tested in `test_invariance.py`."""
    return functools.cache(lambda name, dtype: decode_logits(model_of(name, dtype), requests_of(model_of(name, dtype)), len(LENGTHS)))


def slots_of(model: Model, budget: str) -> int:
    router, _ = model.spec.moe
    return {"minimum": router.active, "half": router.experts // 2, "all": router.experts}[budget]


@pytest.mark.parametrize(tuple(FACTORS), COVER)
def test_a_pairwise_cover(model_of, resident_logits, model, dtype, batch, budget, staging, policy, mode):
    resident = model_of(model, dtype)
    offloaded = slot_model(resident, slots_of(resident, budget), staging, policy)
    got = MODES[mode](offloaded, requests_of(resident)[:batch], batch)
    for i, (ours, expected) in enumerate(zip(got, resident_logits(model, dtype), strict=False)):
        differ = (bits(ours) != bits(expected)).any(axis=1)
        assert not differ.any(), f"request {i} differs at steps {np.flatnonzero(differ).tolist()}"
