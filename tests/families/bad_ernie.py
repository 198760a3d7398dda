"""What the reader of ERNIE 4.5 refuses."""

BAD = {
    "ernie4_5_moe": [
        ({"moe_k": 9}, "moe_k = 9 is more than the 8 experts"),
        ({"moe_num_experts": [8, 8]}, r"moe_num_experts = \[8, 8\] must be a positive integer"),
        ({"moe_layer_interval": -1}, "moe_layer_interval = -1"),
        ({"moe_layer_start_index": 4}, "moe_layer_start_index = 4, .* leave no layer with experts"),
        ({"moe_layer_interval": 5}, "moe_layer_interval = 5 leave no layer with experts"),
        ({"moe_layer_end_index": -2}, "moe_layer_end_index = -2"),
        ({"moe_layer_end_index": [1, 2]}, "moe_layer_end_index = "),
        ({"moe_num_shared_experts": -1}, "moe_num_shared_experts = -1"),
        ({"moe_norm_min": "none"}, "moe_norm_min = 'none'"),
        ({"tie_word_embeddings": True}, "use_bias = True is not supported with tie_word_embeddings = True"),
        ({"tie_word_embeddings": ...}, "use_bias = True is not supported with tie_word_embeddings = None"),
        ({"moe_gate": "top2_fused"}, "moe_gate = 'top2_fused'"),
        ({"moe_gate_act": "sigmoid"}, "moe_gate_act = 'sigmoid'"),
        ({"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid'"),
        ({"moe_use_aux_free": False}, "moe_use_aux_free = False"),
        ({"moe_norm_gate_logits": False}, "moe_norm_gate_logits = False"),
        ({"moe_group_experts": True}, "moe_group_experts = True"),
        ({"use_rmsnorm": False}, "use_rmsnorm = False"),
        ({"compression_ratio": 2.0}, "compression_ratio = 2.0"),
        ({"num_key_value_heads": 4}, "num_attention_heads = 6 is not a multiple of num_key_value_heads = 4"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor leaves . of"),
        ({"num_experts_per_tok": 3}, "'num_experts_per_tok' = 3"),
    ],
}
