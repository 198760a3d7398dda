"""Tokens that go on from where their experts were give the bits of one device, and cross the links once for each MoE layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.cache.batch import join_batches
from jaxmoe.cache.layers import init_layers
from jaxmoe.engine import coherent, steps
from jaxmoe.engine.mesh import Devices, first_state, place_bank, place_params
from jaxmoe.spec import ModelSpec
from sharding.hlo import collectives
from sharding.split import Split, SplitError, layout_of
from tests import models

CONFIG = models.CONFIGS["qwen3_moe"] | {"num_experts_per_tok": 1, "mlp_only_layers": [0]}
ROWS, POSITIONS, STEPS = 5, 128, 4


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.CONFIGS, "one_active", CONFIG)
        return models.random_model("one_active", unroll=False)


def coherent_devices(spec: ModelSpec, split: Split) -> Devices:
    layout = layout_of(spec, split)
    return Devices(dataclasses.replace(layout, batch=tuple(axis for axis in layout.batch if axis != "expert")), split.mesh())


def decoded(model, on: Devices | None, tokens: np.ndarray):
    """Logits [STEPS, ROWS, V] of sequences that begin empty, the fourth of which has ended and the last of which is padding; and the last state."""
    live = np.asarray([True, True, True, False, True])
    if on is None:
        state = steps.committed(steps.EngineState(init_layers(model.spec, ROWS, POSITIONS, 64), ()))
        params, bank, step, mesh = model.params, model.bank, steps.logits_step(model.spec, model.kernels), False
    else:
        state = first_state(model.spec, on, lambda spec: init_layers(spec, ROWS, POSITIONS, 64), model.bank.init_state, steps.EngineState)()
        params, bank = place_params(model.spec, on, model.params), place_bank(on, model.bank)
        step, mesh = steps.logits_step(model.spec, model.kernels, on), True
    out = []
    for at in range(STEPS):
        batch = jax.tree.map(np.asarray, steps.decode_batch(np.arange(ROWS, dtype=np.int32), tokens[at], np.full(ROWS, at, np.int32), live))
        logits, state = step(params, bank, state, join_batches([batch], mesh))
        out.append(np.asarray(logits)[live])
    return np.stack(out), state


TOKENS = np.random.default_rng(0).integers(0, 96, (STEPS, ROWS)).astype(np.int32)


def test_decoding_has_the_bits_of_one_device_and_so_have_the_caches_of_every_device(model):
    on = coherent_devices(model.spec, Split(expert=4, exchange="coherent"))
    alone, at_home = decoded(model, None, TOKENS)
    moved, travelled = decoded(model, on, TOKENS)
    assert np.isfinite(alone).all() and (alone == moved).all()
    rows = np.asarray([0, 1, 2, 4])
    for there, here in zip(jax.tree.leaves(travelled.layers), jax.tree.leaves(at_home.layers), strict=True):
        length = [axis for axis, size in enumerate(here.shape) if axis > 2 and size == here.shape[-2:][axis - 3] and size >= POSITIONS]
        for shard in there.addressable_shards:
            a, b = (np.take(np.asarray(t)[:, rows], np.arange(STEPS), axis=length[0]) for t in (shard.data, here))
            assert (a == b).all() and a.any()


def test_one_all_to_all_for_each_moe_layer_and_one_all_gather_a_step(model):
    on = coherent_devices(model.spec, Split(expert=4, exchange="coherent"))
    text = compiled_text(model, on)
    found = collectives(text)
    assert sum(c.times for c in found if c.kind == "all-to-all") == len(model.spec.moe_layers)
    assert {c.bytes for c in found if c.kind == "all-to-all"} == {4 * ROWS * (model.spec.width + 3) * 4}
    assert len([c for c in found if c.kind == "all-gather"]) == 1
    assert {c.kind for c in found} <= {"all-to-all", "all-gather", "all-reduce"}
    assert sum(c.bytes for c in found if c.kind == "all-reduce") <= 4  # how many rows the fullest device has


def compiled_text(model, on: Devices) -> str:
    state = first_state(model.spec, on, lambda spec: init_layers(spec, ROWS, POSITIONS, 64), model.bank.init_state, steps.EngineState)()
    row = np.arange(ROWS, dtype=np.int32)
    batch = jax.tree.map(np.asarray, steps.decode_batch(row, row, row * 0, row >= 0))
    params, bank = place_params(model.spec, on, model.params), place_bank(on, model.bank)
    step = steps.logits_step(model.spec, model.kernels, on)
    return step.lower(params, bank, state, join_batches([batch], True)).compile().as_text()


def test_rows_are_gathered_however_unevenly_they_lie():
    layout = dataclasses.replace(layout_of(ModelSpec.from_hf(CONFIG), Split(expert=4)), batch=())
    rows = np.random.default_rng(1).integers(0, 2**16, (70, 3)).astype(np.uint16)

    def one(owner):
        mine = owner == jax.lax.axis_index("expert")
        return coherent.gather_rows(jnp.where(mine[:, None], rows, 0), mine, layout)[None]

    by = jax.sharding.PartitionSpec
    f = jax.jit(jax.shard_map(one, mesh=layout.split.mesh(), in_specs=by(), out_specs=by("expert"), check_vma=False))
    for owner in (np.zeros(70, int), np.arange(70) % 5, np.full(70, 9)):
        assert (np.asarray(f(owner)) == np.where((owner < 4)[:, None], rows, 0)).all()


def test_models_whose_tokens_carry_more_are_refused(model):
    layout = coherent_devices(model.spec, Split(expert=4, exchange="coherent")).layout
    state = dataclasses.replace(init_layers(model.spec, 2, POSITIONS, 64), states=(object(),))
    with pytest.raises(SplitError, match="delta-rule layers.*choose 'tokens'"):
        coherent._check(model.spec, state, layout)
    with pytest.raises(SplitError, match="positions split"):
        coherent._check(model.spec, init_layers(model.spec, 2, POSITIONS, 64), dataclasses.replace(layout, sequence=("sequence",)))
    with pytest.raises(SplitError, match="sequences split over the experts' devices"):
        coherent._check(model.spec, init_layers(model.spec, 2, POSITIONS, 64), dataclasses.replace(layout, batch=("expert",)))
