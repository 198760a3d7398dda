"""Attention shapes of real models, for tests, benchmarks and tuning."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Heads H, KV heads K, channels C of keys and V of values; `window` where every other layer has one, `sinks` where a layer has them."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    sinks: bool = False
    latent: bool = False
    """Values are the first channels of the keys (MLA, absorbed)."""


SHAPES: dict[str, AttentionShape] = {
    "mixtral-8x7b": AttentionShape(32, 8, 128, 128),
    "qwen3-30b-a3b": AttentionShape(32, 4, 128, 128),
    "qwen3-235b-a22b": AttentionShape(64, 4, 128, 128),
    "olmoe-1b-7b": AttentionShape(16, 16, 128, 128),
    "deepseek-v3": AttentionShape(128, 1, 576, 512, latent=True),
    "gpt-oss-120b": AttentionShape(64, 8, 64, 64, window=128, sinks=True),
}
"""By model. From the config.json of each."""

@dataclasses.dataclass(frozen=True)
class Regime:
    """A kind of step: query rows in all, sequences, the most rows of one, and words of the tree masks."""

    rows: int
    sequences: int
    most: int
    words: int = 0


REGIMES: dict[str, Regime] = {
    "one": Regime(1, 1, 1),
    "decode": Regime(8, 8, 1),
    "tree": Regime(64, 4, 16, 1),
    "mixed": Regime(512, 8, 505),
    "prompt": Regime(8192, 1, 8192),
}
"""Decoding one sequence and several, verifying trees, decoding beside a piece of a prompt, a whole prompt."""

PAGE = 64
"""Tokens of a page in benchmarks."""
