"""ARC (Megiddo and Modha, FAST 2003), for steps that ask for sets; and Fate's cache, which is ARC with all experts of the first layers resident.

ARC holds experts that were used once lately (T1) apart from those used more often (T2), remembers as many that it let go (B1, B2), and moves the
border p between the two by which of the ghosts are asked for again. The published algorithm takes one request at a time. A step here asks for
several at once: all of them are looked up before any is moved, p moves by all ghosts that were hit, and as many leave as there is too much. With one
request a step that is the published algorithm, request by request.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxmoe.residency.counts import no_stamps
from jaxmoe.residency.policy import Keep, Knowledge, Policy, Shape, Tables

OUT, T1, T2, B1, B2 = range(5)
SHALLOW = 3
"""Layers whose experts Fate keeps altogether. Source: Fate (arXiv 2502.12224), its setting for Qwen1.5-MoE."""


def _init(shape: Shape, knowledge: Knowledge) -> Tables:
    return no_stamps(shape) | {
        "list": jnp.full((shape.layers, shape.experts), OUT, jnp.int32),
        "border": jnp.zeros(shape.layers, jnp.float32),
        "slots": jnp.asarray(shape.slots, jnp.int32),
    }


def _touch(row: Tables, used: Bool[Array, "S E"], high: Bool[Array, "S E"]) -> Tables:
    if used.shape[0] == 1:
        return _step(row, used[0])
    return jax.lax.scan(lambda row, need: (_step(row, need), None), row, used)[0]


def _step(row: Tables, need: Bool[Array, "E"]) -> Tables:
    """One step. A step that asks for nothing changes nothing."""
    slots, was = row["slots"], row["list"]
    t1, t2, b1, b2 = (was == which for which in (T1, T2, B1, B2))
    ghosts1, ghosts2, n1, n2 = (members.sum().astype(jnp.float32) for members in (need & b1, need & b2, b1, b2))
    border = jnp.minimum(slots * 1.0, row["border"] + ghosts1 * jnp.maximum(1.0, n2 / jnp.maximum(n1, 1.0)))
    border = jnp.maximum(0.0, border - ghosts2 * jnp.maximum(1.0, n1 / jnp.maximum(n2, 1.0)))
    clock = row["clock"] + need.any()
    stamp = jnp.where(need, clock, row["stamp"])

    new1 = (t1 & ~need) | (need & (was == OUT))
    new2 = t2 | (need & (was != OUT))
    over = jnp.maximum(0, new1.sum() + new2.sum() - slots)
    old1, old2 = (t1 & ~need).sum(), (t2 & ~need).sum()
    # As long as T1 is longer than the border its oldest goes; at the border itself, when a ghost of T2 is asked for.
    above = jnp.ceil(old1 - border) + jnp.where((ghosts2 > 0) & (old1 > 0) & (old1 == border), 1, 0)
    from1 = jnp.clip(above.astype(jnp.int32), jnp.maximum(0, over - old2), jnp.minimum(over, old1))
    more = jnp.maximum(0, over - old1 - old2)  # the step asks for more than there are slots: of those, too, some must go
    needed1 = jnp.minimum(more, new1.sum() - old1)
    out1 = new1 & (_rank(new1, need, stamp) < from1 + jnp.where(from1 == old1, needed1, 0))
    out2 = new2 & (_rank(new2, need, stamp) < over - from1 - needed1)
    new1, new2 = new1 & ~out1, new2 & ~out2
    ghost1, ghost2 = (b1 & ~need) | out1, (b2 & ~need) | out2
    none = jnp.zeros_like(need)
    ghost1 = ghost1 & (_rank(ghost1, none, stamp) >= ghost1.sum() - jnp.maximum(0, slots - new1.sum()))
    room2 = jnp.maximum(0, 2 * slots - new1.sum() - new2.sum() - ghost1.sum())
    ghost2 = ghost2 & (_rank(ghost2, none, stamp) >= ghost2.sum() - room2)
    now = jnp.where(new1, T1, jnp.where(new2, T2, jnp.where(ghost1, B1, jnp.where(ghost2, B2, OUT))))
    return row | {"clock": clock, "stamp": stamp, "list": now, "border": border}


def _rank(members: Bool[Array, "E"], protected: Bool[Array, "E"], stamp) -> Array:
    """Each member's place in the order in which they go: those that are not protected first, the oldest first, of equal ones the last."""
    i = jnp.arange(members.shape[0])
    older = (stamp[None, :] < stamp[:, None]) | ((stamp[None, :] == stamp[:, None]) & (i[None, :] > i[:, None]))
    before = (~protected[None, :] & protected[:, None]) | ((protected[None, :] == protected[:, None]) & older)
    return jnp.sum(before & members[None, :], axis=1)


def _keep(row: Tables) -> Keep:
    return ((row["list"] == T1) | (row["list"] == T2)).astype(jnp.float32), row["stamp"]


def shallow_first(total: int, layers: int, experts: int, active: int) -> tuple[int, ...]:
    """All experts of the first `SHALLOW` layers, or of as many as leave every other layer its active ones; the rest shared out evenly.

    Source: Fate, its shallow-favouring cache.
    """
    full = min(SHALLOW, layers)
    while full > 0 and total - full * experts < (layers - full) * active:
        full -= 1
    rest, deep = min(total - full * experts, (layers - full) * experts), layers - full
    return (experts,) * full + tuple(rest // deep + (i < rest % deep) for i in range(deep))


ARC = Policy("arc", _init, _touch, _keep)
FATE = Policy("fate", _init, _touch, _keep, allocate=shallow_first)
