"""Grouped matmul: rows sorted by group, each group with its own matrix out of a flat pool.

A group is named by its id in the pool (an expert of a resident bank, or a slot of an expert cache), so that a cache costs the kernel nothing and
no `pool[layer]` is ever sliced out.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxmoe import formats
from jaxmoe.formats import ExpertLayout, Quantized
from pallas_kernels.compat import interpret_gpu
from pallas_kernels.dispatch import ROW_SLACK, Kernels, first_that_takes
from pallas_kernels.grouped_matmul import cpu, gpu, reference, tpu, xla
from pallas_kernels.grouped_matmul.biases import Biases
from pallas_kernels.grouped_matmul.glu import Glu

Pool = Num[Array, "Z ..."] | Quantized
"""A flat pool of matrices: float32, bfloat16 held as uint16, or quantized with K where the layout has it."""


def grouped_matmul(
    x_MK: Float[Array, "M K"],
    w: Pool,
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    kernels: Kernels,
    layout: Literal["kn", "nk"] = "kn",
) -> Float[Array, "M N"]:
    """`y[m] = x[m] @ w[group_ids[g(m)]]` for rows sorted by group.

    Args:
        x_MK: rows; the first `group_sizes[0]` belong to group 0, and so on. Rows past the sum are padding.
        w: the pool, [Z, K, N] or [Z, N, K] as `layout` says.
        group_ids: which matrix of the pool each group uses; ids out of range are clamped into it.
        group_sizes: rows of each group; zeros are allowed and cost nothing. Their sum is at most M: not checked, since it is not known when traced.
        kernels: which implementation.
        layout: order of a matrix's axes.

    Returns:
        float32 [M, N]; padding rows hold values of no meaning.

    Raises:
        ValueError: shapes that don't belong together.
        NotImplementedError: no implementation takes these arguments.
    """
    _check_groups(x_MK, group_ids, group_sizes)
    k_axis = -2 if layout == "kn" else -1
    _check(w.ndim == 3 and w.shape[k_axis] == x_MK.shape[1], f"a pool [Z, {', '.join(layout.upper())}]", w.shape, x_MK.shape)
    _check_quantized(w, k_axis)
    transposed = layout == "nk"
    args = (x_MK, w, jnp.clip(group_ids, 0, w.shape[0] - 1), group_sizes)

    def of_cpu():
        _refuse_layout(transposed, layout, "kn")
        return cpu.grouped_matmul(*args)

    def of_gpu(**options):
        _refuse_layout(not transposed, layout, "nk")
        return gpu.grouped_matmul(*args, **options)

    def of_tpu(**options):
        _refuse_layout(transposed, layout, "kn")
        return tpu.grouped_matmul(*args, **options)

    return first_that_takes(
        "grouped_matmul",
        _ordered(
            kernels, of_cpu, of_gpu, of_tpu,
            functools.partial(xla.grouped_matmul, *args, kernels.backend == "gpu", transposed),
            functools.partial(reference.grouped_matmul, *args, transposed=transposed),
        ),
    )  # fmt: skip


def grouped_swiglu(
    x_MD: Float[Array, "M D"],
    w_in: Pool,
    w_out: Pool,
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    glu: Glu,
    kernels: Kernels,
    starts: Int[Array, "G"] | None = None,
    into: Float[Array, "M D"] | None = None,
    layout: ExpertLayout = "d2f",
    all_groups: int | None = None,
    biases: Biases | None = None,
) -> Float[Array, "M D"]:
    """A gated feed-forward per group: `glu(x @ gate + b_gate, x @ up + b_up) @ w_out + b_out`, gate and up in one pass with the activation.

    Args:
        x_MD: rows sorted by group, float32 or bfloat16.
        w_in: pool of gate (index 0) and up (index 1) matrices, in the order of axes that `layout` says.
        w_out: pool of down matrices, likewise.
        group_ids, group_sizes: as in `grouped_matmul`.
        glu: joins gate and up, elementwise (`glu.GLUS`).
        kernels: which implementation.
        starts: first row of each group, where the groups given here are some of those that the rows are sorted by.
        into: what to write the groups' rows into. Rows before the first group with rows are kept; others of no group hold values of no
            meaning, so that calls for several parts of the groups go in the order of the rows. M must leave `ROW_SLACK` rows past the last group.
        layout: see `jaxmoe.formats.ExpertLayout`.
        all_groups: how many groups the rows are sorted by, where those given here are some of them; tiles are chosen by it, so that a row's bits
            don't tell in how many calls the groups came.
        biases: `(b_in [G, 2, F], b_out [G, D])` of the groups, in the order of `group_ids` and with these axes in any layout; float32, or bfloat16
            held as uint16. Added to the float32 sums before those are rounded (`GptOssExperts` of transformers rounds once before, too).

    Returns:
        float32 [M, D]; padding rows hold values of no meaning.

    Raises:
        ValueError: shapes that don't belong together.
        NotImplementedError: no implementation takes these arguments.
    """
    _check_groups(x_MD, group_ids, group_sizes)
    _check_swiglu(x_MD, w_in, w_out, layout)
    _check_biases(biases, group_ids.shape[0], w_in, layout)
    _check((starts is None) == (into is None), "`starts` and `into` together")
    if into is not None:
        _check(into.shape == x_MD.shape and x_MD.shape[0] > ROW_SLACK, f"as many rows to write into, above {ROW_SLACK}", into.shape, x_MD.shape)
    ids = jnp.clip(group_ids, 0, w_out.shape[0] - 1)
    args = (x_MD, w_in, w_out, ids, group_sizes, glu)

    def of_cpu():
        _refuse_layout(layout != "d2f", layout, "d2f")
        return cpu.grouped_swiglu(*args, starts, into, biases, kernels.in_place)

    def two_kernels(kernel, wanted: ExpertLayout, **options):
        _refuse_layout(layout != wanted, layout, wanted)
        b_in, b_out = ({}, {}) if biases is None else ({"bias": b} for b in biases)
        rows, groups = x_MD.shape[0] - (0 if into is None else ROW_SLACK), all_groups or ids.shape[0]
        config = kernel.config_for(x_MD, w_in, rows, groups, x_MD.dtype)
        hidden = kernel.grouped_glu(x_MD, w_in, ids, group_sizes, glu, starts, config=config, **b_in, **options)
        config = kernel.config_for(hidden, w_out, rows, groups, jnp.float32)
        y = kernel.grouped_matmul(hidden, w_out, ids, group_sizes, starts, config=config, **b_out, **options)
        return y if into is None or starts is None else _written(into, y, starts, group_sizes)

    return first_that_takes(
        "grouped_swiglu",
        _ordered(
            kernels, of_cpu, functools.partial(two_kernels, gpu, "2fd"), functools.partial(two_kernels, tpu, "2df"),
            functools.partial(xla.grouped_swiglu, *args, kernels.backend == "gpu", starts, into, layout, biases),
            functools.partial(reference.grouped_swiglu, *args, starts, into, layout, biases),
        ),
    )  # fmt: skip


def swiglu_rows(
    x_D: Float[Array, "one D"],
    w_in: Pool,
    w_out: Pool,
    ids_A: Int[Array, "A"],
    glu: Glu,
    kernels: Kernels,
    layout: ExpertLayout = "d2f",
    biases: Biases | None = None,
) -> Float[Array, "A D"]:
    """One token [1, D] through A matrices of the pool, float32 [A, D]: `grouped_swiglu` of A groups of one and the same row."""
    _check(x_D.ndim == 2 and x_D.shape[0] == 1, "one row [1, D]", x_D.shape)
    _check_swiglu(x_D, w_in, w_out, layout)
    _check_biases(biases, ids_A.shape[0], w_in, layout)
    if kernels.backend == "cpu" and layout == "d2f":
        return cpu.swiglu_rows(x_D, w_in, w_out, ids_A, glu, biases, kernels.in_place)
    if kernels.backend in ("gpu", "tpu") and not kernels.pallas:
        return xla.swiglu_rows(x_D, w_in, w_out, ids_A, glu, layout, biases)
    rows = jnp.broadcast_to(x_D, (ids_A.shape[0], x_D.shape[1]))
    return grouped_swiglu(rows, w_in, w_out, ids_A, jnp.ones_like(ids_A), glu, kernels, layout=layout, biases=biases)


def _ordered(kernels: Kernels, of_cpu, of_gpu, of_tpu, of_xla, of_reference) -> list[tuple[str, Any]]:
    """The implementations to try, the best first."""
    if kernels.backend == "reference":
        return [("reference", of_reference)]
    if kernels.backend == "cpu":
        return [("cpu", of_cpu), ("xla", of_xla)]
    if not kernels.pallas:
        return [("xla", of_xla)]
    if kernels.backend == "gpu":
        return [("mosaic_gpu", functools.partial(of_gpu, interpret=interpret_gpu() if kernels.interpret else False)), ("xla", of_xla)]
    return [("mosaic_tpu", functools.partial(of_tpu, interpret=kernels.interpret)), ("xla", of_xla)]


def _written(into: Float[Array, "M D"], y: Float[Array, "M D"], starts: Int[Array, "G"], sizes: Int[Array, "G"]) -> Float[Array, "M D"]:
    """`into` with the rows of these groups from `y`."""
    row = jnp.arange(y.shape[0])[:, None]
    mine = ((row >= starts) & (row < starts + sizes)).any(1)
    return jnp.where(mine[:, None], y, into)


def _refuse_layout(other: bool, layout: str, wanted: str) -> None:
    if other:
        raise NotImplementedError(f"it takes weights in the layout {wanted!r}, these are {layout!r}")


def _check(good: bool, expected: str, *shapes: tuple[int, ...]) -> None:
    if not good:
        raise ValueError(f"expected {expected}, got {' beside '.join(str(list(s)) for s in shapes)}")


def _check_groups(x_MK, group_ids, group_sizes) -> None:
    _check(x_MK.ndim == 2 and x_MK.shape[0] > 0, "rows [M, K], at least one", x_MK.shape)
    good = group_ids.ndim == 1 and group_ids.shape == group_sizes.shape and group_ids.shape[0] > 0
    _check(good, "group ids and sizes [G], at least one", group_ids.shape, group_sizes.shape)


def _check_swiglu(x_MD, w_in, w_out, layout: ExpertLayout) -> None:
    if layout not in formats.LAYOUTS:
        raise ValueError(f"no layout {layout!r} of experts; there are {', '.join(formats.LAYOUTS)}")
    axes = ", ".join(layout.upper())
    _check(w_in.ndim == 4 and w_in.shape[1 + layout.index("2")] == 2, f"a pool [Z, {axes}]", w_in.shape, x_MD.shape)
    d, f = formats.expert_widths(w_in.shape[1:], layout)
    _check(d == x_MD.shape[1], f"a pool [Z, {axes}] for rows [M, D]", w_in.shape, x_MD.shape)
    expected = (w_in.shape[0], *formats.expert_shapes(d, f, layout)[1])
    _check(w_out.shape == expected, f"a pool [Z, {'D, F' if layout == '2fd' else 'F, D'}]", w_out.shape, w_in.shape)
    _check_quantized(w_in, layout.index("d") - 3)
    _check_quantized(w_out, -1 if layout == "2fd" else -2)


def _check_biases(biases: Biases | None, groups: int, w_in: Pool, layout: ExpertLayout) -> None:
    if biases is None:
        return
    d, f = formats.expert_widths(w_in.shape[1:], layout)
    good = biases[0].shape == (groups, 2, f) and biases[1].shape == (groups, d)
    _check(good, f"biases [G, 2, F] and [G, D] of {groups} groups, D = {d}, F = {f}", *(b.shape for b in biases))


def _check_quantized(w: Pool, axis: int) -> None:
    if not isinstance(w, Quantized):
        return
    if w.axis != axis:
        raise ValueError(f"K is axis {axis} of this layout, the quantized weights have it at {w.axis}")
    k = w.shape[axis]
    expected = (w.shape[0], k // w.group, *(n for i, n in enumerate(w.shape) if i not in (0, w.ndim + axis)))
    _check(k % w.group == 0 and w.scales.shape == expected, f"scales {list(expected)} for groups of {w.group}", w.scales.shape, w.shape)
