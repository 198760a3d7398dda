"""DeepSeek: latent attention with and without a latent for queries, groups, dense first layers, yarn with its scale."""

from scripts.golden_cases.case import TINY, Case

_LATENT = {"kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10, "num_key_value_heads": 4}

_V3 = {
    **TINY,
    **_LATENT,
    "model_type": "deepseek_v3",
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 0,
}

V3 = {
    "deepseek_v3_yarn": Case(
        {
            **_V3,
            "q_lora_rank": 28,
            "rope_scaling": {
                "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            },
            "rope_theta": 10000,
        },
        ({"norm_topk_prob": False}, {"routed_scaling_factor": 1.0}, {"topk_group": 4}, {"rope_scaling": None}),
    ),
    "deepseek_v3_plain": Case(
        {**_V3, "q_lora_rank": None, "num_attention_heads": 3, "num_key_value_heads": 3, "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
         "n_shared_experts": 1, "first_k_dense_replace": 0, "rope_interleave": False, "tie_word_embeddings": True, "attention_bias": True},
        ({"rope_interleave": True},),
    ),
}  # fmt: skip
