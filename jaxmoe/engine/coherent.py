"""Decoding where tokens go on from where their experts were ('coherent'): one all-to-all for each MoE layer instead of two.

Context-coherent expert parallelism (ExFlow, arXiv:2401.08383), for models with one active expert a token. Every device along the experts' axis holds
the caches of all sequences of its group, so that any of them can attend for any token. A step begins with the tokens dealt out; at each MoE layer a
token's residual stream goes to the device that has its expert and stays there; at the end of the step all devices gather the keys and values that
each has computed, and the last residual streams, from which every one computes all logits.

Prompts are computed by all devices of a group alike, but for their experts, each by its own device (`jaxmoe.experts.exchange.own_experts`). Were the
prompt's tokens dealt out too, each layer would have to gather its keys and values, since every device needs all of them for good.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout as Order
from jax.experimental.layout import with_layout_constraint
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxmoe.cache.batch import Batch
from jaxmoe.cache.contiguous import KVState
from jaxmoe.cache.layers import LayerStates
from jaxmoe.experts import expert_ffn
from jaxmoe.experts.exchange.wire import bits_of, from_bits, listed, pack, swap, to_words, unpack
from jaxmoe.experts.placed import at_positions
from jaxmoe.experts.sharded import ShardedBank
from jaxmoe.nn.layers import DecoderLayer, Router, expert_bias
from jaxmoe.nn.parts import joined
from jaxmoe.nn.transformer import decoder_layer, embed, head, layer_tables
from jaxmoe.spec import ModelSpec, Segment
from pallas_kernels.dispatch import Kernels
from sharding.exchange_cost import SPARE, coherent_ragged
from sharding.split import Layout, SplitError


def moves(layout: Layout, batch: Batch) -> bool:
    """Whether a step's tokens go from device to device."""
    split = layout.split
    return split.exchange == "coherent" and split.attention == "data" and bool(layout.experts) and batch.run == 1


class Slots(NamedTuple):
    """Which tokens a device has. Attributes: `token` of each slot, 0 in empty ones; `size`, how many are taken: they come first."""

    token: Int[Array, "T"]
    size: Int[Array, ""]

    @property
    def taken(self) -> Bool[Array, "T"]:
        """Which slots have a token."""
        return jnp.arange(self.token.shape[0]) < self.size

    def here(self) -> Bool[Array, "T"]:
        """Which tokens are here."""
        n = self.token.shape[0]
        return jnp.zeros(n, bool).at[jnp.where(self.taken, self.token, n)].set(True, mode="drop")

    def batch(self, batch: Batch) -> Batch:
        """The batch of what is in the slots: empty ones are padding."""
        at = self.token
        return dataclasses.replace(
            batch, tokens=batch.tokens[at], positions=batch.positions[at], segments=jnp.where(self.taken, batch.segments[at], -1),
            run_segments=batch.run_segments[at], run_positions=batch.run_positions[at], n_runs=self.size, grouped=True,
        )  # fmt: skip


def coherent_forward(
    spec: ModelSpec, params: dict, bank: ShardedBank, state: LayerStates, batch: Batch, kernels: Kernels, layout: Layout
) -> tuple[Float[Array, "R V"], ShardedBank, LayerStates]:
    """One step of decoding, inside `shard_map`.

    Args:
        spec: `sharding.split.local_spec` of the model.
        params, kernels, layout: as `forward` takes them.
        bank: of this device's experts.
        state: caches of all sequences of the group, the same on each of its devices.
        batch: one token of each of them, likewise.

    Returns:
        float32 logits of `batch.logit_rows`, the bank and the state, again the same (but for the bank) on each device of a group.

    Raises:
        SplitError: a model whose layers carry more from token to token, or from layer to layer, than can travel.
    """
    _check(spec, state, layout)
    n, me = layout.size(layout.experts), jax.lax.axis_index(layout.experts)
    every = jnp.arange(batch.tokens.shape[0])
    slots = _slots((batch.segments >= 0) & (every % n == me))
    x = _only(slots.taken, embed(spec, params, batch, layout)[slots.token])
    fixed, moving = bank.split()
    carry, here = (x, slots, moving, state), []
    for segment, trees in zip(spec.segments, params["segments"], strict=True):
        carry, seen = _run_segment(spec, segment, trees, fixed, carry, batch, kernels, layout)
        here.append(seen)
    x, slots, moving, state = carry
    x, state = _shared_out(x, slots, state, jnp.concatenate(here), spec, batch, layout)
    return head(spec, params, x, batch, kernels, layout), fixed.join(moving), state


