"""Expert fill in plain XLA: a loop whose body slices one record out of the host store and writes it over a slot of every pool.

XLA moves the slice of the host operand by a copy of its own (on TPU and GPU an asynchronous one) and updates the pools in place, so that a fill needs
no more temporaries than a record or two. The store is sliced along its first axis alone: TPU compilers of jax 0.10.2 take no other slice of a
host operand.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Num

Pools = tuple[jax.Array, ...]
Filled = tuple[Pools, Int[Array, ""]]


def by_while(
    pools: Pools, store: Num[Array, "X R C"], ids_M: Int[Array, "M"], slots_M: Int[Array, "M"], first: Int[Array, ""], stop: Int[Array, ""]
) -> Filled:
    """See `api.fill`: a loop over the misses alone. On a GPU its predicate goes to the host and back, every time around."""

    def body(carry):
        i, pools, count = carry
        parts = split(read(store, ids_M[i]), pools)
        return i + 1, write(pools, parts, slots_M[i]), count + 1

    _, pools, count = lax.while_loop(lambda carry: carry[0] < stop, body, (first, pools, jnp.int32(0)))
    return pools, count


def by_fixed(
    pools: Pools, store: Num[Array, "X R C"], ids_M: Int[Array, "M"], slots_M: Int[Array, "M"], first: Int[Array, ""], stop: Int[Array, ""]
) -> Filled:
    """See `api.fill`: a loop of known length M, whatever the misses are, so that nothing is asked of the host. It reads M records, always.

    Rounds before `first` repeat the first miss and rounds after `stop` the last, which leaves what the misses in their order would have left.
    Without a miss every round writes a slot's own content back.
    """
    low = jnp.minimum(first, ids_M.shape[0] - 1)
    missed = stop > first
    own = tuple(lax.dynamic_slice_in_dim(pool, slots_M[low], 1, 0) for pool in pools)

    def body(i, carry):
        pools, count = carry
        j = jnp.clip(i, low, jnp.maximum(stop - 1, low))
        parts = split(read(store, ids_M[j]), pools)
        parts = tuple(jnp.where(missed, part, kept) for part, kept in zip(parts, own, strict=True))
        return write(pools, parts, slots_M[j]), count + 1

    return lax.fori_loop(0, ids_M.shape[0], body, (pools, jnp.int32(0)))


def read(store: jax.Array, i: jax.Array) -> jax.Array:
    """Record `i`, flat, on the device."""
    return jax.device_put(lax.dynamic_slice_in_dim(store, i, 1, 0), jax.memory.Space.Device).reshape(-1)


def split(record: jax.Array, pools: Pools) -> Pools:
    """A record's elements as one entry [1, ...] of each pool."""
    parts, at = [], 0
    for pool in pools:
        size = math.prod(pool.shape[1:])
        parts.append(lax.slice_in_dim(record, at, at + size).reshape(1, *pool.shape[1:]))
        at += size
    return tuple(parts)


def write(pools: Pools, parts: Pools, slot: jax.Array) -> Pools:
    """The pools with an entry of each in a slot."""
    return tuple(lax.dynamic_update_slice_in_dim(pool, part, slot, 0) for pool, part in zip(pools, parts, strict=True))
