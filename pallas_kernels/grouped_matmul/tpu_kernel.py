"""The body of `tpu`'s grouped matmul: what one step of its grid does, and how quantized weights are unpacked on the way to the matrix unit."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxmoe.formats import PACK_BLOCK, pack_block
from pallas_kernels.grouped_matmul.glu import Glu
from pallas_kernels.grouped_matmul.tpu_tiles import Config, Form, direct, scratch_shape


def kernel(form: Form, c: Config, glu: Glu | None, biased: bool, ends, ids, tiles, low, high, x_ref, w_ref, *refs) -> None:
    """One step: this K tile's part of an item's sums; at the last K tile its rows are stored, with the group's bias if there is one."""
    *more, y_ref, sums_ref, scratch_ref = refs if scratch_shape(form, c) else (*refs, None)
    scales, bias_ref = (more[:-1], more[-1]) if biased else (more, None)
    item, k = pl.program_id(1), pl.program_id(2)
    k_tiles = form.k // c.k

    def changed(of_item):
        """Whether a block is another than in the step before; with all of K in a block, it need not be."""
        return (k_tiles > 1) | (item == 0) | (of_item[item] != of_item[jnp.maximum(item - 1, 0)])

    @pl.when(item < ends[form.groups - 1])
    def _():
        if direct(form, c):
            if form.kind == "int4":
                pl.when(changed(tiles))(lambda: _reorder(c, x_ref, scratch_ref))
            pl.when(k == 0)(lambda: sums_ref.__setitem__(..., jnp.zeros_like(sums_ref)))
            _add_direct(form, c, scratch_ref if form.kind == "int4" else x_ref, w_ref, scales[0], sums_ref)
        else:
            if form.kind != "plain":
                pl.when(changed(ids))(lambda: _unpack(form, c, w_ref, scales[0], scratch_ref))
            for part in range(form.parts):
                weights = _as_bfloat16(form, w_ref, part) if form.kind == "plain" else scratch_ref[part]
                dot = jnp.dot(x_ref[...], weights, preferred_element_type=jnp.float32)
                sums_ref[part] = dot if k_tiles == 1 else jnp.where(k == 0, 0.0, sums_ref[part]) + dot

        @pl.when(k == k_tiles - 1)
        def _():
            sums = [sums_ref[part] if bias_ref is None else sums_ref[part] + bias_ref[0, part : part + 1, :] for part in range(form.parts)]
            y = sums[0] if glu is None else glu(*sums)
            row = jax.lax.broadcasted_iota(jnp.int32, y_ref.shape, 0)
            mine = (row >= low[item]) & (row < high[item])
            y_ref[...] = jnp.where(mine, y.astype(y_ref.dtype), y_ref[...])


def _as_bfloat16(form: Form, w_ref, part: int) -> jax.Array:
    """This block's bfloat16 weights [K, columns], held as uint16."""
    return jax.lax.bitcast_convert_type(w_ref[0, part] if form.parts == 2 else w_ref[0], jnp.bfloat16)


