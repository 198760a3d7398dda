"""Expert shapes of real models, for tests, benchmarks and tuning."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ExpertShape:
    """Model width D, an expert's hidden width F, E experts of which a token uses A."""

    width: int
    hidden: int
    experts: int
    active: int


SHAPES: dict[str, ExpertShape] = {
    "mixtral-8x7b": ExpertShape(4096, 14336, 8, 2),
    "qwen3-30b-a3b": ExpertShape(2048, 768, 128, 8),
    "qwen3-235b-a22b": ExpertShape(4096, 1536, 128, 8),
    "olmoe-1b-7b": ExpertShape(2048, 1024, 64, 8),
    "deepseek-v3": ExpertShape(7168, 2048, 256, 8),
    "gpt-oss-120b": ExpertShape(2880, 2880, 128, 4),
}
"""By model. From the config.json of each."""

TOKENS = (1, 8, 64, 512, 8192)
"""Tokens in a step; each makes `active` rows."""
