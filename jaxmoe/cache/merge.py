"""Attention over part of the keys, and the merging of such parts: results of disjoint sets of keys become that of their union, in any grouping.

A part is kept as (o, m, l): the largest score, the sum of exponentials over it, and the values weighted with them (DistAttention, arXiv:2401.02669;
online softmax, arXiv:1805.02867). Knows neither devices nor caches.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from jaxmoe import formats

NONE = -1e30
"""The largest score of no keys: finite, so that nothing minus nothing is a number."""


class Partial(NamedTuple):
    """Attributes: `m` float32 [...] the largest score, `l` float32 [...] the sum of exp(score - m), `o` float32 [..., V] the sum of values weighted
    with exp(score - m); not divided by l."""

    o: Float[Array, "... V"]
    m: Float[Array, "..."]
    l: Float[Array, "..."]


def nothing(shape: tuple[int, ...], width: int) -> Partial:
    """The result of no keys: merged with any other, it changes no bit of it."""
    return Partial(jnp.zeros((*shape, width)), jnp.full(shape, NONE), jnp.zeros(shape))


def of_sinks(sinks: Float[Array, "H"], like: Partial) -> Partial:
    """The result of a key whose score is `sinks` and whose value is zero, for partials whose last axis is the heads; to be merged in once."""
    m = jnp.broadcast_to(sinks.astype(jnp.float32), like.m.shape)
    return Partial(jnp.zeros_like(like.o), m, jnp.ones_like(m))


def merge_partials(a: Partial, b: Partial) -> Partial:
    """The result over the keys of both."""
    m = jnp.maximum(a.m, b.m)
    keep_a, keep_b = jnp.exp(a.m - m), jnp.exp(b.m - m)
    return Partial(a.o * keep_a[..., None] + b.o * keep_b[..., None], m, a.l * keep_a + b.l * keep_b)


def merge_all(parts: Partial) -> Partial:
    """Partials along a first axis, merged from the first to the last."""
    total = jax.tree.map(lambda x: x[0], parts)
    for i in range(1, parts.m.shape[0]):
        total = merge_partials(total, jax.tree.map(lambda x, i=i: x[i], parts))
    return total


def finish(part: Partial) -> Float[Array, "... V"]:
    """Attention's result, once all keys are in; zeros where a query has seen none."""
    return part.o / jnp.where(part.l == 0, 1.0, part.l)[..., None]


def packed(part: Partial) -> Float[Array, "... V2"]:
    """One array to send: o with m and l behind it."""
    return jnp.concatenate([part.o, part.m[..., None], part.l[..., None]], -1)


def unpacked(x: Float[Array, "... V2"]) -> Partial:
    """The inverse of `packed`."""
    return Partial(x[..., :-2], x[..., -2], x[..., -1])


def attend_block(
    q: Float[Array, "K m C"],
    k: Num[Array, "K C S"],
    v: Num[Array, "K S V"] | Num[Array, "K V S"],
    visible: Bool[Array, "m S"],
    scale: float,
    values_lie_as_keys: bool = False,
) -> Partial:
    """Rows of queries over one block of keys.

    Args:
        q: in the dtype that products are computed in.
        k, v: float32, bfloat16, or bfloat16 held as uint16.
        visible: which keys each row sees; it may be none.
        scale: of the scores.
        values_lie_as_keys: `v` is [K, V, S], as it is where values are the keys' first channels.

    Returns:
        Of shape [K, m].
    """
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    s = jnp.einsum("kmc,kcs->kms", q, formats.load(k, q.dtype), precision=exact, preferred_element_type=jnp.float32) * scale
    s = jnp.where(visible, s, -jnp.inf)
    m = jnp.maximum(s.max(-1), NONE)
    p = jnp.exp(s - m[..., None])
    how = "kms,kvs->kmv" if values_lie_as_keys else "kms,ksv->kmv"
    o = jnp.einsum(how, p.astype(q.dtype), formats.load(v, q.dtype), precision=exact, preferred_element_type=jnp.float32)
    return Partial(o, m, p.sum(-1))
