"""gpt-oss: a sink per head, windows in some layers, biases nearly everywhere, and a clamped glu (transformers, models/gpt_oss)."""

from __future__ import annotations

from dataclasses import replace

from jaxmoe.spec.families.common import SHAPE, Family, attention, layer_kinds, only, positive, rope, router
from jaxmoe.spec.types import AttentionSpec, ExpertSpec, LayerSpec, SpecError

LIMIT, ALPHA = 7.0, 1.702
"""Of the experts' glu (`clamped_swiglu`): configs before transformers 5 don't have the second, nor always the first."""


def _attention(config: dict) -> AttentionSpec:
    """A layer's attention without its window."""
    if not (config.get("rope_scaling") or config.get("rope_parameters")):
        raise SpecError("config.json: gpt_oss needs rope_scaling or rope_parameters: without either, transformers has its own idea of them")
    turning = rope(config, positive(config, "head_dim"), 150000.0)
    if turning.width != config["head_dim"]:
        raise SpecError(f"config.json: partial_rotary_factor leaves {turning.width} of head_dim = {config['head_dim']} channels to turn: all do")
    if turning.scaling is not None and turning.scaling.original:
        only(config, "initial_context_length", turning.scaling.original, None)
    bias = bool(config["attention_bias"])
    return attention(config, 150000.0, rope=turning, qkv_bias=bias, out_bias=bias, sinks=True)


def _layers(config: dict) -> list[LayerSpec]:
    experts = positive(config, "num_local_experts")
    chosen = router(config, experts, logits_bias=True, score="none", weight_from="softmax_selected_logits")
    only(config, "num_experts", experts, None)
    only(config, "experts_per_token", config["num_experts_per_tok"], None)
    only(config, "swiglu_limit", LIMIT, None)
    only(config, "swiglu_alpha", ALPHA, None)
    experts_of = ExpertSpec(positive(config, "intermediate_size"), "clamped_swiglu", bias=True)
    full = _attention(config)
    kinds = layer_kinds(config, "layer_types", ("sliding_attention", "full_attention"), lambda i: "full_attention")
    window = positive(config, "sliding_window") if "sliding_attention" in kinds else None
    return [LayerSpec(replace(full, window=window) if kind == "sliding_attention" else full, chosen, experts_of) for kind in kinds]


FAMILY = Family(
    (*SHAPE, "num_key_value_heads", "head_dim", "num_local_experts", "attention_bias", "layer_types"),
    (
        "sliding_window", "swiglu_limit", "swiglu_alpha", "tie_word_embeddings", "initial_context_length", "experts_per_token", "num_experts",
    ),
    _layers,
    lambda config: {"norm_wide": True},
    models="gpt-oss-120b, gpt-oss-20b",
    formats=("mxfp4",),
)  # fmt: skip
