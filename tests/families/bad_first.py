"""What the readers of Mixtral, OLMoE and Qwen3-MoE refuse."""

_COMMON = [
    ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9 is more than the . experts"),
    ({"num_key_value_heads": 3}, "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers = 0 must be a positive integer"),
    ({"layer_types": ["linear_attention"]}, "layer_types holds 'linear_attention'"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "original_max_position_embeddings = None"),
    ({"rope_parameters": {"rope_type": "default", "spin": 2}}, "rope_parameters.spin = 2"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor leaves . of 1. channels to turn"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}}, "rope_theta = '1e4' must be a number"),
    ({"rope_parameters": {"factor": 2.0}, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters = .* and rope_scaling = .* the same"),
    ({"rope_scaling": [2.0]}, r"rope_scaling = \[2.0\] must be an object"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quant_method = 'gptq'"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}, r"weight_block_size = \[128\]"),
]

BAD = {
    "mixtral": [*_COMMON, ({"num_local_experts": -1}, "num_local_experts = -1"), ({"sliding_window": 0}, "sliding_window = 0")],
    "olmoe": [*_COMMON, ({"num_experts": 2.5}, "num_experts = 2.5"), ({"attention_bias": "yes"}, "attention_bias = 'yes'")],
    "qwen3_moe": [
        *_COMMON,
        ({"num_experts": None}, "num_experts"),
        ({"use_sliding_window": True}, "sliding_window = None must be a positive integer"),
        ({"mlp_only_layers": [7]}, r"mlp_only_layers = \[7\] must list layers, from 0 to 2"),
        ({"qkv_bias": True}, "qkv_bias = True is not supported"),
        ({"use_qk_norm": False}, "use_qk_norm = False is not supported"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size = 64 is not supported"),
    ],
}
