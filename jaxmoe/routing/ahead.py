"""Routing ahead of time: the routers of later layers, stacked, evaluated on what an earlier layer's router reads.

The residual stream changes slowly from layer to layer, so that a later router given an earlier layer's input chooses much of what it will choose
(Fate, arXiv:2502.12224, "cross-layer gate"; HOBBIT, arXiv:2411.01433, evaluates several layers' gates in one stacked matmul). Nothing here decides
what is computed: it only foretells, and knows neither caches nor links.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int16, Num

from jaxmoe.routing import stages
from jaxmoe.routing.route import check
from jaxmoe.spec import ModelSpec, RouterSpec
from pallas_kernels.dense.api import softmax
from pallas_kernels.dispatch import Kernels

AHEAD = 4
"""For how many layers ahead choices are recorded (K)."""

WIDTH = 3
"""How many times as many experts as a token uses are recorded of each (W = WIDTH * A)."""

LEAVES = ("kernel", "bias", "select_bias", "input_scale")
"""A router's weights that its ranking depends on."""

Gates = dict[str, Num[Array, "L ..."]]


def stack_gates(spec: ModelSpec, params: dict) -> Gates:
    """The routers of all MoE layers as one array a leaf, as they are held (bfloat16 as uint16).

    Args:
        spec: the model.
        params: the segmented tree (`jaxmoe.spec.params`), stacked or with tuples of layers; abstract or numpy leaves do too.

    Returns:
        "kernel" [L, D, E] and, where routers have them, "bias" [L, E], "select_bias" [L, E] and "input_scale" [L, D].

    Raises:
        SpecError: the layers' routers are of several kinds, or of one that can't be run.
    """
    router, _ = spec.moe
    check(router)
    segments = []
    for segment, trees in zip(spec.segments, params["segments"], strict=True):
        own = [tree["router"] for layer, tree in zip(segment.pattern, trees, strict=True) if layer.sparse]
        if own:
            segments.append({name: _by_layer([gate[name] for gate in own]) for name in LEAVES if name in own[0]})
    return {name: _joined([gates[name] for gates in segments]) for name in segments[0]}


def _by_layer(leaves: list) -> Array:
    """Leaves of a pattern's sparse layers, each over the repeats, as one in the order of the layers."""
    stacked = [jnp.stack(leaf) if isinstance(leaf, tuple) else jnp.asarray(leaf) for leaf in leaves]
    return stacked[0] if len(stacked) == 1 else jnp.stack(stacked, axis=1).reshape(-1, *stacked[0].shape[1:])


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def gate_scores(
    spec: ModelSpec, gates: Gates, moe_layer: Any, x_TD: Float[Array, "T D"], valid_T: Bool[Array, "T"], depth: int, kernels: Kernels
) -> Float[Array, "depth E"]:
    """How likely the next layers are to ask for each expert, judged by what a layer's router reads.

    A token's number for an expert is the chance to be drawn at least once in A draws by share (`shares`): it ranks as the router's selection does,
    and a layer's numbers add up to at most A, as uses do. Tokens are combined as if they were independent: 1 - prod(1 - p).

    Args:
        spec: the model.
        gates: of `stack_gates`.
        moe_layer: the layer whose input is given, by its place among MoE layers; may be traced. -1 with the first layer's input gives the first
            layer's own scores.
        x_TD: what that layer's router reads: the normalised activations, or with `RouterSpec.input_norm` the residual stream.
        valid_T: False for padding.
        depth: layers to look ahead.
        kernels: which matmul.

    Returns:
        float32 [depth, E] in [0, 1]; zeros past the last layer.
    """
    router, _ = spec.moe
    with jax.named_scope("gates"):
        biased, masked = _selection(spec, gates, moe_layer, x_TD, depth, kernels)
        share = shares(router, biased, masked, kernels)
        chance = 1 - (1 - share) ** router.active
        missed = jnp.prod(jnp.where(valid_T[:, None], 1 - chance, 1.0), axis=1)
        return jnp.where(_exists(gates, moe_layer, depth)[:, None], 1 - missed, 0.0)


