"""Which positions a query sees, and the softmax over them: shared by every way of attending."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.spec import AttentionSpec


def first_seen(spec: AttentionSpec, at: Int[Array, "..."]) -> Int[Array, "..."]:
    """The first position that a query at `at` may see."""
    first = jnp.zeros_like(at)
    if spec.window is not None:
        first = jnp.maximum(first, at - spec.window + 1)
    if spec.chunk is not None:
        first = jnp.maximum(first, at // spec.chunk * spec.chunk)
    return first


def seen(spec: AttentionSpec, at_query: Int[Array, "..."], at_key: Int[Array, "..."]) -> Bool[Array, "..."]:
    """Whether queries at `at_query` see keys at `at_key`, broadcast against each other."""
    causal = at_key <= at_query
    return causal if spec.window is None and spec.chunk is None else causal & (at_key >= first_seen(spec, at_query))


def softmax_with(scores: Float[Array, "... S"], sinks: Float[Array, "... 1"] | None) -> Float[Array, "... S"]:
    """Softmax over the last axis, in which a sink's logit takes part without a place in the result."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    top = jnp.maximum(scores.max(-1, keepdims=True), sinks)
    p = jnp.exp(scores - top)
    return p / (p.sum(-1, keepdims=True) + jnp.exp(sinks - top))
