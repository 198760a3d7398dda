"""Dense matmul on the CPU, with every row's bits independent of the rows around it.

XLA's CPU backend picks a matmul kernel by the sizes. On the machines measured, a product of few rows (2 to 48) adds up K in two or more blocks
when the weights are large, one of many rows adds it up in one, and a product of one row is another emitter still. So dots of few rows here have 4,
8, 16 or 32, a class within which each row's bits are the same. Many rows are one dot where a split of K into equal parts, added in order, gives
the bits of that class (`same_order` finds out, on the machine it runs on), else a loop over tiles of 32 rows. A test holds every dot shape of
several models to it: `tests/pallas_kernels/test_row_invariance.py`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from jaxmoe import formats

ROW_TILES = (4, 8, 16, 32)
"""Row counts whose results agree bit for bit."""


def row_tile(rows: int) -> int:
    """The smallest allowed tile that covers `rows`, else the largest."""
    return next((t for t in ROW_TILES if rows <= t), ROW_TILES[-1])


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
    tile = row_tile(rows)
    tiles = pad_rows(x, tile).reshape(-1, tile, x.shape[1])
    if tiles.shape[0] == 1:
        return _dot(tiles[0], w, transposed)[:rows]
    return jax.lax.map(lambda t: _dot(t, w, transposed), tiles).reshape(-1, n)[:rows]


_ONES = 8
"""Columns in the place of one."""


def row_sum(x_TK: Float[Array, "T K"]) -> Float[Array, "T 1"]:
    """Sum of each row as a dot with ones: XLA's own reductions add in an order that depends on the size of the whole array."""
    return dense(x_TK, jnp.ones((x_TK.shape[1], _ONES), jnp.float32))[:, :1]


def _dot(x: jax.Array, w: jax.Array, transposed: bool) -> jax.Array:
    return jax.lax.dot_general(x, w, (((1,), (int(transposed),)), ((), ())))


def _dot_in_parts(x: jax.Array, w: jax.Array, transposed: bool, parts: int) -> jax.Array:
    """The sum, in order, of the products of equal parts of K."""
    xs, ws = jnp.split(x, parts, axis=1), jnp.split(w, parts, axis=int(transposed))
    return functools.reduce(jnp.add, [_dot(a, b, transposed) for a, b in zip(xs, ws, strict=True)])


_WIDE = 64
"""Columns to which narrow weights are widened with zeros where that finds a kernel that adds up in the same order."""

_PROBED_WEIGHTS = 2**24
"""Elements of the largest weights for which `same_order` runs a probe; larger ones go by tiles."""


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
    if k * n > _PROBED_WEIGHTS:
        return None
    rng = np.random.default_rng(0)
    x = rng.standard_normal((-(-rows // ROW_TILES[-1]) * ROW_TILES[-1], k), dtype=np.float32)
    w = rng.standard_normal((n, k) if transposed else (k, n), dtype=np.float32)
    with jax.ensure_compile_time_eval():
        few = jax.jit(lambda x, w: _dot(x, w, transposed))
        expected = np.concatenate([few(t, w) for t in x.reshape(-1, ROW_TILES[-1], k)])[:rows]
        for wide in (n,) if n >= _WIDE else (n, _WIDE):
            more = ((0, wide - n), (0, 0))
            padded = np.pad(w, more if transposed else more[::-1])
            for parts in (1, 2, 4):
                if k % parts == 0:
                    many = jax.jit(functools.partial(_dot_in_parts, transposed=transposed, parts=parts))
                    if (np.asarray(many(x[:rows], padded))[:, :n].view(np.uint32) == expected.view(np.uint32)).all():
                        return parts, wide
    return None