def _check(spec: ModelSpec, state: LayerStates, layout: Layout) -> None:
    reasons = {
        "delta-rule layers, whose states would have to travel": any(not isinstance(s, KVState) for s in state.states),
        "dense networks beside its experts": any(layer.sparse and layer.dense is not None for layer in spec.layers),
        "routers that decide for the next layer": any(layer.router is not None and layer.router.pregated for layer in spec.layers),
        "its positions split": bool(layout.sequence),
        "its sequences split over the experts' devices": bool(set(layout.batch) & set(layout.experts)),
    }
    for what, found in reasons.items():
        if found:
            raise SplitError(f"exchange = 'coherent' can't move tokens of a model that has {what}: choose 'tokens'")


def _slots(here_T: Bool[Array, "T"]) -> Slots:
    count = here_T.sum(dtype=jnp.int32)
    order = jnp.argsort(~here_T, stable=True).astype(jnp.int32)
    return Slots(jnp.where(jnp.arange(here_T.shape[0]) < count, order, 0), count)


def _only(taken: Bool[Array, "T"], x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    return jnp.where(taken[:, None], x, jnp.zeros_like(x))


# --- layers


class MovingLayer(DecoderLayer):
    """A sparse layer whose tokens leave after attention for where their experts are."""

    @nn.compact
    def __call__(self, x, layer, moe_layer, bank: ShardedBank, state, slots: Slots, batch: Batch, tables) -> Any:
        """Returns `(x, bank, state, slots)`."""
        s, m = self.spec, self.model
        assert s.router is not None and s.experts is not None
        x, state = self._attention(x, layer, state, slots.batch(batch), tables)
        norm = self._norm("norm_mlp")
        with jax.named_scope("route"):
            router = Router(s.router, m.width, m.norm_eps, m.precision, self.kernels, name="router")
            routed, _ = router(norm(x), (), slots.taken)
        ids = at_positions(bank.position_of_expert, moe_layer, routed.ids)
        with jax.named_scope("move"):
            x, ids, weights, slots = move(x, ids, routed.weights, slots, bank.experts, self.layout, self.kernels)
        h, taken = norm(x), slots.taken
        side, into = self._shared(h), h
        if s.router.apply == "input":
            into, weights = h * weights.astype(h.dtype), jnp.where(taken[:, None], 1.0, 0.0)
        more = {}
        if s.experts.bias:
            more["biases"] = expert_bias(s, m, self.layout, bank)
        with jax.named_scope("experts"):
            y, own_bank, _ = expert_ffn(bank.own, moe_layer, into, ids, weights, taken, self.kernels, **more)
        y = y if self._together else joined(y, self.layout.summed)
        return _only(taken, self._finish(x, side, y)), dataclasses.replace(bank, own=own_bank), state, slots


def _run_segment(spec: ModelSpec, segment: Segment, trees, fixed, carry, batch: Batch, kernels: Kernels, layout: Layout):
    """All repeats of a pattern; returns the carry and where tokens were when each layer's keys were computed, [layers, T]."""
    pattern, size = segment.pattern, len(segment.pattern)
    states = np.asarray([spec.state_index(i) for i in range(spec.n_layers)], np.int32)
    sparse = np.cumsum([layer.sparse for layer in spec.layers]).astype(np.int32) - 1

    def repeat(carry, tree_and_index):
        layers, r = tree_and_index
        x, slots, moving, state = carry
        bank, here = fixed.join(moving), []
        for j, (own, tree) in enumerate(zip(pattern, layers, strict=True)):
            index = segment.first + r * size + j
            layer, moe_layer = (jnp.asarray(numbers)[index] for numbers in (states, sparse))
            here.append(slots.here())
            now = slots.batch(batch)
            tables = layer_tables(own, now, x.dtype)
            if own.sparse:
                module: Any = MovingLayer(own, spec, kernels, layout)
                x, bank, state, slots = module.apply({"params": tree}, x, layer, moe_layer, bank, state, slots, batch, tables)
            else:
                module = decoder_layer(spec, own, kernels, layout)
                x, bank, state, _, _ = module.apply({"params": tree}, "all", x, layer, moe_layer, bank, state, (), now, tables)
                x = _only(slots.taken, x)
        return (x, slots, bank.split()[1], state), jnp.stack(here)

    if isinstance(trees[0]["norm_attn"]["scale"], tuple):
        seen = []
        for r in range(segment.repeats):
            layers = tuple(jax.tree.map(lambda t, r=r: t[r], tree, is_leaf=lambda t: isinstance(t, tuple)) for tree in trees)
            carry, here = repeat(carry, (layers, r))
            seen.append(here)
        return carry, jnp.concatenate(seen)
    carry, here = jax.lax.scan(repeat, carry, (trees, jnp.arange(segment.repeats)))
    return carry, here.reshape(-1, here.shape[-1])


def move(
    x_TD: Float[Array, "T D"], ids_T1: Int[Array, "T 1"], weights_T1: Float[Array, "T 1"], slots: Slots, experts: int, layout: Layout,
    kernels: Kernels,
) -> tuple[Float[Array, "T D"], Int[Array, "T 1"], Float[Array, "T 1"], Slots]:  # fmt: skip
    """Takes each token to the device that has its expert; returns what came, ids now counting that device's own experts."""
    axes, (tokens, width) = layout.experts, x_TD.shape
    n = layout.size(axes)
    count, ids = experts // n, ids_T1[:, 0]
    goes_NT = (jnp.where(slots.taken, ids // count, n)[None, :] == jnp.arange(n)[:, None]).astype(jnp.int32)
    rank_NT = jnp.cumsum(goes_NT, axis=1, dtype=jnp.int32) - goes_NT
    from_NC = listed(jnp.where(goes_NT > 0, rank_NT, tokens), tokens)
    weight = bits_of(weights_T1, x_TD.dtype)
    whole = jnp.concatenate([(ids % count)[:, None], slots.token[:, None], weight], 1)
    row_NCW = pack(x_TD.at[from_NC].get(mode="fill", fill_value=0), whole.at[from_NC].get(mode="fill", fill_value=-1))
    ragged = coherent_ragged(kernels.backend, n, tokens, width, x_TD.dtype.itemsize)
    came = swap(row_NCW, goes_NT.sum(1, dtype=jnp.int32), None, axes, kernels.backend, ragged)
    x, whole = unpack(came.reshape(n * tokens, -1), width, x_TD.dtype)
    there = whole[:, 1] >= 0
    order = jnp.argsort(~there, stable=True)[:tokens]
    slots = Slots(jnp.maximum(whole[order, 1], 0), there.sum(dtype=jnp.int32))
    weights = jnp.where(slots.taken[:, None], from_bits(whole[order, 2:], 1), 0.0)
    return _only(slots.taken, x[order]), jnp.maximum(whole[order, :1], 0), weights, slots


# --- the end of a step


def _shared_out(x, slots: Slots, state: LayerStates, here_LT, spec: ModelSpec, batch: Batch, layout: Layout):
    """What each device has computed, on all: the last residual streams [T, D], and the caches with the step's keys and values."""
    tokens, width = x.shape
    where = jnp.where(slots.taken, slots.token, tokens)
    streams = jnp.zeros_like(x).at[where].set(x, mode="drop")
    new = [_new_entries(kv, batch) for kv in state.states]
    words = [_narrow(to_words(t), [*new, streams]) for t in (*new, streams)]
    row = max(t.shape[-1] for t in words[:-1])
    cut = -(-words[-1].shape[-1] // row)
    stream_rows = jnp.pad(words[-1], ((0, 0), (0, cut * row - words[-1].shape[-1]))).reshape(tokens * cut, row)
    of_kind = [np.asarray([i for i, layer in enumerate(spec.layers) if layer.state == kind]) for kind in state.kinds]
    rows = [jnp.pad(t, ((0, 0), (0, 0), (0, row - t.shape[-1]))).reshape(-1, row) for t in words[:-1]]
    mine = [here_LT[at].reshape(-1) for at in of_kind]
    table = gather_rows(jnp.concatenate([*rows, stream_rows]), jnp.concatenate([*mine, jnp.repeat(slots.here(), cut)]), layout)
    states, at = [], 0
    for kv, entries, own in zip(state.states, new, words, strict=False):
        size = math.prod(own.shape[:2])
        got = table[at : at + size, : own.shape[-1]].reshape(own.shape)
        states.append(_with_entries(kv, _widened(got, entries.dtype), batch))
        at += size
    streams = _widened(table[at:].reshape(tokens, -1)[:, : words[-1].shape[-1]], x.dtype)
    return streams, dataclasses.replace(state, states=tuple(states))


def gather_rows(rows_RW: UInt[Array, "R W"], mine_R: Bool[Array, "R"], layout: Layout) -> UInt[Array, "R W"]:
    """Each row from the device that has it, on all; zeros where none has.

    What devices have lies close together, in rooms of somewhat more than an even share, as often as it takes to send all.
    """
    axes, total = layout.experts, rows_RW.shape[0]
    n = layout.size(axes)
    room = min(total, 8 * math.ceil(SPARE * total / n / 8))
    rank = jnp.cumsum(mine_R, dtype=jnp.int32) - mine_R
    numbers = to_words(jnp.arange(total, dtype=jnp.int32)) if rows_RW.dtype == jnp.uint32 else _halves(jnp.arange(total, dtype=jnp.int32))
    numbered = jnp.concatenate([rows_RW, numbers.reshape(total, -1)], 1)

    def once(sent, table):
        slot = jnp.where(mine_R & (rank >= sent) & (rank < sent + room), rank - sent, room)
        leaving = numbered.at[listed(slot[None], room)[0]].get(mode="fill")  # of unsigned integers: all bits are set, and the number is -1
        came = jax.lax.all_gather(leaving, axes, axis=0, tiled=True)
        number = jax.lax.bitcast_convert_type(came[:, rows_RW.shape[1] :], jnp.int32).reshape(-1)
        return table.at[jnp.where(number < 0, total, number)].set(came[:, : rows_RW.shape[1]], mode="drop")

    table = jnp.zeros_like(rows_RW)
    if room == total:
        return once(jnp.int32(0), table)
    most = jax.lax.pmax(mine_R.sum(dtype=jnp.int32), tuple(dict.fromkeys((*axes, *layout.batch))))
    return jax.lax.while_loop(lambda c: c[0] < most, lambda c: (c[0] + room, once(*c)), (jnp.int32(0), table))[1]


def _new_entries(kv: KVState, batch: Batch) -> jax.Array:
    """What the caches have at the step's positions: [L, T, K * (C + V)] as it is held."""

    def entries(cache, start, shape):
        return _as_written(jax.lax.dynamic_slice(_as_written(cache), start, shape)).reshape(cache.shape[0], -1)

    def of_token(at):
        segment, position = at
        k = entries(kv.k, (0, segment, 0, 0, position), (kv.k.shape[0], 1, *kv.k.shape[2:4], 1))
        if kv.v is None:
            return k
        v = entries(kv.v, (0, segment, 0, position, 0), (kv.v.shape[0], 1, kv.v.shape[2], 1, kv.v.shape[4]))
        return jnp.concatenate([k, v], 1)

    return jax.lax.map(of_token, (batch.run_segments, batch.run_positions)).swapaxes(0, 1)


def _with_entries(kv: KVState, entries: jax.Array, batch: Batch) -> KVState:
    """The inverse of `_new_entries`, for tokens that are live."""
    keys = math.prod(kv.k.shape[2:4])

    def put(cache, new, start, live):
        old = jax.lax.dynamic_slice(cache, start, new.shape)
        return _as_written(jax.lax.dynamic_update_slice(cache, jnp.where(live, new, old), start))

    def one(t, caches):
        k, v = caches
        segment, position, live = batch.run_segments[t], batch.run_positions[t], batch.segments[t] >= 0
        new = jax.lax.dynamic_index_in_dim(entries, t, 1, keepdims=False)
        k = put(k, new[:, :keys].reshape(k.shape[0], 1, *k.shape[2:4], 1), (0, segment, 0, 0, position), live)
        if v is not None:
            v = put(v, new[:, keys:].reshape(v.shape[0], 1, v.shape[2], 1, v.shape[4]), (0, segment, 0, position, 0), live)
        return k, v

    return KVState(*jax.lax.fori_loop(0, batch.tokens.shape[0], one, (kv.k, kv.v)))


def _as_written(x: jax.Array) -> jax.Array:
    """The array with its axes in their order: XLA's TPU compiler would else lay a whole cache out anew, for a slice of one position."""
    return with_layout_constraint(x, Order(tuple(range(x.ndim))))


def _narrow(words: jax.Array, together: list) -> jax.Array:
    """Words of the width that the narrowest of the arrays which travel together has."""
    wide = words.dtype == jnp.uint32 and any(t.dtype.itemsize == 2 for t in together)
    return _halves(words).reshape(*words.shape[:-1], -1) if wide else words


def _halves(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


def _widened(words: jax.Array, dtype) -> jax.Array:
    """Numbers of `dtype` of words, which may be halves of them."""
    if words.dtype.itemsize < jnp.dtype(dtype).itemsize:
        words = words.reshape(*words.shape[:-1], -1, 2)
    return jax.lax.bitcast_convert_type(words, dtype)
