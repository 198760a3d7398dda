"""Shapes, dtypes and logical axes of every leaf, and the two ways to arrange layers.

*Layered*: `{"embed", "layers": {"0": {...}, "1": ...}, "final_norm", "lm_head"}`, one entry a layer: what checkpoints hold.
*Segmented*: `{"embed", "segments": ((tree, ...), ...), "final_norm", "lm_head"}`, where `segments[s][j]` holds layer j of segment s's pattern with
a leading axis over repeats: what the scanned model takes. `stack_layers` and `unstack_layers` go between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxmoe import formats
from jaxmoe.spec.types import AttentionSpec, DeltaSpec, ExpertSpec, LatentSpec, LayerSpec, ModelSpec, RouterSpec


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter array before it exists: `shape`, `dtype` as held (bfloat16 is held as uint16), and a logical name per axis."""

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str | None, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


MakeLeaf = Callable[..., Leaf]
"""`(shape, axes, dtype=None) -> Leaf`: a leaf in the model's dtype, or in the one named."""


def _linear(leaf: MakeLeaf, shape: tuple[int, ...], axes: tuple[str | None, ...], inputs: int = 1, bias: bool = False) -> dict:
    out = {"kernel": leaf(shape, axes)}
    if bias:
        out["bias"] = leaf(shape[inputs:], axes[inputs:])
    return out


def _attention(a: AttentionSpec, width: int, leaf: MakeLeaf) -> dict:
    h, k, c = a.heads, a.kv_heads, a.head_dim
    if a.latent is not None:
        return _latent(a, a.latent, width, leaf)
    out: dict[str, Any] = {
        "q": _linear(leaf, (width, h, c), ("embed", "heads", "head_dim"), bias=a.qkv_bias),
        "k": _linear(leaf, (width, k, c), ("embed", "kv_heads", "head_dim"), bias=a.qkv_bias),
        "o": _linear(leaf, (h, c, width), ("heads", "head_dim", "embed"), 2, a.out_bias),
    }
    if a.values == "own":
        out["v"] = _linear(leaf, (width, k, c), ("embed", "kv_heads", "head_dim"), bias=a.qkv_bias)
    if a.gate:
        out["gate"] = _linear(leaf, (width, h, c), ("embed", "heads", "head_dim"), bias=a.qkv_bias)
    if a.qk_norm == "head":
        out["q_norm"] = {"scale": leaf((c,), ("head_dim",))}
        out["k_norm"] = {"scale": leaf((c,), ("head_dim",))}
    elif a.qk_norm == "full":
        out["q_norm"] = {"scale": leaf((h, c), ("heads", "head_dim"))}
        out["k_norm"] = {"scale": leaf((k, c), ("kv_heads", "head_dim"))}
    if a.sinks:
        out["sinks"] = {"scale": leaf((h,), ("heads",))}
    return out


def _latent(a: AttentionSpec, m: LatentSpec, width: int, leaf: MakeLeaf) -> dict:
    h, r = a.heads, a.rope.width if a.rope else 0
    out: dict[str, Any] = {
        "kv_down": _linear(leaf, (width, m.kv_rank), ("embed", None), bias=a.qkv_bias),
        "k_rope": _linear(leaf, (width, r), ("embed", None), bias=a.qkv_bias),
        "kv_norm": {"scale": leaf((m.kv_rank,), (None,))},
        # By head, each as checkpoints have it: the latent is the last axis, which queries are multiplied into and outputs out of.
        "k_up": {"kernel": leaf((h, m.plain, m.kv_rank), ("heads", None, None))},
        "v_up": {"kernel": leaf((h, m.value, m.kv_rank), ("heads", None, None))},
        "o": _linear(leaf, (h, m.value, width), ("heads", None, "embed"), 2, a.out_bias),
    }
    if m.q_rank is None:
        return {"q": _linear(leaf, (width, h, a.head_dim), ("embed", "heads", "head_dim"))} | out
    return {
        "q_down": _linear(leaf, (width, m.q_rank), ("embed", None), bias=a.qkv_bias),
        "q_norm": {"scale": leaf((m.q_rank,), (None,))},
        "q_up": _linear(leaf, (m.q_rank, h, a.head_dim), (None, "heads", "head_dim")),
    } | out


