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
from jaxmoe.spec.types import AttentionSpec, ExpertSpec, LayerSpec, ModelSpec


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


def _attention(a: AttentionSpec, width: int, leaf: Callable) -> dict:
    h, k, c = a.heads, a.kv_heads, a.head_dim
    out: dict[str, Any] = {
        "q": {"kernel": leaf((width, h, c), ("embed", "heads", "head_dim"))},
        "k": {"kernel": leaf((width, k, c), ("embed", "kv_heads", "head_dim"))},
        "v": {"kernel": leaf((width, k, c), ("embed", "kv_heads", "head_dim"))},
        "o": {"kernel": leaf((h, c, width), ("heads", "head_dim", "embed"))},
    }
    if a.qkv_bias:
        out["q"]["bias"] = leaf((h, c), ("heads", "head_dim"))
        out["k"]["bias"] = leaf((k, c), ("kv_heads", "head_dim"))
        out["v"]["bias"] = leaf((k, c), ("kv_heads", "head_dim"))
    if a.out_bias:
        out["o"]["bias"] = leaf((width,), ("embed",))
    if a.qk_norm == "head":
        out["q_norm"] = {"scale": leaf((c,), ("head_dim",))}
        out["k_norm"] = {"scale": leaf((c,), ("head_dim",))}
    elif a.qk_norm == "full":
        out["q_norm"] = {"scale": leaf((h, c), ("heads", "head_dim"))}
        out["k_norm"] = {"scale": leaf((k, c), ("kv_heads", "head_dim"))}
    return out


def _mlp(e: ExpertSpec, width: int, leaf: Callable) -> dict:
    return {
        "gate": {"kernel": leaf((width, e.width), ("embed", "hidden"))},
        "up": {"kernel": leaf((width, e.width), ("embed", "hidden"))},
        "down": {"kernel": leaf((e.width, width), ("hidden", "embed"))},
    }


def _layer(layer: LayerSpec, spec: ModelSpec, leaf: Callable) -> dict:
    out = {
        "norm_attn": {"scale": leaf((spec.width,), ("embed",))},
        "attn": _attention(layer.attention, spec.width, leaf),
        "norm_mlp": {"scale": leaf((spec.width,), ("embed",))},
    }
    if layer.router is not None:
        out["router"] = {"kernel": leaf((spec.width, layer.router.experts), ("embed", None))}
    if layer.dense is not None:
        out["mlp"] = _mlp(layer.dense, spec.width, leaf)
    return out


def abstract_params(spec: ModelSpec) -> dict:
    """The layered tree of `Leaf`s of everything but routed experts."""
    dtype = formats.leaf_dtype(spec.precision.params)

    def leaf(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Leaf:
        return Leaf(shape, dtype, axes)

    out = {
        "embed": {"table": leaf((spec.vocab, spec.width), ("vocab", "embed"))},
        "layers": {str(i): _layer(layer, spec, leaf) for i, layer in enumerate(spec.layers)},
        "final_norm": {"scale": leaf((spec.width,), ("embed",))},
    }
    if not spec.tied:
        out["lm_head"] = {"kernel": leaf((spec.width, spec.vocab), ("embed", "vocab"))}
    return out


def abstract_experts(spec: ModelSpec) -> dict:
    """The tree of `Leaf`s of the routed experts as checkpoints hold them: `{layer: {gate [E, D, F], up [E, D, F], down [E, F, D]}}`."""
    dtype = formats.leaf_dtype(spec.precision.params)
    out = {}
    for i, layer in enumerate(spec.layers):
        if layer.router is None or layer.experts is None:
            continue
        e, d, f = layer.router.experts, spec.width, layer.experts.width
        out[str(i)] = {
            "gate": Leaf((e, d, f), dtype, ("experts", "embed", "hidden")),
            "up": Leaf((e, d, f), dtype, ("experts", "embed", "hidden")),
            "down": Leaf((e, f, d), dtype, ("experts", "hidden", "embed")),
        }
    return out


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
