"""Grouped matmul on TPUs: a Mosaic kernel that walks the row tiles of the groups that have rows, each with its matrix streamed out of the flat pool.

A work item is a row tile and a group with rows in it. Which items there are is computed on the device by a few small XLA ops and handed to the
kernel ahead of its blocks (scalar prefetch), so that the pipeline knows every item's matrix early enough to fetch it. The grid is (column tiles,
items, K tiles). Row tiles lie on multiples of their size: a tile that several groups share is visited once for each, in a row, and merged by masks
in VMEM. There are at most `tiles + groups - 1` items; places past the last real one name its blocks again, which costs neither copies nor matmuls.
A matrix whose K is not cut stays in VMEM for all row tiles of its group, so prefill reads weights once too.

What bounds it: with few rows the weights' bytes, in blocks of about `DECODE_BLOCK` under way while the one before is multiplied; with many rows the
matrix unit. Quantized weights go to the matrix unit as whole numbers where there are few rows, and each group's sums are scaled, which is exact.
With many rows, scales of fewer than 64 numbers, or K no multiple of 128, they are unpacked into a scratch in VMEM (rounded to bfloat16), once for all
row tiles of a group where K is not cut. Everything here is compiled for v5e, v5p, v6e and TPU7x and interpreted on the CPU; speeds and the choice of
tiles are unmeasured.

Gate and up lie one after the other, [Z, 2, K, F] (`jaxmoe.formats.ExpertLayout` '2df'): bfloat16 as [Z, K, 2, F] would share 32-bit words between
gate and up, and taking them apart costs 2.6 times the bytes' time on v5e, by the length of the compiler's schedule, and more on the others.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Num

from jaxmoe.formats import Quantized, load, pack_block
from pallas_kernels.grouped_matmul.glu import Glu
from pallas_kernels.grouped_matmul.tpu_kernel import kernel
from pallas_kernels.grouped_matmul.tpu_tiles import (
    ONE_TILE,
    SUBLANES,
    VMEM,
    Config,
    Form,
    candidates,
    check_config,
    choose,
    heuristic,
    scratch_shape,
    work_items,
)

__all__ = ["Config", "candidates", "config_for", "grouped_glu", "grouped_matmul", "heuristic", "pool_formats"]

Weights = Num[Array, "Z ..."] | Quantized


def grouped_matmul(
    x_MK: Float[Array, "M K"],
    w: Weights,
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    starts: Int[Array, "G"] | None = None,
    *,
    bias: Num[Array, "G N"] | None = None,
    out_dtype: Any = jnp.float32,
    config: Config | None = None,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """`y[m] = x[m] @ w[group_ids[g(m)]]` for rows sorted by group; sums in float32.

    Args:
        x_MK: bfloat16 rows.
        w: the pool [Z, K, N]: bfloat16 held as uint16, or `Quantized` with `axis` -2.
        group_ids: which matrix of the pool each group uses; any order, repeats allowed.
        group_sizes: rows of each group; zeros are allowed and cost nothing.
        starts: first row of each group, ascending, groups disjoint; None: they lie back to back from row 0.
        bias: added to each group's sums; float32, or bfloat16 held as uint16.
        out_dtype: float32 or bfloat16.
        config: tile sizes; None: `heuristic`.
        interpret: as in `pallas_call`.

    Returns:
        [M, N]; rows of no group hold anything.

    Raises:
        NotImplementedError: a dtype or size that the kernel cannot take; the message says which.
    """
    _check_x(x_MK)
    if w.ndim != 3 or w.shape[1] != x_MK.shape[1]:
        raise NotImplementedError(f"the kernel takes a pool [Z, K, N] with K = {x_MK.shape[1]}, not {list(w.shape)}")
    if jnp.dtype(out_dtype) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        raise NotImplementedError(f"the kernel writes float32 or bfloat16, not {jnp.dtype(out_dtype)}")
    form = _form(x_MK, w, group_ids.shape[0], w.shape[2], 1, out_dtype)
    return _call(form, x_MK, w, group_ids, group_sizes, starts, None, None if bias is None else bias[:, None], config, interpret)


def grouped_glu(
    x_MK: Float[Array, "M K"],
    w_in: Weights,
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    glu: Glu,
    starts: Int[Array, "G"] | None = None,
    *,
    bias: Num[Array, "G two F"] | None = None,
    config: Config | None = None,
    interpret: Any = False,
) -> Float[Array, "M F"]:
    """`glu(x @ gate, x @ up)` with each group's own gate and up; `glu` is applied to the float32 sums.

    Args:
        x_MK, group_ids, group_sizes, starts, config, interpret: see `grouped_matmul`.
        w_in: the pool [Z, 2, K, F] of gate (index 0 of the axis of two) and up (index 1): bfloat16 held as uint16, or `Quantized` with `axis` -2
            and scales [Z, K/group, 2, F].
        glu: `glu(gate, up)`, elementwise.
        bias: added to each group's sums before `glu`; float32, or bfloat16 held as uint16.

    Returns:
        [M, F] in x's dtype; rows of no group hold anything.

    Raises:
        NotImplementedError: see `grouped_matmul`.
    """
    _check_x(x_MK)
    k = x_MK.shape[1]
    if w_in.ndim != 4 or w_in.shape[1:3] != (2, k):
        order = " in the order [Z, K, 2, F]" if w_in.ndim == 4 and w_in.shape[1:3] == (k, 2) else ""
        raise NotImplementedError(f"the kernel takes a pool [Z, 2, K, F] with K = {k}, not {list(w_in.shape)}{order}")
    form = _form(x_MK, w_in, group_ids.shape[0], w_in.shape[3], 2, x_MK.dtype)
    return _call(form, x_MK, w_in, group_ids, group_sizes, starts, glu, bias, config, interpret)


def config_for(x_MK: Float[Array, "M K"], w: Weights, rows: int, groups: int, out_dtype: Any) -> Config:
    """The tile sizes for `x_MK`, which has some of `groups` groups with `rows` rows in all: K is summed in the pieces of a call for all of them.

    Raises:
        NotImplementedError: see `grouped_matmul`.
    """
    _check_x(x_MK)
    form = _form(jax.ShapeDtypeStruct((rows, x_MK.shape[1]), x_MK.dtype), w, groups, w.shape[-1], w.ndim - 2, out_dtype)
    config = choose(form)
    return dataclasses.replace(config, rows=ONE_TILE) if config.rows < ONE_TILE and x_MK.shape[0] > ONE_TILE else config


def pool_formats(w: Any, sharding: jax.sharding.Sharding) -> Any:
    """How the leaves of a pool have to lie in memory for the kernel to read them in place, as a pytree of `Format`s like `w`.

    XLA lays an array out such that it pads least. Where N is no multiple of 128 and Z is one (gpt-oss), the pool's axis comes last; where K/group is
    no multiple of 8, the pool's axis comes second to last in scales [Z, K/group, N]. Such a leaf would be copied whole at every call. Put it on the
    device with its format instead, or give it another shape: N padded to 128, scales as [Z, K/group, 1, N].

    Args:
        w: the pool [Z, K, N] or [Z, 2, K, F], as arrays or shapes.
        sharding: the sharding of all leaves.
    """
    return jax.tree.map(lambda leaf: Format(Layout(tuple(range(leaf.ndim))), sharding), w)


def _check_x(x: jax.Array) -> None:
    if x.ndim != 2 or x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the kernel takes bfloat16 rows [M, K], not {x.dtype} {list(x.shape)}")


def _form(x: Any, w: Weights, groups: int, n: int, parts: int, out: Any) -> Form:
    """The sizes, checked.

    Raises:
        NotImplementedError: see `grouped_matmul`.
    """
    m, k = x.shape
    if k % SUBLANES:
        raise NotImplementedError(f"the kernel takes K in multiples of {SUBLANES}, not {k}")
    common = (m, k, n, groups, parts)
    if not isinstance(w, Quantized):
        if w.dtype != jnp.uint16:
            raise NotImplementedError(f"the kernel takes bfloat16 held as uint16, or quantized weights, not {w.dtype}")
        return Form(*common, "plain", 0, jnp.dtype(out))
    if w.axis != -2 or w.bits not in (4, 8):
        raise NotImplementedError(f"the kernel takes 8 or 4 bits with K on axis -2, not {w.bits} bits with K on axis {w.axis}")
    if w.group % 32 or k % w.group:
        raise NotImplementedError(f"the kernel takes groups of a multiple of 32 that divide K = {k}, not groups of {w.group}")
    if w.bits == 4 and (pack_block(k) < 64 or math.gcd(w.group, pack_block(k) // 2) % 32):
        raise NotImplementedError(f"the kernel takes 4 bits with K in multiples of 64, not {k}")
    return Form(*common, f"int{w.bits}", w.group, jnp.dtype(out))


def _call(form: Form, x, w, group_ids, group_sizes, starts, glu: Glu | None, bias, config: Config | None, interpret: Any) -> jax.Array:
    """The kernel around the pipeline's blocks; `bias` [G, parts, N] or None."""
    c = choose(form) if config is None else config
    check_config(form, c)
    row_tiles, k_tiles = pl.cdiv(form.m, c.rows), form.k // c.k
    items = row_tiles + min(form.groups, form.m) - 1
    scalars = work_items(group_ids, group_sizes, starts, c.rows, items)

    def place(i, k, ends):
        """The item and the K tile of a step; past the last item they stay at its last step's."""
        total = ends[form.groups - 1]
        return jnp.minimum(i, jnp.maximum(total - 1, 0)), jnp.where(i < total, k, k_tiles - 1)

    def x_map(n, i, k, ends, ids, tiles, low, high):
        i, k = place(i, k, ends)
        return tiles[i], k

    def w_map(n, i, k, ends, ids, *_):
        i, k = place(i, k, ends)
        return ids[i], *(0,) * (form.parts - 1), k, n

    def scale_map(n, i, k, ends, ids, *_):
        i, k = place(i, k, ends)
        return ids[i], k, *((0,) if w.scales.ndim == 4 else ()), n

    def bias_map(n, i, k, ends, *_):
        return place(i, k, ends)[0], 0, n

    def out_map(n, i, k, ends, ids, tiles, *_):
        return tiles[place(i, k, ends)[0]], n

    rows_k = c.k // 2 if form.kind == "int4" else c.k
    w_block = (1, *w.shape[1:-2], rows_k, c.columns)
    in_specs = [pl.BlockSpec((c.rows, c.k), x_map), pl.BlockSpec(w_block, w_map)]
    operands: tuple[jax.Array, ...] = (x, w) if not isinstance(w, Quantized) else (x, w.values, w.scales)
    if isinstance(w, Quantized):
        scale_block = (1, c.k // form.group, *w.scales.shape[2:-1], c.columns)
        in_specs.append(pl.BlockSpec(scale_block, scale_map))
    if bias is not None:
        operands = (*operands, _by_item(bias, scalars[0], items))
        in_specs.append(pl.BlockSpec((1, form.parts, c.columns), bias_map))
    scratch = [pltpu.VMEM((form.parts, c.rows, c.columns), jnp.float32)]
    if shape := scratch_shape(form, c):
        scratch.append(pltpu.VMEM(shape, jnp.bfloat16))

    return pl.pallas_call(
        functools.partial(kernel, form, c, glu, bias is not None),
        out_shape=jax.ShapeDtypeStruct((form.m, form.n), form.out),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(pl.cdiv(form.n, c.columns), items, k_tiles),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((c.rows, c.columns), out_map),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM),
        cost_estimate=_cost(form, c),
        interpret=interpret,
        name="grouped_glu" if form.parts == 2 else "grouped_matmul",
    )(*scalars, *operands)


def _by_item(bias: Num[Array, "G parts N"], ends: Int[Array, "G"], items: int) -> Float[Array, "T parts N"]:
    """The bias of each work item's group: few rows, and no further numbers to hand to the kernel ahead of its blocks."""
    group = jnp.sum(ends <= jnp.arange(items)[:, None], axis=1)
    return load(bias[jnp.minimum(group, ends.shape[0] - 1)], jnp.float32)


def _cost(form: Form, c: Config) -> pl.CostEstimate:
    """What the compiler may plan with: every row real, and as many groups as can have rows."""
    weights = min(form.groups, form.m) * form.k * form.n * form.parts * form.weight_bytes
    rows = form.m * (2 * form.k * pl.cdiv(form.n, c.columns) + form.out.itemsize * form.n)
    return pl.CostEstimate(
        flops=2 * form.m * form.k * form.n * form.parts, bytes_accessed=int(weights + rows), transcendentals=form.m * form.n * (form.parts - 1)
    )
