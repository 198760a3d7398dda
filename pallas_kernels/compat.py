"""What differs between the supported versions of jax, and what none of them does by itself, for kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import jaxpr_as_fun


def interpret_gpu() -> Any:
    """The parameter that has a Mosaic GPU kernel interpreted on the CPU."""
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from jax 0.11 on

    return InterpretGPUParams()


def row_by_row(cols: int) -> tuple[Any, ...]:
    """Transforms of a row-major tile in shared memory that is written as the transpose of wgmma's sums and then copied out by single rows.

    jax 0.10.2 writes transposes to tiled references only, jax 0.11 to any: tiles of one row are the same bytes as none.
    """
    return () if hasattr(plgpu, "InterpretGPUParams") else (plgpu.TilingTransform((1, cols)),)


def call_as_on_device(f: Callable, *args: Any) -> Any:
    """`f(*args)`, traced as if every argument were in device memory.

    A GPU reads pinned host memory by its address, but Mosaic refuses a reference to an array whose type says that it lives there.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    jaxpr, out = jax.make_jaxpr(f, return_shape=True)(*shapes)
    return jax.tree.unflatten(jax.tree.structure(out), jaxpr_as_fun(jaxpr)(*jax.tree.leaves(args)))


def dot_with_rows(a: Any, b: Any, interpret: Any) -> jax.Array:
    """`a @ b.T` in float32 on the tensor cores of a GPU, for references [M, C] and [N, C] to shared memory.

    jax 0.10.2 cannot interpret a reference that is read transposed; there the product is made of plain values.
    """
    if interpret and not hasattr(plgpu, "InterpretGPUParams"):
        return jnp.dot(a[...], b[...].T, preferred_element_type=jnp.float32)

    def product(acc):
        plgpu.wgmma(acc, a, b.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))
