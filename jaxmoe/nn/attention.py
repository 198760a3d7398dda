"""Attention: projections, norms and positions of grouped-query and of latent attention. What is attended to is the layer state's business."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe import formats
from jaxmoe.cache.batch import Batch
from jaxmoe.nn.parts import NORMAL, Held, Linear, RMSNorm, model_norm, rms
from jaxmoe.nn.rope import apply_rope
from jaxmoe.spec import AttentionSpec, LatentSpec, ModelSpec
from pallas_kernels.dense.api import dense_heads
from pallas_kernels.dispatch import Kernels
from sharding.split import ALONE, Layout


class Attention(nn.Module):
    """Grouped-query attention."""

    spec: AttentionSpec
    model: ModelSpec
    kernels: Kernels
    layout: Layout = ALONE

    @nn.compact
    def __call__(self, x: Float[Array, "T D"], layer, state: Any, batch: Batch, tables) -> tuple[jax.Array, Any]:
        """Returns the output [T, D] and the layer state; `tables` are those of `rope_tables`."""
        s, precision = self.spec, self.model.precision

        def project(name: str, heads: int) -> jax.Array:
            return Linear((self.model.width,), (heads, s.head_dim), precision, self.kernels, s.qkv_bias, name=name)(x)

        q, k = project("q", s.heads), project("k", s.kv_heads)
        v = k if s.values == "keys" else project("v", s.kv_heads)
        if s.qk_norm in ("head", "full"):
            q_shape, k_shape = ((s.heads, s.head_dim), (s.kv_heads, s.head_dim)) if s.qk_norm == "full" else ((s.head_dim,), (s.head_dim,))
            over = self.layout.heads if s.qk_norm == "full" else ()
            q = model_norm(self.model, self.kernels, q_shape, "q_norm", over)(q)
            k = model_norm(self.model, self.kernels, k_shape, "k_norm", over)(k)
        if s.v_norm:
            v = self._unscaled(v)
        if s.clip is not None:
            q, k, v = (jnp.clip(t, -s.clip, s.clip) for t in (q, k, v))
        if s.rope is not None:
            q, k = apply_rope(s.rope, tables, q), apply_rope(s.rope, tables, k)
        if s.qk_norm == "after_rope":
            q, k = self._unscaled(q), self._unscaled(k)
        if s.temperature is not None:
            warmth = jnp.log1p(jnp.floor((batch.positions + 1.0) / s.temperature.every)) * s.temperature.scale + 1.0
            q = (q * warmth[:, None, None]).astype(q.dtype)
        sinks = formats.load(Held("scale", (s.heads,), precision, name="sinks")(), jnp.float32) if s.sinks else None
        with jax.named_scope("attend"):
            o, state = state.attend(s, layer, q, k, v, batch, self.kernels, sinks)
        if s.gate:
            o = o * jax.nn.sigmoid(project("gate", s.heads))
        o = o.reshape(x.shape[0], -1)
        return Linear((s.heads, s.head_dim), (self.model.width,), precision, self.kernels, s.out_bias, self.layout.heads, name="o")(o), state

    def _unscaled(self, x: Float[Array, "T H C"]) -> jax.Array:
        """Each head normalised, without a learned scale."""
        return rms(x, self.model.norm_eps, self.kernels).astype(x.dtype).reshape(x.shape)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) in its absorbed form, for prompts as for decoding.

    A position's latent and its rotary channels, one vector for all heads, are both key and value; queries are multiplied into the latent's space, and
    outputs out of it. So a cache holds `kv_rank + rope` numbers a position, and a token's bits don't depend on whether it was decoded or part of a
    prompt. For long prompts, keys and values made per head would take fewer operations (a third, at DeepSeek-V3's sizes) and more memory.
    """

    spec: AttentionSpec
    model: ModelSpec
    kernels: Kernels
    layout: Layout = ALONE

    @nn.compact
    def __call__(self, x: Float[Array, "T D"], layer, state: Any, batch: Batch, tables) -> tuple[jax.Array, Any]:
        """See `Attention`."""
        s, m = self.spec, self.spec.latent
        assert m is not None, "latent attention needs its ranks"
        precision = self.model.precision
        q = self._queries(x, m)
        latent = self._linear("kv_down", m.kv_rank, s.qkv_bias)(x)
        latent = RMSNorm((m.kv_rank,), m.eps, precision, self.kernels, name="kv_norm")(latent)
        q_plain, q_turned = q[..., : m.plain], q[..., m.plain :]
        k_turned = self._linear("k_rope", self.spec.head_dim - m.plain, s.qkv_bias)(x)[:, None]
        if s.rope is not None:
            q_turned, k_turned = apply_rope(s.rope, tables, q_turned), apply_rope(s.rope, tables, k_turned)
        q_latent = dense_heads(q_plain, self._up("k_up", m.plain), self.kernels)
        q, k = jnp.concatenate([q_latent, q_turned], -1), jnp.concatenate([latent[:, None], k_turned], -1)
        with jax.named_scope("attend"):
            o, state = state.attend(s, layer, q, k, None, batch, self.kernels)
        o = dense_heads(o, self._up("v_up", m.value), self.kernels, transposed=True).reshape(x.shape[0], -1)
        return Linear((s.heads, m.value), (self.model.width,), precision, self.kernels, s.out_bias, self.layout.heads, name="o")(o), state

    def _linear(self, name: str, width: int, bias: bool) -> Linear:
        return Linear((self.model.width,), (width,), self.model.precision, self.kernels, bias, name=name)

    def _queries(self, x: Float[Array, "T D"], m: LatentSpec) -> Float[Array, "T H C"]:
        s, precision = self.spec, self.model.precision
        if m.q_rank is None:
            return Linear((self.model.width,), (s.heads, s.head_dim), precision, self.kernels, name="q")(x)
        low = self._linear("q_down", m.q_rank, s.qkv_bias)(x)
        low = RMSNorm((m.q_rank,), m.eps, precision, self.kernels, name="q_norm")(low)
        return Linear((m.q_rank,), (s.heads, s.head_dim), precision, self.kernels, name="q_up")(low)

    def _up(self, name: str, width: int) -> jax.Array:
        assert self.spec.latent is not None
        return Held("kernel", (self.spec.heads, width, self.spec.latent.kv_rank), self.model.precision, NORMAL, name=name)()
