"""Exchanges between devices' tokens and experts give what a plain loop gives, bit for bit, whatever is asked for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmoe.engine.mesh import bank_spec
from jaxmoe.engine.model import Offload, slot_bank
from jaxmoe.experts import ResidentBank, SlotBank
from jaxmoe.experts.exchange import exchange_tokens, gather_sums, gather_tokens, own_experts, send_weights
from jaxmoe.experts.placed import PlacedBank, permute_bank, placed_bank
from jaxmoe.experts.sharded import ShardedBank
from sharding.exchange_cost import Shape, traffic
from sharding.hlo import collectives
from sharding.split import Split, SplitError
from tests.experts.exchange_cases import CPU, Scales, expected, meeting, met, same_bits
from tests.models import random_model, records_of


def routings(devices: int, tokens: int, active: int, experts: int):
    """Ids [n, T, A] and valid [n, T]: at random with padding, all to one device's experts, none at all, and one device that has all tokens."""
    r = np.random.default_rng(tokens)
    ids = np.stack([[r.permutation(experts)[:active] for _ in range(tokens)] for _ in range(devices)]).astype(np.int32)
    last = np.broadcast_to(experts - 1 - np.arange(active, dtype=np.int32), ids.shape)
    yield ids, r.random((devices, tokens)) > 0.3
    yield last, np.ones((devices, tokens), bool)
    yield ids, np.zeros((devices, tokens), bool)
    yield ids, np.arange(devices)[:, None] == np.full((1, tokens), devices - 1)


def inputs(devices: int, tokens: int, experts: int, dtype):
    """Numbers [L, E] of the experts, and activations [n, T, D] with zeros of either sign."""
    r = np.random.default_rng(devices)
    x = r.standard_normal((devices, tokens, 6)).astype(dtype)
    x[:, :, :2] = [0.0, -0.0]
    return r.standard_normal((2, experts)).astype(np.float32), x


WAYS = [
    (functools.partial(exchange_tokens, how="whole"), 2, 1, 3, np.float32),
    (functools.partial(exchange_tokens, how="ragged"), 4, 5, 3, ml_dtypes.bfloat16),
    (functools.partial(exchange_tokens, how="rounds"), 8, 24, 3, np.float32),
    (gather_tokens, 8, 5, 2, np.float32),
    (gather_tokens, 2, 7, 1, ml_dtypes.bfloat16),
]


