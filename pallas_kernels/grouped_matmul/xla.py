"""Grouped matmul in plain XLA, for accelerators: a loop over tiles of rows, each a dot with the matrix it needs, sliced out of the pool by itself.

Operands stay bfloat16 where both of them are, and sums are float32. The pool is never reshaped: TPUs lay [D, 2, F] out otherwise than [D, 2F], so
that a reshape of the pool is a second pool. The loop goes over the tiles that have rows; where the loop has to have a known length, over as many as
there could be, and the last one is done again and again, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxmoe import formats
from jaxmoe.formats import ExpertLayout, Quantized
from pallas_kernels.dispatch import ROW_SLACK
from pallas_kernels.grouped_matmul.biases import Biases, of_group
from pallas_kernels.grouped_matmul.glu import Glu

TILE = ROW_SLACK
"""Rows of a tile, if there are so many."""

Pool = Num[Array, "Z ..."] | Quantized

_INTO_HIDDEN = {"d2f": "md,dcf->mcf", "2df": "md,cdf->mcf", "2fd": "md,cfd->mcf"}
_OUT_OF_HIDDEN = {"d2f": "mf,fd->md", "2df": "mf,fd->md", "2fd": "mf,df->md"}


def grouped_matmul(
    x_MK: Float[Array, "M K"], w: Pool, group_ids: Int[Array, "G"], group_sizes: Int[Array, "G"], known_length: bool, transposed: bool = False
) -> Float[Array, "M N"]:
    """See `api.grouped_matmul`.

    Args:
        known_length: no loop of a length that the compiler doesn't know; on a GPU such a loop reads its predicate back to the host every time.
        transposed: the layout is 'nk'.
    """
    equation = "mk,nk->mn" if transposed else "mk,kn->mn"

    def f(rows, i, _):
        return _dot(equation, rows, formats.entry(w, i))

    return _over_tiles(x_MK, w.shape[1] if transposed else w.shape[2], group_ids, group_sizes, f, known_length)


def grouped_swiglu(
    x_MD: Float[Array, "M D"],
    w_in: Pool,
    w_out: Pool,
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    glu: Glu,
    known_length: bool,
    starts: Int[Array, "G"] | None = None,
    into: Float[Array, "M D"] | None = None,
    layout: ExpertLayout = "d2f",
    biases: Biases | None = None,
) -> Float[Array, "M D"]:
    """See `api.grouped_swiglu`, and `grouped_matmul` for `known_length`."""

    def f(rows, i, g):
        return _swiglu(rows, formats.entry(w_in, i), formats.entry(w_out, i), glu, layout, *of_group(biases, g))

    return _over_tiles(x_MD, x_MD.shape[1], group_ids, group_sizes, f, known_length, starts, into)


def swiglu_rows(
    x_D: Float[Array, "one D"],
    w_in: Pool,
    w_out: Pool,
    ids_A: Int[Array, "A"],
    glu: Glu,
    layout: ExpertLayout = "d2f",
    biases: Biases | None = None,
) -> Float[Array, "A D"]:
    """See `api.swiglu_rows`."""

    def expert(_, scanned):
        i, own = scanned
        bias = (formats.load(b, jnp.float32) for b in own)
        return None, _swiglu(x_D, formats.entry(w_in, i), formats.entry(w_out, i), glu, layout, *bias)[0]

    return jax.lax.scan(expert, None, (ids_A, biases or ()))[1]


def _over_tiles(
    x: jax.Array, width: int, group_ids: jax.Array, group_sizes: jax.Array, f: Callable, known_length: bool,
    starts: jax.Array | None = None, into: jax.Array | None = None,
):  # fmt: skip
    """Runs `f(rows [tile, K], pool id, group) -> [tile, width]` over the tiles that the groups' rows make.

    Returns:
        float32 [M, width], other rows as in `into`.
    """
    rows, groups = x.shape[0], group_ids.shape[0]
    # A part of the groups is computed in tiles of the same size as all of them are, so that a row's bits don't tell which it was.
    m = rows if into is None else rows - ROW_SLACK
    tile, with_rows = min(TILE, m), min(groups, m)
    starts = jnp.cumsum(group_sizes) - group_sizes if starts is None else starts
    tiles = -(-group_sizes // tile)
    ends = jnp.cumsum(tiles)
    most = with_rows + (m - with_rows) // tile
    rounds = jnp.minimum(jnp.arange(most), jnp.maximum(ends[-1] - 1, 0))
    group = jnp.minimum(jnp.sum(ends[None, :] <= rounds[:, None], axis=1), groups - 1)  # the group of each round's tile
    low = starts[group] + (rounds - (ends - tiles)[group]) * tile
    high = jnp.minimum(low + tile, (starts + group_sizes)[group])
    first, ids = jnp.minimum(low, rows - tile), group_ids[group]

    def one_tile(j, y):
        at = first[j]
        out = f(jax.lax.dynamic_slice_in_dim(x, at, tile), ids[j], group[j])
        row = at + jnp.arange(tile)
        mine = (row >= low[j]) & (row < high[j])
        kept = jax.lax.dynamic_slice_in_dim(y, at, tile)
        return jax.lax.dynamic_update_slice_in_dim(y, jnp.where(mine[:, None], out, kept), at, 0)

    # A plain constant would be shared by all layers, and copied for each.
    y = jnp.full((rows, width), jnp.minimum(ends[-1], 0), jnp.float32) if into is None else into
    return jax.lax.fori_loop(0, most if known_length else ends[-1], one_tile, y)


def _swiglu(
    rows: jax.Array, w_in: jax.Array, w_out: jax.Array, glu: Glu, layout: ExpertLayout,
    b_in: jax.Array | None = None, b_out: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """One expert's feed-forward; in bfloat16 rounded where separate ops would round, a product and its bias being one."""
    both = _dot(_INTO_HIDDEN[layout], rows, w_in)
    both = (both if b_in is None else both + b_in).astype(rows.dtype)
    y = _dot(_OUT_OF_HIDDEN[layout], glu(both[:, 0], both[:, 1]), w_out)
    return y if b_out is None else y + b_out


def _dot(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """Summed in float32; in full precision unless both are bfloat16."""
    dtype = jnp.promote_types(x.dtype, w.dtype)
    exact = None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.einsum(equation, x.astype(dtype), w.astype(dtype), precision=exact, preferred_element_type=jnp.float32)
