"""How weights are held in memory and on disk, known to kernels, checkpoints and compressors alike.

bfloat16 is held as uint16 and bitcast after it has been sliced: XLA's CPU backend otherwise widens a whole array to float32 at every step.
A uint16 leaf is therefore always bfloat16 here.

Quantized weights are whole numbers and scales, one scale for `group` neighbours along K (the axis that a matmul sums over). Two 4-bit numbers share a
byte: within blocks of `pack_block(K)`, the low half of byte j is number j and the high half is number j + block / 2, so that a kernel unpacks a
tile by two shifts and never interleaves.
"""

from __future__ import annotations

import math
import threading
from typing import Literal, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int8

AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)

DTYPES = ("float32", "bfloat16")
"""Names of the dtypes in which weights can be held."""

_LEAF: dict[str, np.dtype] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}


def leaf_dtype(name: str) -> np.dtype:
    """The dtype of the array that holds weights of dtype `name`.

    Raises:
        ValueError: `name` is not one of `DTYPES`.
    """
    if name not in _LEAF:
        raise ValueError(f"unsupported dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return _LEAF[name]


def compute_dtype(name: str) -> np.dtype:
    """The dtype in which activations of dtype `name` are computed."""
    leaf_dtype(name)
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def load(leaf: jax.Array, dtype) -> jax.Array:
    """Weights ready for arithmetic: a uint16 leaf is read as bfloat16, then widened or narrowed to `dtype`. Slice before calling it."""
    if leaf.dtype == jnp.uint16:
        leaf = jax.lax.bitcast_convert_type(leaf, jnp.bfloat16)
    return leaf.astype(dtype)


def store(x: jax.Array, name: str) -> jax.Array:
    """The inverse of `load`: rounds `x` to dtype `name` (to nearest, ties to even) and gives the array that holds it."""
    if name == "bfloat16":
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(leaf_dtype(name))


def store_numpy(x: np.ndarray, name: str) -> np.ndarray:
    """`store` for numpy arrays of float32, float16, bfloat16 or uint16 (bfloat16 bits); copies only when the bits change."""
    if x.dtype == ml_dtypes.bfloat16:
        x = x.view(np.uint16)
    if name == "bfloat16":
        if x.dtype == np.uint16:
            return x
        return x.astype(np.float32, copy=False).astype(ml_dtypes.bfloat16).view(np.uint16)
    if x.dtype == np.uint16:
        x = x.view(ml_dtypes.bfloat16)
    return x.astype(leaf_dtype(name), copy=False)


def load_numpy(leaf: np.ndarray) -> np.ndarray:
    """A held array as float32 numpy values (bfloat16 bits are widened exactly)."""
    if leaf.dtype == np.uint16:
        return leaf.view(ml_dtypes.bfloat16).astype(np.float32)
    return leaf.astype(np.float32, copy=False)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype, alignment: int = 64) -> np.ndarray:
    """An uninitialised array on a boundary on which jax's CPU backend takes memory over instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(dtype).reshape(shape)


_TILE = (2048, 16)  # of a matrix that is transposed, columns by rows; a plain strided copy takes five times as long
_SHARED_BYTES = 4 << 20  # from this size on, two threads share the work


def contiguous(x: np.ndarray) -> np.ndarray:
    """`x` in C order. A view whose first axes lie behind its last ones in memory, as a transposed matrix does, is copied by tiles."""
    if x.flags.c_contiguous:
        return x
    for first in range(1, x.ndim):
        try:
            matrix = x.transpose(*range(first, x.ndim), *range(first)).reshape(math.prod(x.shape[first:]), -1, copy=False)
        except ValueError:  # that would need a copy
            continue
        if abs(matrix.strides[1]) < abs(matrix.strides[0]):
            return _transposed(matrix).reshape(x.shape)
    return np.ascontiguousarray(x)


def _transposed(matrix: np.ndarray) -> np.ndarray:
    rows, cols = matrix.shape
    out = np.empty((cols, rows), matrix.dtype)

    def fill(first: int, last: int) -> None:
        for j in range(first, last, _TILE[1]):
            for i in range(0, cols, _TILE[0]):
                out[i : i + _TILE[0], j : min(j + _TILE[1], last)] = matrix[j : min(j + _TILE[1], last), i : i + _TILE[0]].T

    if matrix.nbytes < _SHARED_BYTES:
        fill(0, rows)
        return out
    half = rows // 2 // 64 * 64  # whole lines of the cache
    other = threading.Thread(target=fill, args=(half, rows))
    other.start()
    fill(0, half)
    other.join()
    return out


ExpertLayout = Literal["d2f", "2df", "2fd"]
"""Order of the axes of an expert's two leaves, set once when they are loaded, by what multiplies with them: 'd2f' has w_in [D, 2, F] and w_out [F, D]
(CPUs: gate and up are one matrix), '2df' has w_in [2, D, F] and w_out [F, D] (TPUs, which would pad an axis of 2 next to the last), and '2fd' has
w_in [2, F, D] and w_out [D, F] (GPUs, whose tiles run along K). Index 0 of the axis of 2 is the gate."""

LAYOUTS: tuple[ExpertLayout, ...] = ("d2f", "2df", "2fd")


def expert_shapes(d: int, f: int, layout: ExpertLayout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of an expert's w_in and w_out, of model width `d` and hidden width `f`."""
    sizes = {"d": d, "2": 2, "f": f}
    return tuple(sizes[letter] for letter in layout), (d, f) if layout == "2fd" else (f, d)


