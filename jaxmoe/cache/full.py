"""Attention with no cache: whole sequences of equal length at once, differentiable. What training and calibration use."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.cache.batch import Batch
from jaxmoe.spec import AttentionSpec
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
        v: Float[Array, "T K C"],
        batch: Batch,
        kernels: Kernels,
    ) -> tuple[Float[Array, "T H C"], FullState]:
        """Causal attention within each row; see `KVState.attend`."""
        b, (h, c), kv = self.rows, q.shape[1:], k.shape[1]
        q = (q * spec.softmax_scale).reshape(b, -1, kv, h // kv, c)
        k, v = k.reshape(b, -1, kv, c), v.reshape(b, -1, kv, c)
        s = jnp.einsum("bqkgc,bskc->bkgqs", q, k, preferred_element_type=jnp.float32)
        at = jnp.arange(s.shape[-1])
        seen = at[None, :] <= at[:, None]
        if spec.window is not None:
            seen &= at[None, :] > at[:, None] - spec.window
        p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf), axis=-1).astype(v.dtype)
        o = jnp.einsum("bkgqs,bskc->bqkgc", p, v)
        return o.reshape(-1, h, c), self
