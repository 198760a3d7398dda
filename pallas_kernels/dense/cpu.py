"""Dense matmul on the CPU, with every row's bits independent of the rows around it.

XLA's CPU backend picks a matmul kernel by the sizes. On the machines measured, a product of few rows (2 to 48) adds up K in two or more blocks
when the weights are large, one of many rows adds it up in one, and a product of one row is another emitter still. So dots of few rows here have 4,
8, 16 or 32, a class within which each row's bits are the same; for some sizes of K that takes a split of K into equal parts, added in order
(`few_rows` finds out, on the machine it runs on). Many rows are one dot where a split of K gives the bits of that class (`same_order` finds out),
else a loop over tiles of 32 rows. A test holds every dot shape of several models to it: `tests/pallas_kernels/test_row_invariance.py`.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from jaxmoe import formats
from pallas_kernels.one_kernel import joined, one_kernel, part, put

ROW_TILES = (4, 8, 16, 32)
"""Row counts whose results agree bit for bit, in as many parts as `few_rows` says."""


def row_tile(rows: int, tiles: tuple[int, ...] = ROW_TILES) -> int:
    """The smallest allowed tile that covers `rows`, else the largest."""
    return next((t for t in tiles if rows <= t), tiles[-1])


def pad_rows(x: jax.Array, multiple: int) -> jax.Array:
    """Zero rows at the end, up to a multiple."""
    missing = -x.shape[0] % multiple
    return jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1)) if missing else x


def dense(
    x_TK: Float[Array, "T K"], w: Num[Array, "K N"] | Num[Array, "N K"], row_invariant: bool = True, transposed: bool = False
) -> Float[Array, "T N"]:
    """float32 product of float32 or bfloat16 rows with float32 or uint16-held bfloat16 weights (bfloat16 values are widened exactly)."""
    rows = x_TK.shape[0]
    w = formats.load(w, jnp.float32)
    x = x_TK.astype(jnp.float32)
    if not row_invariant:
        return _dot(x, w, transposed)
    n = w.shape[0 if transposed else 1]
    if n == 1:  # a product with one column is another emitter still, and of four rows a third
        more = ((0, _ONES - 1), (0, 0))
        return dense(x, jnp.pad(w, more if transposed else more[::-1]), transposed=transposed)[:, :1]
    if rows > ROW_TILES[-1] and (found := same_order(rows, x.shape[1], n, transposed)):
        parts, wide = found
        more = ((0, wide - n), (0, 0))
        return _dot_in_parts(x, jnp.pad(w, more if transposed else more[::-1]), transposed, parts)[:, :n]
    few = few_rows(x.shape[1], n, transposed)
    tile = row_tile(rows, few.tiles)
    tiles = pad_rows(x, tile).reshape(-1, tile, x.shape[1])
    if tiles.shape[0] == 1:
        return _dot_in_parts(tiles[0], w, transposed, few.parts)[:rows]
    return jax.lax.map(lambda t: _dot_in_parts(t, w, transposed, few.parts), tiles).reshape(-1, n)[:rows]


_ONES = 8
"""Columns in the place of one."""


def row_sum(x_TK: Float[Array, "T K"]) -> Float[Array, "T 1"]:
    """Sum of each row, in an order that depends on K alone: XLA's own reductions add in one that depends on the size of the whole array."""
    return _row_sums(x_TK, squared=False)


def row_sum_of_squares(x_TK: Float[Array, "T K"]) -> Float[Array, "T 1"]:
    """Sum of each row's squares, likewise."""
    return _row_sums(x_TK, squared=True)


_LANES = 64
"""In how many sums at most a row is added up: number k to sum k modulo this one or the largest power of two that divides K. Then halves are added."""


