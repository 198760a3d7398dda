"""Grouped matmul on the CPU: a loop over the groups that have rows, each a few plain dots of row tiles with the group's matrix.

`jax.lax.ragged_dot` computes every group for every row on this backend. Here a group reads its matrix once and nothing else, an empty group
costs nothing, and each row's bits do not depend on the other rows (tiles have sizes of `pallas_kernels.dense.cpu.ROW_TILES`, or others that
`same_order` found to have their bits). A tile that overhangs its group writes rows of the next one, wrong ones or zeros; the next group's own tiles,
which come later, write over them.

XLA's CPU backend multiplies with whole buffers only, so that picking a matrix out of the pool copies it. With few rows, where reading the matrices is
all there is to do, loops of our own read them in place (`in_place`), in the order of additions that dots of few rows have.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxmoe import formats
from jaxmoe.formats import Quantized
from pallas_kernels.dense.cpu import ROW_TILES, few_rows, row_tile, same_order
from pallas_kernels.dispatch import ROW_SLACK
from pallas_kernels.grouped_matmul.biases import Biases, add_to_rows, of_group
from pallas_kernels.grouped_matmul.glu import Glu
from pallas_kernels.grouped_matmul.in_place import in_place_parts, times

_LARGE_TILES = (64, 96, ROW_SLACK)
"""Rows of tiles for groups that mostly need several."""

_TILE_STEP, _KINDS = 16, 3
"""By how many rows tiles for groups that mostly need one differ, and how many of them a program has: each is compiled."""

_LARGE_WEIGHTS = 2**17
"""Elements of a matrix from which on XLA spreads a tile's dot over cores, so that larger tiles pay for the padding they bring."""


class Tiling(NamedTuple):
    """Rows that a tile may have, fewest first, and into how many parts K of each matrix is cut for a tile's dots to have the bits of small tiles'."""

    rows: tuple[int, ...]
    parts: tuple[int, ...]


