"""The Linen modules of a decoder layer. They hold weights by name and shape, are only ever `apply`ed, and keep no state."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmoe import formats
from jaxmoe.cache.batch import Batch
from jaxmoe.experts import ExpertBank, expert_ffn
from jaxmoe.routing.route import RouterOut, route
from jaxmoe.spec import AttentionSpec, ExpertSpec, LayerSpec, Precision, RopeSpec
from pallas_kernels.dense.api import dense, row_sum
from pallas_kernels.dispatch import Kernels
from pallas_kernels.grouped_matmul.glu import GLUS


def held(init, precision: Precision):
    """An initialiser that gives weights as they are held: float32, or bfloat16 in a uint16 array."""
    return lambda key, shape: formats.store(init(key, shape, jnp.float32), precision.params)


_normal = nn.initializers.normal(0.02)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axes covered by its scale, computed in float32, scaled in x's dtype."""

    shape: tuple[int, ...]
    eps: float
    precision: Precision
    kernels: Kernels

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", held(nn.initializers.ones, self.precision), self.shape)
        rows = x.astype(jnp.float32).reshape(-1, math.prod(self.shape))
        rows = rows * jax.lax.rsqrt(row_sum(rows * rows, self.kernels) / rows.shape[1] + self.eps)
        return rows.astype(x.dtype).reshape(x.shape) * formats.load(scale, x.dtype)


class Linear(nn.Module):
    """A dense layer whose kernel is `[*inputs, *outputs]`; the input is given flattened to [T, prod(inputs)]."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    precision: Precision
    kernels: Kernels
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "T K"]) -> jax.Array:
        kernel = self.param("kernel", held(_normal, self.precision), self.inputs + self.outputs)
        y = dense(x, kernel.reshape(x.shape[1], -1), self.kernels)
        y = y.reshape(x.shape[0], *self.outputs)
        if self.bias:
            y = y + formats.load(self.param("bias", held(nn.initializers.zeros, self.precision), self.outputs), y.dtype)
        return y


def rope_tables(spec: RopeSpec, positions: Int[Array, "T"], dtype) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [T, width / 2] of each position's angles, computed in float32."""
    inverse = 1.0 / (spec.theta ** (jnp.arange(0, spec.width, 2, dtype=jnp.float32) / spec.width))
    angles = positions.astype(jnp.float32)[:, None] * inverse
    # The barrier keeps XLA from fusing cosines and sines into every layer's use of them, once per head.
    return jax.lax.optimization_barrier((jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)))


def apply_rope(spec: RopeSpec, tables: tuple[jax.Array, jax.Array], x: Float[Array, "T H C"]) -> jax.Array:
    """Turns the first `spec.width` channels of every head by its token's angles (RoFormer, eq. 34)."""
    cos, sin = (t[:, None, :] for t in tables)
    turned, rest = x[..., : spec.width], x[..., spec.width :]
    if spec.style == "half":
        a, b = jnp.split(turned, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


class Attention(nn.Module):
    """Grouped-query attention; what it attends to is the layer state's business."""

    spec: AttentionSpec
    width: int
    eps: float
    precision: Precision
    kernels: Kernels

    @nn.compact
    def __call__(self, x: Float[Array, "T D"], layer, state: Any, batch: Batch, tables) -> tuple[jax.Array, Any]:
        s = self.spec

        def project(name: str, heads: int) -> jax.Array:
            return Linear((self.width,), (heads, s.head_dim), self.precision, self.kernels, s.qkv_bias, name=name)(x)

        q, k, v = project("q", s.heads), project("k", s.kv_heads), project("v", s.kv_heads)
        if s.qk_norm is not None:
            q_shape, k_shape = (
                ((s.head_dim,), (s.head_dim,)) if s.qk_norm == "head" else ((s.heads, s.head_dim), (s.kv_heads, s.head_dim))
            )
            q = RMSNorm(q_shape, self.eps, self.precision, self.kernels, name="q_norm")(q)
            k = RMSNorm(k_shape, self.eps, self.precision, self.kernels, name="k_norm")(k)
        if s.clip is not None:
            q, k, v = (jnp.clip(t, -s.clip, s.clip) for t in (q, k, v))
        if s.rope is not None:
            q, k = apply_rope(s.rope, tables, q), apply_rope(s.rope, tables, k)
        with jax.named_scope("attend"):
            o, state = state.attend(s, layer, q, k, v, batch, self.kernels)
        o = o.reshape(x.shape[0], -1)
        out = Linear((s.heads, s.head_dim), (self.width,), self.precision, self.kernels, s.out_bias, name="o")(o)
        return out, state


class GatedMLP(nn.Module):
    """A dense gated feed-forward network."""

    spec: ExpertSpec
    width: int
    precision: Precision
    kernels: Kernels

    @nn.compact
    def __call__(self, x: Float[Array, "T D"]) -> jax.Array:
        def linear(name: str, inputs: int, outputs: int, x: jax.Array) -> jax.Array:
            return Linear((inputs,), (outputs,), self.precision, self.kernels, name=name)(x)

        gate, up = (linear(name, self.width, self.spec.width, x) for name in ("gate", "up"))
        return linear("down", self.spec.width, self.width, GLUS[self.spec.activation](gate, up))


class Router(nn.Module):
    """Holds the router's weights and calls `route`."""

    spec: Any
    width: int
    precision: Precision
    kernels: Kernels

    @nn.compact
    def __call__(self, x: Float[Array, "T D"], state: Any, valid: Bool[Array, "T"]) -> tuple[RouterOut, Any]:
        kernel = self.param("kernel", held(_normal, self.precision), (self.width, self.spec.experts))
        return route(self.spec, {"kernel": kernel}, x, state, valid, self.kernels)


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    spec: LayerSpec
    width: int
    eps: float
    precision: Precision
    kernels: Kernels

    @nn.compact
    def __call__(self, x: Float[Array, "T D"], layer, moe_layer, bank: ExpertBank, state, router_state, batch: Batch, tables):
        """Returns `(x, bank, state, router_state, routed)`; `routed` is the RouterOut of a sparse layer, None of a dense one."""
        def norm(name: str) -> RMSNorm:
            return RMSNorm((self.width,), self.eps, self.precision, self.kernels, name=name)

        with jax.named_scope("attention"):
            attention = Attention(self.spec.attention, self.width, self.eps, self.precision, self.kernels, name="attn")
            h, state = attention(norm("norm_attn")(x), layer, state, batch, tables)
            x = x + h
        h = norm("norm_mlp")(x)
        if self.spec.dense is not None:
            with jax.named_scope("mlp"):
                mlp = GatedMLP(self.spec.dense, self.width, self.precision, self.kernels, name="mlp")
                return x + mlp(h), bank, state, router_state, None
        valid = batch.segments >= 0
        with jax.named_scope("route"):
            router = Router(self.spec.router, self.width, self.precision, self.kernels, name="router")
            routed, router_state = router(h, router_state, valid)
        with jax.named_scope("experts"):
            y, bank, _ = expert_ffn(bank, moe_layer, h, routed.ids, routed.weights, valid, self.kernels)
        return x + y, bank, state, router_state, routed
