"""gpt-oss: a sink per head, windows in some layers, biases nearly everywhere, and a clamped glu (transformers, models/gpt_oss)."""

from __future__ import annotations

from dataclasses import replace

from jaxmoe.spec.families.common import FULL, SHAPE, SLIDING, Family, attention, biases, layer_kinds, only, positive, rope_fields, router, whole_rope
from jaxmoe.spec.types import AttentionSpec, ExpertSpec, LayerSpec, SpecError

LIMIT, ALPHA = 7.0, 1.702
"""Of the experts' glu (`clamped_swiglu`): configs before transformers 5 don't have the second, nor always the first."""


def _attention(config: dict) -> AttentionSpec:
    """A layer's attention without its window."""
    if not rope_fields(config):
        raise SpecError("config.json: gpt_oss needs rope_scaling or rope_parameters: without either, transformers has its own idea of them")
    turning = whole_rope(config, positive(config, "head_dim"), 150000.0)
    if turning.scaling is not None and turning.scaling.original:
        only(config, "initial_context_length", turning.scaling.original, None)
    return attention(config, rope=turning, sinks=True, **biases(config))


def _layers(config: dict) -> list[LayerSpec]:
    experts = positive(config, "num_local_experts")
    chosen = router(config, experts, logits_bias=True, score="none", weight_from="softmax_selected_logits")
    only(config, "num_experts", experts, None)
    only(config, "experts_per_token", config["num_experts_per_tok"], None)
    only(config, "swiglu_limit", LIMIT, None)
    only(config, "swiglu_alpha", ALPHA, None)
    experts_of = ExpertSpec(positive(config, "intermediate_size"), "clamped_swiglu", bias=True)
    full = _attention(config)
    kinds = layer_kinds(config, "layer_types", (FULL, SLIDING), lambda i: FULL)
    window = positive(config, "sliding_window") if SLIDING in kinds else None
    return [LayerSpec(replace(full, window=window) if kind == SLIDING else full, chosen, experts_of) for kind in kinds]


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
