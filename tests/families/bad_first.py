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
    ({"quantization_config": {"quant_method": "gptq"}}, "quant_method = 'gptq'"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}, r"weight_block_size = \[128\]"),
]

BAD = {
    "mixtral": [*_COMMON, ({"num_local_experts": -1}, "num_local_experts = -1"), ({"sliding_window": 0}, "sliding_window = 0")],
    "olmoe": [*_COMMON, ({"num_experts": 2.5}, "num_experts = 2.5")],
    "qwen3_moe": [
        *_COMMON,
        ({"num_experts": None}, "num_experts"),
        ({"mlp_only_layers": [7]}, r"mlp_only_layers = \[7\] must list layers, from 0 to 2"),
    ],
}
