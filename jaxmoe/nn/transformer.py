"""The model: one pure `forward` over a ragged batch that serves prefill, decode and training alike.

    logits, bank, state, aux = forward(spec, params, bank, state, batch, kernels)

Segments are scanned over their repeats when their leaves are stacked, and unrolled when they are tuples of one array a layer (which spares the
CPU a copy of every weight at every step: XLA there copies a slice before it multiplies with it).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe import formats
from jaxmoe.cache.batch import Batch
from jaxmoe.experts import ExpertBank
from jaxmoe.nn.layers import DecoderLayer
from jaxmoe.nn.parts import joined, model_norm
from jaxmoe.nn.pipeline import run_stages
from jaxmoe.nn.rope import rope_tables
from jaxmoe.routing.ahead import Gates, chosen_ahead
from jaxmoe.routing.route import RouterOut, initial_state
from jaxmoe.spec import LayerSpec, ModelSpec, Segment, abstract_params, stack_layers
from pallas_kernels.dense.api import dense
from pallas_kernels.dispatch import Kernels
from sharding.split import ALONE, Layout


def decoder_layer(spec: ModelSpec, layer: LayerSpec, kernels: Kernels, layout: Layout = ALONE) -> DecoderLayer:
    """The Linen module of one layer."""
    return DecoderLayer(layer, spec, kernels, layout)


def layer_tables(layer: LayerSpec, batch: Batch, dtype) -> tuple[jax.Array, jax.Array] | None:
    """The rotary tables of a layer's positions; None where nothing turns."""
    rope = None if layer.attention is None else layer.attention.rope
    return None if rope is None else rope_tables(rope, batch.positions, jnp.float32 if rope.wide else dtype)


def forward(
    spec: ModelSpec, params: dict, bank: ExpertBank, state: Any, batch: Batch, kernels: Kernels, collect: bool = False, gates: Gates | None = None,
    layout: Layout = ALONE,
) -> tuple[Float[Array, "R V"], ExpertBank, Any, dict]:
    """Runs the model over a batch.

    Args:
        spec: the model.
        params: the segmented tree (`jaxmoe.spec.params`), stacked or with tuples of layers.
        bank: the routed experts.
        state: the layers' state with `attend` and `delta` methods, such as `LayerStates`.
        batch: the tokens.
        kernels: which implementations run.
        collect: also return every layer's routing.
        gates: of `jaxmoe.routing.ahead.stack_gates`: with `collect`, return what they foretell of the next layers as well.
        layout: how the model is split over devices, inside `shard_map`: `spec` is then `sharding.split.local_spec`, and all else a device's own part.

    Returns:
        float32 logits of `batch.logit_rows` (see `head`); the bank and the state afterwards; aux: `{"routed": [RouterOut of [r, ...] leaves per
        sparse layer of each pattern]}` with `collect`, else empty.
    """
    fixed, moving = bank.split()
    x = embed(spec, params, batch, layout)
    carry = (x, moving, state, initial_state(spec, x))
    routed = []
    for segment, trees in zip(spec.segments, params["segments"], strict=True):
        if layout.stage:
            carry = _run_staged(spec, segment, trees, fixed, carry, batch, kernels, layout)
            continue
        carry, seen = _run_segment(spec, segment, trees, fixed, carry, batch, kernels, collect, gates, layout)
        routed.extend(seen)
    x, moving, state, _ = carry
    return head(spec, params, x, batch, kernels, layout), fixed.join(moving), state, {"routed": routed} if collect else {}


def layer_groups(spec: ModelSpec, groups: int) -> tuple[int, ...]:
    """Where groups of layers begin, and the last one ends: `groups` + 1 layer numbers, about equally many experts' layers in each.

    A pattern of layers that repeats is never cut.

    Raises:
        ValueError: more groups than there are such pieces, or none.
    """
    cuts = [segment.layer_index(r, 0) for segment in spec.segments for r in range(segment.repeats)]
    if not 1 <= groups <= len(cuts):
        raise ValueError(f"{groups} groups of layers: the model can be cut into 1 to {len(cuts)}")
    weights = [0.01 + sum(i in spec.moe_layers for i in range(a, b)) for a, b in zip(cuts, [*cuts[1:], spec.n_layers], strict=True)]
    total, out, done = sum(weights), [0], 0.0
    for i, weight in enumerate(weights):
        done += weight
        left = groups - len(out)  # groups that are still to begin
        if left and (done >= total * len(out) / groups - 1e-9 or len(weights) - i - 1 == left):
            out.append(cuts[i + 1])
    return (*out, spec.n_layers)


