"""`dense`: rows of activations times one weight matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxmoe import formats
from pallas_kernels.dense import cpu
from pallas_kernels.dispatch import Kernels

MIN_ROWS = 8
"""Rows of an accelerator's dot: of fewer XLA makes a sum of products, and lays the weights of all layers out anew for it."""


def dense(
    x_TK: Float[Array, "T K"], w: Num[Array, "K N"] | Num[Array, "N K"], kernels: Kernels, out_dtype=None, transposed: bool = False
) -> Float[Array, "T N"]:
    """Multiplies activations with weights, summing in float32.

    Args:
        x_TK: float32 or bfloat16 activations.
        w: weights [K, N], or [N, K] when `transposed`; float32, or bfloat16 held as uint16.
        kernels: which implementation; on the CPU with `row_invariant` every row's bits are those of the row alone.
        out_dtype: dtype of the result; that of `x_TK` when None.
        transposed: whether w is [N, K]. A `w.T` handed in would be copied, and rounded differently, wherever XLA moves it out of a loop.

    Returns:
        The product, rounded once to `out_dtype`.
    """
    out_dtype = x_TK.dtype if out_dtype is None else out_dtype
    if kernels.backend == "cpu":
        return cpu.dense(x_TK, w, kernels.row_invariant, transposed).astype(out_dtype)
    precision = jax.lax.Precision.HIGHEST if x_TK.dtype == jnp.float32 else None
    contract = (((1,), (int(transposed),)), ((), ()))
    rows = x_TK.shape[0]
    if rows < MIN_ROWS:
        x_TK = jnp.pad(x_TK, ((0, MIN_ROWS - rows), (0, 0)))
    # Without the barrier XLA takes work on weights out of the loop over tokens: a copy of them, as long as the loop runs.
    x_TK, w = jax.lax.optimization_barrier((x_TK, w))
    y = jax.lax.dot_general(x_TK, formats.load(w, x_TK.dtype), contract, precision, preferred_element_type=jnp.float32)
    return y[:rows].astype(out_dtype)


def dense_heads(
    x_THK: Float[Array, "T H K"], w: Num[Array, "H K N"] | Num[Array, "H N K"], kernels: Kernels, transposed: bool = False
) -> Float[Array, "T H N"]:
    """`dense` for each head with its own matrix; in x's dtype.

    Args:
        x_THK: activations.
        w: weights [H, K, N], or [H, N, K] when `transposed`.
        kernels: as for `dense`.
        transposed: see `w`.
    """
    if kernels.backend == "cpu":
        y = jax.lax.map(lambda head: dense(head[0], head[1], kernels, transposed=transposed), (x_THK.swapaxes(0, 1), w))
        return y.swapaxes(0, 1)
    precision = jax.lax.Precision.HIGHEST if x_THK.dtype == jnp.float32 else None
    rows = x_THK.shape[0]
    if rows < MIN_ROWS:
        x_THK = jnp.pad(x_THK, ((0, MIN_ROWS - rows), (0, 0), (0, 0)))
    x_THK, w = jax.lax.optimization_barrier((x_THK, w))
    contract = (((2,), (2 if transposed else 1,)), ((1,), (0,)))
    y = jax.lax.dot_general(x_THK, formats.load(w, x_THK.dtype), contract, precision, preferred_element_type=jnp.float32)
    return y.swapaxes(0, 1)[:rows].astype(x_THK.dtype)


def row_sum(x_TK: Float[Array, "T K"], kernels: Kernels) -> Float[Array, "T 1"]:
    """Sum of each float32 row; on the CPU with `row_invariant`, in an order that depends on nothing but K."""
    if kernels.backend == "cpu" and kernels.row_invariant:
        return cpu.row_sum(x_TK)
    return x_TK.sum(-1, keepdims=True)


def row_sum_of_squares(x_TK: Float[Array, "T K"], kernels: Kernels) -> Float[Array, "T 1"]:
    """Sum of each float32 row's squares, as `row_sum` adds."""
    if kernels.backend == "cpu" and kernels.row_invariant:
        return cpu.row_sum_of_squares(x_TK)
    return row_sum(x_TK * x_TK, kernels)


def softmax(x_TN: Float[Array, "T N"], kernels: Kernels) -> Float[Array, "T N"]:
    """Softmax of each float32 row, summed by `row_sum`."""
    # Bounding the maximum changes nothing but what XLA's CPU backend can do: it hands a bare maximum of more than 4,096 values, with the exponential
    # after it, to a library whose exponential has other bits.
    top = jnp.maximum(x_TN.max(-1, keepdims=True), jnp.finfo(jnp.float32).min)
    e = jnp.exp(x_TN - top)
    return e / row_sum(e, kernels)
