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
from pallas_kernels.dispatch import ROW_SLACK

TILE = ROW_SLACK
"""Rows of a tile, if there are so many."""


def grouped_matmul(
    x_MK: Float[Array, "M K"], w_ZKN: Num[Array, "Z K N"], group_ids: Int[Array, "G"], group_sizes: Int[Array, "G"], known_length: bool
) -> Float[Array, "M N"]:
    """See `api.grouped_matmul`.

    Args:
        known_length: no loop of a length that the compiler doesn't know; on a GPU such a loop reads its predicate back to the host every time.
    """

    def f(rows, i):
        return _dot("mk,kn->mn", rows, _pick(w_ZKN, i))

    return _over_tiles(x_MK, w_ZKN.shape[2], group_ids, group_sizes, f, known_length)


def grouped_swiglu(
    x_MD: Float[Array, "M D"],
    w_in_ZD2F: Num[Array, "Z D two F"],
    w_out_ZFD: Num[Array, "Z F D"],
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    act: Callable,
    known_length: bool,
    starts: Int[Array, "G"] | None = None,
    into: Float[Array, "M D"] | None = None,
) -> Float[Array, "M D"]:
    """See `api.grouped_swiglu`, and `grouped_matmul` for `known_length`."""

    def f(rows, i):
        return _swiglu(rows, _pick(w_in_ZD2F, i), _pick(w_out_ZFD, i), act)

    return _over_tiles(x_MD, x_MD.shape[1], group_ids, group_sizes, f, known_length, starts, into)


def swiglu_rows(
    x_D: Float[Array, "one D"], w_in_ZD2F: Num[Array, "Z D two F"], w_out_ZFD: Num[Array, "Z F D"], ids_A: Int[Array, "A"], act: Callable
) -> Float[Array, "A D"]:
    """See `api.swiglu_rows`."""

    def expert(_, i):
        return None, _swiglu(x_D, _pick(w_in_ZD2F, i), _pick(w_out_ZFD, i), act)[0]

    return jax.lax.scan(expert, None, ids_A)[1]


def _over_tiles(
    x: jax.Array, width: int, group_ids: jax.Array, group_sizes: jax.Array, f: Callable, known_length: bool,
    starts: jax.Array | None = None, into: jax.Array | None = None,
):  # fmt: skip
    """Runs `f(rows [tile, K], pool id) -> [tile, width]` over the tiles that the groups' rows make; float32 [M, width], other rows as in `into`."""
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
        out = f(jax.lax.dynamic_slice_in_dim(x, at, tile), ids[j])
        row = at + jnp.arange(tile)
        mine = (row >= low[j]) & (row < high[j])
        kept = jax.lax.dynamic_slice_in_dim(y, at, tile)
        return jax.lax.dynamic_update_slice_in_dim(y, jnp.where(mine[:, None], out, kept), at, 0)

    # A plain constant would be shared by all layers, and copied for each.
    y = jnp.full((rows, width), jnp.minimum(ends[-1], 0), jnp.float32) if into is None else into
    return jax.lax.fori_loop(0, most if known_length else ends[-1], one_tile, y)


def _swiglu(rows: jax.Array, w_in_D2F: jax.Array, w_out_FD: jax.Array, act: Callable) -> jax.Array:
    """One expert's feed-forward; in bfloat16 rounded where separate ops would round."""
    both = _dot("md,dcf->mcf", rows, w_in_D2F).astype(rows.dtype)
    return _dot("mf,fd->md", act(both[:, 0]) * both[:, 1], w_out_FD)


def _pick(pool: jax.Array, i: Int[Array, ""]) -> jax.Array:
    """One entry of the pool, ready for a dot."""
    leaf = jax.lax.dynamic_index_in_dim(pool, i, 0, keepdims=False)
    return formats.load(leaf, jnp.bfloat16 if leaf.dtype == jnp.uint16 else leaf.dtype)


def _dot(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """Summed in float32; in full precision unless both are bfloat16."""
    dtype = jnp.promote_types(x.dtype, w.dtype)
    exact = None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.einsum(equation, x.astype(dtype), w.astype(dtype), precision=exact, preferred_element_type=jnp.float32)
