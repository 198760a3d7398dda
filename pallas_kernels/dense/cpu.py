"""Dense matmul on the CPU by row tiles of fixed sizes.

XLA's CPU backend picks a matmul emitter by the number of rows, and emitters round differently: on the machines measured, 1 row and 64 or more
rows differ from all counts in between. Every dot here therefore has 4, 8, 16 or 32 rows, a class within which each row's bits are the same
(`tests/pallas_kernels/test_row_invariance.py` holds that for every dot shape, on the machine it runs on). Few rows take the small tiles, so that a
single token does not pay for thirty-two.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxmoe import formats

ROW_TILES = (4, 8, 16, 32)
"""Row counts whose results agree bit for bit."""

_UNROLL = 4


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
    tile = row_tile(rows)
    tiles = pad_rows(x, tile).reshape(-1, tile, x.shape[1])
    if tiles.shape[0] <= _UNROLL:
        out = [_dot(tiles[i], w, transposed) for i in range(tiles.shape[0])]
        return (out[0] if len(out) == 1 else jnp.concatenate(out))[:rows]
    return jax.lax.map(lambda t: _dot(t, w, transposed), tiles).reshape(-1, w.shape[0 if transposed else 1])[:rows]


def _dot(x: jax.Array, w: jax.Array, transposed: bool) -> jax.Array:
    return jax.lax.dot_general(x, w, (((1,), (int(transposed),)), ((), ())))


_ONES = 8


def row_sum(x_TK: Float[Array, "T K"]) -> Float[Array, "T 1"]:
    """Sum of each row as a tiled dot with ones: XLA's own reductions add in an order that depends on the size of the whole array."""
    return dense(x_TK, jnp.ones((x_TK.shape[1], _ONES), jnp.float32))[:, :1]
