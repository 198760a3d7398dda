"""gpt-oss: windows that alternate, in both orders, with yarn that doesn't round its range and with plain positions, biases in attention and not."""

from scripts.golden_cases.case import TINY, Case

_CONFIG = {
    **TINY, "model_type": "gpt_oss", "intermediate_size": 32, "num_local_experts": 8, "head_dim": 16, "num_attention_heads": 6,
    "attention_bias": True, "sliding_window": 10, "swiglu_limit": 7.0,
}  # fmt: skip

_YARN = {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 64, "truncate": False}

CASES = {
    "gpt_oss_yarn": Case(
        {**_CONFIG, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "rope_theta": 150000, "rope_scaling": _YARN,
         "initial_context_length": 64, "experts_per_token": 3},
        (
            {"rope_scaling": {**_YARN, "truncate": True}},
            {"layer_types": ["full_attention", "sliding_attention"]},
            {"sliding_window": 11},
        ),
    ),
    "gpt_oss_plain": Case(
        {**_CONFIG, "num_hidden_layers": 3, "layer_types": ["full_attention", "full_attention", "sliding_attention"], "attention_bias": False,
         "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20, "tie_word_embeddings": True, "num_experts_per_tok": 1,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "swiglu_alpha": 1.702},
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 15e4}},),
    ),
}  # fmt: skip
