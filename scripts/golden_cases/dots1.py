"""dots.llm1: windows by either field, biases, groups, shared experts, both kinds of weights."""

from scripts.golden_cases.case import TINY, Case

_CONFIG = {
    **TINY,
    "model_type": "dots1",
    "n_routed_experts": 10,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "head_dim": 20,
    "rope_theta": 10000000,
}

CASES = {
    "dots1_windowed": Case(
        {**_CONFIG, "num_hidden_layers": 3, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "sliding_window": 10,
         "max_window_layers": 2, "scoring_func": "noaux_tc", "moe_layer_freq": 1},
        ({"sliding_window": 11}, {"norm_topk_prob": False}),
    ),
    "dots1_listed": Case(
        {**_CONFIG, "num_hidden_layers": 3, "first_k_dense_replace": 0, "norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_group": 5,
         "topk_group": 2, "sliding_window": 10, "layer_types": ["sliding_attention", "full_attention", "full_attention"], "attention_bias": True,
         "tie_word_embeddings": True, "n_shared_experts": 1, "num_key_value_heads": 1},
        ({"topk_group": 5},),
    ),
}  # fmt: skip
