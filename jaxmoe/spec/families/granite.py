"""Granite-MoE and its kind with an expert that sees every token: four numbers that activations, scores and logits are scaled by (transformers,
models/granitemoe and models/granitemoeshared)."""

from __future__ import annotations

from jaxmoe.spec.families.common import SHAPE, Family, attention, biases, count, positive, router
from jaxmoe.spec.types import ExpertSpec, LayerSpec, SpecError

_SCALES = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


def _scale(config: dict, field: str) -> float:
    value = config[field]
    if type(value) not in (int, float) or not value > 0:
        raise SpecError(f"config.json: {field} = {value!r} must be a number above 0")
    return float(value)


def _layers(config: dict) -> list[LayerSpec]:
    attend = attention(config, scale=_scale(config, "attention_multiplier"), **biases(config))
    route = router(config, positive(config, "num_local_experts"), score="none", weight_from="softmax_selected_logits")
    shared = count(config, "shared_intermediate_size")
    layer = LayerSpec(attend, route, ExpertSpec(positive(config, "intermediate_size")), shared=ExpertSpec(shared) if shared else None)
    return [layer] * positive(config, "num_hidden_layers")


def _model(config: dict) -> dict:
    return {
        "embed_scale": _scale(config, "embedding_multiplier"),
        "residual_scale": _scale(config, "residual_multiplier"),
        "logit_divisor": _scale(config, "logits_scaling"),
    }


_REQUIRED = (*SHAPE, *_SCALES, "num_local_experts")
_OPTIONAL = ("num_key_value_heads", "head_dim", "attention_bias", "tie_word_embeddings")

MOE = Family(_REQUIRED, _OPTIONAL, _layers, _model, models="Granite-3.1-1B-A400M, 3B-A800M, PowerMoE-3B")

SHARED = Family((*_REQUIRED, "shared_intermediate_size"), _OPTIONAL, _layers, _model, models="Granite-MoE with a shared expert")
