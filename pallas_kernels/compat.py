"""What differs between the supported versions of jax, and what none of them does by itself, for kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import jaxpr_as_fun


def interpret_gpu() -> Any:
    """The parameter that has a Mosaic GPU kernel interpreted on the CPU."""
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from jax 0.11 on

    return InterpretGPUParams()


def call_as_on_device(f: Callable, *args: Any) -> Any:
    """`f(*args)`, traced as if every argument were in device memory.

    A GPU reads pinned host memory by its address, but Mosaic refuses a reference to an array whose type says that it lives there.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    jaxpr, out = jax.make_jaxpr(f, return_shape=True)(*shapes)
    return jax.tree.unflatten(jax.tree.structure(out), jaxpr_as_fun(jaxpr)(*jax.tree.leaves(args)))
