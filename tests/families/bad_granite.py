"""What the readers of Granite's architectures refuse."""

_COMMON = [
    ({"num_experts_per_tok": 10}, "num_experts_per_tok = 10 is more than the 9 experts"),
    ({"attention_multiplier": "small"}, "attention_multiplier = 'small' must be a number"),
    ({"residual_multiplier": True}, "residual_multiplier = True must be a number"),
    ({"embedding_multiplier": -12.0}, "embedding_multiplier = -12.0 must be a number above 0"),
    ({"logits_scaling": 0}, "logits_scaling = 0 must be a number above 0"),
    ({"num_attention_heads": 5}, "num_attention_heads = 5 is not a multiple of num_key_value_heads = 2"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"layer_types": ["mamba"]}, "layer_types holds 'mamba'"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}, "rope_scaling": None}, "leaves . of .* channels"),
    ({"sliding_window": 16}, "'sliding_window' = 16"),
]

BAD = {
    "granitemoe": [*_COMMON, ({"shared_intermediate_size": 20}, "'shared_intermediate_size' = 20")],
    "granitemoeshared": [*_COMMON, ({"shared_intermediate_size": -1}, "shared_intermediate_size = -1")],
}
