"""What the readers of Qwen2-MoE, Qwen3-Next and Qwen3.5-MoE refuse."""

_COMMON = [
    ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9 is more than the 8 experts"),
    ({"num_experts": 0}, "num_experts = 0 must be a positive integer"),
    ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size = 0"),
    ({"num_key_value_heads": 3}, "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
]

_DELTA = [
    ({"layer_types": ["full_attention"]}, "layer_types = .* must name the kinds"),
    ({"full_attention_interval": 0}, "full_attention_interval = 0"),
    ({"linear_num_value_heads": 3}, "linear_num_value_heads = 3 is not a multiple of linear_num_key_heads = 2"),
    ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim = 0"),
    ({"linear_value_head_dim": 2.5}, "linear_value_head_dim = 2.5"),
]

_V3_5 = [
    ({"attn_output_gate": False}, "attn_output_gate = False is not supported"),
    ({"output_gate_type": "sigmoid"}, "output_gate_type = 'sigmoid' is not supported"),
    ({"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype = 'bfloat16' is not supported"),
    ({"norm_topk_prob": False}, "norm_topk_prob = False is not supported"),
    ({"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\] is not supported"),
    ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported"),
    ({"rope_parameters": {"partial_rotary_factor": None}}, "needs the field 'partial_rotary_factor'"),
]

BAD = {
    "qwen2_moe": [
        *_COMMON,
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor leaves . of"),
        ({"qkv_bias": "yes"}, "qkv_bias = 'yes' is not supported"),
        ({"layer_types": ["full_attention"]}, "layer_types = .* must name the kinds of 3 layers"),
        ({"layer_types": ["full_attention", "full_attention", "linear_attention"]}, "layer_types holds 'linear_attention'"),
        ({"layer_types": ["sliding_attention"] * 3, "use_sliding_window": False}, "'sliding_attention', but use_sliding_window = False"),
        ({"max_window_layers": None}, "needs the field 'max_window_layers'"),
        ({"max_window_layers": -1}, "max_window_layers = -1"),
        ({"sliding_window": None}, "sliding_window = None must be a positive integer"),
        ({"sliding_window": 0}, "sliding_window = 0"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
        ({"mlp_only_layers": [3]}, r"mlp_only_layers = \[3\] must list layers"),
    ],
    "qwen3_next": [
        *_COMMON,
        *_DELTA,
        ({"layer_types": ["linear_attention", "linear_attention", "sliding_attention"]}, "layer_types holds 'sliding_attention'"),
        ({"layer_types": ["full_attention"] * 3}, "full_attention_interval = 3 is not what layer_types says"),
        ({"full_attention_interval": None}, "needs the field 'layer_types' or 'full_attention_interval'"),
        ({"partial_rotary_factor": None}, "needs the field 'partial_rotary_factor'"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"mlp_only_layers": [3]}, r"mlp_only_layers = \[3\] must list layers"),
    ],
    "qwen3_5_moe_text": [*_V3_5, ({"full_attention_interval": None}, "needs the field 'layer_types' or 'full_attention_interval'")],
    "qwen3_5_moe": [
        ({"text_config": 3}, "text_config = 3 must be an object"),
        ({"text_config": {"model_type": ..., "layer_types": None, "full_attention_interval": None}}, "qwen3_5_moe needs the field 'layer_types'"),
        *(
            ({"text_config": change}, message)
            for change, message in [
                *_COMMON,
                *_DELTA,
                *_V3_5,
                ({"layer_types": ["full_attention"] * 2}, "full_attention_interval = 2 is not what layer_types says"),
            ]
        ),
    ],
}
