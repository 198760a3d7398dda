"""From what a policy thinks of every expert to the set that a layer holds after a step."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxmoe.residency.policy import Keep


class Choice(NamedTuple):
    """Disjoint sets of experts of one layer and step.

    `hit` were asked for and are there; `enter` were asked for and are brought to stay; `stream` were asked for and are brought for this step alone;
    `leave` are there and make room. What stays is there and neither hit nor leaving, or hit and not in `leave`.
    """

    hit: Bool[Array, "E"]
    enter: Bool[Array, "E"]
    stream: Bool[Array, "E"]
    leave: Bool[Array, "E"]


def choose(keep: Keep, resident: Bool[Array, "E"], need: Bool[Array, "E"], slots: Int[Array, ""] | int, bypass: bool) -> Choice:
    """Chooses what a layer of `slots` slots holds after a step that asked for `need`.

    Of all experts that are there or asked for, the `slots` most worth keeping stay or enter. Without `bypass`, one that was asked for goes before
    one that was not, unless this is pinned (worth infinity). An expert that was hit may be in `leave` where more were asked for than there are slots:
    it makes room once it has been used.
    """
    candidate = resident | need
    first = candidate if bypass else need | (keep[0] == jnp.inf)
    order = jnp.arange(need.shape[0])

    def above(key: jax.Array) -> jax.Array:
        return key[None, :] > key[:, None]

    def level(key: jax.Array) -> jax.Array:
        return key[None, :] == key[:, None]

    # before[i, j]: j is more worth keeping than i. Comparing all pairs is one small fused operation where a sort would be several.
    before = above(keep[0]) | (level(keep[0]) & (above(keep[1]) | (level(keep[1]) & (order[None, :] < order[:, None]))))
    before = above(first) | (level(first) & before)
    rank = jnp.sum(before & candidate[None, :], axis=1, dtype=jnp.int32)
    stays = candidate & (rank < slots)
    miss = need & ~resident
    return Choice(hit=need & resident, enter=miss & stays, stream=miss & ~stays, leave=resident & ~stays)


def choose_shared(
    keep: Keep,
    resident: Bool[Array, "L E"],
    need: Bool[Array, "E"],
    layer: Int[Array, ""] | int,
    slots: Int[Array, ""] | int,
    bypass: bool,
    most: int | None = None,
) -> tuple[Choice, Bool[Array, "L E"]]:
    """`choose` where all layers share `slots` slots, and one of them asks for `need`.

    Args:
        keep, resident, need, slots, bypass: see `choose`; no more are resident than there are slots.
        layer: the one that asks.
        most: what `need` holds at most, if that is known to be few; those that don't stay are then found one by one, and nothing is sorted.

    Returns:
        The choice for the layer's experts, and all that leave, of every layer.
    """
    layers, _ = resident.shape
    wanted = (jnp.arange(layers) == layer)[:, None] & need[None, :]
    candidate = resident | wanted
    first = candidate if bypass else wanted | (keep[0] == jnp.inf)
    excess = jnp.maximum(0, candidate.sum(dtype=jnp.int32) - slots)
    keys = (first.astype(jnp.float32), *keep)
    stays = candidate & ~(_least_by_sort(keys, candidate, excess) if most is None else _least_one_by_one(keys, candidate, excess, most))

    def own(members: Bool[Array, "L E"]) -> Bool[Array, "E"]:
        return jax.lax.dynamic_index_in_dim(members, layer, 0, keepdims=False)

    leave, miss = resident & ~stays, need & ~own(resident)
    return Choice(hit=need & own(resident), enter=miss & own(stays), stream=miss & ~own(stays), leave=own(leave)), leave


Keys = tuple[Array, ...]
"""Compared in this order; all [L, E]. Of equal ones a later place is less."""


def _least_by_sort(keys: Keys, members: Bool[Array, "L E"], count: Int[Array, ""]) -> Bool[Array, "L E"]:
    """The `count` least members."""
    last = jnp.where(members, -keys[0], jnp.inf)  # what is no member comes after all that are
    order = jnp.lexsort(tuple(key.reshape(-1) for key in (*(-key for key in reversed(keys[1:])), last)))  # the largest first; of equal ones the first
    rank = jnp.arange(members.size, dtype=jnp.int32) - members.sum(dtype=jnp.int32)
    return jnp.zeros(members.size, bool).at[order].set((-count <= rank) & (rank < 0), unique_indices=True).reshape(members.shape)


def _least_one_by_one(keys: Keys, members: Bool[Array, "L E"], count: Int[Array, ""], most: int) -> Bool[Array, "L E"]:
    """The same, where `count` is at most `most`: every layer's least member is known, so that one more is one layer's next."""

    def one(i, carry):
        left, least, at = carry
        layer = _last_least(least, at >= 0)
        expert = at[layer]
        row = left[layer].at[expert].set(left[layer, expert] & (i >= count))
        key_E = tuple(key[layer] for key in keys)
        new = _last_least(key_E, row)
        least = tuple(values.at[layer].set(key[new]) for values, key in zip(least, key_E, strict=True))
        return left.at[layer].set(row), least, at.at[layer].set(new)

    at = _last_least(keys, members)
    least = tuple(jnp.take_along_axis(key, at[:, None], axis=1)[:, 0] for key in keys)
    return members & ~jax.lax.fori_loop(0, most, one, (members, least, at))[0]


def _last_least(keys: Keys, among: Bool[Array, "... N"]) -> Int[Array, "..."]:
    """The place of the least of `among` along the last axis, of equal ones the last; -1 where there is none."""
    for key in keys:
        top = jnp.inf if jnp.issubdtype(key.dtype, jnp.floating) else jnp.iinfo(key.dtype).max
        among = among & (key == jnp.min(jnp.where(among, key, top), axis=-1, keepdims=True))
    return jnp.max(jnp.where(among, jnp.arange(among.shape[-1], dtype=jnp.int32), -1), axis=-1)
