"""The plain meaning of the grouped matmul: every group in turn, over all rows, masked. Slow; for tests and for backends without a kernel."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxmoe import formats


def grouped_matmul(
    x_MK: Float[Array, "M K"],
    w_ZKN: Num[Array, "Z K N"],
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    starts: Int[Array, "G"] | None = None,
    into: Float[Array, "M N"] | None = None,
) -> Float[Array, "M N"]:
    """See `api.grouped_matmul`, and `api.grouped_swiglu` for `starts` and `into`."""
    starts = jnp.cumsum(group_sizes) - group_sizes if starts is None else starts
    row = jnp.arange(x_MK.shape[0])

    def body(y, g):
        w = formats.load(jax.lax.dynamic_index_in_dim(w_ZKN, group_ids[g], 0, False), jnp.float32)
        out = jnp.dot(x_MK.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
        mine = (row >= starts[g]) & (row < starts[g] + group_sizes[g])
        return jnp.where(mine[:, None], out, y), None

    y0 = jnp.zeros((x_MK.shape[0], w_ZKN.shape[2]), jnp.float32) if into is None else into
    return jax.lax.scan(body, y0, jnp.arange(group_ids.shape[0]))[0]


def grouped_swiglu(
    x_MD: Float[Array, "M D"],
    w_in_ZD2F: Num[Array, "Z D two F"],
    w_out_ZFD: Num[Array, "Z F D"],
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    act: Callable,
    starts: Int[Array, "G"] | None = None,
    into: Float[Array, "M D"] | None = None,
) -> Float[Array, "M D"]:
    """See `api.grouped_swiglu`."""
    z, d, _, f = w_in_ZD2F.shape
    both = grouped_matmul(x_MD, w_in_ZD2F.reshape(z, d, 2 * f), group_ids, group_sizes, starts).astype(x_MD.dtype)
    hidden = (act(both[:, :f]) * both[:, f:]).astype(x_MD.dtype)
    return grouped_matmul(hidden, w_out_ZFD, group_ids, group_sizes, starts, into)
