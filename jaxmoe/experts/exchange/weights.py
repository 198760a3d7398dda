"""Experts travel to the tokens: those that any device asks for are sent to all, some at a time ('weights').

This is the sparse materialisation of Hecate (fully sharded sparse data parallelism), and makes of the other devices' memory a tier of a cache of
experts. Tokens, of which there may be many, stay where they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxmoe.experts.exchange.meeting import Meeting
from jaxmoe.experts.resident import ResidentBank
from sharding.exchange_cost import wave_size
from sharding.split import SplitError


def send_weights(bank, at: Meeting, x_TD, ids_TA, valid_T):
    """See `jaxmoe.experts.exchange`.

    In each wave every device sends some of its experts that are asked for, and computes with what it gets, while the next wave's are on their way.
    """
    if not isinstance(bank, ResidentBank):
        raise SplitError(f"exchange = 'weights' sends experts from device to device, a {type(bank).__name__} has them elsewhere: choose 'tokens'")
    tokens, active = ids_TA.shape
    size = wave_size(at.experts, at.devices)
    asked_E = _asked(at, ids_TA, valid_T)
    rank_E = (jnp.cumsum(asked_E.reshape(at.devices, -1), axis=1, dtype=jnp.int32) - 1).reshape(-1)
    expert_M = ids_TA.reshape(-1)
    slot_M = expert_M // at.count * size + rank_E[expert_M] % size
    wave_M = jnp.where(jnp.repeat(valid_T, active), rank_E[expert_M] // size, -1)
    rows = jnp.repeat(x_TD, active, axis=0)
    send = _sender(bank, at, asked_E, size)

    def compute(w, there, y):
        now = wave_M == w
        some, own = there[:2], there[2:] or None
        group = dataclasses.replace(bank, w_in=some[0][None], w_out=some[1][None])
        new, _ = dataclasses.replace(at, moe_layer=jnp.int32(0), biases=own).compute(group, rows, slot_M, now)
        return jnp.where(now[:, None], new, y)

    def wave(w, carry):
        there, y = carry
        coming = send(w + 1)
        return coming, compute(w, there, y)

    last = _waves(at, asked_E, size, tokens * active) - 1
    there, y = jax.lax.fori_loop(0, last, wave, (send(jnp.int32(0)), jnp.zeros_like(rows)))
    return compute(last, there, y).reshape(tokens, active, -1), bank


def _asked(at: Meeting, ids_TA: Int[Array, "T A"], valid_T: Bool[Array, "T"]) -> Bool[Array, "E"]:
    """Experts that tokens of any device along the experts' axes ask for."""
    own = jnp.zeros(at.experts, jnp.uint8).at[jnp.where(valid_T[:, None], ids_TA, at.experts)].max(jnp.uint8(1), mode="drop")
    return jax.lax.all_gather(own, at.axes).any(0)


def _waves(at: Meeting, asked_E: Bool[Array, "E"], size: int, pairs: int):
    """How many waves there are, at least one: as many as the device with most experts that are asked for needs."""
    if at.kernels.backend == "gpu":  # a loop of unknown length would read its predicate back to the host
        return -(-min(at.count, at.devices * pairs) // size)
    most = asked_E.reshape(at.devices, -1).sum(1, dtype=jnp.int32).max()
    others = tuple(axis for axis in at.deciding if axis not in at.axes)
    most = jax.lax.pmax(most, others) if others else most
    return jnp.maximum(1, -(-most // size))


def _sender(bank: ResidentBank, at: Meeting, asked_E: Bool[Array, "E"], size: int) -> Callable:
    """Of a wave, what gathers its experts from all devices: `w_in` and `w_out` [n * size, ...], then biases if there are any."""
    own = jax.lax.dynamic_slice_in_dim(asked_E, jax.lax.axis_index(at.axes) * at.count, at.count)
    order = jnp.pad(jnp.argsort(~own, stable=True).astype(jnp.int32), (0, size))

    def send(w):
        ids = jax.lax.dynamic_slice_in_dim(order, jnp.minimum(w * size, at.count), size)
        weights = [jnp.concatenate([_expert(t, at.moe_layer, ids[i]) for i in range(size)]) for t in (bank.w_in, bank.w_out)]
        return tuple(jax.lax.all_gather(t, at.axes, axis=0, tiled=True) for t in (*weights, *(b[ids] for b in at.biases or ())))

    return send


def _expert(w, moe_layer, id):
    """One expert [1, ...] of [L, E, ...]: a slice, where a gather would have XLA copy the bank into an order that suits it."""
    return jax.lax.dynamic_slice(w, (moe_layer, id, *(0,) * (w.ndim - 2)), (1, 1, *w.shape[2:]))[0]