def forward_group(
    spec: ModelSpec, params: dict, bank: ExpertBank, state: Any, x: Float[Array, "T D"], router_state: Any, batch: Batch, kernels: Kernels,
    first: Int[Array, ""], last: Int[Array, ""],
) -> tuple[Float[Array, "T D"], ExpertBank, Any, Any]:  # fmt: skip
    """Takes a batch through the layers from `first` up to `last`, which are values: one program serves every group of layers.

    Args:
        spec, params, bank, state, batch, kernels: as for `forward`.
        x, router_state: what the layers before have left; of the tokens' embeddings where `first` is 0, whatever is given.
        first, last: of `layer_groups`.

    Returns:
        The residual stream, bank, state and router state after these layers.
    """
    fixed, moving = bank.split()
    fresh = (embed(spec, params, batch), initial_state(spec, x))
    x, router_state = jax.tree.map(lambda new, old: jnp.where(first == 0, new, old), fresh, (x, router_state))
    carry = (x, moving, state, router_state)
    for segment, trees in zip(spec.segments, params["segments"], strict=True):
        repeat = _repeat_of(spec, segment, fixed, batch, kernels, False, None, ALONE)
        if _is_unrolled(trees):
            for r in range(segment.repeats):
                layers = _layers_at(trees, r)
                at = segment.layer_index(r, 0)
                inside = ((first <= at) & (at < last)).astype(jnp.int32)
                # A loop of one step or none: what a conditional hands through it may copy, and pools are large.
                carry = jax.lax.fori_loop(0, inside, lambda _, c, layers=layers, r=r, repeat=repeat: repeat(c, (layers, r))[0], carry)
        else:
            begin, each = segment.first, len(segment.pattern)
            low, high = (jnp.clip((edge - begin) // each, 0, segment.repeats) for edge in (first, last))

            def one(r, carry, trees=trees, repeat=repeat):
                layers = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, r, 0, keepdims=False), trees)
                return repeat(carry, (layers, r))[0]

            carry = jax.lax.fori_loop(low, high, one, carry)
    x, moving, state, router_state = carry
    return x, fixed.join(moving), state, router_state


def embed(spec: ModelSpec, params: dict, batch: Batch, layout: Layout = ALONE) -> Float[Array, "T D"]:
    """The tokens' embeddings; where the vocabulary is split, from whichever device has them."""
    with jax.named_scope("embed"):
        table, dtype = params["embed"]["table"], formats.compute_dtype(spec.precision.compute)
        if layout.vocab:
            at = batch.tokens - jax.lax.axis_index(layout.vocab) * spec.vocab
            own = (at >= 0) & (at < spec.vocab)
            rows = formats.load(table[jnp.clip(at, 0, spec.vocab - 1)], dtype)
            x = joined(jnp.where(own[:, None], rows, jnp.zeros_like(rows)), layout.vocab)
        else:
            x = formats.load(table[batch.tokens], dtype)
        return x if spec.embed_scale == 1.0 else formats.rounded(x * jnp.asarray(spec.embed_scale, x.dtype))


def head(
    spec: ModelSpec, params: dict, x_TD: Float[Array, "T D"], batch: Batch, kernels: Kernels, layout: Layout = ALONE
) -> Float[Array, "R V"]:
    """float32 logits of `batch.logit_rows`; a device's own part of them where the vocabulary is split."""
    with jax.named_scope("head"):
        norm: Any = model_norm(spec, kernels)
        kernel, transposed = head_kernel(params)
        x = x_TD[batch.logit_rows]
        if layout.sequence and batch.run > 1:  # from whichever device has the token
            own = (batch.logit_rows >= 0)[:, None]
            x = joined(jnp.where(own, x_TD[jnp.maximum(batch.logit_rows, 0)], jnp.zeros_like(x)), layout.sequence)
        logits = dense(norm.apply({"params": params["final_norm"]}, x), kernel, kernels, jnp.float32, transposed)
        if spec.head_bias:
            logits = logits + formats.load(params["lm_head"]["bias"], jnp.float32)
        if spec.logit_divisor != 1.0:
            logits = logits / spec.logit_divisor
        return logits if spec.logit_cap is None else jnp.tanh(logits / spec.logit_cap) * spec.logit_cap


