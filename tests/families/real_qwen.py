"""Parameters as published: Qwen1.5-MoE-A2.7B (its announcement), Qwen2-57B-A14B (arXiv:2407.10671), Qwen3-MoE, Qwen3-Next-80B-A3B and Qwen3.5-MoE
(their model cards).

Qwen's counts of what a token uses hold the embedding, which ours don't. With it ours are 2.69B for Qwen1.5-MoE and 22.19B for Qwen3-235B-A22B; for
the others, the published number is too coarse to compare with: 14.25B for Qwen2-57B-A14B, 3.35B for Qwen3-30B-A3B (its card says 3.3B), 35.47B for
Qwen3-Coder-480B-A35B, 3.87B for Qwen3-Next-80B-A3B (3.25B without embedding and output matrix), 3.46B for Qwen3.5-35B-A3B (2.44B), 17.35B for
Qwen3.5-397B-A17B. In full, Qwen3-Next is 79.674B, 79.05B without embedding and output matrix (its card: 80B and 79B), and the text models of Qwen3.5
are 34.661B and 396.346B.
"""

REAL = {
    "qwen1_5_moe_a2_7b": (14.3e9, 2.7e9 - 151936 * 2048),
    "qwen2_57b_a14b": (57.4e9, None),
    "qwen3_235b_a22b": (235e9, 22e9 - 151936 * 4096),
    "qwen3_30b_a3b": (30.5e9, None),
    "qwen3_5_35b_a3b": (35e9, None),
    "qwen3_5_397b_a17b": (397e9, None),
    "qwen3_coder_480b_a35b": (480e9, None),
    "qwen3_next_80b_a3b": (80e9, None),
}

UNSURE = {"qwen1_5_moe_a2_7b": ("transformers_version",)}
"""Fields of the files whose presence or value was written from memory and not checked; none of them changes the graph."""
