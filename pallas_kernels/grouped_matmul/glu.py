"""What joins gate and up in a gated feed-forward: elementwise functions `glu(gate, up)`, traced into the kernels."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Glu = Callable[[jax.Array, jax.Array], jax.Array]


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(gate) * up` (Shazeer 2020, arXiv:2002.05202)."""
    return jax.nn.silu(gate) * up


def geglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`gelu(gate) * up`, with the tanh approximation."""
    return jax.nn.gelu(gate) * up


def clamped_swiglu(gate: jax.Array, up: jax.Array, limit: float = 7.0, alpha: float = 1.702) -> jax.Array:
    """gpt-oss's: `g * sigmoid(alpha * g) * (u + 1)` with g clamped from above and u from both sides (`GptOssExperts` of transformers)."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


GLUS: dict[str, Glu] = {"silu": swiglu, "gelu": geglu, "clamped_swiglu": clamped_swiglu}
"""By the names that `ExpertSpec` uses."""
