"""LRU, LFU with decay, and a static profile.

Tables are dicts of arrays with a leading layer axis; `touch` and `keep` see one layer's row of each. Steps come in blocks of S, in order: a decode
step of several sequences is one step that asks for a set of experts, a prompt of S tokens is S steps. A step that asks for nothing is no step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

Tables = dict[str, Array]
Keep = tuple[Array, Array]
"""Two [E] keys, compared in this order: the larger stays."""

Profile = Float[Array | np.ndarray, "L E"]
"""How much each expert is used, in any unit."""

DECAY = 0.9
"""What a count keeps of itself from step to step. Source: the replays of real traces in the LFRU literature; 0.9 to 0.95 differ by under a point."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """A residency policy.

    Attributes:
        name: what the command line calls it.
        init: `(layers, experts, profile [L, E] or None) -> tables`.
        touch: `(one layer's tables, used [S, E]) -> tables` after S steps.
        keep: `(one layer's tables) -> Keep`.
        bypass: whether an expert that was asked for may be turned away, when those that are there are worth more. Without it every expert that was
            asked for enters, as far as there is room.
        needs_profile: whether `init` needs a profile.
    """

    name: str
    init: Callable[[int, int, Profile | None], Tables]
    touch: Callable[[Tables, Bool[Array, "S E"]], Tables]
    keep: Callable[[Tables], Keep]
    bypass: bool = False
    needs_profile: bool = False


def _no_stamps(layers: int, experts: int, profile: Profile | None = None) -> Tables:
    return {"clock": jnp.zeros(layers, jnp.int32), "stamp": jnp.full((layers, experts), -1, jnp.int32)}


def _stamp(tables: Tables, used: Bool[Array, "S E"]) -> Tables:
    """The step in which each expert was last used."""
    active = used.any(1)
    step = tables["clock"] + jnp.cumsum(active, dtype=jnp.int32)
    last = jnp.max(jnp.where(used, step[:, None], -1), axis=0)
    return tables | {"clock": step[-1], "stamp": jnp.maximum(tables["stamp"], last)}


def _keep_recent(tables: Tables) -> Keep:
    return tables["stamp"].astype(jnp.float32), tables["stamp"]


def _no_counts(layers: int, experts: int, profile: Profile | None = None) -> Tables:
    return _no_stamps(layers, experts) | {"count": jnp.zeros((layers, experts), jnp.float32)}


def _count(tables: Tables, used: Bool[Array, "S E"]) -> Tables:
    """Uses, each worth `DECAY` to the number of steps since."""
    steps = jnp.cumsum(used.any(1), dtype=jnp.int32)
    if used.shape[0] == 1:
        new = jnp.where(steps[0] > 0, tables["count"] * DECAY + used[0], tables["count"])
    else:
        age = (steps[-1] - steps).astype(jnp.float32)
        new = tables["count"] * DECAY ** steps[-1].astype(jnp.float32) + jnp.sum(jnp.where(used, (DECAY**age)[:, None], 0.0), axis=0)
    return _stamp(tables, used) | {"count": new}


def _keep_frequent(tables: Tables) -> Keep:
    return tables["count"], tables["stamp"]


def _profile(layers: int, experts: int, profile: Profile | None) -> Tables:
    if profile is None:
        raise ValueError("the static policy needs a profile of how often each expert is used: give a trace")
    if profile.shape != (layers, experts):
        raise ValueError(f"the profile has {list(profile.shape)} layers and experts, the model {[layers, experts]}")
    return {"profile": jnp.array(profile, jnp.float32)}


def _keep_profile(tables: Tables) -> Keep:
    return tables["profile"], jnp.zeros(tables["profile"].shape, jnp.int32)


POLICIES: dict[str, Policy] = {
    "lru": Policy("lru", _no_stamps, _stamp, _keep_recent),
    "lfu": Policy("lfu", _no_counts, _count, _keep_frequent),
    "static": Policy("static", _profile, lambda tables, used: tables, _keep_profile, bypass=True, needs_profile=True),
}
"""By name. LFU's ties, and there are many at few slots, go to the more recently used."""

DEFAULT = "lfu"


def find_policy(name: str) -> Policy:
    """The policy of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in POLICIES:
        raise ValueError(f"there is no residency policy {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name]


def layer_row(tables: Tables, layer: jax.Array | int) -> Tables:
    """One layer's tables."""
    return {name: jax.lax.dynamic_index_in_dim(table, layer, 0, keepdims=False) for name, table in tables.items()}


def with_row(tables: Tables, layer: jax.Array | int, row: Tables) -> Tables:
    """The tables with one layer's replaced."""
    return {name: jax.lax.dynamic_update_index_in_dim(table, row[name], layer, 0) for name, table in tables.items()}