def _delta(d: DeltaSpec, width: int, leaf: MakeLeaf) -> dict:
    sizes = {"q": (d.k_heads, d.k_dim), "k": (d.k_heads, d.k_dim), "v": (d.v_heads, d.v_dim)}
    axes = {"q": "kv_heads", "k": "kv_heads", "v": "heads", "z": "heads"}
    out = {name: _linear(leaf, (width, *size), ("embed", axes[name], None)) for name, size in {**sizes, "z": sizes["v"]}.items()}
    out |= {name: _linear(leaf, (width, d.v_heads), ("embed", "heads")) for name in ("beta", "decay")}
    out |= {f"conv_{name}": {"kernel": leaf((*size, d.conv), (axes[name], None, None))} for name, size in sizes.items()}
    return out | {
        "a_log": {"scale": leaf((d.v_heads,), ("heads",))},
        "dt_bias": {"bias": leaf((d.v_heads,), ("heads",))},
        "norm": {"scale": leaf((d.v_dim,), (None,))},
        "o": _linear(leaf, (d.v_heads, d.v_dim, width), ("heads", None, "embed"), 2),
    }


def _mlp(e: ExpertSpec, width: int, leaf: MakeLeaf, hidden: str = "mlp_hidden") -> dict:
    return {
        "gate": _linear(leaf, (width, e.width), ("embed", hidden), bias=e.bias),
        "up": _linear(leaf, (width, e.width), ("embed", hidden), bias=e.bias),
        "down": _linear(leaf, (e.width, width), (hidden, "embed"), bias=e.bias),
    }


def _router(r: RouterSpec, width: int, leaf: MakeLeaf) -> dict:
    held = "float32" if r.matmul_dtype == "float32" else None
    out = {"kernel": leaf((width, r.experts), ("embed", None), held)}
    if r.logits_bias:
        out["bias"] = leaf((r.experts,), (None,), held)
    if r.select_bias:
        out["select_bias"] = leaf((r.experts,), (None,), "float32")
    if r.input_norm:
        out["input_scale"] = leaf((width,), ("embed",))
    if r.expert_scale:
        out["expert_scale"] = leaf((r.experts,), (None,))
    return out


def _layer(layer: LayerSpec, spec: ModelSpec, leaf: MakeLeaf) -> dict:
    width = spec.width
    names = ["norm_attn", "norm_mlp"]
    if layer.post_norms:
        names += ["norm_attn_out", "norm_mlp_out"]
        if layer.dense is not None and layer.experts is not None:
            names += ["norm_experts", "norm_mlp_own", "norm_experts_out"]
    out: dict[str, Any] = {name: _norm(spec, leaf) for name in names}
    if layer.attention is not None:
        out["attn"] = _attention(layer.attention, width, leaf)
    if layer.delta is not None:
        out["delta"] = _delta(layer.delta, width, leaf)
    if layer.router is not None and layer.experts is not None:
        out["router"] = _router(layer.router, width, leaf)
        if layer.experts.bias:
            e, f = layer.router.experts, layer.experts.width
            out["expert_bias"] = {"w_in": leaf((e, 2, f), ("experts", None, "hidden")), "w_out": leaf((e, width), ("experts", "embed"))}
    if layer.dense is not None:
        out["mlp"] = _mlp(layer.dense, width, leaf)
    if layer.shared is not None:
        out["shared"] = _mlp(layer.shared, width, leaf, "shared_hidden")
        if layer.shared_gate:
            out["shared_gate"] = _linear(leaf, (width, 1), ("embed", None))
    if layer.layer_scale:
        out["layer_scale"] = {"scale": leaf((1,), (None,))}
    return out


def _norm(spec: ModelSpec, leaf: MakeLeaf) -> dict:
    out = {"scale": leaf((spec.width,), ("embed",))}
    if spec.norm == "layer":
        out["bias"] = leaf((spec.width,), ("embed",))
    return out


def abstract_params(spec: ModelSpec) -> dict:
    """The layered tree of `Leaf`s of everything but routed experts."""

    def leaf(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: str | None = None) -> Leaf:
        return Leaf(shape, formats.leaf_dtype(dtype or spec.precision.params), axes)

    out = {
        "embed": {"table": leaf((spec.vocab, spec.width), ("vocab", "embed"))},
        "layers": {str(i): _layer(layer, spec, leaf) for i, layer in enumerate(spec.layers)},
        "final_norm": _norm(spec, leaf),
    }
    if not spec.tied:
        out["lm_head"] = _linear(leaf, (spec.width, spec.vocab), ("embed", "vocab"), bias=spec.head_bias)
    if spec.extra_heads:
        out["extra"] = {str(i): _extra(layer, spec, leaf) for i, layer in enumerate(spec.extra_heads)}
    return out


