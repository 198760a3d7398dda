"""ERNIE 4.5: dense layers before, after and between sparse ones, biases, shared experts or none, weights whose sum is below its bound."""

from scripts.golden_cases.case import TINY, Case

_CONFIG = {
    **{field: value for field, value in TINY.items() if field != "num_experts_per_tok"},
    "model_type": "ernie4_5_moe",
    "moe_intermediate_size": 24,
    "moe_num_experts": 8,
    "moe_k": 3,
}

CASES = {
    "ernie4_5_moe_biased": Case(
        {
            **_CONFIG,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "use_bias": True,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
            "moe_layer_interval": 1,
            "rope_theta": 5e5,
            "num_nextn_predict_layers": 1,
        },
        ({"moe_k": 2}, {"rope_theta": 1e4}),
    ),
    "ernie4_5_moe_bounded": Case(
        {
            **_CONFIG,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 20,
            "use_bias": False,
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": -1,
            "moe_layer_interval": 2,
            "moe_norm_min": 0.8,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        ({"moe_norm_min": 1e-12},),
    ),
}
