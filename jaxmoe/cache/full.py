"""Attention with no cache: whole sequences of equal length at once, differentiable. What training and calibration use."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.cache.batch import Batch
from jaxmoe.cache.masks import seen, softmax_with
from jaxmoe.cache.recurrent import delta_full
from jaxmoe.spec import AttentionSpec, DeltaSpec
from pallas_kernels.dispatch import Kernels


@flax.struct.dataclass
class FullState:
    """Holds nothing. `rows`: how many sequences share the token axis, each T / rows long and starting at position 0."""

    rows: int = flax.struct.field(pytree_node=False, default=1)

    def attend(
        self,
        spec: AttentionSpec,
        layer,
        q: Float[Array, "T H C"],
        k: Float[Array, "T K C"],
        v: Float[Array, "T K V"] | None,
        batch: Batch,
        kernels: Kernels,
        sinks: Float[Array, "H"] | None = None,
    ) -> tuple[Float[Array, "T H V"], FullState]:
        """Causal attention within each row; see `KVState.attend`."""
        b, (h, c), kv = self.rows, q.shape[1:], k.shape[1]
        if v is None:
            assert spec.latent is not None, "attention without values is latent"
            v = k[..., : spec.latent.kv_rank]
        width = v.shape[-1]
        q = (q * spec.softmax_scale).reshape(b, -1, kv, h // kv, c)
        k, v = k.reshape(b, -1, kv, c), v.reshape(b, -1, kv, width)
        s = jnp.einsum("bqkgc,bskc->bkgqs", q, k, preferred_element_type=jnp.float32)
        at = jnp.arange(s.shape[-1])
        s = jnp.where(seen(spec, at[:, None], at), s, -jnp.inf)
        p = softmax_with(s, None if sinks is None else sinks.reshape(kv, h // kv, 1, 1)).astype(v.dtype)
        o = jnp.einsum("bkgqs,bskc->bqkgc", p, v)
        return o.reshape(-1, h, width), self

    def delta(
        self,
        spec: DeltaSpec,
        layer,
        q: Float[Array, "T Kh dk"],
        k: Float[Array, "T Kh dk"],
        v: Float[Array, "T Vh dv"],
        log_decay: Float[Array, "T Vh"],
        beta: Float[Array, "T Vh"],
        conv_kernels: tuple[Array, Array, Array],
        batch: Batch,
        kernels: Kernels,
    ) -> tuple[Float[Array, "T Vh dv"], FullState]:
        """The delta rule over each row; see `RecurrentState.delta`."""
        return delta_full(spec, self.rows, q, k, v, log_decay, beta, conv_kernels), self
