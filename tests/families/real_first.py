"""Parameters as published: Mixtral-8x7B (arXiv:2401.04088), OLMoE-1B-7B (arXiv:2409.02060).

What a token uses is published with the embedding, which ours don't hold. With it ours are 12.88B for Mixtral-8x7B, and 1.28B for OLMoE-1B-7B,
whose published 1.3B is too coarse.
"""

REAL = {
    "mixtral_8x7b": (46.7e9, 12.9e9 - 32000 * 4096),
    "olmoe_1b_7b": (6.9e9, None),
}

UNSURE = {
    "olmoe_1b_7b": ("attention_bias", "rope_scaling", "transformers_version"),
}
"""Fields of the files whose presence or value was written from memory and not checked; none of them changes the graph."""
