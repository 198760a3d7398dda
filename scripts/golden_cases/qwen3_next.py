"""Qwen3-Next and Qwen3.5-MoE: delta rules with and without more value heads than key heads, attention by interval and by name, yarn of a part of a
head's channels, biases, dense layers, a sequence longer than a chunk of the delta rule; the text model within the whole, and alone."""

from scripts.golden_cases.case import TINY, Case

# A delta rule's outputs are differences that its norm blows up where they are small: with the usual epsilon and few channels of keys, transformers'
# own logits are up to 5e-5 from those that it gives in float64.
_CONFIG = {
    **TINY,
    "head_dim": 16,
    "rms_norm_eps": 1e-3,
    "num_experts": 8,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 28,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
}
_NEXT = {**_CONFIG, "model_type": "qwen3_next"}

NEXT = {
    "qwen3_next_interval": Case(
        {
            **_NEXT,
            "num_hidden_layers": 3,
            "full_attention_interval": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "decoder_sparse_step": 1,
            "partial_rotary_factor": 0.25,
            "rope_scaling": None,
            "rope_theta": 1e4,
        },
        ({"norm_topk_prob": False}, {"partial_rotary_factor": 0.5}),
        lengths=(75, 37),
    ),
    "qwen3_next_named": Case(
        {
            **_NEXT,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "layer_types": ["full_attention", "linear_attention"],
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_key_head_dim": 12,
            "linear_value_head_dim": 8,
            "linear_conv_kernel_dim": 3,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "partial_rotary_factor": 0.5,
            },
        },
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},),
    ),
}

_TEXT = {
    **{field: value for field, value in _CONFIG.items() if field != "intermediate_size"},
    "model_type": "qwen3_5_moe_text",
    "full_attention_interval": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "attn_output_gate": True,
    "mamba_ssm_dtype": "float32",
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}

V3_5_TEXT = {
    "qwen3_5_moe_alone": Case(
        {
            **_TEXT,
            "layer_types": None,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 24,
            "rms_norm_eps": 1e-2,
        },
    ),
}

V3_5 = {
    "qwen3_5_moe_text_config": Case(
        {"model_type": "qwen3_5_moe", "text_config": _TEXT},
        ({"text_config": {**_TEXT, "rope_parameters": {**_TEXT["rope_parameters"], "partial_rotary_factor": 0.25}}},),
    ),
}
