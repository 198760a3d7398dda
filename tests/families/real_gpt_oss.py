"""Parameters as published: gpt-oss-120b and gpt-oss-20b (OpenAI's model card, arXiv:2508.10925, table 1). It counts the output matrix among those
that a token uses and the embedding not, as here, and of the experts' biases those of chosen ones."""

REAL = {"gpt_oss_120b": (116.83e9, 5.13e9), "gpt_oss_20b": (20.91e9, 3.61e9)}

UNSURE: dict[str, tuple[str, ...]] = {}
"""Fields of the files whose presence or value was written from memory and not checked; none of them changes the graph."""
