"""Qwen3-MoE: dense layers among sparse ones by both fields, biases, a window, tied embeddings, both kinds of weights."""

from scripts.golden_cases.case import TINY, Case

_CONFIG = {**TINY, "model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 24, "head_dim": 16, "num_hidden_layers": 3}

CASES = {
    "qwen3_moe_normalized": Case(
        {**_CONFIG, "norm_topk_prob": True, "mlp_only_layers": [1], "decoder_sparse_step": 1, "rope_theta": 1e6},
        ({"norm_topk_prob": False},),
    ),
    "qwen3_moe_tied": Case(
        {
            **_CONFIG,
            "num_hidden_layers": 4,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "mlp_only_layers": [],
            "decoder_sparse_step": 2,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 10,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
        ({"use_sliding_window": False}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    ),
}
