"""What the readers of GLM-4.5 and dots.llm1 refuse."""

_COMMON = [
    ({"num_experts_per_tok": 11}, "num_experts_per_tok = 11 is more than the 10 experts"),
    ({"num_key_value_heads": 5}, "is not a multiple of num_key_value_heads = 5"),
    ({"first_k_dense_replace": 4}, "first_k_dense_replace = 4 is more than num_hidden_layers = 3"),
    ({"n_group": 3, "topk_group": 2}, "n_group = 3 does not split 10 experts"),
    ({"n_group": 5, "topk_group": 1}, "topk_group = 1 of 5 groups of 2 experts can't give 3"),
    ({"n_group": 1, "topk_group": 2}, "topk_group = 2"),
    ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
    ({"num_local_experts": 8}, "num_local_experts = 8"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quant_method = 'compressed-tensors'"),
]

BAD = {
    "dots1": [
        *_COMMON,
        ({"max_window_layers": ...}, "sliding_window = 10 needs layer_types or max_window_layers"),
        ({"sliding_window": ...}, "sliding_window is missing or null"),
        ({"sliding_window": 0}, "sliding_window = 0"),
        ({"sliding_window": None, "layer_types": ["full_attention", "full_attention", "sliding_attention"]}, "sliding_window is missing or null"),
        ({"layer_types": ["full_attention"]}, r"layer_types = \['full_attention'\] must name the kinds of 3 layers"),
        ({"layer_types": ["full_attention", "full_attention", "chunked_attention"]}, "layer_types holds 'chunked_attention'"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers' = 1"),
    ],
    "glm4_moe": [
        *_COMMON,
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5"),
        ({"partial_rotary_factor": ...}, "needs the field 'partial_rotary_factor'"),
        ({"head_dim": 14}, "7 of a head's 14 channels"),
        ({"num_nextn_predict_layers": 1, "num_mtp_layers": 2}, "num_nextn_predict_layers = 1 and num_mtp_layers = 2"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types holds 'sliding_attention'"),
    ],
}
