"""The Linen module of a gated delta-rule layer, in the place of attention."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe import formats
from jaxmoe.cache.batch import Batch
from jaxmoe.nn.parts import NORMAL, Held, Linear, rms
from jaxmoe.spec import DeltaSpec, Precision
from pallas_kernels.dispatch import Kernels
from sharding.split import ALONE, Layout


class GatedDelta(nn.Module):
    """Gated DeltaNet (arXiv:2412.06464) as Qwen3-Next has it; what it remembers is the layer state's business.

    Queries, keys and values are convolved with the sequence's last inputs by the state. Its decays are computed in float32, and its outputs are
    normalised per head, scaled, and multiplied by the SiLU of a projection.
    """

    spec: DeltaSpec
    width: int
    eps: float
    precision: Precision
    kernels: Kernels
    layout: Layout = ALONE

    @nn.compact
    def __call__(self, x: Float[Array, "T D"], layer, state: Any, batch: Batch) -> tuple[Float[Array, "T D"], Any]:
        s = self.spec
        keys, values = (s.k_heads, s.k_dim), (s.v_heads, s.v_dim)

        def project(name: str, *sizes: int) -> jax.Array:
            return Linear((self.width,), sizes, self.precision, self.kernels, name=name)(x)

        def own(name: str, leaf: str, *shape: int, init=nn.initializers.ones) -> jax.Array:
            return Held(leaf, shape, self.precision, init, name=name)()

        q, k, v, z = project("q", *keys), project("k", *keys), project("v", *values), project("z", *values)
        conv = tuple(own(f"conv_{name}", "kernel", *t.shape[1:], s.conv, init=NORMAL) for name, t in (("q", q), ("k", k), ("v", v)))
        beta = jax.nn.sigmoid(project("beta", s.v_heads).astype(jnp.float32)).astype(x.dtype)
        shift = formats.load(own("dt_bias", "bias", s.v_heads, init=nn.initializers.zeros), jnp.float32)
        rate = jnp.exp(formats.load(own("a_log", "scale", s.v_heads), jnp.float32))
        log_decay = -rate * jax.nn.softplus(project("decay", s.v_heads).astype(jnp.float32) + shift)
        o, state = state.delta(s, layer, q, k, v, log_decay, beta, conv, batch, self.kernels)
        o = rms(o.astype(x.dtype), self.eps, self.kernels).astype(x.dtype).reshape(o.shape)
        o = o * formats.load(own("norm", "scale", s.v_dim), x.dtype)
        o = (o * jax.nn.silu(z.astype(jnp.float32))).astype(x.dtype)
        return Linear(values, (self.width,), self.precision, self.kernels, summed=self.layout.heads, name="o")(o.reshape(x.shape[0], -1)), state
