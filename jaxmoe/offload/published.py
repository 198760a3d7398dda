"""What fits in what: published models, by their config.json.

Arithmetic on shapes alone, for models whose weights nobody has to have; 4-bit experts are a format that jaxmoe does not run yet.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from jaxmoe.offload.budget import ExpertShapes
from jaxmoe.spec import ModelSpec
from jaxmoe.spec.published import published

DEVICES_GB = (8, 12, 16, 24, 40, 80)
"""Sizes of device memory that a model is fitted into, in 10^9 bytes; a card sold by GiB has 7 % more, which is left to the runtime."""
EXPERT_BITS = {"bfloat16": Fraction(16), "4-bit": Fraction(17, 4)}
"""Bits of an expert's weight; '4-bit' has 4 and a scale: 8 bits for every 32 weights, as in mxfp4, or 16 for every 64."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A released model in the table of what fits in what.

    Attributes:
        config: its name in `jaxmoe.spec.published`.
        expert_dtypes: which of `EXPERT_BITS` its experts are usually held in.
    """

    config: str
    expert_dtypes: tuple[str, ...] = ("bfloat16", "4-bit")

    @property
    def spec(self) -> ModelSpec:
        """The model, held in bfloat16."""
        return published(self.config).with_precision("bfloat16")

    def shapes(self, name: str, dtype: str = "bfloat16") -> ExpertShapes:
        """The shapes with experts held in `dtype`, one of `EXPERT_BITS`; everything else, the experts' biases included, is bfloat16."""
        spec = self.spec
        expert = math.ceil(3 * spec.width * spec.moe[1].width * EXPERT_BITS[dtype] / 8)
        shapes = ExpertShapes.from_spec(spec, name)
        return dataclasses.replace(shapes, expert_bytes=(expert,) * shapes.layers)


PUBLISHED = {
    "Mixtral-8x7B": Published("mixtral_8x7b"),
    "Qwen3-30B-A3B": Published("qwen3_30b_a3b"),
    "Qwen3-235B-A22B": Published("qwen3_235b_a22b", ("4-bit",)),
    "OLMoE-1B-7B": Published("olmoe_1b_7b"),
    "DeepSeek-V2-Lite": Published("deepseek_v2_lite"),
    "DeepSeek-V3": Published("deepseek_v3", ("4-bit",)),
    "gpt-oss-120b": Published("gpt_oss_120b", ("4-bit",)),
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
