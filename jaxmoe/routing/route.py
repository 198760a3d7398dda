"""Routing of tokens to experts: six small pure stages, chosen per stage by `RouterSpec`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.spec import RouterSpec, SpecError
from pallas_kernels.dense.api import dense, softmax
from pallas_kernels.dispatch import Kernels


class RouterOut(NamedTuple):
    """`ids` [T, A] of the chosen experts, best first, ties to the lowest id; `weights` [T, A] float32, zero for padding tokens; `logits` [T, E]."""

    ids: Int[Array, "T A"]
    weights: Float[Array, "T A"]
    logits: Float[Array, "T E"]


def check(spec: RouterSpec) -> None:
    """Raises SpecError for a stage that is described but not built yet, naming it."""
    if spec.group_limit is not None or spec.select != "topk" or spec.weight_from != "score" or spec.apply != "output":
        raise SpecError(f"router stages not supported: {spec}")
    if spec.logits_bias or spec.select_bias or spec.score not in ("softmax", "sigmoid"):
        raise SpecError(f"router stages not supported: {spec}")


def route(
    spec: RouterSpec, params: dict, x_TD: Float[Array, "T D"], state: Any, valid_T: Bool[Array, "T"], kernels: Kernels
) -> tuple[RouterOut, Any]:
    """Chooses experts and their weights.

    Args:
        spec: the stages.
        params: `{"kernel": [D, E]}`.
        x_TD: the layer's normalised activations.
        state: threaded through the layers by routers that look back; unchanged here.
        valid_T: False for padding tokens, whose weights become exactly zero.
        kernels: which matmul.

    Returns:
        The choice, and the state.
    """
    check(spec)
    logits = router_logits(spec, params, x_TD, kernels)
    scores = scores_of(spec, logits, kernels)
    ids = select(spec, scores)
    weights = weights_of(spec, scores, ids)
    if spec.weights_dtype == "model":
        weights = weights.astype(x_TD.dtype).astype(jnp.float32)
    return RouterOut(ids, jnp.where(valid_T[:, None], weights, 0.0), logits), state


def router_logits(spec: RouterSpec, params: dict, x_TD: jax.Array, kernels: Kernels) -> Float[Array, "T E"]:
    """Stage 1: logits, in float32; with `matmul_dtype` 'model' they were rounded to the activations' dtype first, as the references do."""
    if spec.matmul_dtype == "float32":
        return dense(x_TD.astype(jnp.float32), params["kernel"], kernels)
    return dense(x_TD, params["kernel"], kernels).astype(jnp.float32)


def scores_of(spec: RouterSpec, logits: Float[Array, "T E"], kernels: Kernels) -> Float[Array, "T E"]:
    """Stage 2: one score per expert."""
    return softmax(logits, kernels) if spec.score == "softmax" else jax.nn.sigmoid(logits)


def select(spec: RouterSpec, scores: Float[Array, "T E"]) -> Int[Array, "T A"]:
    """Stage 3: which experts; ties go to the lowest id."""
    return jax.lax.top_k(scores, spec.active)[1]


def weights_of(spec: RouterSpec, scores: Float[Array, "T E"], ids: Int[Array, "T A"]) -> Float[Array, "T A"]:
    """Stages 4 and 5: the chosen experts' weights, normalised and scaled."""
    weights = jnp.take_along_axis(scores, ids, axis=1)
    if spec.normalize:
        total = weights[:, :1]
        for j in range(1, spec.active):  # column by column: a reduction's order may depend on the batch
            total = total + weights[:, j : j + 1]
        weights = weights / (total + spec.norm_eps)
    return weights * spec.scale if spec.scale != 1.0 else weights