def expert_axes(layout: ExpertLayout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the axes of an expert's leaves are: `w_in.transpose(first)` is [D, 2, F] and `w_out.transpose(second)` is [F, D]."""
    return tuple(layout.index(letter) for letter in "d2f"), (1, 0) if layout == "2fd" else (0, 1)


def expert_axis_names(layout: ExpertLayout) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """The logical names of the axes of an expert's w_in and w_out."""
    names = {"d": "embed", "2": None, "f": "hidden"}
    return tuple(names[letter] for letter in layout), tuple(names[letter] for letter in ("df" if layout == "2fd" else "fd"))


def expert_widths(w_in_shape: tuple[int, ...], layout: ExpertLayout) -> tuple[int, int]:
    """`(D, F)` of the shape of an expert's w_in."""
    sizes = dict(zip(layout, w_in_shape, strict=True))
    return sizes["d"], sizes["f"]


PACK_BLOCK = 128
"""Numbers along K in one block of packed 4-bit weights, where K is a multiple of it."""


def pack_block(k: int) -> int:
    """Numbers along K that are packed together: the largest power of two up to `PACK_BLOCK` that divides K.

    Raises:
        ValueError: K is odd.
    """
    if k % 2:
        raise ValueError(f"4-bit weights are packed in pairs along K, and {k} is odd")
    return math.gcd(k, PACK_BLOCK)


@flax.struct.dataclass
class Quantized:
    """Weights as small whole numbers times scales.

    Attributes:
        values: int8, the axis `axis` being K, or K / 2 with 4 bits (see the module's docstring for which number lies where).
        scales: float32, as `values` but K / group along K; always with K before the other axes of a matrix, wherever it is in `values`.
        bits: 8 or 4.
        group: numbers along K that share a scale.
        axis: where K is in `values`, counted from the end.
    """

    values: Int8[Array, "..."]
    scales: Float[Array, "..."]
    bits: int = flax.struct.field(pytree_node=False, default=8)
    group: int = flax.struct.field(pytree_node=False, default=128)
    axis: int = flax.struct.field(pytree_node=False, default=-2)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weights' own shape."""
        axis = self.values.ndim + self.axis
        return tuple(n * (8 // self.bits) if i == axis else n for i, n in enumerate(self.values.shape))

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        return self.values.ndim

    @property
    def nbytes(self) -> int:
        """Bytes of numbers and scales."""
        return self.values.nbytes + self.scales.nbytes


def quantize(w: jax.Array, bits: int, group: int, axis: int) -> Quantized:
    """Rounds float weights to the nearest of 2^bits - 1 steps of a group's own, symmetric about zero.

    Args:
        w: [E, K, N] or [E, K, 2, N] with `axis` -2 or -3, or [E, N, K] or [E, 2, N, K] with `axis` -1.
        bits: 8 or 4.
        group: numbers along K that share a scale.
        axis: where K is, counted from the end.

    Raises:
        ValueError: other bits, or K is not a whole number of groups.
    """
    k = w.shape[axis]
    if bits not in (4, 8):
        raise ValueError(f"weights are quantized to 4 or 8 bits, not {bits}")
    if group <= 0 or k % group:
        raise ValueError(f"K = {k} is not a whole number of groups of {group}")
    w = jnp.moveaxis(w.astype(jnp.float32), axis, 1)
    grouped = w.reshape(w.shape[0], k // group, group, *w.shape[2:])
    largest = 2 ** (bits - 1) - 1
    scales = jnp.abs(grouped).max(2) / largest
    numbers = jnp.round(grouped / jnp.where(scales == 0, 1.0, scales)[:, :, None]).astype(jnp.int8).reshape(w.shape)
    if bits == 4:
        numbers = pack_int4(numbers, 1)
    return Quantized(jnp.moveaxis(numbers, 1, axis), scales, bits, group, axis)


def dequantize(q: Quantized) -> jax.Array:
    """The float32 weights that `q` stands for; K where it is in `q.values`."""
    numbers = jnp.moveaxis(q.values, q.axis, 1)
    if q.bits == 4:
        numbers = unpack_int4(numbers, 1)
    return jnp.moveaxis(numbers.astype(jnp.float32) * jnp.repeat(q.scales, q.group, axis=1), 1, q.axis)


def entry(pool: jax.Array | Quantized, i: jax.Array) -> jax.Array:
    """Entry `i` of a pool [Z, ...]; a uint16 leaf is read as bfloat16, quantized weights come as float32."""
    one = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, i, 1), pool)
    if isinstance(one, Quantized):
        return dequantize(one)[0]
    return load(one, jnp.bfloat16 if one.dtype == jnp.uint16 else one.dtype)[0]


def pack_int4(numbers: AnyArray, axis: int) -> AnyArray:
    """int8 in -8..7 to bytes of two, along `axis`; of numpy arrays, numpy arrays."""
    block = pack_block(numbers.shape[axis])
    shape = numbers.shape
    numbers = numbers.reshape(*shape[:axis], shape[axis] // block, 2, block // 2, *shape[axis + 1 :])
    halves = [numbers[(slice(None),) * (axis + 1) + (slice(half, half + 1),)] for half in (0, 1)]
    return ((halves[0] & 15) | (halves[1] << 4)).astype(np.int8).reshape(*shape[:axis], shape[axis] // 2, *shape[axis + 1 :])


def unpack_int4(packed: AnyArray, axis: int) -> AnyArray:
    """The inverse of `pack_int4`."""
    shape = packed.shape
    k = shape[axis] * 2
    half = pack_block(k) // 2
    packed = packed.reshape(*shape[:axis], shape[axis] // half, 1, half, *shape[axis + 1 :])
    module = np if isinstance(packed, np.ndarray) else jnp
    both = module.concatenate([(packed << 4) >> 4, packed >> 4], axis + 1)
    return both.reshape(*shape[:axis], k, *shape[axis + 1 :])


def rounded(x: jax.Array) -> jax.Array:
    """`x`, a product, as a number of its own, whatever is added to it.

    XLA's CPU backend otherwise makes a multiply-add of the two, with one rounding, where both are in one fusion; in another program, where they are
    not, it can't. A barrier would say it better, but jax 0.10.2 drops barriers there before it fuses.
    """
    return jnp.where(x == x, x, jnp.nan) if x.dtype == jnp.float32 else x


def inverse_root(x: jax.Array) -> jax.Array:
    """One over the square root, each rounded by itself.

    `jax.lax.rsqrt` has other bits on XLA's CPU backend in registers of 512 bits than for the numbers that don't fill one.
    """
    return 1 / rounded(jnp.sqrt(x))
