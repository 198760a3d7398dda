"""DeepSeek, Kimi-K2 and GLM-4.7-Flash: latent attention with and without a latent for queries, groups, dense first layers, yarn with its scale."""

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
                "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
                "mscale": 1.0, "mscale_all_dim": 1.0,
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

_YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
}

_V2 = {
    **TINY,
    **_LATENT,
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "moe_layer_freq": 1,
}

V2 = {
    "deepseek_v2_groups": Case(
        {**_V2, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 28, "topk_method": "group_limited_greedy",
         "n_group": 4, "topk_group": 2, "routed_scaling_factor": 5.0, "rope_scaling": _YARN, "rope_theta": 10000},
        ({"topk_group": 4}, {"routed_scaling_factor": 1.0}, {"rope_scaling": {**_YARN, "mscale_all_dim": 1.0}}),
    ),
    "deepseek_v2_greedy": Case(
        {**_V2, "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "n_shared_experts": 1,
         "first_k_dense_replace": 0, "attention_bias": True, "tie_word_embeddings": True, "num_experts_per_tok": 2,
         "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},),
    ),
}  # fmt: skip

_KIMI_YARN = {**_YARN, "beta_fast": 1.0, "beta_slow": 1.0, "mscale_all_dim": 1.0}

KIMI = {
    "kimi_k2": Case(
        {**_V3, "model_type": "kimi_k2", "num_hidden_layers": 2, "q_lora_rank": 24, "qk_rope_head_dim": 16, "n_group": 1, "topk_group": 1,
         "n_shared_experts": 1, "routed_scaling_factor": 2.827, "rope_scaling": _KIMI_YARN, "rope_theta": 50000.0,
         "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        ({"rope_scaling": {**_KIMI_YARN, "beta_fast": 32.0}},),
        theirs={"model_type": "deepseek_v3"},
    ),
}  # fmt: skip

_GLM_LITE = {**_V3, "model_type": "glm4_moe_lite", "q_lora_rank": 24, "v_head_dim": 14, "routed_scaling_factor": 1.8}

GLM_LITE = {
    "glm4_moe_lite_first": Case(
        {**_GLM_LITE, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "partial_rotary_factor": 1.0, "rope_scaling": None, "rope_theta": 1000000,
         "topk_method": "noaux_tc"},
        ({"rope_theta": 10000}, {"norm_topk_prob": False}),
    ),
    "glm4_moe_lite_listed": Case(
        {**_GLM_LITE, "first_k_dense_replace": None, "mlp_layer_types": ["sparse", "dense", "sparse"], "rope_interleave": False,
         "norm_topk_prob": False, "attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        ({"rope_interleave": True},),
    ),
}  # fmt: skip
