"""Qwen1.5-MoE and Qwen2-MoE: biases on q, k and v only, an expert that sees every token behind a gate, windows on some layers (transformers,
models/qwen2_moe)."""

from __future__ import annotations

from typing import Any

from jaxmoe.spec.families.common import FULL, SHAPE, SLIDING, Family, attention, count, layer_kinds, only, positive, router
from jaxmoe.spec.families.qwen3_moe import sparse_steps
from jaxmoe.spec.types import AttentionSpec, ExpertSpec, LayerSpec, SpecError


def sparse(config: dict, normalize: bool, **kwargs: Any) -> LayerSpec:
    """A layer of routed experts and one that sees every token, behind a gate; `kwargs` are further fields of `LayerSpec`."""
    return LayerSpec(
        router=router(config, positive(config, "num_experts"), normalize=normalize),
        experts=ExpertSpec(positive(config, "moe_intermediate_size")),
        shared=ExpertSpec(positive(config, "shared_expert_intermediate_size")),
        shared_gate=True,
        **kwargs,
    )


def _kinds(config: dict) -> list[str]:
    """Unless they are named, every other one of the first `max_window_layers` layers has a window, from layer 0 on."""
    windows = bool(config.get("use_sliding_window", False))
    if windows and config.get("max_window_layers") is None and config.get("layer_types") is None:
        raise SpecError("config.json: use_sliding_window = True needs the field 'max_window_layers' or 'layer_types'")
    first = count(config, "max_window_layers")
    kinds = layer_kinds(config, "layer_types", (FULL, SLIDING), lambda i: SLIDING if windows and i < first and i % 2 == 0 else FULL)
    if not windows and SLIDING in kinds:
        raise SpecError(f"config.json: layer_types holds {SLIDING!r}, but use_sliding_window = {config.get('use_sliding_window')!r}")
    return kinds


def _attention(config: dict, kind: str) -> AttentionSpec:
    window = positive(config, "sliding_window") if kind == SLIDING else None
    return attention(config, qkv_bias=config.get("qkv_bias", True), window=window)


def _layers(config: dict) -> list[LayerSpec]:
    only(config, "qkv_bias", True, False)
    kinds = _kinds(config)
    made = {kind: sparse_steps(config, sparse(config, bool(config["norm_topk_prob"]), attention=_attention(config, kind))) for kind in set(kinds)}
    return [made[kind][i] for i, kind in enumerate(kinds)]


FAMILY = Family(
    (*SHAPE, "moe_intermediate_size", "shared_expert_intermediate_size", "num_experts", "norm_topk_prob"),
    (
        "num_key_value_heads", "head_dim", "qkv_bias", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types",
        "tie_word_embeddings", "decoder_sparse_step", "mlp_only_layers",
    ),
    _layers,
    models="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
)  # fmt: skip
