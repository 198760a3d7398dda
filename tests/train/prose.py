"""Invented text for the tests of sources and corpora."""

import random

WORDS = "the of expert router token layer cache slot budget memory window stream and in to a is was not with".split()


def prose(seed: int, words: int) -> str:
    rng = random.Random(seed)
    lines = (" ".join(rng.choice(WORDS) for _ in range(12)).capitalize() + "." for _ in range(words // 12))
    return "".join(line + ("\n\n" if i % 5 == 4 else "\n") for i, line in enumerate(lines))
