"""Programs with different exchanges run over the same arrays, each step by the one that suits it."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxmoe.cache.layers import init_layers
from jaxmoe.decode.sampling import sampling_params
from jaxmoe.engine import mesh, steps
from jaxmoe.engine.switching import Switching, by_table, by_traffic, with_exchange
from sharding.split import Split, SplitError
from tests.models import CONFIGS, random_model


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "small", CONFIGS["mixtral"] | {"num_hidden_layers": 1})
        return random_model("small", unroll=False)


def test_a_switch_changes_no_bit_and_moves_no_array(model):
    spec, rows = model.spec, 4
    on = mesh.devices_for(spec, Split(expert=2))
    params, bank = mesh.place_params(spec, on, model.params), mesh.place_bank(on, model.bank)

    def run(programs, sizes):
        """Each size with as many tokens of every sequence as a call gives."""
        state = mesh.first_state(spec, on, lambda own: init_layers(own, rows, 128, 64), bank.init_state, steps.EngineState)()
        tokens, seen, places = np.arange(2 * rows, dtype=np.int32), [], []
        for call, live in enumerate(sizes):
            at = np.full(2 * rows, call * steps.CHUNK, np.int32)
            budget = np.where(np.arange(2 * rows) % rows < live, steps.CHUNK, 0).astype(np.int32)
            before = [x.sharding for x in jax.tree.leaves(state)]
            own = np.tile(np.arange(rows, dtype=np.int32), 2)
            with jax.transfer_guard_device_to_device("disallow"):
                out, state, _ = programs.decode(
                    params, bank, state, own, tokens, at, budget, np.full(steps.EOS_SLOTS, -2, np.int32), sampling_params(2 * rows)
                )
            out = np.asarray(out)
            assert all(x.sharding == b for x, b in zip(jax.tree.leaves(state), before, strict=True))
            seen.append(out)
            tokens = np.where(out[-1] >= 0, out[-1], tokens)
            places.append([x.unsafe_buffer_pointer() for x in (s.data for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards)])
        return np.stack(seen), places

    turns = iter(["tokens", "gather", "tokens"])
    switching = Switching(spec, model.kernels, True, on, lambda tokens: next(turns))
    switched, places = run(switching, (4, 4, 3))
    straight, _ = run(steps.Fused(spec, model.kernels, True, on=on), (4, 4, 3))
    assert (switched == straight).all() and (switched[:, :, 0] >= 0).all() and len(np.unique(switched)) > 8
    assert switching.used == {"tokens": 2, "gather": 1}
    assert places[0] == places[1] == places[2]


def test_exchanges_lay_out_all_arrays_alike(model):
    on = mesh.devices_for(model.spec, Split(data=2, expert=2, tensor=2))
    for exchange in ("tokens", "gather", "weights"):
        other = with_exchange(on, exchange)
        assert other.layout.split.exchange == exchange and other.mesh is on.mesh
        assert mesh.params_partition(model.spec, other.layout, model.params) == mesh.params_partition(model.spec, on.layout, model.params)
        assert mesh.bank_partition(other.layout, model.bank) == mesh.bank_partition(on.layout, model.bank)
        assert dataclasses.replace(other.layout, split=on.layout.split) == on.layout


def test_what_cannot_be_switched_is_refused(model):
    for split, exchange, message in (
        (Split(expert=2), "coherent", "exchange = 'coherent' over the arrays of 'tokens': choose among tokens, gather, weights"),
        (Split(expert=2), "post", "exchange = 'post'"),
        (Split(expert=2, attention="tensor"), "gather", "has no exchange, it needs expert > 1 and attention = data"),
        (Split(data=2), "gather", "has no exchange"),
    ):
        with pytest.raises(SplitError, match=message):
            with_exchange(mesh.devices_for(model.spec, split), exchange)
    with pytest.raises(ValueError, match="a table of exchanges is empty"):
        by_table({})


def test_picks():
    pick = by_table({8: "gather", 128: "tokens"})
    assert [pick(n) for n in (1, 8, 9, 128, 4096)] == ["gather", "gather", "tokens", "tokens", "tokens"]


def test_the_closed_form_picks_for_a_model(model):
    pick = by_traffic(model.spec, mesh.devices_for(model.spec, Split(expert=4)), model.kernels)
    assert pick(1) in ("tokens", "gather") and pick(1 << 14) == "weights"  # 4 small experts against many tokens
