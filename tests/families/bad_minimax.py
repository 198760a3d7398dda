"""What the reader of MiniMax-M2 refuses."""

BAD = {
    "minimax_m2": [
        ({"num_experts_per_tok": 10}, "num_experts_per_tok = 10 is more than the 9 experts"),
        ({"rotary_dim": 18}, "rotary_dim = 18 is more than head_dim = 16"),
        ({"rotary_dim": 7}, "an even number"),
        ({"rotary_dim": 8.5}, "rotary_dim = 8.5 must be a positive integer"),
        ({"partial_rotary_factor": 0.25}, "rotary_dim = 8, but partial_rotary_factor = 0.25 of head_dim = 16"),
        ({"attn_type_list": [1, 0]}, r"attn_type_list = \[1, 0\] is not supported"),
        ({"attn_type_list": [1]}, r"attn_type_list = \[1\] is not supported .* each of 2 layers"),
        ({"qk_norm_type": "per_head"}, "qk_norm_type = 'per_head'"),
        ({"use_qk_norm": False}, "use_qk_norm = False"),
        ({"use_routing_bias": False}, "use_routing_bias = False"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"norm_topk_prob": False}, "norm_topk_prob = False"),
        ({"shared_intermediate_size": 24}, "shared_intermediate_size = 24"),
        ({"sliding_window": 128}, "sliding_window = 128"),
        ({"layernorm_mlp_beta": 0.5}, "layernorm_mlp_beta = 0.5"),
        ({"layernorm_full_attention_beta": 0.5}, "layernorm_full_attention_beta = 0.5"),
        ({"layernorm_linear_attention_beta": 0.5}, "layernorm_linear_attention_beta = 0.5"),
        ({"num_attention_heads": 7}, "num_attention_heads = 7 is not a multiple of num_key_value_heads = 2"),
    ],
}