def chosen_ahead(spec: ModelSpec, gates: Gates, moe_layer: Any, x_TD: Float[Array, "T D"], kernels: Kernels) -> Int16[Array, "T K W"]:
    """The experts that the routers of the next `AHEAD` layers would choose, token by token, and those that they would choose next.

    Args:
        spec, gates, moe_layer, x_TD, kernels: see `gate_scores`.

    Returns:
        int16 [T, AHEAD, WIDTH * A] ids, best first: the first A are what the router would choose. Where groups limit the choice, experts of the
        kept groups come first, and the others after them by their own score. -1 past the last layer and where there are no more experts.
    """
    router, _ = spec.moe
    wide = WIDTH * router.active
    with jax.named_scope("gates"):
        biased, masked = _selection(spec, gates, moe_layer, x_TD, AHEAD, kernels)
        count = min(wide, router.experts)
        if router.group_limit is None:
            ids = jax.lax.top_k(masked, count)[1]
        else:
            ids = jnp.lexsort((-biased, -masked), axis=-1)[..., :count]
        ids = jnp.where(_exists(gates, moe_layer, AHEAD)[:, None, None], ids, -1)
        ids = jnp.pad(ids, ((0, 0), (0, 0), (0, wide - count)), constant_values=-1)
    return ids.swapaxes(0, 1).astype(jnp.int16)


def shares(router: RouterSpec, biased: Float[Array, "K T E"], masked: Float[Array, "K T E"], kernels: Kernels) -> Float[Array, "K T E"]:
    """Selection scores as shares that add up to one and keep the ranking; experts outside the kept groups have none.

    Logits go through a softmax. Scores are divided by their sum; those with a bias for selection, which may be negative, are counted from the token's
    lowest one.

    Args:
        router: the stages.
        biased: scores, with the bias for selection.
        masked: the same where experts are eligible; a number that stands for others, where groups limit the choice.
        kernels: how a row is summed.
    """
    eligible = masked == biased
    if router.score == "none":
        rows = jnp.where(eligible, biased, -jnp.inf)
        return softmax(rows.reshape(-1, rows.shape[-1]), kernels).reshape(rows.shape)
    least = biased.min(-1, keepdims=True) if router.select_bias else 0.0
    above = jnp.where(eligible, biased - least, 0.0)
    return above / jnp.maximum(above.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def _exists(gates: Gates, moe_layer: Any, depth: int) -> Bool[Array, "depth"]:
    return moe_layer + 1 + jnp.arange(depth) < gates["kernel"].shape[0]


def _selection(
    spec: ModelSpec, gates: Gates, moe_layer: Any, x_TD: Float[Array, "T D"], depth: int, kernels: Kernels
) -> tuple[Float[Array, "depth T E"], Float[Array, "depth T E"]]:
    """The next layers' selection scores with their bias, and the same with ineligible experts masked.

    One stacked matmul. On the CPU it goes layer by layer, as that backend's dots of several heads do: each is then the router's own dot, bit for bit.
    """
    router, _ = spec.moe
    last = gates["kernel"].shape[0] - 1
    layers = jnp.clip(moe_layer + 1 + jnp.arange(depth), 0, last)

    def of_layer(gate: dict) -> tuple[Array, Array]:
        inputs = stages.normalized(gate["input_scale"], x_TD, spec.norm_eps, kernels) if router.input_norm else x_TD
        scores = stages.scores_of(router, stages.router_logits(router, gate, inputs, kernels), kernels)
        biased = stages.with_bias(router, gate, scores)
        return biased, stages.masked(router, biased)[0]

    chosen = {name: leaf[layers] for name, leaf in gates.items()}
    return jax.lax.map(of_layer, chosen) if kernels.backend == "cpu" else jax.vmap(of_layer)(chosen)
