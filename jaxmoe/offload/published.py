"""What fits in what: published models by the fields of their config.json that decide what they weigh.

Arithmetic on shapes alone, for models whose weights nobody has to have; some of them are of formats or families that jaxmoe does not run yet.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np

from jaxmoe.offload.budget import ExpertShapes

DEVICES_GB = (8, 12, 16, 24, 40, 80)
"""Sizes of device memory that a model is fitted into, in 10^9 bytes; a card sold by GiB has 7 % more, which is left to the runtime."""
EXPERT_BITS = {"bfloat16": Fraction(16), "4-bit": Fraction(17, 4)}
"""Bits of an expert's weight; '4-bit' has 4 and a scale: 8 bits for every 32 weights, as in mxfp4, or 16 for every 64."""


@dataclasses.dataclass(frozen=True)
class Published:
    """Sizes from a model's published config.json, and its published number of parameters, `total` billions, to check them by.

    Attributes:
        family: its model_type.
        vocab, width, layers, heads, kv_heads, head_dim: V, D, all decoder layers, H, K, C.
        experts, active, expert_width: E, A, F.
        expert_dtypes: which of `EXPERT_BITS` its experts are usually held in.
        shared_width: hidden width of what every token passes through beside the routed experts, all shared experts together.
        dense_layers, dense_width: first layers without experts, and their hidden width.
        latent: (rank, rotary width, value width) of multi-head latent attention.
        qk_norm: 'head' or 'full', as in `AttentionSpec`.
        biases: attention, router and experts have them, and attention has a sink a head.
    """

    family: str
    total: float
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    active: int
    expert_width: int
    expert_dtypes: tuple[str, ...] = ("bfloat16", "4-bit")
    shared_width: int = 0
    dense_layers: int = 0
    dense_width: int = 0
    latent: tuple[int, int, int] | None = None
    qk_norm: Literal["head", "full"] | None = None
    biases: bool = False

    @property
    def moe_layers(self) -> int:
        """Layers that have experts (L)."""
        return self.layers - self.dense_layers

    def parameters(self) -> dict[str, int]:
        """How many parameters each part of the whole model has."""
        d = self.width
        return {
            "embedding": self.vocab * d,
            "head": self.vocab * d,
            "attention": self.layers * self._attention(),
            "norms": (2 * self.layers + 1) * d,
            "router": self.moe_layers * self.experts * (d + self.biases),
            "shared": self.moe_layers * 3 * d * self.shared_width,
            "dense": self.dense_layers * 3 * d * self.dense_width,
            "experts": self.moe_layers * self.experts * (3 * d * self.expert_width + self._expert_biases()),
        }

    def _expert_biases(self) -> int:
        return (2 * self.expert_width + self.width) * self.biases

    def _attention(self) -> int:
        d, q, kv = self.width, self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.latent is not None:
            rank, rotary, value = self.latent
            return d * q + d * (rank + rotary) + rank + rank * self.heads * (self.head_dim - rotary + value) + self.heads * value * d
        norms = {None: 0, "head": 2 * self.head_dim, "full": q + kv}[self.qk_norm]
        return 2 * d * q + 2 * d * kv + norms + (q + 2 * kv + d + self.heads) * self.biases

    def shapes(self, name: str, dtype: str = "bfloat16") -> ExpertShapes:
        """The shapes with experts held in `dtype`, one of `EXPERT_BITS`; everything else, biases included, is bfloat16."""
        expert = math.ceil(3 * self.width * self.expert_width * EXPERT_BITS[dtype] / 8) + 2 * self._expert_biases()
        counts = self.parameters()
        per_layer = 2 * self.kv_heads * self.head_dim if self.latent is None else sum(self.latent[:2])
        return ExpertShapes(
            name=name, layers=self.moe_layers, experts=self.experts, active=self.active, expert_bytes=(expert,) * self.moe_layers,
            dense_bytes=2 * (sum(counts.values()) - counts["experts"]), kv_bytes_per_token=2 * self.layers * per_layer,
            lookup_bytes=2 * counts["embedding"],
        )  # fmt: skip


PUBLISHED = {
    "Mixtral-8x7B": Published("mixtral", 46.7, 32000, 4096, 32, 32, 8, 128, 8, 2, 14336),
    "Qwen3-30B-A3B": Published("qwen3_moe", 30.5, 151936, 2048, 48, 32, 4, 128, 128, 8, 768, qk_norm="head"),
    "OLMoE-1B-7B": Published("olmoe", 6.9, 50304, 2048, 16, 16, 16, 128, 64, 8, 1024, qk_norm="full"),
    "DeepSeek-V2-Lite": Published(
        "deepseek_v2", 15.7, 102400, 2048, 27, 16, 16, 192, 64, 6, 1408, shared_width=2816, dense_layers=1, dense_width=10944, latent=(512, 64, 128)
    ),
    "gpt-oss-120b": Published("gpt_oss", 116.8, 201088, 2880, 36, 64, 8, 64, 128, 4, 2880, expert_dtypes=("4-bit",), biases=True),
}


def interpolate_hits(curve: Sequence[tuple[float, float]], slots: float, active: int) -> float:
    """A hit rate read off a curve that was replayed on another model's trace, at as many slots per active expert; flat beyond its ends.

    Args:
        curve: (slots / A, hit rate), by rising slots / A.
    """
    return float(np.interp(slots / active, [x for x, _ in curve], [hit for _, hit in curve]))


def fits_in(count: int) -> str:
    """The smallest of `DEVICES_GB` that holds so many bytes, as '24 GB'; 'none' where even the largest is too small."""
    return next((f"{size} GB" for size in DEVICES_GB if count <= size * 10**9), "none")
