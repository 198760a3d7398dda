"""Qwen3-MoE: norms per head, dense layers where the config says so (transformers, models/qwen3_moe)."""

from __future__ import annotations

from jaxmoe.spec.families.common import SHAPE, Family, attention, biases, layer_indices, only, positive, router
from jaxmoe.spec.types import ExpertSpec, LayerSpec, SpecError


def _layers(config: dict) -> list[LayerSpec]:
    for field, value in _ONLY.items():
        only(config, field, value, None)
    window = positive(config, "sliding_window") if config.get("use_sliding_window") else None
    attend = attention(config, qk_norm="head", window=window, **biases(config))
    experts = config.get("num_experts") or config.get("num_local_experts")
    if not experts:
        raise SpecError("config.json: qwen3_moe needs the field 'num_experts', which is missing or null")
    route = router(config, experts, normalize=bool(config["norm_topk_prob"]))
    return sparse_steps(config, LayerSpec(attend, route, ExpertSpec(config["moe_intermediate_size"])))


def sparse_steps(config: dict, sparse: LayerSpec) -> list[LayerSpec]:
    """Sparse layers, and dense ones of `intermediate_size` where `mlp_only_layers` or `decoder_sparse_step` say so."""
    dense = LayerSpec(sparse.attention, dense=ExpertSpec(config["intermediate_size"]), delta=sparse.delta)
    only_dense = layer_indices(config, "mlp_only_layers")
    step = 1 if config.get("decoder_sparse_step") is None else positive(config, "decoder_sparse_step")
    return [sparse if i not in only_dense and (i + 1) % step == 0 else dense for i in range(config["num_hidden_layers"])]


_ONLY = {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}
"""Fields that Qwen3-Coder-480B has and transformers doesn't read, and the only values that its model is right for."""

FAMILY = Family(
    (*SHAPE, "moe_intermediate_size", "norm_topk_prob"),
    (
        "num_key_value_heads", "head_dim", "attention_bias", "use_sliding_window", "sliding_window", "tie_word_embeddings",
        "decoder_sparse_step", "mlp_only_layers", "num_experts", "num_local_experts", *_ONLY,
    ),
    _layers,
    models="Qwen3-30B-A3B, 235B-A22B, Coder-480B",
)  # fmt: skip