def _extra(layer: LayerSpec, spec: ModelSpec, leaf: MakeLeaf) -> dict:
    """A head of multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2); embedding and output matrix are the model's own."""
    return {
        "embed_norm": _norm(spec, leaf),
        "hidden_norm": _norm(spec, leaf),
        "join": _linear(leaf, (2, spec.width, spec.width), (None, "embed", "embed_out"), 2),
        "layer": _layer(layer, spec, leaf),
        "norm": _norm(spec, leaf),
    }


def abstract_experts(spec: ModelSpec) -> dict:
    """The tree of `Leaf`s of the routed experts as checkpoints hold them: `{layer: {gate [E, D, F], up [E, D, F], down [E, F, D]}}`.

    The experts of extra head i are those of layer `n_layers + i`.
    """
    dtype = formats.leaf_dtype(spec.precision.params)
    out = {}
    for i, layer in enumerate((*spec.layers, *spec.extra_heads)):
        if layer.router is None or layer.experts is None:
            continue
        e, d, f = layer.router.experts, spec.width, layer.experts.width
        out[str(i)] = {
            "gate": Leaf((e, d, f), dtype, ("experts", "embed", "hidden")),
            "up": Leaf((e, d, f), dtype, ("experts", "embed", "hidden")),
            "down": Leaf((e, f, d), dtype, ("experts", "hidden", "embed")),
        }
    return out


def parameter_counts(spec: ModelSpec) -> tuple[int, int]:
    """How many parameters the model has, and how many of them a token uses: all but the embedding table's other rows and the experts not chosen.

    Extra heads count in neither.
    """

    def size(tree: Any) -> int:
        return sum(map(size, tree.values())) if isinstance(tree, dict) else int(np.prod(tree.shape, dtype=np.int64))

    own = dataclasses.replace(spec, extra_heads=())
    params, experts = abstract_params(own), abstract_experts(own)
    total = size(params) + size(experts)
    used = total if spec.tied else total - size(params["embed"])
    for i in spec.moe_layers:
        router = spec.layers[i].router
        assert router is not None, "a layer with experts has a router"
        of_experts = size(experts[str(i)]) + size(params["layers"][str(i)].get("expert_bias", {}))
        used -= of_experts // router.experts * (router.experts - router.active)
    return total, used


def stack_layers(spec: ModelSpec, layered: dict, stack: Callable[[list], Any]) -> dict:
    """Turns a layered tree into the segmented one; `stack` joins the same leaf of a segment's repeats (e.g. `np.stack`, or `tuple`)."""
    out = {k: v for k, v in layered.items() if k != "layers"}
    out["segments"] = tuple(
        tuple(
            _zip_trees([layered["layers"][str(seg.layer_index(r, j))] for r in range(seg.repeats)], stack)
            for j in range(len(seg.pattern))
        )
        for seg in spec.segments
    )
    return out


def unstack_layers(spec: ModelSpec, segmented: dict, take: Callable[[Any, int], Any] = lambda a, r: a[r]) -> dict:
    """The inverse of `stack_layers`; `take(leaf, r)` picks repeat r out of a stacked leaf."""
    out = {k: v for k, v in segmented.items() if k != "segments"}
    layers: dict[str, Any] = {}
    for seg, trees in zip(spec.segments, segmented["segments"], strict=True):
        for j, tree in enumerate(trees):
            for r in range(seg.repeats):
                layers[str(seg.layer_index(r, j))] = _map_tree(tree, lambda a, r=r: take(a, r))
    out["layers"] = {str(i): layers[str(i)] for i in range(spec.n_layers)}
    return out


def _zip_trees(trees: list, join: Callable[[list], Any]):
    if isinstance(trees[0], dict):
        return {k: _zip_trees([t[k] for t in trees], join) for k in trees[0]}
    return join(trees)


def _map_tree(tree, f: Callable):
    if isinstance(tree, dict):
        return {k: _map_tree(v, f) for k, v in tree.items()}
    return f(tree)