@pytest.mark.parametrize(("exchange", "devices", "tokens", "active", "dtype"), WAYS)
def test_each_token_gets_its_results_with_the_bits_of_a_plain_loop(exchange, devices, tokens, active, dtype):
    w, x = inputs(devices, tokens, 16, dtype)
    step = met(exchange, devices, 16)
    for ids, valid in routings(devices, tokens, active, 16):
        y, calls = step(w, x, ids, valid)
        assert same_bits(y, expected(w, x, ids, valid))
        if getattr(exchange, "keywords", {}).get("how") == "rounds":  # as many as the fullest pair of devices needs, on all devices
            pairs = max(np.sum((ids[d] // 2 == e) & valid[d][:, None]) for d in range(8) for e in range(8))
            seen = max(np.sum(((ids[d] // 2 == e) & valid[d][:, None]).any(1)) for d in range(8) for e in range(8))
            assert set(np.asarray(calls).tolist()) == {max(1, -(-pairs // 16), -(-seen // 16))}
    sends_what_is_counted(
        exchange, collectives(step.lower(w, x, ids, valid).compile().as_text()), Shape(tokens, active, 16, devices, 6, 1, x.itemsize, "cpu")
    )


def sends_what_is_counted(exchange, found, shape: Shape):
    """Two collectives for each round, of the bytes in the closed form; and one of a number where rounds or ragged rows need it."""
    how = getattr(exchange, "keywords", {}).get("how", "gather")
    large, small = (([c for c in found if (c.bytes > 64) == is_large]) for is_large in (True, False))
    assert [c.kind for c in large] == (["all-gather", "reduce-scatter"] if how == "gather" else ["all-to-all"] * 2)
    assert [c.kind for c in small] == {"rounds": ["all-reduce"], "ragged": ["all-to-all"]}.get(how, [])
    if how in ("whole", "gather"):
        assert sum(c.sent for c in large) == traffic("gather" if how == "gather" else "tokens", shape)


def test_tokens_that_every_device_has_get_all_results():
    w, x = inputs(1, 5, 8, np.float32)
    r = np.random.default_rng(0)
    ids, valid = r.integers(0, 8, (1, 5, 2)).astype(np.int32), np.asarray([[True, False, True, True, True]])
    everywhere = [np.repeat(t, 4, axis=0) for t in (x, ids, valid)]
    with pytest.raises(SplitError, match="all tokens on each device"):
        met(own_experts, 4, 8)(w, *everywhere)

    def exchange(bank, at, *tokens):
        return own_experts(bank, dataclasses.replace(at, layout=dataclasses.replace(at.layout, batch=())), *tokens)

    y, _ = met(exchange, 4, 8)(w, *everywhere)
    want = expected(w, x, ids, valid)
    assert all(same_bits(one, want[0]) for one in np.asarray(y))


def test_sums_that_come_back_are_those_of_the_results_up_to_rounding():
    w, x = inputs(4, 5, 16, np.float32)
    ids, valid = next(routings(4, 5, 3, 16))
    weights = np.random.default_rng(9).random(ids.shape).astype(np.float32)

    def one(w, x, ids, weights, valid):
        return gather_sums(Scales(w, jnp.zeros(1, jnp.int32)), meeting(4, 16, 1), x[0], ids[0], weights[0], valid[0])[0][None]

    by = P("expert")
    step = jax.jit(jax.shard_map(one, mesh=Split(expert=4).mesh(), in_specs=(P(None, "expert"), by, by, by, by), out_specs=by, check_vma=False))
    want = np.einsum("ntad,nta->ntd", expected(w, x, ids, valid).astype(np.float64), weights)
    np.testing.assert_allclose(step(w, x, ids, weights, valid), want, rtol=1e-6, atol=1e-6)
    found = collectives(step.lower(w, x, ids, weights, valid).compile().as_text())
    assert sum(c.sent for c in found) == traffic("gather", Shape(5, 3, 16, 4, 6, 1, 4, "cpu"), sums=True)


# --- real experts


def bank_of(experts: int, seed: int = 0) -> ResidentBank:
    r = np.random.default_rng(seed)
    return ResidentBank(*(jnp.asarray(r.standard_normal(s), jnp.float32) / 4 for s in ((2, experts, 16, 2, 8), (2, experts, 8, 16))))


def sharded(devices: int, bank, exchange: str, position=None):
    """The jitted `(bank, x, ids, weights, valid, biases) -> y` of layer 1 by devices that each have a part of the tokens."""
    at = meeting(devices, bank.w_in.shape[1])
    layout = dataclasses.replace(at.layout, split=dataclasses.replace(at.layout.split, exchange=exchange))

    def one(bank, *args):
        *args, biases = args
        own = ShardedBank(bank, layout, at.experts, position)
        return own.expert_ffn(jnp.int32(1), *args, CPU, biases)[0]

    by, of = P("expert"), ResidentBank(P(None, "expert"), P(None, "expert"))  # type: ignore[arg-type]
    return jax.jit(jax.shard_map(one, mesh=layout.split.mesh(), in_specs=(of, by, by, by, by, by), out_specs=by, check_vma=False))


def layer_inputs(rows: int, active: int, experts: int):
    """Activations, ids, weights and valid of all devices' tokens, and biases of a layer's experts."""
    r = np.random.default_rng(rows)
    ids = np.stack([r.permutation(experts)[:active] for _ in range(rows)]).astype(np.int32)
    args = (r.standard_normal((rows, 16)).astype(np.float32), ids, r.random((rows, active)).astype(np.float32), r.random(rows) > 0.2)
    biases = tuple(r.standard_normal(s).astype(np.float32) for s in ((experts, 2, 8), (experts, 16)))
    return args, biases


def test_sent_experts_give_the_bits_of_one_device_with_biases_and_in_any_order():
    """Also where all tokens ask for one device's experts, which come one by one, and where they ask for all."""
    args, biases = layer_inputs(8, 3, 16)
    bank = bank_of(16)
    order = np.stack([np.random.default_rng(layer).permutation(16) for layer in range(2)])
    placed = placed_bank(bank, order)
    moved = tuple(b[order[1]] for b in biases)
    step = sharded(4, bank, "weights", placed.position_of_expert)
    for ids in (args[1], np.tile(order[1][[13, 15, 12]].astype(np.int32), (8, 1)), np.arange(24, dtype=np.int32).reshape(8, 3) % 16):
        y = step(placed.own, args[0], ids, *args[2:], moved)
        assert same_bits(y, ALONE(bank, args[0], ids, *args[2:], biases))
    found = collectives(step.lower(placed.own, *args, moved).compile().as_text())
    assert {c.kind for c in found} == {"all-gather"}
    assert sorted(c.bytes for c in found if c.times == 1) == sorted(4 * 4 * n for n in (16 * 2 * 8, 8 * 16, 2 * 8, 16)) or len(found) == 9


ALONE = jax.jit(lambda bank, x, ids, weights, valid, biases: bank.expert_ffn(jnp.int32(1), x, ids, weights, valid, CPU, biases)[0])
"""Layer 1 on one device."""


def test_rounds_carry_a_bank_of_slots():
    """Two devices with four experts each and room for two; all tokens ask for the second's, which takes two rounds."""
    r, model = np.random.default_rng(0), random_model("olmoe", unroll=False)
    at = meeting(2, 8, 1)
    own = slot_bank(bank_spec(model.spec, at.layout), None, Offload(2, 1), "d2f")
    records = records_of(model).reshape(2, 2, 4, *own_record(model))
    store = records.swapaxes(0, 1).reshape(16, *own_record(model))
    ids = np.asarray([[4 + t % 4, 4 + (t + 1) % 4] for t in range(12)], np.int32)
    x, valid = r.standard_normal((12, model.spec.width)).astype(np.float32), r.random(12) > 0.1

    def one(store, x, ids, valid):
        bank = dataclasses.replace(own, store=store, poison=True)
        y, bank = exchange_tokens(bank.join(bank.init_state()), at, x, ids, valid, how="rounds")
        return y, bank.state.loads[None]

    by = P("expert")
    step = jax.jit(jax.shard_map(one, mesh=at.layout.split.mesh(), in_specs=(by,) * 4, out_specs=by, check_vma=False))
    y, loads = step(store, x, ids, valid)
    pairs = np.repeat(x, 2, axis=0), ids.reshape(-1, 1), np.ones((24, 1), np.float32), np.repeat(valid, 2)
    want = jax.jit(lambda bank, *a: bank.expert_ffn(jnp.int32(1), *a, CPU)[0])(model.bank, *pairs)
    assert same_bits(y, np.asarray(want).reshape(y.shape))
    assert loads[0].tolist() == [0, 0] and 4 < int(loads[1][1]) <= 8  # experts came again in the second round


def own_record(model) -> tuple[int, ...]:
    """The shape of an expert's record."""
    return records_of(model).shape[1:]


def test_weights_that_lie_elsewhere_are_refused():
    with pytest.raises(SplitError, match="exchange = 'weights'.*SlotBank.*choose 'tokens'"):
        send_weights(SlotBank(None), meeting(2, 4), *[None] * 3)


def test_a_placed_bank_takes_the_models_ids():
    bank, r = bank_of(4), np.random.default_rng(3)
    order = np.asarray([[2, 0, 3, 1], [3, 2, 1, 0]])
    placed = placed_bank(bank, order)
    assert isinstance(placed, PlacedBank)
    for layer in range(2):
        for position, expert in enumerate(order[layer]):
            assert same_bits(placed.own.w_in[layer, position], bank.w_in[layer, expert])
            assert same_bits(placed.own.w_out[layer, position], bank.w_out[layer, expert])
            assert placed.position_of_expert[layer, expert] == position
    with pytest.raises(ValueError, match="order_LE.*permutation of 4 experts for each of 2 layers"):
        permute_bank(bank, r.integers(0, 2, (2, 4)))
