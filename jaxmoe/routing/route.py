"""Routing of tokens to experts: six small pure stages (`jaxmoe.routing.stages`), chosen per stage by `RouterSpec`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int16

from jaxmoe.routing import stages
from jaxmoe.routing.sparsemixer import sparsemixer
from jaxmoe.spec import ModelSpec, RouterSpec, SpecError
from pallas_kernels.dispatch import Kernels

BUILT: dict[str, tuple[str, ...]] = {
    "matmul_dtype": ("model", "float32"),
    "score": ("softmax", "sigmoid", "sqrtsoftplus", "none"),
    "select": ("topk", "sparsemixer"),
    "weight_from": ("score", "softmax_selected_logits", "sigmoid_selected_logits", "sparsemixer"),
    "weights_dtype": ("model", "float32"),
    "apply": ("output", "input"),
}
"""Values of `RouterSpec`'s fields that can be run."""


class RouterOut(NamedTuple):
    """`ids` [T, A] of the chosen experts, best first, ties to the lowest id; `weights` [T, A] float32, zero for padding tokens; `logits` [T, E].

    Those who call a router may add what its layer gave it to read, `inputs` [T, D], and the choices that it foretells, `ahead` int16 [T, K, W]
    (`jaxmoe.routing.ahead`).
    """

    ids: Int[Array, "T A"]
    weights: Float[Array, "T A"]
    logits: Float[Array, "T E"]
    inputs: Float[Array, "T D"] | None = None
    ahead: Int16[Array, "T K W"] | None = None


def check(spec: RouterSpec) -> None:
    """Refuses a router that can't be run.

    Raises:
        SpecError: a stage that is described but not built, stages that don't fit together, or sizes that don't; names the field.
    """
    for field, known in BUILT.items():
        if (value := getattr(spec, field)) not in known:
            raise SpecError(f"RouterSpec.{field} = {value!r} is not supported ({', '.join(known)} are)")
    if not 0 < spec.active <= spec.experts:
        raise SpecError(f"RouterSpec.active = {spec.active} must be from 1 to the number of experts, {spec.experts}")
    if "sparsemixer" in (spec.select, spec.weight_from):
        _check_sparsemixer(spec)
    if spec.group_limit is not None:
        _check_groups(spec)


def _check_sparsemixer(spec: RouterSpec) -> None:
    if spec.select != spec.weight_from:
        raise SpecError(f"RouterSpec.select = {spec.select!r} does not go with weight_from = {spec.weight_from!r}: sparsemixer is both")
    if spec.active != 2:
        raise SpecError(f"RouterSpec.active = {spec.active} is not supported with select = 'sparsemixer', which chooses 2")
    if spec.score != "none" or spec.select_bias or spec.group_limit is not None:
        raise SpecError("RouterSpec.select = 'sparsemixer' chooses by logits: no score, select_bias or group_limit goes with it")


def _check_groups(spec: RouterSpec) -> None:
    limit = spec.group_limit
    assert limit is not None
    if limit.score not in ("max", "top2sum"):
        raise SpecError(f"GroupLimit.score = {limit.score!r} is not supported (max, top2sum are)")
    if limit.groups < 1 or spec.experts % limit.groups:
        raise SpecError(f"GroupLimit.groups = {limit.groups} must divide the number of experts, {spec.experts}")
    size = spec.experts // limit.groups
    if limit.score == "top2sum" and size < 2:
        raise SpecError(f"GroupLimit.groups = {limit.groups} leaves groups of one expert, and score 'top2sum' needs two")
    if not 0 < limit.kept <= limit.groups or limit.kept * size < spec.active:
        raise SpecError(f"GroupLimit.kept = {limit.kept} of {limit.groups} groups of {size} experts can't give {spec.active} active ones")


def initial_state(spec: ModelSpec, x_TD: Float[Array, "T D"]) -> Any:
    """What the first layer's router gets as its state: empty, but for pre-gated routers `(what the last router was given, whether one was)`.

    Args:
        spec: the model.
        x_TD: anything of the shape and dtype that routers read.
    """
    pregated = any(layer.router is not None and layer.router.pregated for layer in spec.layers)
    return (jnp.zeros_like(x_TD), jnp.bool_(False)) if pregated else ()


def _previous(x_TD: Float[Array, "T D"], state: Any) -> tuple[Float[Array, "T D"], Any]:
    """What the last MoE layer's router was given, or its own where this is the first; and the state for the next (Pre-gated MoE, arXiv:2308.12066).

    Raises:
        SpecError: the caller threads no state.
    """
    if not state:
        raise SpecError("RouterSpec.pregated needs the router state of `initial_state`, threaded through the layers")
    before, known = state
    return jnp.where(known, before, x_TD), (x_TD, jnp.bool_(True))


def route(
    spec: RouterSpec,
    params: dict,
    x_TD: Float[Array, "T D"],
    state: Any,
    valid_T: Bool[Array, "T"],
    kernels: Kernels,
    eps: float = 1e-6,
) -> tuple[RouterOut, Any]:
    """Chooses experts and their weights. What weights are applied to, `spec.apply`, is the caller's business.

    Args:
        spec: the stages.
        params: `{"kernel": [D, E]}` and, as the spec asks for them, "bias" [E], "select_bias" [E], "input_scale" [D], "expert_scale" [E]; in
            the form in which weights are held.
        x_TD: the layer's normalised activations; with `spec.input_norm`, those before the norm.
        state: threaded through the layers by routers that look back (`initial_state`); unchanged by others.
        valid_T: False for padding tokens, whose weights become exactly zero.
        kernels: which matmul.
        eps: of the router's own norm (`spec.input_norm`).

    Returns:
        The choice, and the state.

    Raises:
        SpecError: a stage that can't be run.
    """
    check(spec)
    if spec.pregated:
        x_TD, state = _previous(x_TD, state)
    inputs = stages.normalized(params["input_scale"], x_TD, eps, kernels) if spec.input_norm else x_TD
    logits = stages.router_logits(spec, params, inputs, kernels)
    if spec.select == "sparsemixer":
        ids, weights = sparsemixer(logits.astype(x_TD.dtype if spec.matmul_dtype == "model" else jnp.float32), spec.jitter, kernels)
    else:
        scores = stages.scores_of(spec, logits, kernels)
        ids, eligible = stages.select(spec, params, scores)
        weights = stages.chosen_weights(spec, logits, scores, eligible, ids, kernels)
    weights = stages.finished(spec, params, weights, ids)
    if spec.weights_dtype == "model":
        weights = weights.astype(x_TD.dtype).astype(jnp.float32)
    return RouterOut(ids, jnp.where(valid_T[:, None], weights, 0.0), logits), state
