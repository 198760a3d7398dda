"""What goes over the links, bit for bit: rows as words, blocks of rows swapped among devices, and sums of which one term is there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from pallas_kernels.dispatch import Backend


def words_of(dtype) -> jnp.dtype:
    """Unsigned integers as wide as a dtype's numbers."""
    return jnp.dtype({2: jnp.uint16, 4: jnp.uint32}[jnp.dtype(dtype).itemsize])


def to_words(x: jax.Array) -> UInt[Array, "..."]:
    """The bits of 16- or 32-bit numbers. XLA's CPU backend would send bfloat16 as float32, and add zeros without their signs."""
    return jax.lax.bitcast_convert_type(x, words_of(x.dtype))


def pack(x: Float[Array, "... D"], ids: Int[Array, "... J"]) -> UInt[Array, "... W"]:
    """A row's numbers and, behind them, small integers, as words of one collective; `unpack` is the inverse."""
    words = to_words(x)
    narrow = jnp.int16 if words.dtype == jnp.uint16 else jnp.int32
    return jnp.concatenate([words, jax.lax.bitcast_convert_type(ids.astype(narrow), words.dtype)], -1)


def unpack(words: UInt[Array, "... W"], width: int, dtype) -> tuple[Float[Array, "... D"], Int[Array, "... J"]]:
    """Numbers and integers of packed rows."""
    narrow = jnp.int16 if words.dtype == jnp.uint16 else jnp.int32
    ids = jax.lax.bitcast_convert_type(words[..., width:], narrow).astype(jnp.int32)
    return jax.lax.bitcast_convert_type(words[..., :width], dtype), ids


def bits_of(weights_TA: Float[Array, "T A"], dtype) -> Int[Array, "T B"]:
    """float32 numbers as integers that `pack` takes with numbers of `dtype`: one each, or two where words have 16 bits."""
    narrow = jnp.int16 if words_of(dtype) == jnp.uint16 else jnp.int32
    bits = jax.lax.bitcast_convert_type(weights_TA.astype(jnp.float32), narrow)
    return bits.astype(jnp.int32).reshape(weights_TA.shape[0], -1)


def from_bits(bits_TB: Int[Array, "T B"], count: int) -> Float[Array, "T A"]:
    """The inverse of `bits_of`, for `count` numbers a row."""
    if bits_TB.shape[1] == count:
        return jax.lax.bitcast_convert_type(bits_TB, jnp.float32)
    return jax.lax.bitcast_convert_type(bits_TB.astype(jnp.int16).reshape(-1, count, 2), jnp.float32)


def swap(
    blocks: UInt[Array, "n C W"], sizes: Int[Array, "n"], coming: Int[Array, "n"] | None, axes: tuple[str, ...], backend: Backend, ragged: bool
) -> UInt[Array, "n C W"]:
    """Sends block d to device d.

    Args:
        blocks: of which the first `sizes[d]` rows matter.
        sizes: see there.
        coming: how many rows matter of the block from each device; None if this has to be asked for first.
        axes: mesh axes that the devices lie along.
        backend: without a ragged exchange, the CPU's gives the same.
        ragged: only the rows that matter travel.

    Returns:
        The block from each device; where ragged, all bits are set in rows that don't matter, so that ids are -1.
    """
    if not ragged:
        return jax.lax.all_to_all(blocks, axes, 0, 0, tiled=True)
    n, room, width = blocks.shape
    if coming is None:
        coming = jax.lax.all_to_all(sizes, axes, 0, 0, tiled=True)
    nothing = jnp.asarray(jnp.iinfo(blocks.dtype).max, blocks.dtype)
    if backend not in ("gpu", "tpu"):
        there = jnp.arange(room)[None, :, None] < coming[:, None, None]
        return jnp.where(there, jax.lax.all_to_all(blocks, axes, 0, 0, tiled=True), nothing)
    starts, here = room * jnp.arange(n, dtype=jnp.int32), jnp.full(n, room * jax.lax.axis_index(axes), jnp.int32)
    into = jnp.full((n * room, width), nothing, blocks.dtype)
    sizes, coming = sizes.astype(jnp.int32), coming.astype(jnp.int32)
    out = jax.lax.ragged_all_to_all(blocks.reshape(n * room, width), into, starts, sizes, here, coming, axis_name=axes)
    return out.reshape(n, room, width)


def one_of(x: jax.Array, mine: Bool[Array, "..."], axes: tuple[str, ...], backend: Backend, scatter: bool) -> jax.Array:
    """The sum over devices of what at most one of them has, with that one's bits; zero where none has.

    The CPU adds words. Elsewhere numbers are added, for which every reduction is built: minus zero is what adds nothing, to a zero's sign neither.

    Args:
        x: float32 or bfloat16 [M, ...].
        mine: where this device has it; broadcast against x.
        axes: of the devices.
        backend: see above.
        scatter: each device gets its own part of the first axis, rather than all.
    """

    def total(t: jax.Array) -> jax.Array:
        if not scatter:
            return jax.lax.psum(t, axes)
        flat = t.reshape(t.shape[0], -1)  # of few rows in the axes behind, a TPU's compiler would make a sum of all for all devices
        return jax.lax.psum_scatter(flat, axes, scatter_dimension=0, tiled=True).reshape(-1, *t.shape[1:])

    if backend in ("gpu", "tpu"):
        return total(jnp.where(mine, x, jnp.asarray(-0.0, x.dtype)))
    words = to_words(x)
    return jax.lax.bitcast_convert_type(total(jnp.where(mine, words, jnp.zeros_like(words))), x.dtype)


def listed(slot_NM: Int[Array, "n M"], room: int) -> Int[Array, "n C"]:
    """What lies in each slot; M, which is none, in empty ones. Items with the slot `room` are left out."""
    n, items = slot_NM.shape
    at = (jnp.arange(n)[:, None], slot_NM)
    return jnp.full((n, room), items, jnp.int32).at[at].set(jnp.arange(items, dtype=jnp.int32)[None, :], mode="drop")
