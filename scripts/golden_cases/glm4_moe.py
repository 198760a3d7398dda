"""GLM-4.5: part of a head turns, with and without norms of queries and keys and biases, groups, both kinds of weights."""

from scripts.golden_cases.case import TINY, Case

_CONFIG = {
    **TINY,
    "model_type": "glm4_moe",
    "num_attention_heads": 6,
    "n_routed_experts": 10,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "num_nextn_predict_layers": 0,
    "rope_theta": 1000000,
}

CASES = {
    "glm4_moe_normalized": Case(
        {**_CONFIG, "num_hidden_layers": 3, "first_k_dense_replace": 1, "head_dim": 20, "partial_rotary_factor": 0.5, "use_qk_norm": True,
         "attention_bias": True, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1, "rope_scaling": None},
        ({"partial_rotary_factor": 1.0}, {"norm_topk_prob": False}),
    ),
    "glm4_moe_groups": Case(
        {**_CONFIG, "first_k_dense_replace": 0, "partial_rotary_factor": None, "use_qk_norm": False, "attention_bias": False,
         "norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_shared_experts": 2, "n_group": 5, "topk_group": 3, "tie_word_embeddings": True,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
        ({"topk_group": 5},),
    ),
}  # fmt: skip
