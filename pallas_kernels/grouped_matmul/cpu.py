"""Grouped matmul on the CPU: a loop over row tiles that exist, each a plain dot with its group's matrix.

`jax.lax.ragged_dot` computes every group for every row on this backend. Here a tile reads its group's matrix once and nothing else, an empty group
costs nothing, and each row's bits do not depend on the other rows (tiles have the sizes of `pallas_kernels.dense.cpu.ROW_TILES`). A tile that
overhangs its group computes rows of the next one with the wrong matrix; the next group's own tiles, which come later, write over them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxmoe import formats
from pallas_kernels.dense.cpu import ROW_TILES, row_tile


class Tiles(NamedTuple):
    """Row tiles in order: the pool id and first row of each; only the first `total` exist."""

    ids: Int[Array, "I"]
    starts: Int[Array, "I"]
    total: Int[Array, ""]


def tile_for(rows: int, groups: int) -> int:
    """A tile for groups of `rows / groups` rows on average: large enough to fill the matmul, small enough not to compute mostly padding."""
    return row_tile(min(max(rows // max(groups, 1), ROW_TILES[0]), ROW_TILES[-1]))


def make_tiles(group_ids: Int[Array, "G"], group_sizes: Int[Array, "G"], rows: int, tile: int) -> Tiles:
    """Cuts every group into tiles of `tile` rows; the last of a group may overhang."""
    groups = group_ids.shape[0]
    most = rows // tile + min(groups, rows)
    tiles_of_group = -(-group_sizes // tile)
    last = jnp.cumsum(tiles_of_group)
    first_row = jnp.cumsum(group_sizes) - group_sizes
    i = jnp.arange(most)
    group = jnp.minimum((last[None, :] <= i[:, None]).sum(1), groups - 1)
    within = i - (last - tiles_of_group)[group]
    return Tiles(group_ids[group], first_row[group] + within * tile, last[-1])


def _over_tiles(x: jax.Array, width: int, tiles: Tiles, tile: int, f: Callable) -> jax.Array:
    """Runs `f(rows [tile, K], pool id) -> [tile, width]` over the tiles that exist; float32 [M, width]."""
    m, k = x.shape
    x = jnp.pad(x.astype(jnp.float32), ((0, tile), (0, 0)))

    def body(i, y):
        rows = jax.lax.dynamic_slice(x, (tiles.starts[i], 0), (tile, k))
        return jax.lax.dynamic_update_slice(y, f(rows, tiles.ids[i]), (tiles.starts[i], 0))

    return jax.lax.fori_loop(0, tiles.total, body, jnp.zeros((m + tile, width), jnp.float32))[:m]


def swiglu_rows(
    x_D: Float[Array, "one D"], w_in_ZD2F: Num[Array, "Z D two F"], w_out_ZFD: Num[Array, "Z F D"], ids_A: Int[Array, "A"], act: Callable
) -> Float[Array, "A D"]:
    """One row through several matrices of the pool: decoding's case, with nothing to sort. Bits as in `grouped_swiglu`."""
    z, d, _, f = w_in_ZD2F.shape
    w_in = w_in_ZD2F.reshape(z, d, 2 * f)
    dtype = x_D.dtype
    rows = jnp.pad(x_D.astype(jnp.float32), ((0, ROW_TILES[0] - 1), (0, 0)))

    def expert(i, y):
        both = (rows @ _pick(w_in, ids_A[i])).astype(dtype)
        hidden = act(both[:, :f]) * both[:, f:]
        out = hidden.astype(jnp.float32) @ _pick(w_out_ZFD, ids_A[i])
        return jax.lax.dynamic_update_slice(y, out[:1], (i, 0))

    return jax.lax.fori_loop(0, ids_A.shape[0], expert, jnp.zeros((ids_A.shape[0], d), jnp.float32))


def _pick(pool: jax.Array, i: Int[Array, ""]) -> jax.Array:
    return formats.load(jax.lax.dynamic_index_in_dim(pool, i, 0, False), jnp.float32)


def grouped_matmul(
    x_MK: Float[Array, "M K"], w_ZKN: Num[Array, "Z K N"], group_ids: Int[Array, "G"], group_sizes: Int[Array, "G"]
) -> Float[Array, "M N"]:
    """See `api.grouped_matmul`."""
    tile = tile_for(x_MK.shape[0], group_ids.shape[0])
    tiles = make_tiles(group_ids, group_sizes, x_MK.shape[0], tile)
    return _over_tiles(x_MK, w_ZKN.shape[2], tiles, tile, lambda rows, i: rows @ _pick(w_ZKN, i))


def grouped_swiglu(
    x_MD: Float[Array, "M D"],
    w_in_ZD2F: Num[Array, "Z D two F"],
    w_out_ZFD: Num[Array, "Z F D"],
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    act: Callable,
) -> Float[Array, "M D"]:
    """See `api.grouped_swiglu`. In bfloat16 the gate, up and hidden values are rounded where a separate op would have rounded them."""
    z, d, _, f = w_in_ZD2F.shape
    w_in = w_in_ZD2F.reshape(z, d, 2 * f)
    dtype = x_MD.dtype
    tile = tile_for(x_MD.shape[0], group_ids.shape[0])
    tiles = make_tiles(group_ids, group_sizes, x_MD.shape[0], tile)

    def expert(rows, i):
        both = (rows @ _pick(w_in, i)).astype(dtype)
        hidden = act(both[:, :f]) * both[:, f:]
        return hidden.astype(jnp.float32) @ _pick(w_out_ZFD, i)

    return _over_tiles(x_MD, d, tiles, tile, expert)
