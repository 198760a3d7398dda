"""What the readers of Gemma 4 refuse."""

_KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]

BAD = {
    "gemma4_text": [
        ({"enable_moe_block": False}, "enable_moe_block = False is not supported"),
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input = 256 is not supported"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers = 2 is not supported"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all' is not supported"),
        ({"use_double_wide_mlp": True}, "use_double_wide_mlp = True is not supported"),
        ({"hidden_activation": "gelu"}, "hidden_activation = 'gelu' is not supported"),
        ({"top_k_experts": 11}, "top_k_experts = 11 is more than the 10 experts"),
        ({"layer_types": _KINDS}, "layer_types ends with 'sliding_attention'"),
        ({"layer_types": _KINDS[:3]}, "must name the kinds of 4 layers"),
        ({"layer_types": ["chunked_attention", *_KINDS[:3]]}, "layer_types holds 'chunked_attention'"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
        ({"num_global_key_value_heads": 3}, "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
        ({"global_head_dim": ...}, "global_head_dim = None must be a positive integer"),
        ({"global_head_dim": 15}, "an even number"),
        ({"attention_k_eq_v": "all"}, "attention_k_eq_v = 'all' is not supported"),
        ({"sliding_window": -1}, "sliding_window = -1"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping = 0 must be a number above 0"),
        ({"per_layer_config": {"1": {"head_dim": 24}}}, "global_head_dim = 24 and per_layer_config = .* can't both be given"),
        ({"global_head_dim": None, "num_global_key_value_heads": None, "per_layer_config": {"1": {"head_dim": 24}}}, "the same for each layer"),
        ({"global_head_dim": None, "num_global_key_value_heads": None, "per_layer_config": [24]}, r"per_layer_config = \[24\] must be an object"),
        ({"rope_theta": 1e4}, "rope_theta = 10000.0 is not supported"),
        ({"rope_parameters": {"sliding_attention": None}}, "rope_parameters.sliding_attention = None must be an object"),
        ({"rope_parameters": {"local": {}}}, "rope_parameters = .* must have an object for 'full_attention'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope type 'yarn' of 'full_attention'"),
        ({"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}}, "partial_rotary_factor = 0.5 does not go with"),
        ({"rope_parameters": {"full_attention": {"factor": 8.0}}}, "rope_parameters.factor = 8.0"),
    ],
    "gemma4": [
        ({"text_config": {"enable_moe_block": False}}, "enable_moe_block = False is not supported"),
        ({"text_config": {"hidden_size_per_layer_input": 256}}, "hidden_size_per_layer_input = 256 is not supported"),
        ({"text_config": {"top_k_experts": 11}}, "top_k_experts = 11 is more than the 10 experts"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method = 'fp8' is not supported"),
        ({"text_config": 3}, "text_config = 3 must be an object"),
    ],
}
