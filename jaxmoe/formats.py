"""How weights are held in memory and on disk, known to kernels, checkpoints and compressors alike.

bfloat16 is held as uint16 and bitcast after it has been sliced: XLA's CPU backend otherwise widens a whole array to float32 at every step.
A uint16 leaf is therefore always bfloat16 here. Quantized leaves join this file with the kernels that read them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

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
