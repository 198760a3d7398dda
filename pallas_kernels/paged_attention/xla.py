"""Paged attention in plain XLA, for the CPU and for what the kernels refuse: one sequence after another, over all pages of its page table at once.

A sequence's keys and values are gathered, so that a step needs memory for one sequence's pages beside the pool. Scores are float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.paged_attention.types import Pages, Partial, Queries, plain


def paged_attention(
    q_THC: Float[Array, "T H C"], pages: Pages, queries: Queries, scale: float, window: int | None = None, soft_cap: float | None = None
) -> Partial:
    """See `api.paged_attention`; before the sinks and the division."""
    n_rows, heads, _ = q_THC.shape
    width, most = pages.k.shape[2], min(queries.most, n_rows)
    at_key = jnp.arange(queries.page_table.shape[1] * width)

    def one(b, out: Partial) -> Partial:
        low = jnp.clip(queries.rows[b], 0, n_rows - most)
        row = low + jnp.arange(most)
        mine = (row >= queries.rows[b]) & (row < queries.rows[b] + queries.lengths[b])
        at_row = queries.first[b] + row - queries.rows[b]
        seen = _seen(queries, b, at_key, at_row, row, window) & mine[:, None]
        part = _attend(jax.lax.dynamic_slice_in_dim(q_THC, low, most), pages, queries, b, seen, scale, soft_cap)

        def put(kept, new):
            old = jax.lax.dynamic_slice_in_dim(kept, low, most)
            new = jnp.where(mine.reshape(-1, *[1] * (new.ndim - 1)), new, old)
            return jax.lax.dynamic_update_slice_in_dim(kept, new, low, 0)

        return jax.tree.map(put, out, part)

    nothing = Partial(
        jnp.zeros((n_rows, heads, pages.width_of_values)), jnp.full((n_rows, heads), -jnp.inf), jnp.zeros((n_rows, heads))
    )
    return jax.lax.fori_loop(0, queries.rows.shape[0], one, nothing)


def _seen(queries: Queries, b, at_key, at_row, row, window: int | None) -> jax.Array:
    """Which keys [S] of sequence b each row sees; [rows, S]."""
    first = queries.first[b]
    seen = at_key <= at_row[:, None]
    if queries.tree is not None:
        words, j = queries.tree[row], at_key - first
        held = (j >= 0) & (j < words.shape[1] * 32)
        j = jnp.where(held, j, 0)
        bit = (words[:, j // 32] >> (j % 32).astype(jnp.uint32)) & 1
        seen = (at_key < first) | (held & (bit == 1))
    if window is not None:
        seen &= at_key > at_row[:, None] - window
    return seen & (at_key < queries.keys[b])


def _attend(q, pages: Pages, queries: Queries, b, seen, scale: float, soft_cap: float | None) -> Partial:
    """Rows [t, H, C] over all keys of sequence b."""
    kv_heads, width = pages.k.shape[1:3]
    t, heads, c = q.shape
    used = jnp.arange(queries.page_table.shape[1]) * width < queries.keys[b]
    table = jnp.where(used, queries.page_table[b], queries.page_table[b, 0])
    there = seen.any(0)

    def held(leaf, scales=None):
        """[K, S, ...] of the sequence, zeros where no row sees anything."""
        x = jnp.moveaxis(plain(leaf[table], None if scales is None else scales[table]), 1, 0)
        x = x.reshape(x.shape[0], there.shape[0], *x.shape[3:])
        return jnp.where(there.reshape(1, -1, *[1] * (x.ndim - 2)), x, 0.0)

    keys = held(pages.k, pages.k_scales)
    values = keys[..., : pages.value_width] if pages.v is None else held(pages.v, pages.v_scales)
    q = q.astype(jnp.float32).reshape(t, kv_heads, heads // kv_heads, c)
    s = jnp.einsum("tkgc,ksc->tkgs", q, keys, precision="highest") * scale
    if soft_cap is not None:
        s = soft_cap * jnp.tanh(s / soft_cap)
    if pages.bias is not None:
        s = s + held(pages.bias)[:, None]
    s = jnp.where(seen[:, None, None], s, -jnp.inf)
    m = s.max(-1)
    p = jnp.where(s == -jnp.inf, 0.0, jnp.exp(s - jnp.where(m == -jnp.inf, 0.0, m)[..., None]))
    o = jnp.einsum("tkgs,ksv->tkgv", p, values, precision="highest")
    return Partial(o.reshape(t, heads, -1), m.reshape(t, heads), p.sum(-1).reshape(t, heads))