def head_kernel(params: dict) -> tuple[jax.Array, bool]:
    """The output matrix and whether it is transposed: its own [D, V], or the embedding's [V, D]."""
    return (params["lm_head"]["kernel"], False) if "lm_head" in params else (params["embed"]["table"], True)


def chosen_experts(spec: ModelSpec, routed: list[RouterOut]) -> tuple[Array, ...]:
    """What `forward` collected, by MoE layer.

    Returns:
        int16 [T, L, A] expert ids and float16 [T, L, A] weights; with gates, also the int16 [T, L, K, W] ids that they foretell.
    """
    names = ("ids", "weights") if routed[0].ahead is None else ("ids", "weights", "ahead")
    found: dict[str, list[jax.Array]] = {name: [] for name in names}
    at = 0
    for segment in spec.segments:
        sparse = sum(layer.sparse for layer in segment.pattern)
        own, at = routed[at : at + sparse], at + sparse
        for name, out in found.items():
            if own:
                layers = jnp.stack([getattr(r, name) for r in own], axis=1)  # [repeats, sparse, T, ...]
                out.append(layers.reshape(-1, *layers.shape[2:]))
    return tuple(jnp.concatenate(out).swapaxes(0, 1).astype(jnp.float16 if name == "weights" else jnp.int16) for name, out in found.items())


def _repeat_of(spec: ModelSpec, segment: Segment, fixed, batch: Batch, kernels, collect: bool, gates: Gates | None, layout: Layout) -> Callable:
    """`(carry, (layers, r)) -> (carry, routing of each sparse layer)`: the r-th repeat of a segment's pattern."""
    pattern, before = segment.pattern, spec.layers[: segment.first]
    modules: list[Any] = [decoder_layer(spec, layer, kernels, layout) for layer in pattern]

    def number(same: Callable[[LayerSpec], bool], r, j: int):
        """Which of the model's layers of some kind the j-th of the r-th repeat is."""
        return sum(map(same, before)) + r * sum(map(same, pattern)) + sum(map(same, pattern[:j]))

    def repeat(carry, tree_and_index):
        layers, r = tree_and_index
        x, moving, state, router_state = carry
        bank = fixed.join(moving)
        seen: list[RouterOut] = []
        for j, (module, tree) in enumerate(zip(modules, layers, strict=True)):
            own = pattern[j]
            layer = number(functools.partial(_same_state, own), r, j)
            moe_layer = number(lambda other: other.sparse, r, j)
            x, bank, state, router_state, routed = module.apply(
                {"params": tree}, "all", x, layer, moe_layer, bank, state, router_state, batch, layer_tables(own, batch, x.dtype)
            )
            if routed is not None and collect:
                ahead = None if gates is None else chosen_ahead(spec, gates, moe_layer, routed.inputs, kernels)
                seen.append(routed._replace(inputs=None, ahead=ahead))
        return (x, bank.split()[1], state, router_state), tuple(seen)

    return repeat


def _run_segment(spec: ModelSpec, segment: Segment, trees, fixed, carry, batch, kernels, collect: bool, gates: Gates | None, layout: Layout):
    """Runs all repeats of a pattern; returns the carry and, per sparse layer of the pattern, its routing stacked over repeats."""
    repeat = _repeat_of(spec, segment, fixed, batch, kernels, collect, gates, layout)
    if _is_unrolled(trees):
        out = []
        for r in range(segment.repeats):
            carry, seen = repeat(carry, (_layers_at(trees, r), r))
            out.append(seen)
        return carry, list(jax.tree.map(lambda *a: jnp.stack(a), *out)) if out and out[0] else []
    carry, seen = jax.lax.scan(repeat, carry, (trees, jnp.arange(segment.repeats)))
    return carry, list(seen)


