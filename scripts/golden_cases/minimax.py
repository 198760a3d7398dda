"""MiniMax-M2: some of a head's channels turn, by both spellings; norms over all heads, a bias for selection."""

from scripts.golden_cases.case import TINY, Case

_CONFIG = {**TINY, "model_type": "minimax_m2", "intermediate_size": 24, "num_local_experts": 9}

CASES = {
    "minimax_m2_partial": Case(
        {
            **_CONFIG,
            "num_attention_heads": 6,
            "head_dim": 16,
            "rotary_dim": 8,
            "rope_theta": 5e6,
            "attn_type_list": [1, 1],
            "qk_norm_type": "per_layer",
            "use_qk_norm": True,
            "use_routing_bias": True,
            "scoring_func": "sigmoid",
        },
        ({"rotary_dim": 16}, {"num_experts_per_tok": 2}),
    ),
    "minimax_m2_tied": Case(
        {
            **_CONFIG,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 20,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.6},
        },
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},),
    ),
}
