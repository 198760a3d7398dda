"""How tokens and experts meet, where each device has its own tokens and its own experts.

All ways take the same arrays, so that a program with another way needs nothing moved (Tutel, arXiv:2206.03382, section 3). Each is a function

    exchange(bank, compute, x_TD, ids_TA, valid_T, experts, layout) -> (y_TAD, bank)

of a bank of the device's own experts, `compute(bank, x_MD, ids_M, valid_M) -> (y_MD, bank)`, which runs rows through one of them each, and the
device's tokens with the ids of their experts among all `experts`. It gives each token's result from each of its experts, in x's dtype, as this device
would have computed them itself (but for sums over `layout.expert_hidden`, which are left to the caller).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sharding.split import Exchange


def exchange_tokens(bank, compute, x_TD, ids_TA, valid_T, experts: int, layout):
    """Tokens travel to their experts' devices and results come back, by two all-to-alls; no token is ever dropped.

    A device has room for all the rows that another could send it.
    """
    n, (tokens, active) = layout.size(layout.experts), ids_TA.shape
    count = experts // n
    to, rows = jnp.where(valid_T[:, None], ids_TA // count, n).reshape(-1), tokens * active
    order = jnp.argsort(to, stable=True)
    start = jnp.searchsorted(to[order], jnp.arange(n))
    place = jnp.zeros(rows, jnp.int32).at[order].set(jnp.arange(rows, dtype=jnp.int32) - start[jnp.minimum(to[order], n - 1)].astype(jnp.int32))
    where = (to, place)
    x = jnp.zeros((n, rows, x_TD.shape[1]), x_TD.dtype).at[where].set(jnp.repeat(x_TD, active, axis=0), mode="drop")
    ids = jnp.full((n, rows), -1, jnp.int32).at[where].set((ids_TA % count).reshape(-1), mode="drop")
    x, ids = (jax.lax.all_to_all(t, layout.experts, 0, 0, tiled=True) for t in (x, ids))
    y, bank = compute(bank, x.reshape(n * rows, -1), jnp.maximum(ids, 0).reshape(-1), (ids >= 0).reshape(-1))
    y = jax.lax.all_to_all(y.reshape(n, rows, -1), layout.experts, 0, 0, tiled=True)
    back = y.at[where].get(mode="fill", fill_value=0)
    return back.reshape(tokens, active, -1), bank


def gather_tokens(bank, compute, x_TD, ids_TA, valid_T, experts: int, layout):
    """Every device sees the tokens of all, computes those of its experts, and gets its own tokens' results back by a scattered sum of which one
    term is not zero."""
    n, active = layout.size(layout.experts), ids_TA.shape[1]
    count = experts // n
    x, ids, valid = (jax.lax.all_gather(t, layout.experts, axis=0, tiled=True) for t in (x_TD, ids_TA, valid_T))
    ids = ids - jax.lax.axis_index(layout.experts) * count
    mine = (ids >= 0) & (ids < count) & valid[:, None]
    y, bank = compute(bank, jnp.repeat(x, active, axis=0), jnp.where(mine, ids, 0).reshape(-1), mine.reshape(-1))
    y = jax.lax.psum_scatter(y.reshape(*ids.shape, -1), layout.experts, scatter_dimension=0, tiled=True)
    return y, bank


EXCHANGES: dict[Exchange, Callable] = {"tokens": exchange_tokens, "gather": gather_tokens}
"""The ways by name."""
