"""From what a policy thinks of every expert to the set that a layer holds after a step."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxmoe.residency.policies import Keep


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
    one that was not. An expert that was hit may be in `leave` where more were asked for than there are slots: it makes room once it has been used.
    """
    candidate = resident | need
    first = candidate if bypass else need
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
