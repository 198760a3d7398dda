"""What the readers of DeepSeek's architectures refuse."""

BAD = {
    "deepseek_v3": [
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace = 4 is more than num_hidden_layers = 3"),
        ({"n_group": 5}, "n_group = 5 does not split 12 experts"),
        ({"topk_group": 5}, "topk_group = 5 of 4 groups"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ({"qk_rope_head_dim": 7}, "an even number"),
        ({"q_lora_rank": -3}, "q_lora_rank = -3"),
    ],
}
