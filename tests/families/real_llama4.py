"""Parameters as published: Llama 4 (Meta's model card): Scout 109B and Maverick 400B in all, 17B of them activated.

Both totals hold what sees images, which isn't read here (`IMAGES`, by its config). The 17B are too coarse to compare with: the text models use 16.14B
and 16.15B as counted here, 17.17B and 17.18B with the embedding's table, which rounds to what is published (tests/families/test_llama4.py).
"""

_D = 1408
_VISION_LAYER = 4 * (_D + 1) * _D + (_D + 1) * 5632 + (5632 + 1) * _D + 4 * _D
_ADAPTER = 4 * _D * 4096 + 4096 * 4096 + 4096 * 5120
IMAGES = 34 * _VISION_LAYER + _ADAPTER + (24 * 24 + 1) * _D + 3 * 14 * 14 * _D + 5 * _D
"""Parameters of the vision tower, its adapter and the projector: 0.87B."""

REAL = {
    "llama_4_scout_17b_16e_instruct": (109e9 - IMAGES, None),
    "llama_4_maverick_17b_128e_instruct": (400e9 - IMAGES, None),
}

UNSURE = {"llama_4_maverick_17b_128e_instruct": ("no_rope_layers",)}
"""Fields of the files whose presence or value was written from memory and not checked; a list in `no_rope_layers` says what an empty one does."""
