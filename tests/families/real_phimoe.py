"""Parameters as published: Phi-3.5-MoE (arXiv:2404.14219), 41.9B. Its 6.6B activated count the embedding too, which makes 6.64B; ours without
it are 6.51B."""

REAL = {"phi_3_5_moe": (41.9e9, None)}

UNSURE: dict[str, tuple[str, ...]] = {}
"""Fields of the file whose presence or value was written from memory and not checked."""