@one_kernel(static=("squared",))
def _row_sums(x_TK: Float[Array, "T K"], *, squared: bool) -> Float[Array, "T 1"]:
    rows, k = x_TK.shape
    lanes = math.gcd(k, _LANES)

    def row(t, sums_T):
        def step(i, sums):
            x = part(x_TK, (t, i * lanes), (1, lanes))
            return sums + (formats.rounded(x * x) if squared else x)

        sums = jax.lax.fori_loop(0, k // lanes, step, jnp.zeros((1, lanes), jnp.float32))
        return put(sums_T, joined(jnp.add, sums), (t, 0))

    return jax.lax.fori_loop(0, rows, row, jnp.zeros((rows, 1), jnp.float32))


def _dot(x: jax.Array, w: jax.Array, transposed: bool) -> jax.Array:
    return jax.lax.dot_general(x, w, (((1,), (int(transposed),)), ((), ())))


def _dot_in_parts(x: jax.Array, w: jax.Array, transposed: bool, parts: int) -> jax.Array:
    """The sum, in order, of the products of equal parts of K."""
    if parts == 1:
        return _dot(x, w, transposed)
    xs, ws = jnp.split(x, parts, axis=1), jnp.split(w, parts, axis=int(transposed))
    return functools.reduce(jnp.add, [_dot(a, b, transposed) for a, b in zip(xs, ws, strict=True)])


_WIDE = 64
"""Columns to which narrow weights are widened with zeros where that finds a kernel that adds up in the same order."""

PROBED_WEIGHTS = 2**24
"""Elements of the largest weights for which a probe is run. Larger ones go by tiles, in one part: with so many columns no size was seen to differ."""

_UNSPLIT = 384
"""Length of K below which no machine was seen to add up few rows in an order that depends on their number."""


class FewRows(NamedTuple):
    """How few rows are multiplied: into how many parts K is split, and which of `ROW_TILES` then have the same bits."""

    parts: int
    tiles: tuple[int, ...]


@functools.cache
def few_rows(k: int, n: int, transposed: bool = False) -> FewRows:
    """The fewest parts of K with which all tiles have the same bits; the largest tile alone where there are none.

    Runs the dots in question once on random values: which kernel runs depends on sizes alone.

    Args:
        k, n: sizes of the weights.
        transposed: whether they are [N, K].
    """
    if k < _UNSPLIT or k * n > PROBED_WEIGHTS:
        return FewRows(1, ROW_TILES)
    x, w = random_rows(ROW_TILES[-1], k, n, transposed)
    with jax.ensure_compile_time_eval():
        for parts in (p for p in _PARTS if k % p == 0):
            dot = jax.jit(functools.partial(_dot_in_parts, transposed=transposed, parts=parts))
            found = [np.concatenate([dot(rows, w) for rows in x.reshape(-1, tile, k)]).view(np.uint32) for tile in ROW_TILES]
            if all((bits == found[-1]).all() for bits in found):
                return FewRows(parts, ROW_TILES)
    return FewRows(1, ROW_TILES[-1:])


_PARTS = (1, 2, 4)
"""Into how many parts K may be split."""


def few_rows_dot(x: Float[Array, "M K"], w: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """One of `few_rows`' tiles times a matrix."""
    return _dot_in_parts(x, w, False, few_rows(*w.shape).parts)


def random_rows(rows: int, k: int, n: int, transposed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Rows and weights to try dots on."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, k), dtype=np.float32)
    return x, rng.standard_normal((n, k) if transposed else (k, n), dtype=np.float32)


@functools.cache
def same_order(rows: int, k: int, n: int, transposed: bool = False) -> tuple[int, int] | None:
    """Into how many parts K must be split, and how wide the weights must be, for one dot of all rows to have the bits of tiles.

    Runs the dots in question once on random values (which kernel runs depends on sizes alone) and compares all rows.

    Args:
        rows, k, n: sizes of the dot.
        transposed: whether the weights are [N, K].

    Returns:
        (parts, columns), or None when nothing tried gives the same bits.
    """
    if k * n > PROBED_WEIGHTS:
        return None
    x, w = random_rows(-(-rows // ROW_TILES[-1]) * ROW_TILES[-1], k, n, transposed)
    parts = few_rows(k, n, transposed).parts
    with jax.ensure_compile_time_eval():
        few = jax.jit(functools.partial(_dot_in_parts, transposed=transposed, parts=parts))
        expected = np.concatenate([few(t, w) for t in x.reshape(-1, ROW_TILES[-1], k)])[:rows]
        for wide in (n,) if n >= _WIDE else (n, _WIDE):
            more = ((0, wide - n), (0, 0))
            padded = np.pad(w, more if transposed else more[::-1])
            for parts in _PARTS:
                if k % parts == 0:
                    many = jax.jit(functools.partial(_dot_in_parts, transposed=transposed, parts=parts))
                    if (np.asarray(many(x[:rows], padded))[:, :n].view(np.uint32) == expected.view(np.uint32)).all():
                        return parts, wide
    return None
