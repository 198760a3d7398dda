"""OLMoE: norms over the whole projected queries and keys, then an optional bound (transformers, models/olmoe)."""

from __future__ import annotations

from jaxmoe.spec.families.common import SHAPE, Family, attention, positive, router
from jaxmoe.spec.types import ExpertSpec, LayerSpec


def _layers(config: dict) -> list[LayerSpec]:
    bias = bool(config.get("attention_bias", False))
    attend = attention(config, 10000.0, qk_norm="full", qkv_bias=bias, out_bias=bias, clip=config.get("clip_qkv"))
    route = router(config, positive(config, "num_experts"), normalize=bool(config["norm_topk_prob"]))
    return [LayerSpec(attend, route, ExpertSpec(config["intermediate_size"]))] * config["num_hidden_layers"]


FAMILY = Family(
    (*SHAPE, "num_experts", "norm_topk_prob"),
    ("num_key_value_heads", "attention_bias", "clip_qkv", "tie_word_embeddings", "num_local_experts", "head_dim"),
    _layers,
    models="OLMoE-1B-7B",
)
