"""What the reader of gpt-oss refuses."""

BAD = {
    "gpt_oss": [
        ({"num_key_value_heads": 4}, "num_attention_heads = 6 is not a multiple of num_key_value_heads = 4"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9 is more than the 8 experts"),
        ({"experts_per_token": 4}, "experts_per_token = 4"),
        ({"num_experts": 32}, "num_experts = 32"),
        ({"swiglu_limit": 6.0}, r"swiglu_limit = 6.0 is not supported \(7.0 or None is\)"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0"),
        ({"initial_context_length": 4096}, "initial_context_length = 4096"),
        ({"sliding_window": None}, "sliding_window = None"),
        ({"layer_types": ["sliding_attention"]}, r"layer_types = .* must name the kinds of 2 layers"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types holds 'chunked_attention'"),
        ({"rope_scaling": ...}, "gpt_oss needs rope_scaling or rope_parameters"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "mystery": 1}}, "rope_parameters.mystery = 1"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor leaves 8 of 16 channels"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "quant_method = 'fp8'"),
    ],
}
