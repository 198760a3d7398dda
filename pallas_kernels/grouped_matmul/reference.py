"""The plain meaning of the grouped matmul: every group in turn, over all rows, masked, in float32. Slow; for tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxmoe import formats
from jaxmoe.formats import ExpertLayout, Quantized
from pallas_kernels.grouped_matmul.biases import Biases, add_to_rows, of_group
from pallas_kernels.grouped_matmul.glu import Glu

Pool = Num[Array, "Z ..."] | Quantized


def grouped_matmul(
    x_MK: Float[Array, "M K"],
    w: Pool,
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    starts: Int[Array, "G"] | None = None,
    into: Float[Array, "M N"] | None = None,
    transposed: bool = False,
) -> Float[Array, "M N"]:
    """See `api.grouped_matmul`, and `api.grouped_swiglu` for `starts` and `into`; `transposed`: the layout is 'nk'."""
    starts = jnp.cumsum(group_sizes) - group_sizes if starts is None else starts
    row = jnp.arange(x_MK.shape[0])

    def body(y, g):
        w_KN = formats.entry(w, group_ids[g]).astype(jnp.float32)
        out = jnp.dot(x_MK.astype(jnp.float32), w_KN.T if transposed else w_KN, precision=jax.lax.Precision.HIGHEST)
        mine = (row >= starts[g]) & (row < starts[g] + group_sizes[g])
        return jnp.where(mine[:, None], out, y), None

    width = w.shape[1] if transposed else w.shape[2]
    y0 = jnp.zeros((x_MK.shape[0], width), jnp.float32) if into is None else into
    return jax.lax.scan(body, y0, jnp.arange(group_ids.shape[0]))[0]


def grouped_swiglu(
    x_MD: Float[Array, "M D"],
    w_in: Pool,
    w_out: Pool,
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    glu: Glu,
    starts: Int[Array, "G"] | None = None,
    into: Float[Array, "M D"] | None = None,
    layout: ExpertLayout = "d2f",
    biases: Biases | None = None,
) -> Float[Array, "M D"]:
    """See `api.grouped_swiglu`."""
    starts = jnp.cumsum(group_sizes) - group_sizes if starts is None else starts
    row = jnp.arange(x_MD.shape[0])
    equation = {"d2f": "md,dcf->cmf", "2df": "md,cdf->cmf", "2fd": "md,cfd->cmf"}[layout]

    def body(hidden, g):
        w = formats.entry(w_in, group_ids[g]).astype(jnp.float32)
        both = jnp.einsum(equation, x_MD.astype(jnp.float32), w, precision="highest")
        for b_in in of_group(biases, g)[:1]:
            both = both + b_in[:, None]
        gate, up = both.astype(x_MD.dtype)
        mine = (row >= starts[g]) & (row < starts[g] + group_sizes[g])
        return jnp.where(mine[:, None], glu(gate, up).astype(x_MD.dtype), hidden), None

    _, f = formats.expert_widths(w_in.shape[1:], layout)
    hidden, _ = jax.lax.scan(body, jnp.zeros((x_MD.shape[0], f), x_MD.dtype), jnp.arange(group_ids.shape[0]))
    y = grouped_matmul(hidden, w_out, group_ids, group_sizes, starts, into, layout == "2fd")
    return y if biases is None else add_to_rows(y, biases[1], group_sizes, starts)
