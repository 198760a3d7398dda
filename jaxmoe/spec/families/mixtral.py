"""Mixtral (transformers, models/mixtral)."""

from __future__ import annotations

from jaxmoe.spec.families.common import SHAPE, Family, attention, positive, router
from jaxmoe.spec.types import ExpertSpec, LayerSpec


def _layers(config: dict) -> list[LayerSpec]:
    attend = attention(config, 1e6, window=config.get("sliding_window"))
    route = router(config, positive(config, "num_local_experts"), normalize=True, weights_dtype="float32")
    return [LayerSpec(attend, route, ExpertSpec(config["intermediate_size"]))] * config["num_hidden_layers"]


FAMILY = Family(
    (*SHAPE, "num_local_experts"), ("num_key_value_heads", "head_dim", "sliding_window", "tie_word_embeddings", "num_experts"), _layers,
    models="Mixtral-8x7B, 8x22B",
)
