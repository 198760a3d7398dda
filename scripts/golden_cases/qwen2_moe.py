"""Qwen2-MoE: windows by number and by name, dense layers by both fields, with and without biases, tied embeddings, both kinds of weights."""

from scripts.golden_cases.case import TINY, Case

_CONFIG = {
    **TINY,
    "model_type": "qwen2_moe",
    "num_experts": 8,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 28,
    "use_sliding_window": True,
    "sliding_window": 10,
}

CASES = {
    "qwen2_moe_numbered": Case(
        {
            **_CONFIG,
            "num_hidden_layers": 3,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
            "decoder_sparse_step": 1,
            "max_window_layers": 2,
            "rope_theta": 1e6,
        },
        ({"norm_topk_prob": True}, {"max_window_layers": 3}, {"max_window_layers": 0}),
    ),
    "qwen2_moe_named": Case(
        {
            **_CONFIG,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 20,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
            "qkv_bias": False,
            "decoder_sparse_step": 2,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
        ({"layer_types": ["sliding_attention", "full_attention"]},),
    ),
}
