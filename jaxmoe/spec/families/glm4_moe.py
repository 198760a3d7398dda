"""GLM-4.5 and 4.6: grouped-query attention of which half turns, norms of queries and keys in some sizes, DeepSeek-V3's router and head of multi-token
prediction (transformers, models/glm4_moe)."""

from __future__ import annotations

from jaxmoe.spec.families.common import SHAPE, Family, attention, dense_first, heads, positive, rope, rotary_part
from jaxmoe.spec.families.deepseek import extra_heads, shared, v3_router
from jaxmoe.spec.types import ExpertSpec, LayerSpec


def _sparse(config: dict) -> LayerSpec:
    rotary_part(config, needed=True)
    turning = rope(config, heads(config)[2], 10000.0)
    qk_norm = "head" if config["use_qk_norm"] else None
    attend = attention(config, rope=turning, qk_norm=qk_norm, qkv_bias=bool(config["attention_bias"]))
    return LayerSpec(attend, v3_router(config), ExpertSpec(positive(config, "moe_intermediate_size")), shared=shared(config))


FAMILY = Family(
    (
        *SHAPE, "num_key_value_heads", "attention_bias", "use_qk_norm", "moe_intermediate_size", "n_routed_experts", "n_shared_experts",
        "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "first_k_dense_replace",
    ),
    (
        "head_dim", "partial_rotary_factor", "tie_word_embeddings", "num_local_experts", "num_nextn_predict_layers", "num_mtp_layers", "scoring_func",
        "topk_method", "moe_layer_freq",
    ),
    lambda config: dense_first(config, "first_k_dense_replace", _sparse(config)),
    lambda config: extra_heads(config, _sparse(config)),
    models="GLM-4.5, GLM-4.5-Air, GLM-4.6",
)  # fmt: skip
