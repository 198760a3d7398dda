"""Gemma 4: windows and wider heads with keys as values in turn; values of their own, biases and an output matrix; the text model within the whole."""

from typing import Any

from scripts.golden_cases.case import TINY, Case

_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}

_CONFIG: dict[str, Any] = {
    **{field: value for field, value in TINY.items() if field not in ("num_experts_per_tok", "hidden_act")},
    "model_type": "gemma4_text",
    "head_dim": 12,
    "global_head_dim": 24,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": _ROPE,
    "hidden_activation": "gelu_pytorch_tanh",
    "enable_moe_block": True,
    "num_experts": 10,
    "top_k_experts": 3,
    "moe_intermediate_size": 24,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 61,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "use_bidirectional_attention": "vision",
    "final_logit_softcapping": 5.0,
    "tie_word_embeddings": True,
}

TEXT = {
    "gemma4_text_keys": Case(
        {**_CONFIG, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        (
            {"final_logit_softcapping": None},
            {"sliding_window": 13},
            {"rope_parameters": {**_ROPE, "full_attention": {**_ROPE["full_attention"], "partial_rotary_factor": 0.5}}},
        ),
    ),
    "gemma4_text_values": Case(
        {
            **_CONFIG,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 8,
            "global_head_dim": None,
            "num_global_key_value_heads": None,
            "per_layer_config": {"2": {"head_dim": 20}},
            "attention_k_eq_v": False,
            "attention_bias": True,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e4},
                "full_attention": {"rope_type": "default", "rope_theta": 1e5},
            },
            "top_k_experts": 2,
            "use_bidirectional_attention": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
        },
    ),
}

WHOLE = {
    "gemma4_within": Case(
        {
            "model_type": "gemma4",
            "text_config": {**{field: value for field, value in _CONFIG.items() if field != "tie_word_embeddings"}, "num_key_value_heads": 1},
            "vision_config": None,
            "audio_config": None,
            "tie_word_embeddings": True,
        },
    ),
}
