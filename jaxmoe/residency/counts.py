"""What most policies count: when each expert was last used, and how often, with decay or without. Then LRU, LFU with decay, and a static profile."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmoe.residency.policy import DECAY, UNTOLD, Keep, Knowledge, Policy, Shape, Tables, same_row


def no_stamps(shape: Shape, knowledge: Knowledge = UNTOLD) -> Tables:
    """No step yet, and no expert used in any."""
    return {"clock": jnp.zeros(shape.layers, jnp.int32), "stamp": jnp.full((shape.layers, shape.experts), -1, jnp.int32)}


def stamp(row: Tables, used: Bool[Array, "S E"], high: Bool[Array, "S E"] | None = None) -> Tables:
    """The step in which each expert was last used."""
    active = used.any(1)
    step = row["clock"] + jnp.cumsum(active, dtype=jnp.int32)
    last = jnp.max(jnp.where(used, step[:, None], -1), axis=0)
    return row | {"clock": step[-1], "stamp": jnp.maximum(row["stamp"], last)}


def no_counts(shape: Shape, knowledge: Knowledge = UNTOLD) -> Tables:
    """No stamps, and counts of zero."""
    return no_stamps(shape) | {"count": jnp.zeros((shape.layers, shape.experts), jnp.float32)}


def count(row: Tables, used: Bool[Array, "S E"], high: Bool[Array, "S E"] | None = None) -> Tables:
    """Uses, each worth `DECAY` to the number of steps since."""
    steps = jnp.cumsum(used.any(1), dtype=jnp.int32)
    if used.shape[0] == 1:
        new = jnp.where(steps[0] > 0, row["count"] * DECAY + used[0], row["count"])
    else:
        age = (steps[-1] - steps).astype(jnp.float32)
        new = row["count"] * DECAY ** steps[-1].astype(jnp.float32) + jnp.sum(jnp.where(used, (DECAY**age)[:, None], 0.0), axis=0)
    return stamp(row, used) | {"count": new}


def rate(tables: Tables) -> Float[Array, "..."]:
    """Each expert's share of recent steps, never quite zero: what a count says about the next step where nothing better is known."""
    return jnp.clip(tables["count"] * (1 - DECAY), 1e-3, 1.0)


def keep_recent(row: Tables) -> Keep:
    """The last used stays."""
    return row["stamp"].astype(jnp.float32), row["stamp"]


def keep_frequent(row: Tables) -> Keep:
    """The most used stays; ties, and there are many at few slots, go to the more recently used."""
    return row["count"], row["stamp"]


def _profile(shape: Shape, knowledge: Knowledge) -> Tables:
    return {"profile": jnp.array(knowledge.profile, jnp.float32)}


def _keep_profile(row: Tables) -> Keep:
    return row["profile"], jnp.zeros(row["profile"].shape, jnp.int32)


LRU = Policy("lru", no_stamps, stamp, keep_recent)
LFU = Policy("lfu", no_counts, count, keep_frequent)
STATIC = Policy("static", _profile, same_row, _keep_profile, bypass=True, needs=("profile",))
