"""Traces to test with: the two real ones and small random ones."""

import functools
from pathlib import Path

import numpy as np

from jaxmoe.offload.trace import DECODE, PROMPT, Trace, TraceBuilder, load

DATA = Path(__file__).parent / "data"
QWEN, GEMMA = "qwen3_30b_a3b", "gemma4_26b_a4b"


@functools.cache
def real(name: str) -> Trace:
    return load(DATA / f"{name}.npz")


def meta(layers: int, experts: int, active: int, **more) -> dict:
    sizes = {"layers": layers, "experts": experts, "active": active, "expert_bytes": [1000 + layer for layer in range(layers)]}
    return {"model": "random", "spec_hash": None} | sizes | more


def random_trace(seed: int, prompt: int = 7, decode: int = 30, rows: int = 3, layers: int = 2, experts: int = 9, active: int = 3) -> Trace:
    """Skewed routing in batches of `rows`, with tokens that lack some or all experts."""
    rng = np.random.default_rng(seed)
    chance = rng.dirichlet(np.ones(experts))
    builder = TraceBuilder(meta(layers, experts, active))

    def add(tokens: int, phase: int) -> None:
        ids = np.stack([[rng.choice(experts, active, False, chance) for _ in range(layers)] for _ in range(tokens)])
        ids[rng.random(ids.shape) < 0.2] = -1
        builder.add(ids, rng.random(ids.shape), rng.integers(0, 50, tokens), np.arange(tokens), phase, rng.random(tokens) < 0.9)

    add(prompt, PROMPT)
    for _ in range(decode):
        add(rows, DECODE)
    return builder.build()


def random_used(seed: int, steps: int, layers: int, experts: int, share: float) -> np.ndarray:
    """[S, L, E] sets, empty ones among them."""
    return np.random.default_rng(seed).random((steps, layers, experts)) < share
