"""Parameters as published: Gemma 4 26B-A4B's model card, without the tower for images (about 550M)."""

REAL = {"gemma_4_26b_a4b": (25.2e9, 3.8e9)}

UNSURE: dict[str, tuple[str, ...]] = {}
"""Fields of the files whose presence or value was written from memory and not checked; none of them changes the graph."""
