"""OLMoE: the bound on queries, keys and values, biases, both kinds of weights."""

from scripts.golden_cases.case import TINY, Case

_CONFIG = {**TINY, "model_type": "olmoe", "num_experts": 8}

CASES = {
    "olmoe_clipped": Case(
        {**_CONFIG, "norm_topk_prob": False, "clip_qkv": 0.8, "num_key_value_heads": 4, "rope_theta": 1e4},
        ({"clip_qkv": None}, {"norm_topk_prob": True}),
    ),
    "olmoe_normalized": Case(
        {**_CONFIG, "norm_topk_prob": True, "clip_qkv": None, "attention_bias": True, "tie_word_embeddings": True}, ({"rope_theta": 1e6},)
    ),
}
