"""The stages of a router: its input, logits, scores, which experts, their weights, and what becomes of those.

Each takes and gives float32 rows, one a token, and a row depends on nothing but itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from jaxmoe import formats
from jaxmoe.spec import GroupLimit, RouterSpec
from pallas_kernels.dense.api import dense, row_sum_of_squares, softmax
from pallas_kernels.dispatch import Kernels


def normalized(scale: Num[Array, "D"], x_TD: Float[Array, "T D"], eps: float, kernels: Kernels) -> Float[Array, "T D"]:
    """The router's own view of the residual stream: root-mean-square norm without a scale, times a learned one, times D^-0.5.

    Rounded to x's dtype after each of the three, as transformers' models/gemma4 (`Gemma4TextRouter`) does.
    """
    rows = x_TD.astype(jnp.float32)
    width = rows.shape[1]
    rows = rows * formats.inverse_root(row_sum_of_squares(rows, kernels) / width + eps)
    scaled = rows.astype(x_TD.dtype) * formats.load(scale, x_TD.dtype)
    return (scaled.astype(jnp.float32) * jnp.float32(width**-0.5)).astype(x_TD.dtype)


def router_logits(spec: RouterSpec, params: dict, x_TD: jax.Array, kernels: Kernels) -> Float[Array, "T E"]:
    """Stage 1: logits, in float32; with `matmul_dtype` 'model' they were rounded, once, to the activations' dtype first, as the references do."""
    if spec.matmul_dtype == "float32":
        x_TD = x_TD.astype(jnp.float32)
    logits = dense(x_TD, params["kernel"], kernels, jnp.float32)
    if spec.logits_bias:
        logits = logits + formats.load(params["bias"], jnp.float32)
    return logits.astype(x_TD.dtype).astype(jnp.float32)


def scores_of(spec: RouterSpec, logits: Float[Array, "T E"], kernels: Kernels) -> Float[Array, "T E"]:
    """Stage 2: one score per expert."""
    if spec.score == "softmax":
        return softmax(logits, kernels)
    if spec.score == "sigmoid":
        return jax.nn.sigmoid(logits)
    if spec.score == "sqrtsoftplus":
        return jnp.sqrt(jax.nn.softplus(logits))
    return logits


def select(spec: RouterSpec, params: dict, scores: Float[Array, "T E"]) -> tuple[Int[Array, "T A"], Bool[Array, "T E"] | None]:
    """Stage 3: which experts, best first, ties to the lowest id.

    Args:
        spec: the stages.
        params: "select_bias", where the spec asks for it.
        scores: of stage 2.

    Returns:
        Ids, and which experts were eligible (None: all).
    """
    scores, eligible = masked(spec, with_bias(spec, params, scores))
    return jax.lax.top_k(scores, spec.active)[1], eligible


def with_bias(spec: RouterSpec, params: dict, scores: Float[Array, "T E"]) -> Float[Array, "T E"]:
    """Scores for selection: with the bias, where there is one."""
    return scores + formats.load(params["select_bias"], jnp.float32) if spec.select_bias else scores


def masked(spec: RouterSpec, scores: Float[Array, "T E"]) -> tuple[Float[Array, "T E"], Bool[Array, "T E"] | None]:
    """Scores in which experts outside the kept groups can't win; and which experts are eligible (None: all)."""
    limit = spec.group_limit
    if limit is None:
        return scores, None
    eligible = in_kept_groups(limit, scores)
    return jnp.where(eligible, scores, -jnp.inf if limit.mask_value is None else limit.mask_value), eligible


def in_kept_groups(limit: GroupLimit, scores: Float[Array, "T E"]) -> Bool[Array, "T E"]:
    """Whether each expert is in one of its token's best groups: by their best expert (DeepSeek-V2) or the sum of their best two (DeepSeek-V3)."""
    rows, experts = scores.shape
    grouped = scores.reshape(rows, limit.groups, -1)
    if limit.score == "max":
        of_group = grouped.max(-1)
    else:
        best = jax.lax.top_k(grouped, 2)[0]
        of_group = best[..., 0] + best[..., 1]
    kept = jax.lax.top_k(of_group, limit.kept)[1]
    of_kept = (kept[:, :, None] == jnp.arange(limit.groups)).any(1)
    return jnp.repeat(of_kept, experts // limit.groups, axis=1)


def chosen_weights(
    spec: RouterSpec,
    logits: Float[Array, "T E"],
    scores: Float[Array, "T E"],
    eligible: Bool[Array, "T E"] | None,
    ids: Int[Array, "T A"],
    kernels: Kernels,
) -> Float[Array, "T A"]:
    """Stage 4: the chosen experts' weights. Of scores, those without the bias for selection."""
    if spec.weight_from == "softmax_selected_logits":
        return softmax(_of(ids, logits), kernels)
    if spec.weight_from == "sigmoid_selected_logits":
        return jax.nn.sigmoid(_of(ids, logits))
    if eligible is not None and spec.group_limit is not None and spec.group_limit.mask_value is not None:
        # A number that can be chosen, where fewer eligible scores than needed are above it, stands for the score itself (DeepSeek-V2).
        scores = jnp.where(eligible, scores, spec.group_limit.mask_value)
    return _of(ids, scores)


def _of(ids: Int[Array, "T A"], x: Float[Array, "T E"]) -> Float[Array, "T A"]:
    """The chosen experts' numbers. That ids are there is said, for XLA to do nothing about others wherever one is used."""
    return jnp.take_along_axis(x, ids, axis=1, mode="promise_in_bounds", wrap_negative_indices=False)


def finished(spec: RouterSpec, params: dict, weights: Float[Array, "T A"], ids: Int[Array, "T A"]) -> Float[Array, "T A"]:
    """Stage 5: weights normalised, and multiplied by their experts' numbers and by the spec's."""
    if spec.normalize:
        total = weights[:, :1]
        for j in range(1, spec.active):  # column by column: a reduction's order may depend on the batch
            total = total + weights[:, j : j + 1]
        total = total + spec.norm_eps
        weights = weights / (jnp.maximum(total, spec.norm_min) if spec.norm_min else total)
    if spec.expert_scale:
        weights = weights * formats.load(params["expert_scale"], jnp.float32)[ids]
    return weights * spec.scale if spec.scale != 1.0 else weights
