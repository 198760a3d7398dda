"""The Linen modules that all others are made of: norms and linear maps. They hold weights by name and shape, are only ever `apply`ed, and keep no
state."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe import formats
from jaxmoe.spec import ModelSpec, Precision
from pallas_kernels.dense.api import dense, row_sum, row_sum_of_squares
from pallas_kernels.dispatch import Kernels


def held(init, precision: Precision):
    """An initialiser that gives weights as they are held: float32, or bfloat16 in a uint16 array."""
    return lambda key, shape: formats.store(init(key, shape, jnp.float32), precision.params)


NORMAL = nn.initializers.normal(0.02)


def joined(x: jax.Array, over: tuple[str, ...]) -> jax.Array:
    """The sum of what the devices along some mesh axes have; `x` itself without axes."""
    if not over:
        return x
    with jax.named_scope("join"):
        return jax.lax.psum(x, over)


def rms(
    x: Float[Array, "... C"], eps: float, kernels: Kernels, width: int | None = None, over: tuple[str, ...] = ()
) -> Float[Array, "rows C"]:
    """float32 rows of `width` numbers (the last axis, if not given) divided by their root mean square; `over`: mesh axes that share the rows."""
    rows = x.astype(jnp.float32).reshape(-1, width or x.shape[-1])
    count = rows.shape[1] * jax.lax.axis_size(over) if over else rows.shape[1]
    return rows * formats.inverse_root(joined(row_sum_of_squares(rows, kernels), over) / count + eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axes covered by its scale, computed in float32.

    Attributes:
        offset: what is added to the scale.
        wide: multiply by the scale in float32 too, and round afterwards; otherwise round first, as Llama does.
        over: mesh axes that share what is normalised.
    """

    shape: tuple[int, ...]
    eps: float
    precision: Precision
    kernels: Kernels
    offset: float = 0.0
    wide: bool = False
    over: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", held(nn.initializers.constant(1.0 - self.offset), self.precision), self.shape)
        rows = rms(x, self.eps, self.kernels, math.prod(self.shape), self.over).reshape(x.shape)
        dtype = jnp.float32 if self.wide else x.dtype
        factor = formats.load(scale, dtype)
        return (rows.astype(dtype) * (factor + self.offset if self.offset else factor)).astype(x.dtype)


class LayerNorm(nn.Module):
    """Norm with a mean, a scale and a bias (Ba et al. 2016), computed in float32."""

    width: int
    eps: float
    precision: Precision
    kernels: Kernels

    @nn.compact
    def __call__(self, x: Float[Array, "T D"]) -> jax.Array:
        scale = self.param("scale", held(nn.initializers.ones, self.precision), (self.width,))
        bias = self.param("bias", held(nn.initializers.zeros, self.precision), (self.width,))
        rows = x.astype(jnp.float32)
        rows = rows - row_sum(rows, self.kernels) / self.width
        rows = rows * formats.inverse_root(row_sum_of_squares(rows, self.kernels) / self.width + self.eps)
        return (rows * formats.load(scale, jnp.float32) + formats.load(bias, jnp.float32)).astype(x.dtype)


def model_norm(
    spec: ModelSpec, kernels: Kernels, shape: tuple[int, ...] | None = None, name: str | None = None, over: tuple[str, ...] = ()
) -> RMSNorm | LayerNorm:
    """A norm as the model has them; over the model's width, or root-mean-square over `shape` and what the mesh axes `over` share."""
    if spec.norm == "layer" and shape is None:
        return LayerNorm(spec.width, spec.norm_eps, spec.precision, kernels, name=name)
    return RMSNorm(shape or (spec.width,), spec.norm_eps, spec.precision, kernels, spec.norm_offset, spec.norm_wide, over, name=name)


class Linear(nn.Module):
    """A dense layer whose kernel is `[*inputs, *outputs]`; the input is given flattened to [T, prod(inputs)].

    Attributes: `summed`, mesh axes over which its inputs are split: results are summed over them before the bias is added.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    precision: Precision
    kernels: Kernels
    bias: bool = False
    summed: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: Float[Array, "T K"]) -> jax.Array:
        kernel = self.param("kernel", held(NORMAL, self.precision), self.inputs + self.outputs)
        y = joined(dense(x, kernel.reshape(x.shape[1], -1), self.kernels), self.summed)
        y = y.reshape(x.shape[0], *self.outputs)
        if self.bias:
            y = y + formats.load(self.param("bias", held(nn.initializers.zeros, self.precision), self.outputs), y.dtype)
        return y


class Held(nn.Module):
    """A leaf that is used as it is. Attributes: `leaf` its name, `initial` what it begins with."""

    leaf: str
    shape: tuple[int, ...]
    precision: Precision
    initial: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param(self.leaf, held(self.initial, self.precision), self.shape)
