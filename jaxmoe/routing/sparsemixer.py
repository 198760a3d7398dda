"""SparseMixer-v2's choice of two experts, as it is at inference (GRIN MoE, arXiv:2409.12136; transformers' models/phimoe)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dense.api import softmax
from pallas_kernels.dispatch import Kernels


def sparsemixer(logits: Float[Array, "T E"], jitter: float, kernels: Kernels) -> tuple[Int[Array, "T 2"], Float[Array, "T 2"]]:
    """The two largest logits, each weighted by a softmax of its own over the logits near it.

    The second softmax leaves the first choice out, so weights don't add up to one; most are near one each.

    Args:
        logits: in the dtype of the router's matmul, in which distances are compared.
        jitter: a logit takes part while its distance to the largest, relative to the larger of its size and the largest, is at most `2 * jitter`.
        kernels: how a softmax is summed.

    Returns:
        Ids, the larger first, ties to the lowest id; and weights, float32.
    """
    first, first_weight = _pick(logits, logits, jitter, kernels)
    rest = jnp.where(jnp.arange(logits.shape[1]) == first, -jnp.inf, logits)
    second, second_weight = _pick(rest, logits, jitter, kernels)
    return jnp.concatenate([first, second], axis=1), jnp.concatenate([first_weight, second_weight], axis=1)


def _pick(left: jax.Array, logits: jax.Array, jitter: float, kernels: Kernels) -> tuple[Int[Array, "T 1"], Float[Array, "T 1"]]:
    """The best of the logits that are left, and its weight among those near it; distances are from `logits`, of which none is left out."""
    pick = jnp.argmax(left, axis=1, keepdims=True)
    top = jnp.take_along_axis(left, pick, axis=1)
    size = jnp.maximum(jnp.abs(logits), top)
    size = jnp.where(size == 0, 1, size)  # zero logits under a largest of at most zero: no distance, where the references have 0 / 0
    far = (top - logits) / size > 2 * jitter
    gates = softmax(jnp.where(far, -jnp.inf, left).astype(jnp.float32), kernels)
    return pick.astype(jnp.int32), jnp.take_along_axis(gates, pick, axis=1)
