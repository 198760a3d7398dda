"""Grouped matmul: rows sorted by group, each group with its own matrix out of a flat pool.

A group is named by its id in the pool (an expert of a resident bank, or a slot of an expert cache), so that a cache costs the kernel nothing and
no `pool[layer]` is ever sliced out.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.dispatch import ROW_SLACK, Kernels
from pallas_kernels.grouped_matmul import cpu, reference, xla


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
        float32 [M, N]; padding rows hold values of no meaning.

    Raises:
        ValueError: shapes that don't belong together.
    """
    _check_groups(x_MK, group_ids, group_sizes)
    _check(w_ZKN.ndim == 3 and w_ZKN.shape[1] == x_MK.shape[1], "a pool [Z, K, N]", w_ZKN.shape, x_MK.shape)
    if kernels.backend == "cpu":
        return cpu.grouped_matmul(x_MK, w_ZKN, group_ids, group_sizes)
    if kernels.backend in ("gpu", "tpu"):
        return xla.grouped_matmul(x_MK, w_ZKN, group_ids, group_sizes, kernels.backend == "gpu")
    return reference.grouped_matmul(x_MK, w_ZKN, group_ids, group_sizes)


def grouped_swiglu(
    x_MD: Float[Array, "M D"],
    w_in_ZD2F: Num[Array, "Z D two F"],
    w_out_ZFD: Num[Array, "Z F D"],
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    act: Callable,
    kernels: Kernels,
    starts: Int[Array, "G"] | None = None,
    into: Float[Array, "M D"] | None = None,
) -> Float[Array, "M D"]:
    """A gated feed-forward per group, in one pass: `(act(x @ w_in[:, 0]) * (x @ w_in[:, 1])) @ w_out`.

    Args:
        x_MD: rows sorted by group, float32 or bfloat16.
        w_in_ZD2F: pool of gate (index 0) and up (index 1) matrices.
        w_out_ZFD: pool of down matrices.
        group_ids, group_sizes: as in `grouped_matmul`.
        act: the gate's activation, elementwise.
        kernels: which implementation.
        starts: first row of each group, where the groups given here are some of those that the rows are sorted by.
        into: what to write the groups' rows into. Rows before the first group given here are kept; those after the last one hold values of no
            meaning, so that calls for several parts of the groups go in the order of the rows. M must leave `ROW_SLACK` rows past the last group.

    Returns:
        float32 [M, D]; padding rows hold values of no meaning.

    Raises:
        ValueError: shapes that don't belong together.
    """
    _check_groups(x_MD, group_ids, group_sizes)
    _check_swiglu(x_MD, w_in_ZD2F, w_out_ZFD)
    _check((starts is None) == (into is None), "`starts` and `into` together")
    if into is not None:
        _check(into.shape == x_MD.shape and x_MD.shape[0] > ROW_SLACK, f"as many rows to write into, above {ROW_SLACK}", into.shape, x_MD.shape)
    if kernels.backend == "cpu":
        return cpu.grouped_swiglu(x_MD, w_in_ZD2F, w_out_ZFD, group_ids, group_sizes, act, starts, into)
    if kernels.backend in ("gpu", "tpu"):
        return xla.grouped_swiglu(x_MD, w_in_ZD2F, w_out_ZFD, group_ids, group_sizes, act, kernels.backend == "gpu", starts, into)
    return reference.grouped_swiglu(x_MD, w_in_ZD2F, w_out_ZFD, group_ids, group_sizes, act, starts, into).astype(jnp.float32)


def swiglu_rows(x_D, w_in_ZD2F, w_out_ZFD, ids_A: Int[Array, "A"], act: Callable, kernels: Kernels) -> Float[Array, "A D"]:
    """One token [1, D] through A matrices of the pool, float32 [A, D]: `grouped_swiglu` of A groups of one and the same row."""
    _check(x_D.ndim == 2 and x_D.shape[0] == 1, "one row [1, D]", x_D.shape)
    _check_swiglu(x_D, w_in_ZD2F, w_out_ZFD)
    if kernels.backend == "cpu":
        return cpu.swiglu_rows(x_D, w_in_ZD2F, w_out_ZFD, ids_A, act)
    if kernels.backend in ("gpu", "tpu"):
        return xla.swiglu_rows(x_D, w_in_ZD2F, w_out_ZFD, ids_A, act)
    rows = jnp.repeat(x_D, ids_A.shape[0], axis=0)
    return grouped_swiglu(rows, w_in_ZD2F, w_out_ZFD, ids_A, jnp.ones_like(ids_A), act, kernels)


def _check(good: bool, expected: str, *shapes: tuple[int, ...]) -> None:
    if not good:
        raise ValueError(f"expected {expected}, got {' beside '.join(str(list(s)) for s in shapes)}")


def _check_groups(x_MK, group_ids, group_sizes) -> None:
    _check(x_MK.ndim == 2 and x_MK.shape[0] > 0, "rows [M, K], at least one", x_MK.shape)
    good = group_ids.ndim == 1 and group_ids.shape == group_sizes.shape and group_ids.shape[0] > 0
    _check(good, "group ids and sizes [G], at least one", group_ids.shape, group_sizes.shape)


def _check_swiglu(x_MD, w_in_ZD2F, w_out_ZFD) -> None:
    d = x_MD.shape[1]
    _check(w_in_ZD2F.ndim == 4 and w_in_ZD2F.shape[1:3] == (d, 2), "a pool [Z, D, 2, F]", w_in_ZD2F.shape, x_MD.shape)
    z, _, _, f = w_in_ZD2F.shape
    _check(w_out_ZFD.shape == (z, f, d), "a pool [Z, F, D]", w_out_ZFD.shape, w_in_ZD2F.shape)
