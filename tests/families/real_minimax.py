"""Parameters as published: MiniMax-M2 (its model card), 230B. Its 10B activated are rounded: ours are 10.4B."""

REAL = {"minimax_m2": (230e9, None)}

UNSURE = {
    "minimax_m2": (
        "bos_token_id", "eos_token_id", "swa_rope_theta", "layernorm_full_attention_beta", "layernorm_linear_attention_beta", "layernorm_mlp_beta",
    ),
}  # fmt: skip
"""Fields of the file whose presence or value was written from memory and not checked; none of them changes the graph."""
