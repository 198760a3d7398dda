"""From what a policy thinks of every expert to the set that a layer holds after a step."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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
        most: what `need` holds at most, if that is known to be few.

    Returns:
        The choice for the layer's experts, and all that leave, of every layer.
    """
    layers, experts = resident.shape
    wanted = (jnp.arange(layers) == layer)[:, None] & need[None, :]
    candidate = resident | wanted
    excess = jnp.maximum(0, candidate.sum(dtype=jnp.int32) - slots)
    first = () if bypass else (wanted | (keep[0] == jnp.inf),)
    stays = candidate & ~_least((*first, *keep), candidate, excess, min(experts, most or experts))

    def own(members: Bool[Array, "L E"]) -> Bool[Array, "E"]:
        return jax.lax.dynamic_index_in_dim(members, layer, 0, keepdims=False)

    leave, miss = resident & ~stays, need & ~own(resident)
    return Choice(hit=need & own(resident), enter=miss & own(stays), stream=miss & ~own(stays), leave=own(leave)), leave


HALF = 16
"""Bits of a stamp that a float32 holds with room to spare."""


def _least(keys: tuple[Array, ...], members: Bool[Array, "L E"], count: Int[Array, ""], most: int) -> Bool[Array, "L E"]:
    """The `count` least members, at most `most`. Keys are compared in their order; of equal ones a later place is less.

    Key by key those below the last one that goes are taken, and those level with it go on to the next key. `top_k` finds that last one by looking at
    each once, where a sort by all keys takes several times as long. It is a loop over keys so that each is one array: XLA may compute an expression
    for every one that reads it, on the CPU to other bits, and then what is compared were not what was looked through.
    """

    def by(carry, key):
        taken, members, count = carry
        least = -jax.lax.top_k(jnp.where(members, -key, -jnp.inf).reshape(-1), most)[0]
        last = least[jnp.maximum(count, 1) - 1]
        below = members & (key < last)
        return (taken | below, members & (key == last), count - below.sum(dtype=jnp.int32)), None

    (taken, level, count), _ = jax.lax.scan(by, (jnp.zeros_like(members), members, count), jnp.stack(_floats(keys)))
    behind = jnp.cumsum(level.reshape(-1)[::-1], dtype=jnp.int32)[::-1].reshape(level.shape)
    return taken | (level & (behind <= count))


def _floats(keys: tuple[Array, ...]) -> list[Float[Array, "L E"]]:
    """The keys in the order of their size as float32: whole numbers as their upper and their lower half."""
    out: list[Float[Array, "L E"]] = []
    for key in keys:
        parts = (key >> HALF, key & (2**HALF - 1)) if jnp.issubdtype(key.dtype, jnp.integer) else (key,)
        out += [part.astype(jnp.float32) for part in parts]
    return out
