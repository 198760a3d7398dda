"""What the readers of DeepSeek's architectures refuse."""

_LATENT = [
    ({"num_key_value_heads": 2}, "num_key_value_heads = 2"),
    ({"first_k_dense_replace": 4}, r"first_k_dense_replace = 4 (is more than num_hidden_layers = [23]|contradicts)"),
    ({"qk_rope_head_dim": 7}, "an even number"),
    ({"q_lora_rank": -3}, "q_lora_rank = -3"),
    ({"num_experts_per_tok": 13}, "num_experts_per_tok"),
    ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
    ({"num_local_experts": 8}, "num_local_experts = 8"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}, "rope_scaling": None}, "partial_rotary_factor leaves [48] of"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quant_method = 'compressed-tensors'"),
]

_V3 = [
    *_LATENT,
    ({"n_group": 5}, "n_group = 5 does not split 12 experts"),
    ({"n_group": 4, "topk_group": 5}, "topk_group = 5 of 4 groups"),
    ({"n_group": 12, "topk_group": 12}, "n_group = 12 does not split 12 experts into groups of two or more"),
    ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
    ({"num_nextn_predict_layers": 1, "num_mtp_layers": 2}, "num_nextn_predict_layers = 1 and num_mtp_layers = 2"),
    ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers = -1"),
]

BAD = {
    "deepseek_v2": [
        *_LATENT,
        ({"norm_topk_prob": True}, "norm_topk_prob = True"),
        ({"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid'"),
        ({"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
        ({"topk_method": "greedy"}, "n_group = 4"),
        ({"n_group": None}, "n_group = None"),
        ({"n_group": 5}, "n_group = 5 does not split 12 experts"),
        ({"topk_group": None}, "topk_group = None"),
        ({"topk_group": 1, "num_experts_per_tok": 4}, "topk_group = 1 of 4 groups of 3 experts can't give 4"),
        ({"mlp_bias": True}, "mlp_bias = True"),
    ],
    "deepseek_v3": _V3,
    "glm4_moe_lite": [
        *_V3,
        ({"mlp_layer_types": ["dense", "sparse"]}, r"mlp_layer_types = .* must name the kinds of 3 layers"),
        ({"mlp_layer_types": ["dense", "sparse", "mixed"]}, "mlp_layer_types holds 'mixed'"),
        ({"mlp_layer_types": ["dense", "dense", "sparse"]}, "first_k_dense_replace = 1 contradicts mlp_layer_types"),
        ({"first_k_dense_replace": 0}, "first_k_dense_replace = 0 contradicts mlp_layer_types"),
        ({"head_dim": 20}, "head_dim = 20"),
    ],
    "kimi_k2": [*_V3, ({"topk_group": 2}, "topk_group = 2")],
}
