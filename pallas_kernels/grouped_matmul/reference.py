"""The plain meaning of the grouped matmul: every group in turn, over all rows, masked. Slow; for tests and for backends without a kernel."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxmoe import formats


def row_groups(group_sizes: Int[Array, "G"], rows: int) -> Int[Array, "M"]:
    """The group of each sorted row; G for padding rows."""
    ends = jnp.cumsum(group_sizes)
    return jnp.searchsorted(ends, jnp.arange(rows), side="right")


def grouped_matmul(
    x_MK: Float[Array, "M K"], w_ZKN: Num[Array, "Z K N"], group_ids: Int[Array, "G"], group_sizes: Int[Array, "G"]
) -> Float[Array, "M N"]:
    """See `api.grouped_matmul`."""
    group = row_groups(group_sizes, x_MK.shape[0])

    def body(y, g):
        w = formats.load(jax.lax.dynamic_index_in_dim(w_ZKN, group_ids[g], 0, False), jnp.float32)
        out = jnp.dot(x_MK.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
        return jnp.where((group == g)[:, None], out, y), None

    y0 = jnp.zeros((x_MK.shape[0], w_ZKN.shape[2]), jnp.float32)
    return jax.lax.scan(body, y0, jnp.arange(group_ids.shape[0]))[0]


def grouped_swiglu(
    x_MD: Float[Array, "M D"],
    w_in_ZD2F: Num[Array, "Z D two F"],
    w_out_ZFD: Num[Array, "Z F D"],
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    act: Callable,
) -> Float[Array, "M D"]:
    """See `api.grouped_swiglu`."""
    z, d, _, f = w_in_ZD2F.shape
    both = grouped_matmul(x_MD, w_in_ZD2F.reshape(z, d, 2 * f), group_ids, group_sizes).astype(x_MD.dtype)
    hidden = (act(both[:, :f]) * both[:, f:]).astype(x_MD.dtype)
    return grouped_matmul(hidden, w_out_ZFD, group_ids, group_sizes)
