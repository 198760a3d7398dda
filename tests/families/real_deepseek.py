"""Parameters as published: DeepSeek-V2 (arXiv:2405.04434), DeepSeek-V3 (its README_WEIGHTS.md), Kimi-K2 (arXiv:2507.20534), GLM-4.7-Flash.

DeepSeek-V2-Lite is published with 2.4B activated, where ours are 2.451B, and GLM-4.7-Flash as "A3B": too coarse to compare with. Kimi-K2 is published
as 1T, in its paper as 1.04T; by the released config, 60 layers of 384 experts of 3 * 7168 * 2048 are 1014.7B, all else is 11.7B.
"""

REAL = {
    "deepseek_v2": (236e9, 21e9),
    "deepseek_v2_lite": (15.7e9, None),
    "deepseek_v3": (671e9, 36.7e9),
    "glm_4_7_flash": (30e9, None),
    "kimi_k2_instruct": (1026.4e9, 32e9),
}

UNSURE = {
    "deepseek_v2_lite": ("transformers_version",),
    "glm_4_7_flash": ("transformers_version",),
}
"""Fields of the files whose presence or value was written from memory and not checked; none of them changes the graph."""
