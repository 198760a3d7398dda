"""What the reader of Phi-3.5-MoE refuses."""

BAD = {
    "phimoe": [
        ({"num_experts_per_tok": 3}, "num_experts_per_tok = 3 is not supported"),
        ({"num_local_experts": 1}, "num_experts_per_tok = 2 is more than the 1 experts"),
        ({"router_jitter_noise": -0.1}, "router_jitter_noise = -0.1"),
        ({"sliding_window": 0}, "sliding_window = 0"),
        ({"num_key_value_heads": 4}, "num_attention_heads = 6 is not a multiple of num_key_value_heads = 4"),
        ({"tie_word_embeddings": True}, "lm_head_bias = True is not supported with tie_word_embeddings"),
        ({"original_max_position_embeddings": 64}, "original_max_position_embeddings = 64, but 256"),
        ({"rope_scaling": {"type": "yarn"}}, "rope type 'yarn' of phimoe"),
        ({"rope_scaling": {"short_mscale": None}}, "short_mscale = None must be a number"),
        ({"rope_scaling": {"long_mscale": "1"}}, "long_mscale = '1' must be a number"),
        ({"rope_scaling": {"long_factor": [1.0, 2.0]}}, "long_factor lists 2 factors for 4 frequencies"),
        ({"rope_scaling": {"short_factor": None}}, "short_factor = None must list"),
        ({"rope_scaling": {"twist": 1}}, "rope_parameters.twist = 1"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ],
}
