"""Grouped matmul: rows sorted by group, each group with its own matrix out of a flat pool.

A group is named by its id in the pool (an expert of a resident bank, or a slot of an expert cache), so that a cache costs the kernel nothing and
no `pool[layer]` is ever sliced out.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.dispatch import Kernels
from pallas_kernels.grouped_matmul import cpu, reference


def grouped_matmul(
    x_MK: Float[Array, "M K"],
    w_ZKN: Num[Array, "Z K N"],
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    kernels: Kernels,
) -> Float[Array, "M N"]:
    """`y[m] = x[m] @ w[group_ids[g(m)]]` for rows sorted by group.

    Args:
        x_MK: rows; the first `group_sizes[0]` belong to group 0, and so on. Rows past the sum are padding.
        w_ZKN: the pool: float32, or bfloat16 held as uint16.
        group_ids: which matrix of the pool each group uses.
        group_sizes: rows of each group; zeros are allowed and cost nothing.
        kernels: which implementation.

    Returns:
        float32 [M, N]; padding rows hold finite values of no meaning.
    """
    if kernels.backend == "cpu":
        return cpu.grouped_matmul(x_MK, w_ZKN, group_ids, group_sizes)
    return reference.grouped_matmul(x_MK, w_ZKN, group_ids, group_sizes)


def grouped_swiglu(
    x_MD: Float[Array, "M D"],
    w_in_ZD2F: Num[Array, "Z D two F"],
    w_out_ZFD: Num[Array, "Z F D"],
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    act: Callable,
    kernels: Kernels,
) -> Float[Array, "M D"]:
    """A gated feed-forward per group, in one pass: `(act(x @ w_in[:, 0]) * (x @ w_in[:, 1])) @ w_out`.

    Args:
        x_MD: rows sorted by group, float32 or bfloat16.
        w_in_ZD2F: pool of gate (index 0) and up (index 1) matrices.
        w_out_ZFD: pool of down matrices.
        group_ids, group_sizes: as in `grouped_matmul`.
        act: the gate's activation, elementwise.
        kernels: which implementation.

    Returns:
        float32 [M, D]; padding rows hold finite values of no meaning.
    """
    if kernels.backend == "cpu":
        return cpu.grouped_swiglu(x_MD, w_in_ZD2F, w_out_ZFD, group_ids, group_sizes, act)
    return reference.grouped_swiglu(x_MD, w_in_ZD2F, w_out_ZFD, group_ids, group_sizes, act).astype(jnp.float32)


def swiglu_rows(x_D, w_in_ZD2F, w_out_ZFD, ids_A: Int[Array, "A"], act: Callable, kernels: Kernels) -> Float[Array, "A D"]:
    """One token [1, D] through A matrices of the pool, float32 [A, D]: `grouped_swiglu` of A groups of one and the same row."""
    if kernels.backend == "cpu":
        return cpu.swiglu_rows(x_D, w_in_ZD2F, w_out_ZFD, ids_A, act)
    rows = jnp.repeat(x_D, ids_A.shape[0], axis=0)
    return grouped_swiglu(rows, w_in_ZD2F, w_out_ZFD, ids_A, jnp.ones_like(ids_A), act, kernels)
