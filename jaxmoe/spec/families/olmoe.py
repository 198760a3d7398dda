"""OLMoE: norms over the whole projected queries and keys, then an optional bound (transformers, models/olmoe)."""

from __future__ import annotations

from jaxmoe.spec.families.common import SHAPE, Family, attention, biases, positive, router
from jaxmoe.spec.types import ExpertSpec, LayerSpec


def _layers(config: dict) -> list[LayerSpec]:
    attend = attention(config, qk_norm="full", clip=config.get("clip_qkv"), **biases(config))
    route = router(config, positive(config, "num_experts"), normalize=bool(config["norm_topk_prob"]))
    return [LayerSpec(attend, route, ExpertSpec(config["intermediate_size"]))] * config["num_hidden_layers"]


FAMILY = Family(
    (*SHAPE, "num_experts", "norm_topk_prob"),
    ("num_key_value_heads", "attention_bias", "clip_qkv", "tie_word_embeddings", "num_local_experts", "head_dim"),
    _layers,
    models="OLMoE-1B-7B",
)
