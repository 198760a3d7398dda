"""Attention of single tokens on the CPU as one kernel: decoding's case.

By XLA's own matmuls a token is a dozen small kernels for each block of keys of each sequence, and each of them has a price. Here loops of our own
(`pallas_kernels.one_kernel`) read keys and values where they lie, with the additions in the order that `contiguous.attend_run` has them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxmoe import formats
from jaxmoe.cache.masks import first_seen, seen
from jaxmoe.spec import AttentionSpec
from pallas_kernels.one_kernel import joined, one_kernel, part, put

KEY_BLOCK = 128
"""Keys in one step of attention on the CPU. Part of what fixes the bits of a result."""

NONE_YET = -1e30
"""The largest score before the first key."""

_TERMS = (8, 4, 2, 1)
"""Channels, or keys, that are added in one step, as many as divide what there is."""

def plan_of(layer: Int[Array, ""], rows: Int[Array, "B"], positions: Int[Array, "B"], count: Int[Array, ""]) -> Int[Array, "B P"]:
    """Where tokens are: the layer, the cache row and the position of each, and how many of them there are.

    One array, so that each of these is used whatever the sizes (see `one_kernel`).
    """
    return jnp.stack([jnp.broadcast_to(p, rows.shape).astype(jnp.int32) for p in (layer, rows, positions, count)], axis=1)


@one_kernel()
def write_single(
    keys: Num[Array, "L B K C S"], values: Num[Array, "L B K S V"], k_BKC: Num[Array, "B K C"], v_BKV: Num[Array, "B K V"], plan_BP: Int[Array, "B P"]
) -> tuple[jax.Array, jax.Array]:
    """The cache with a key and a value of each token, in the cache's dtype, in the places that `plan_of` says: written in place, where whatever
    reads them goes before what is written next, as in a model's layers; else XLA copies them."""

    def token(b, caches):
        keys, values = caches
        layer, row, pos, _ = part(plan_BP, (b, 0), (1, 4))[0]
        k, v = (part(new, (b, 0, 0), (1, *new.shape[1:])) for new in (k_BKC, v_BKV))
        return put(keys, k[None, :, :, :, None], (layer, row, 0, 0, pos)), put(values, v[None, :, :, None], (layer, row, 0, pos, 0))

    return jax.lax.fori_loop(0, plan_BP[0, 3], token, (keys, values))


def attend_single(
    q_BKGC: Float[Array, "B K G C"],
    keys: Num[Array, "L B K C S"],
    values: Num[Array, "L B K S V"],
    plan_BP: Int[Array, "B P"],
    spec: AttentionSpec,
    sinks: Float[Array, "K G"] | None = None,
) -> Float[Array, "B K G V"]:
    """Attends from one token of each sequence, whose own key and value are in the cache.

    Args:
        q_BKGC: float32 queries, scaled.
        keys, values: the cache, float32 or bfloat16 held as uint16.
        plan_BP: of `plan_of`.
        spec: masks.
        sinks: float32, a logit per head that takes part in the softmax and adds nothing.

    Returns:
        float32 outputs, zeros for tokens that there aren't.
    """
    top = jnp.full(q_BKGC.shape[1:3], NONE_YET) if sinks is None else sinks
    return _attend(q_BKGC, keys, values, plan_BP, top, spec=spec)


@one_kernel(static=("spec",))
def _attend(q_BKGC, keys, values, plan_BP, top_KG, *, spec: AttentionSpec) -> Float[Array, "B K G V"]:
    """See `attend_single`; `top`: the largest score to begin with, `NONE_YET` or a sink's."""
    (tokens, heads, group, channels), width = q_BKGC.shape, values.shape[-1]

    def token(b, out):
        layer, row, pos, _ = part(plan_BP, (b, 0), (1, 4))[0]

        def head(h, out):
            q = part(q_BKGC, (b, h, 0, 0), (1, 1, group, channels))[0, 0]

            def block(j, carry):
                top, total, o = carry
                first = j * KEY_BLOCK

                def keys_of(i, n):
                    here = (layer, row, h, i, first)
                    return part(q, (0, i), (group, n)), formats.load(part(keys, here, (1, 1, 1, n, KEY_BLOCK))[0, 0, 0], jnp.float32)

                s = _sum_of_products(channels, keys_of, jnp.zeros((group, KEY_BLOCK)))
                s = jnp.where(seen(spec, pos, first + jnp.arange(KEY_BLOCK)), s, -jnp.inf)
                new_top = jnp.maximum(top, joined(jnp.maximum, s))
                p, keep = jnp.exp(s - new_top), jnp.exp(top - new_top)

                def values_of(i, n):
                    here = (layer, row, h, first + i, 0)
                    return part(p, (0, i), (group, n)), formats.load(part(values, here, (1, 1, 1, n, width))[0, 0, 0], jnp.float32)

                weighted = _sum_of_products(KEY_BLOCK, values_of, jnp.zeros((group, width)))
                return new_top, formats.rounded(total * keep) + joined(jnp.add, p), formats.rounded(o * keep) + weighted

            top = part(top_KG, (h, 0), (1, group)).T
            total = jnp.where(top == NONE_YET, 0.0, 1.0)
            blocks = first_seen(spec, pos) // KEY_BLOCK, pos // KEY_BLOCK + 1
            _, total, o = jax.lax.fori_loop(*blocks, block, (top, total, jnp.zeros((group, width))))
            return put(out, (o / total)[None, None], (b, h, 0, 0))

        return jax.lax.fori_loop(0, heads, head, out)

    return jax.lax.fori_loop(0, plan_BP[0, 3], token, jnp.zeros((tokens, heads, group, width)))


def _sum_of_products(count: int, terms, sums: Float[Array, "G N"]) -> Float[Array, "G N"]:
    """`sums` plus a [G, count] times b [count, N], one after another; `terms(i, n)` gives n columns of a and rows of b from i on."""
    step = next(t for t in _TERMS if count % t == 0)

    def some(i, sums):
        a, b = terms(i * step, step)
        for j in range(step):
            sums = sums + a[:, j : j + 1] * b[j : j + 1]
        return sums

    return jax.lax.fori_loop(0, count // step, some, sums)