def tiling(rows: int, groups: int, shapes: Sequence[tuple[int, ...]]) -> Tiling:
    """Tiles for groups of `rows / groups` rows on average: large enough to fill the matmul, small enough not to compute mostly padding.

    Args:
        rows, groups: how many there are.
        shapes: [K, N] of the matrices that a tile is multiplied with.
    """
    average = rows // groups
    if average > ROW_TILES[-1] and all(k * n >= _LARGE_WEIGHTS for k, n in shapes):
        # Evenly routed groups rarely need a second one, and each takes the smallest that covers it.
        least = -(-average // _TILE_STEP) * _TILE_STEP
        tiles = _LARGE_TILES if least > _LARGE_TILES[1] else tuple(range(max(least, _LARGE_TILES[0]), ROW_SLACK + 1, _TILE_STEP))[:_KINDS]
        found = {t: parts for t in tiles if (parts := _same_parts(t, shapes)) is not None}
        if found:
            largest = found[max(found)]
            return Tiling(tuple(t for t, parts in found.items() if parts == largest), largest)
    few, tiles = _few(shapes)
    return Tiling((row_tile(min(max(average, tiles[0]), tiles[-1]), tiles),), few)


def _few(shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The parts of K of each matrix for tiles of few rows, and the tiles that have the same bits with all of them."""
    found = [few_rows(k, n) for k, n in shapes]
    return tuple(f.parts for f in found), min((f.tiles for f in found), key=len)


def _same_parts(rows: int, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Parts of K with which a dot of these rows has the bits of small tiles' with every matrix as it is; None if there are none."""
    found = [same_order(rows, k, n) for k, n in shapes]
    parts = [f[0] for f, (_, n) in zip(found, shapes, strict=True) if f is not None and f[1] == n]
    return tuple(parts) if len(parts) == len(shapes) else None


def _one_row(shapes: Sequence[tuple[int, ...]]) -> Tiling:
    """The tiling of a single row: itself, where that has the bits of small tiles."""
    parts = _same_parts(1, shapes)
    if parts is not None:
        return Tiling((1,), parts)
    few, tiles = _few(shapes)
    return Tiling(tiles[:1], few)


def _over_groups(
    x: jax.Array, width: int, group_ids: jax.Array, group_sizes: jax.Array, pick: Callable, f: Callable, tiles: Sequence[int],
    starts: jax.Array | None = None, into: jax.Array | None = None,
):  # fmt: skip
    """Runs `f(rows [tile, K], pick(pool id, group)) -> [tile, width]` over the tiles that exist, of the groups that have rows; float32 [M, width].

    The last tile of a group may overhang.
    """
    m, k = x.shape
    tile = tiles[-1]
    x = x.astype(jnp.float32)
    if into is None:
        x = jnp.pad(x, ((0, tile), (0, 0)))
    starts = jnp.cumsum(group_sizes) - group_sizes if starts is None else starts
    with_rows = jnp.argsort(group_sizes == 0, stable=True)
    count = (group_sizes > 0).sum()

    def first_of(count: int):
        """`f` of a tile's first rows, the others zero."""
        return lambda rows, weights: jnp.pad(f(rows[:count], weights), ((0, tile - count), (0, 0)))

    def one_tile(at, left, weights, y):
        rows = jax.lax.dynamic_slice(x, (at, 0), (tile, k))
        covers = (left > jnp.asarray(tiles[:-1])).sum() if len(tiles) > 1 else 0
        return jax.lax.dynamic_update_slice(y, jax.lax.switch(covers, [first_of(t) for t in tiles], rows, weights), (at, 0))

    def one_group(j, y):
        g = with_rows[j]
        weights = pick(group_ids[g], g)
        if m <= tile and into is None:  # no group has a second tile
            return one_tile(starts[g], group_sizes[g], weights, y)
        count = -(-group_sizes[g] // tile)
        return jax.lax.fori_loop(0, count, lambda i, y: one_tile(starts[g] + i * tile, group_sizes[g] - i * tile, weights, y), y)

    # A plain constant would be shared by all layers, and copied for each.
    y = jnp.full((m + tile, width), jnp.minimum(count, 0), jnp.float32) if into is None else into
    return jax.lax.fori_loop(0, count, one_group, y)[:m]


def swiglu_rows(
    x_D: Float[Array, "one D"],
    w_in_ZD2F: Num[Array, "Z D two F"] | Quantized,
    w_out_ZFD: Num[Array, "Z F D"] | Quantized,
    ids_A: Int[Array, "A"],
    glu: Glu,
    biases: Biases | None = None,
    in_place: bool = True,
) -> Float[Array, "A D"]:
    """One row through several matrices of the pool: decoding's case, with nothing to sort. Bits as in `grouped_swiglu`."""
    _, d, _, f = w_in_ZD2F.shape
    w_in = _matrices(w_in_ZD2F)
    if in_place and (found := _read_in_place(w_in, w_out_ZFD, ids_A.shape[0], ids_A.shape[0])):
        x_AD = jnp.broadcast_to(x_D, (ids_A.shape[0], d))
        return _swiglu_in_place(x_AD, w_in, w_out_ZFD, ids_A, jnp.ones_like(ids_A), glu, found, None, biases)
    (tile,), (parts_in, parts_out) = _one_row(((d, 2 * f), (f, d)))
    rows = jnp.pad(x_D.astype(jnp.float32), ((0, tile - 1), (0, 0)))

    def expert(i, y):
        weights = _pick(w_in, ids_A[i], parts_in), _pick(w_out_ZFD, ids_A[i], parts_out)
        out = _swiglu(rows, weights, of_group(biases, i), glu, x_D.dtype)
        return jax.lax.dynamic_update_slice(y, out[:1], (i, 0))

    return jax.lax.fori_loop(0, ids_A.shape[0], expert, jnp.zeros((ids_A.shape[0], d), jnp.float32))


_FEW = 2
"""Rows for each group, of empty ones too, up to which matrices are read in place. With twice as many, dots in two threads are faster."""


def _read_in_place(w_in: jax.Array | Quantized, w_out: jax.Array | Quantized, rows: int, groups: int) -> tuple[int, int] | None:
    """The parts of K of each matrix for `_swiglu_in_place`; None where that doesn't do, or doesn't pay."""
    if isinstance(w_in, Quantized) or isinstance(w_out, Quantized) or rows > _FEW * groups:
        return None
    found = in_place_parts(*w_in.shape[1:]), in_place_parts(*w_out.shape[1:])
    return None if None in found else found  # type: ignore[return-value]


def _swiglu_in_place(
    x_MD: jax.Array, w_in_ZDN: jax.Array | Quantized, w_out_ZFD: jax.Array | Quantized, group_ids: jax.Array, group_sizes: jax.Array, glu: Glu,
    parts: tuple[int, int], starts: jax.Array | None, biases: Biases | None,
) -> Float[Array, "M D"]:  # fmt: skip
    """`_swiglu` of few rows of every group, each matrix read where it lies."""
    assert not isinstance(w_in_ZDN, Quantized) and not isinstance(w_out_ZFD, Quantized), "read in place is what needs no scales"
    both = times(x_MD, w_in_ZDN, group_ids, group_sizes, parts[0], starts)
    if biases is not None:
        both = add_to_rows(both, biases[0].reshape(biases[0].shape[0], -1), group_sizes, starts)
    both = both.astype(x_MD.dtype)
    f = both.shape[1] // 2
    hidden = glu(both[:, :f], both[:, f:])
    y = times(hidden, w_out_ZFD, group_ids, group_sizes, parts[1], starts)
    return y if biases is None else add_to_rows(y, biases[1], group_sizes, starts)


def _swiglu(rows: jax.Array, weights: tuple[list[jax.Array], list[jax.Array]], biases: Sequence[jax.Array], glu: Glu, dtype) -> jax.Array:
    """One expert's feed-forward of a tile; gate, up and hidden values are rounded to `dtype`. `biases`: [2, F] and [D], or none."""
    both = _plus(_dot(rows, weights[0]), *biases[:1]).astype(dtype)
    f = both.shape[1] // 2
    hidden = glu(both[:, :f], both[:, f:])
    return _plus(_dot(hidden.astype(jnp.float32), weights[1]), *biases[1:])


def _plus(sums: jax.Array, *bias: jax.Array) -> jax.Array:
    """Sums and then a bias, if there is one."""
    return sums + bias[0].reshape(-1) if bias else sums


def _matrices(pool: jax.Array | Quantized) -> jax.Array | Quantized:
    """A pool [Z, D, 2, F] as matrices [Z, D, 2F]."""
    flat = jax.tree.map(lambda leaf: leaf.reshape(*leaf.shape[:2], -1), pool)
    return dataclasses.replace(flat, axis=-2) if isinstance(flat, Quantized) else flat


def _pick(pool: jax.Array | Quantized, i: Int[Array, ""], parts: int = 1) -> list[jax.Array]:
    """One matrix [K, N] of the pool, cut into parts of K."""
    if isinstance(pool, Quantized):
        return jnp.split(formats.entry(pool, i), parts)
    _, k, n = pool.shape
    sizes = (1, k // parts, n)
    return [formats.load(jax.lax.dynamic_slice(pool, (i, at, 0), sizes)[0], jnp.float32) for at in range(0, k, k // parts)]


def _dot(rows: jax.Array, weights: list[jax.Array]) -> jax.Array:
    """Rows times a matrix in parts, added in order."""
    return functools.reduce(jnp.add, [x @ w for x, w in zip(jnp.split(rows, len(weights), axis=1), weights, strict=True)])


def grouped_matmul(
    x_MK: Float[Array, "M K"], w_ZKN: Num[Array, "Z K N"] | Quantized, group_ids: Int[Array, "G"], group_sizes: Int[Array, "G"]
) -> Float[Array, "M N"]:
    """See `api.grouped_matmul`."""
    tiles, (parts,) = tiling(x_MK.shape[0], group_ids.shape[0], (w_ZKN.shape[1:],))
    return _over_groups(x_MK, w_ZKN.shape[2], group_ids, group_sizes, lambda i, _: _pick(w_ZKN, i, parts), _dot, tiles)


def grouped_swiglu(
    x_MD: Float[Array, "M D"],
    w_in_ZD2F: Num[Array, "Z D two F"] | Quantized,
    w_out_ZFD: Num[Array, "Z F D"] | Quantized,
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    glu: Glu,
    starts: Int[Array, "G"] | None = None,
    into: Float[Array, "M D"] | None = None,
    biases: Biases | None = None,
    in_place: bool = True,
) -> Float[Array, "M D"]:
    """See `api.grouped_swiglu`. In bfloat16 the gate, up and hidden values are rounded where a separate op would have rounded them.

    `in_place`: of `Kernels`.
    """
    _, d, _, f = w_in_ZD2F.shape
    w_in = _matrices(w_in_ZD2F)
    rows = x_MD.shape[0] - (0 if into is None else ROW_SLACK)
    if in_place and (found := _read_in_place(w_in, w_out_ZFD, rows, group_ids.shape[0])):
        y = _swiglu_in_place(x_MD[:rows], w_in, w_out_ZFD, group_ids, group_sizes, glu, found, starts, biases)
        if into is None:
            return y
        assert starts is not None, "`starts` and `into` come together"
        first = jnp.where(group_sizes > 0, starts, rows).min()  # of those that have rows
        y = jnp.where(jnp.arange(rows)[:, None] < first, into[:rows], y)
        return jax.lax.dynamic_update_slice(into, y, (0, 0))
    tiles, (parts_in, parts_out) = tiling(rows, group_ids.shape[0], ((d, 2 * f), (f, d)))

    def pick(i, g):
        return (_pick(w_in, i, parts_in), _pick(w_out_ZFD, i, parts_out)), of_group(biases, g)

    def expert(rows, picked):
        weights, own = picked
        return _swiglu(rows, weights, own, glu, x_MD.dtype)

    return _over_groups(x_MD, d, group_ids, group_sizes, pick, expert, tiles, starts, into)