def _layers_at(trees: tuple, r: int) -> tuple:
    """The r-th repeat's layers of a segment with a tuple of arrays a leaf."""
    return tuple(jax.tree.map(lambda t: t[r], tree, is_leaf=lambda t: isinstance(t, tuple)) for tree in trees)


def _run_staged(spec: ModelSpec, segment: Segment, trees, fixed, carry, batch, kernels, layout: Layout):
    """Runs a segment of which each stage has some of the repeats."""
    x, moving, state, router_state = carry

    def layers(through, kept, part):
        (x, moving, state, router_state), _ = _run_segment(
            spec, segment, trees, fixed, (through[0], *kept, through[1]), part, kernels, False, None, layout
        )
        return (x, router_state), (moving, state)

    whole = bool(layout.sequence) and batch.run > 1
    (x, router_state), (moving, state) = run_stages(layers, layout.split.stage, (x, router_state), (moving, state), batch, whole)
    return x, moving, state, router_state


def _same_state(layer: LayerSpec, other: LayerSpec) -> bool:
    return layer.state == other.state


def _is_unrolled(trees: tuple) -> bool:
    return isinstance(trees[0]["norm_attn"]["scale"], tuple)


def init_params(spec: ModelSpec, key: jax.Array) -> dict:
    """Random parameters in the segmented, stacked form.

    Residual projections (attention's output) are scaled down by sqrt(2 L), as GPT-2 does.
    """
    layered: dict[str, Any] = {"layers": {}}
    keys = jax.random.split(key, spec.n_layers + 2)
    for i, layer in enumerate(spec.layers):
        layered["layers"][str(i)] = _init_layer(spec, layer, keys[i])
    embed = jax.random.normal(keys[-1], (spec.vocab, spec.width)) * 0.02
    layered["embed"] = {"table": formats.store(embed, spec.precision.params)}
    layered["final_norm"] = _init_norm(spec)
    if not spec.tied:
        head = jax.random.normal(keys[-2], (spec.width, spec.vocab)) * 0.02
        layered["lm_head"] = {"kernel": formats.store(head, spec.precision.params)}
        if spec.head_bias:
            layered["lm_head"]["bias"] = formats.store(jnp.zeros(spec.vocab), spec.precision.params)
    return stack_layers(spec, layered, jnp.stack)


def _init_norm(spec: ModelSpec) -> dict:
    out = {"scale": formats.store(jnp.full(spec.width, 1.0 - spec.norm_offset), spec.precision.params)}
    if spec.norm == "layer":
        out["bias"] = formats.store(jnp.zeros(spec.width), spec.precision.params)
    return out


def _init_layer(spec: ModelSpec, layer: LayerSpec, key: jax.Array) -> dict:
    """Leaves of one layer by the shapes of `abstract_params`: scales such that norms multiply by one, biases zero, kernels normal."""
    index = next(i for i, other in enumerate(spec.layers) if other == layer)
    leaves, tree = jax.tree.flatten_with_path(abstract_params(spec)["layers"][str(index)])
    out = []
    for n, (path, leaf) in enumerate(leaves):
        parent, name = path[-2].key, path[-1].key
        if name == "kernel":
            scale = 0.02 / (2 * spec.n_layers) ** 0.5 if parent in ("o", "down") else 0.02
            value = jax.random.normal(jax.random.fold_in(key, n), leaf.shape) * scale
        elif name == "scale" and parent in ("sinks", "a_log"):
            value = jnp.zeros(leaf.shape)
        elif name == "scale":
            plain = parent.startswith("norm_") or parent in ("q_norm", "k_norm")
            latent = layer.attention is not None and layer.attention.latent is not None and parent == "q_norm"
            value = jnp.full(leaf.shape, 1.0 - (spec.norm_offset if plain and not latent else 0.0))
        else:
            value = jnp.ones(leaf.shape) if name in ("input_scale", "expert_scale") else jnp.zeros(leaf.shape)
        out.append(formats.store(value, "float32" if leaf.dtype == jnp.float32 else "bfloat16"))
    return jax.tree.unflatten(tree, out)
