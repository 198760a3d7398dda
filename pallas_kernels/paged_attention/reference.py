"""The plain meaning of paged attention: one query after another, over all keys that its page table could hold, in float32. Slow; for tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.paged_attention.types import Pages, Partial, Queries, plain


def paged_attention(
    q_THC: Float[Array, "T H C"], pages: Pages, queries: Queries, scale: float, window: int | None = None, soft_cap: float | None = None
) -> Partial:
    """See `api.paged_attention`; before the sinks and the division."""
    _, kv_heads, width, _ = pages.k.shape
    n_rows, heads, _ = q_THC.shape
    group, most_keys = heads // kv_heads, queries.page_table.shape[1] * width
    at = jnp.arange(most_keys)

    def row(t):
        mine = (t >= queries.rows) & (t < queries.rows + queries.lengths)
        b = jnp.argmax(mine)
        table = queries.page_table[b]
        first, i = queries.first[b], t - queries.rows[b]
        seen = at <= first + i
        if queries.tree is not None:
            j = jnp.clip(at - first, 0, queries.tree.shape[1] * 32 - 1)
            bit = (queries.tree[t][j // 32] >> (j % 32).astype(jnp.uint32)) & 1
            seen = (at < first) | ((bit == 1) & (at - first < queries.tree.shape[1] * 32))
        seen &= mine.any() & (at < queries.keys[b])
        if window is not None:
            seen &= at > first + i - window

        def held(leaf, scales=None):
            """[K, S, ...] of the sequence, zeros where nothing is seen, whatever lies there."""
            leaf = leaf[jnp.where(jnp.arange(len(table)) * width < queries.keys[b], table, 0)]
            x = plain(leaf, None if scales is None else scales[table])
            x = jnp.moveaxis(x, 1, 0).reshape(x.shape[1], most_keys, *x.shape[3:])
            return jnp.where(seen.reshape(1, -1, *[1] * (x.ndim - 2)), x, 0.0)

        keys = held(pages.k, pages.k_scales)
        values = keys[..., : pages.value_width] if pages.v is None else held(pages.v, pages.v_scales)
        q = q_THC[t].astype(jnp.float32).reshape(kv_heads, group, -1)
        s = jnp.einsum("kgc,ksc->kgs", q, keys, precision="highest") * scale
        if soft_cap is not None:
            s = soft_cap * jnp.tanh(s / soft_cap)
        if pages.bias is not None:
            s = s + held(pages.bias)[:, None]
        s = jnp.where(seen, s, -jnp.inf)
        m = s.max(-1)
        p = jnp.where(s == -jnp.inf, 0.0, jnp.exp(s - jnp.where(m == -jnp.inf, 0.0, m)[..., None]))
        o = jnp.einsum("kgs,ksv->kgv", p, values, precision="highest")
        return o.reshape(heads, -1), m.reshape(heads), p.sum(-1).reshape(heads)

    return Partial(*jax.lax.map(row, jnp.arange(n_rows)))