def _reorder(c: Config, x_ref, out_ref) -> None:
    """Puts x into the order in which `_whole_numbers` has 4-bit numbers, by a dot with zeros and ones."""
    number = jax.lax.broadcasted_iota(jnp.int32, (PACK_BLOCK, PACK_BLOCK), 0)
    place = jax.lax.broadcasted_iota(jnp.int32, (PACK_BLOCK, PACK_BLOCK), 1)
    half, quarter = PACK_BLOCK // 2, PACK_BLOCK // 4
    here = number == (place & half) + 2 * (place & (quarter - 1)) + jnp.where((place & quarter) != 0, 1, 0)
    order = jnp.where(here, 1.0, 0.0).astype(jnp.bfloat16)

    def step(i, _):
        at = pl.ds(pl.multiple_of(i * PACK_BLOCK, PACK_BLOCK), PACK_BLOCK)
        out_ref[:, at] = jnp.dot(x_ref[:, at], order, preferred_element_type=jnp.float32).astype(jnp.bfloat16)

    jax.lax.fori_loop(0, c.k // PACK_BLOCK, step, None)


def _add_direct(form: Form, c: Config, x_ref, w_ref, scales_ref, sums_ref) -> None:
    """Adds this block's part to the sums, `PACK_BLOCK` numbers along K at a time.

    Args:
        x_ref: the rows, of 4-bit numbers in the order of `_reorder`.
    """
    step_rows = min(form.group, PACK_BLOCK)

    def step(i, _):
        x = x_ref[:, pl.ds(pl.multiple_of(i * PACK_BLOCK, PACK_BLOCK), PACK_BLOCK)]
        for part in range(form.parts):
            w, offset = _whole_numbers(form, w_ref, part, i)
            for first in range(0, PACK_BLOCK, step_rows):
                here = slice(first, first + step_rows)
                dot = jnp.dot(x[:, here], w[here], preferred_element_type=jnp.float32)
                if offset:
                    dot -= offset * jnp.sum(x[:, here].astype(jnp.float32), axis=1, keepdims=True)
                scale = _scale(form, scales_ref, part, jax.lax.div(i * PACK_BLOCK + first, form.group))
                sums_ref[part] += dot * scale

    jax.lax.fori_loop(0, c.k // PACK_BLOCK, step, None)


def _whole_numbers(form: Form, w_ref, part: int, i) -> tuple[jax.Array, float]:
    """Block i's numbers in bfloat16 [PACK_BLOCK, columns], and what each has been raised by.

    Words of four bytes hold eight 4-bit numbers. Two at a time become two bfloat16 of 16 + (number xor 8), which is 24 more than the number. As VMEM
    packs rows, that gives the even and the odd numbers of a block's first half, then of its second.
    """
    rows = PACK_BLOCK if form.kind == "int8" else PACK_BLOCK // 2
    at = pl.ds(pl.multiple_of(i * rows, rows), rows)
    numbers = w_ref[0, part, at, :] if form.parts == 2 else w_ref[0, at, :]
    if form.kind == "int8":
        return numbers.astype(jnp.bfloat16), 0.0
    words = pltpu.bitcast(numbers, jnp.int32)
    pieces = [(moved & 0x00780078) ^ 0x41C041C0 for moved in (words << 3, words >> 5, words >> 1, words >> 9)]
    return jnp.concatenate([pltpu.bitcast(piece, jnp.bfloat16) for piece in pieces]), 24.0


def _scale(form: Form, scales_ref, part: int, i) -> jax.Array:
    """The scales [1, columns] of group i of this block."""
    return scales_ref[0, i, part : part + 1, :] if len(scales_ref.shape) == 4 else scales_ref[0, pl.ds(i, 1), :]


def _unpack(form: Form, c: Config, w_ref, scales_ref, out_ref) -> None:
    """Fills the scratch [parts, K, columns] with this block's weights in bfloat16."""
    unpack = _unpack_int8 if form.kind == "int8" else _unpack_int4
    unpack(form, c, w_ref, scales_ref, out_ref)


def _part(form: Form, w_ref, part: int, at) -> jax.Array:
    """Rows of gate or up, or of the one matrix, as float32's whole numbers."""
    return (w_ref[0, part, at, :] if form.parts == 2 else w_ref[0, at, :]).astype(jnp.int32)


def _unpack_int8(form: Form, c: Config, w_ref, scales_ref, out_ref) -> None:
    def step(i, _):
        at = pl.ds(pl.multiple_of(i * form.group, form.group), form.group)
        for part in range(form.parts):
            numbers = _part(form, w_ref, part, at).astype(jnp.float32)
            out_ref[part, at, :] = (numbers * _scale(form, scales_ref, part, i)).astype(jnp.bfloat16)

    jax.lax.fori_loop(0, c.k // form.group, step, None)


def _unpack_int4(form: Form, c: Config, w_ref, scales_ref, out_ref) -> None:
    """A packed row of a block holds two rows of it, half a block apart."""
    half = pack_block(form.k) // 2
    rows = math.gcd(form.group, half)

    def step(i, _):
        first = i * 2 * half
        for part, j in itertools.product(range(form.parts), range(0, half, rows)):
            packed = _part(form, w_ref, part, pl.ds(pl.multiple_of(i * half + j, rows), rows))
            for at, numbers in ((first + j, (packed << 28) >> 28), (first + half + j, packed >> 4)):
                scale = _scale(form, scales_ref, part, jax.lax.div(at, form.group))
                out_ref[part, pl.ds(pl.multiple_of(at, rows), rows), :] = (numbers.astype(jnp.float32) * scale).astype(jnp.bfloat16)

    jax.lax.fori_loop(0, c.k // (2 * half), step, None)
