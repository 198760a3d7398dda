"""On the CPU, a decode step with experts in host memory keeps its pools where they are, needs little beside them, and is compiled once."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from checkpoints.load import load_hf_or_checkpoint
from jaxmoe.cache.layers import init_layers
from jaxmoe.decode.sampling import sampling_params
from jaxmoe.engine import steps
from jaxmoe.engine.model import Model, Offload, load_model, slot_bank
from jaxmoe.experts import host_store
from jaxmoe.formats import compute_dtype, leaf_dtype
from jaxmoe.spec import ModelSpec
from pallas_kernels.dispatch import ROW_SLACK, Kernels
from tests.engine.test_invariance import SHIPPED
from tests.engine.test_no_recompile import Compilations

STEPS, POSITIONS = 100, 128


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    """The model that ships, with a quarter of its experts on the device."""
    return load_model(load_hf_or_checkpoint(SHIPPED, tmp_path_factory.mktemp("shipped")), "float32", Kernels("cpu"), offload=Offload(slots=8))


@pytest.fixture
def compilations():
    listener = Compilations()
    jax.monitoring.register_event_duration_secs_listener(listener)
    yield listener
    jax.monitoring.unregister_event_duration_listener(listener)


def nbytes(tree) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def first_state(model: Model) -> steps.EngineState:
    """Bound to the device, as steps return it: a step would else compile twice."""
    state = steps.EngineState(init_layers(model.spec, 1, POSITIONS, steps.run_length(32)), model.bank.init_state())
    return jax.device_put(state, jax.devices()[0])


def arguments(tokens, position: int):
    """What a step takes after the state, for one token of one row."""
    row, one = np.zeros(1, np.int32), np.ones(1, np.int32)
    return row, tokens, row + position, one, np.full(steps.EOS_SLOTS, -2, np.int32), sampling_params(1)


def test_a_step_needs_little_beside_the_pools(model):
    state, step = first_state(model), steps.decode_step(model.spec, model.kernels, greedy=True)
    program = step.lower(model.params, model.bank.split()[0], state, *arguments(np.ones(1, np.int32), 0)).compile()
    stats = program.memory_analysis()
    assert stats.alias_size_in_bytes >= nbytes(state)
    assert stats.temp_size_in_bytes <= 3 * host_store.record_bytes(model.spec)
    assert "callback" not in program.as_text()


@pytest.mark.parametrize("rows", [1, 8])
def test_the_bank_needs_little_beside_the_pools(rows):
    """Alone: logits of many rows are large beside these experts, and XLA's CPU backend widens bfloat16 weights. Eight rows need waves."""
    dtype = "bfloat16"
    spec = ModelSpec.from_hf(json.loads((SHIPPED / "config.json").read_text())).with_precision(dtype)
    layers, router = len(spec.moe_layers), spec.moe[0]
    record, held = host_store.record_shape(spec), leaf_dtype(dtype)
    store = jax.ShapeDtypeStruct((layers * router.experts, *record), held, sharding=SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"))
    bank = dataclasses.replace(slot_bank(spec, None, Offload(slots=8)), store=store)
    state = jax.eval_shape(lambda: bank.init_state())

    def run(fixed, state, x, ids, weights):
        bank = fixed.join(state)
        for layer in range(3):  # as many as it takes for layers to hand the pools on
            chosen = ids[layer] ^ jnp.signbit(x[:, :1])  # by what the layer before has computed, as a router chooses
            y, bank, _ = bank.expert_ffn(layer, x, chosen, weights, np.ones(rows, bool), Kernels("cpu"))
            x = x + y
        return x, bank.split()[1]

    x = jax.ShapeDtypeStruct((rows, spec.width), compute_dtype(dtype))
    ids = jax.ShapeDtypeStruct((layers, rows, router.active), np.int32)
    weights = jax.ShapeDtypeStruct((rows, router.active), np.float32)
    stats = jax.jit(run, donate_argnums=1).lower(bank, state, x, ids, weights).compile().memory_analysis()
    assert stats.alias_size_in_bytes >= nbytes(state)
    # What goes into the experts and what comes out of them, beside experts that are no larger.
    ends = 2 * (rows * router.active + ROW_SLACK) * spec.width * 4 if rows > 1 else 0
    assert stats.temp_size_in_bytes <= 3 * host_store.record_bytes(spec) + ends


def test_the_pools_stay_where_they_are(model, compilations):
    """Over a hundred steps, of which the first alone compiles."""
    state, tokens = first_state(model), np.ones(1, np.int32)
    step = steps.decode_step(model.spec, model.kernels, greedy=True)
    fixed, where = model.bank.split()[0], [leaf.unsafe_buffer_pointer() for leaf in state.bank.pools]
    for position in range(STEPS):
        out, state = step(model.params, fixed, state, *arguments(tokens, position))[:2]
        assert [leaf.unsafe_buffer_pointer() for leaf in state.bank.pools] == where, f"step {position}"
        if position == 0:
            compilations.take()
        tokens = np.array(out)[0]
    assert compilations.take() == []
    loads, requests, hits = (np.asarray(x) for x in (state.bank.loads, state.bank.requests, state.bank.hits))
    assert requests.tolist() == [STEPS * model.spec.moe[0].active] * len(requests)
    np.testing.assert_array_equal(loads, requests - hits)
    assert (loads > model.bank.slots[0]).all(), "slots have been taken over"
