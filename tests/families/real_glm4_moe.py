"""Parameters as published: GLM-4.5 (arXiv:2508.06471), dots.llm1 (arXiv:2506.05767).

GLM's counts leave out embedding and output matrix, of which ours hold the latter among those that a token uses, and hold the head of multi-token
prediction, which ours don't; Air's 12B is too coarse to compare with (ours are 12.18B without the output matrix). Those of dots.llm1 hold the
embedding.
"""

REAL = {
    "dots_llm1": (142e9, 14e9 - 152064 * 4096),
    "glm_4_5": (355e9, 32e9 + 151552 * 5120),
    "glm_4_5_air": (106e9, None),
}

UNSURE = {"dots_llm1": ("scoring_func", "sliding_window", "transformers_version")}
"""Fields of the files whose presence or value was written from memory and not checked; of scoring_func, 'noaux_tc' and 'sigmoid' mean the same."""
