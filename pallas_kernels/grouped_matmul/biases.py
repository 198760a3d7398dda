"""Biases of a gated feed-forward per group: held by group, added in float32 to the float32 sums of each matmul."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxmoe import formats

Biases = tuple[Num[Array, "G two F"], Num[Array, "G D"]]
"""Of gate (0) and up (1), and of the output; float32, or bfloat16 held as uint16."""


def of_group(biases: Biases | None, group: Int[Array, ""]) -> tuple[jax.Array, ...]:
    """`([2, F], [D])` of one group in float32, or `()`: what follows adds as many as there are."""
    return tuple(formats.load(jax.lax.dynamic_index_in_dim(b, group, 0, keepdims=False), jnp.float32) for b in biases or ())


def add_to_rows(
    y_MD: Float[Array, "M D"], b_out: Num[Array, "G D"], group_sizes: Int[Array, "G"], starts: Int[Array, "G"] | None
) -> Float[Array, "M D"]:
    """The rows of each group with its bias, other rows as they are. `starts`: see `api.grouped_swiglu`."""
    starts = jnp.cumsum(group_sizes) - group_sizes if starts is None else starts
    row = jnp.arange(y_MD.shape[0])[:, None]
    mine_MG = (row >= starts) & (row < starts + group_sizes)
    return jnp.where(mine_MG.any(1)[:, None], y_MD + formats.load(b_out[mine_MG.argmax(1)], jnp.float32), y_MD)
