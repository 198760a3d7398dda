"""Llama 4: chunks shorter than the sequence, layers without positions by both fields, temperatures, dense and sparse layers by both fields."""

from scripts.golden_cases.case import TINY, Case

_CONFIG = {
    **TINY, "model_type": "llama4_text", "intermediate_size": 24, "intermediate_size_mlp": 40, "num_local_experts": 6, "num_experts_per_tok": 1,
    "head_dim": 16, "num_attention_heads": 6, "attention_chunk_size": 12, "use_qk_norm": True,
}  # fmt: skip

_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

TEXT = {
    "llama4_text_chunked": Case(
        {**_CONFIG, "num_hidden_layers": 2, "no_rope_layers": [], "no_rope_layer_interval": 2, "interleave_moe_layer_step": 1, "floor_scale": 5,
         "attn_scale": 0.7, "attn_temperature_tuning": True, "rope_theta": 500000.0, "rope_scaling": _LLAMA3},
        ({"use_qk_norm": False}, {"attn_temperature_tuning": False}, {"attention_chunk_size": 13}),
    ),
    "llama4_text_listed": Case(
        {**_CONFIG, "num_hidden_layers": 4, "no_rope_layers": [], "moe_layers": [0, 2], "interleave_moe_layer_step": 1, "use_qk_norm": False,
         "layer_types": ["full_attention", "chunked_attention"] * 2, "attn_temperature_tuning": False, "attention_bias": True,
         "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20, "tie_word_embeddings": True,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        ({"no_rope_layers": [1, 0, 1, 1]}, {"layer_types": None}),
    ),
}  # fmt: skip

_WHOLE = {
    **_CONFIG, "num_hidden_layers": 2, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0], "rope_theta": 500000.0, "attn_temperature_tuning": 4,
    "floor_scale": 8, "attn_scale": 0.3, "rope_scaling": {**_LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 1.0},
}  # fmt: skip

WHOLE = {
    "llama4_nested": Case(
        {
            "model_type": "llama4",
            "image_token_index": 60,
            "tie_word_embeddings": False,
            "text_config": _WHOLE,
            "vision_config": {"model_type": "llama4_vision_model", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        },
        ({"text_config": {**_WHOLE, "attn_temperature_tuning": False}},),
        theirs={"text_config": {**_WHOLE, "attn_temperature_tuning": True}},
    ),
}
