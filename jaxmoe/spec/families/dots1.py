"""dots.llm1: Qwen3's attention, perhaps with a window in some layers, and DeepSeek-V3's router (transformers, models/dots1)."""

from __future__ import annotations

import dataclasses

from jaxmoe.spec.families.common import FULL, SHAPE, SLIDING, Family, attention, biases, count, dense_first, layer_kinds, positive
from jaxmoe.spec.families.deepseek import shared, v3_router
from jaxmoe.spec.types import ExpertSpec, LayerSpec, SpecError


def _kinds(config: dict) -> list[str]:
    """Which layers have a window: by `layer_types`, else all from `max_window_layers` on."""
    layers, window, first = config["num_hidden_layers"], config.get("sliding_window"), config.get("max_window_layers")
    if window is not None and first is None and config.get("layer_types") is None:
        raise SpecError(f"config.json: sliding_window = {window} needs layer_types or max_window_layers, which are missing or null")
    full = layers if first is None or (window is None and "sliding_window" in config) else count(config, "max_window_layers")
    kinds = layer_kinds(config, "layer_types", (FULL, SLIDING), lambda i: SLIDING if i >= full else FULL)
    if window is None and SLIDING in kinds:
        raise SpecError("config.json: sliding_window is missing or null, but layer_types or max_window_layers give some layers a window")
    return kinds


def _layers(config: dict) -> list[LayerSpec]:
    attend = attention(config, qk_norm="head", **biases(config))
    windowed = dataclasses.replace(attend, window=config.get("sliding_window"))
    sparse = LayerSpec(attend, v3_router(config), ExpertSpec(positive(config, "moe_intermediate_size")), shared=shared(config))
    layers = zip(dense_first(config, "first_k_dense_replace", sparse), _kinds(config), strict=True)
    return [dataclasses.replace(layer, attention=windowed) if kind == SLIDING else layer for layer, kind in layers]


FAMILY = Family(
    (*SHAPE, "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace"),
    (
        "num_key_value_heads", "head_dim", "attention_bias", "sliding_window", "max_window_layers", "layer_types", "tie_word_embeddings", "n_group",
        "topk_group", "num_local_experts", "scoring_func", "topk_method", "moe_layer_freq",
    ),
    _layers,
    models="dots.llm1",
)  # fmt: skip
