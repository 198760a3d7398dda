"""Granite-MoE: all four scales, biases, tied and not, with and without an expert that sees every token."""

from scripts.golden_cases.case import TINY, Case

_CONFIG = {
    **TINY,
    "model_type": "granitemoe",
    "intermediate_size": 24,
    "num_local_experts": 9,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.4,
    "logits_scaling": 1.7,
}
_BIASED = {
    **_CONFIG,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 20,
    "attention_bias": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 2e4},
}
_SHARED = {"model_type": "granitemoeshared", "shared_intermediate_size": 20}

MOE = {
    "granitemoe_scaled": Case(
        {**_CONFIG, "num_attention_heads": 6, "tie_word_embeddings": True, "rope_theta": 1e4, "rope_scaling": None, "attention_bias": False},
        ({"attention_multiplier": 8**-0.5}, {"residual_multiplier": 1.0}, {"embedding_multiplier": 1.0}),
    ),
    "granitemoe_biased": Case({**_BIASED, "num_experts_per_tok": 1}, ({"logits_scaling": 1},)),
}

SHARED = {
    "granitemoeshared_tied": Case({**_CONFIG, **_SHARED, "tie_word_embeddings": True, "rope_theta": 1e4}, ({"residual_multiplier": 1.0},)),
    "granitemoeshared_none": Case({**_BIASED, **_SHARED, "shared_intermediate_size": 0}),
}
