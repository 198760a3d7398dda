"""Phi-3.5-MoE: both lists of longrope, a distance that lets several logits take part, biases everywhere and nowhere, a window.

Beyond `original_max_position_embeddings` the released code, and transformers 4 (`seq_len` in `PhimoeRotaryEmbedding`), turn by the long factors.
transformers 5 calls `rope_init_fn` without a length there, and so takes the short ones with the long magnitude. For the sequences beyond it, it is
given the long factors as short ones.
"""

from scripts.golden_cases.case import TINY, Case

_CONFIG = {
    **TINY,
    "model_type": "phimoe",
    "num_local_experts": 7,
    "num_experts_per_tok": 2,
    "input_jitter_noise": 0.01,
    "max_position_embeddings": 1024,
}

_SHORT = {
    "type": "longrope", "original_max_position_embeddings": 256, "short_mscale": 1.2, "long_mscale": 1.5,
    "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 4.0, 9.0, 30.0],
}  # fmt: skip

_LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 30, "short_mscale": 1.0, "long_mscale": 1.3,
    "short_factor": [1.0] * 10, "long_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5, 4.0, 8.0, 16.0, 20.0],
}  # fmt: skip

CASES = {
    "phimoe_short": Case(
        {
            **_CONFIG,
            "num_attention_heads": 6,
            "attention_bias": True,
            "lm_head_bias": True,
            "router_jitter_noise": 0.15,
            "sliding_window": 16,
            "original_max_position_embeddings": 256,
            "rope_theta": 1e4,
            "rope_scaling": _SHORT,
        },
        ({"router_jitter_noise": 0.01}, {"sliding_window": None}, {"rope_scaling": {**_SHORT, "short_mscale": 1.5}}),
    ),
    "phimoe_long": Case(
        {
            **_CONFIG,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 20,
            "attention_bias": False,
            "lm_head_bias": False,
            "tie_word_embeddings": True,
            "router_jitter_noise": 0.01,
            "sliding_window": None,
            "rope_parameters": _LONG,
        },
        ({"rope_parameters": {**_LONG, "original_max_position_embeddings": 256}},),
        theirs={"rope_parameters": {**_LONG, "short_factor": _LONG["long_factor"]}},
    ),
}
