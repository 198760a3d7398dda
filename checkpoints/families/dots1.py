"""dots.llm1: Qwen3's names for attention, DeepSeek-V3's for experts (transformers, models/dots1)."""

from __future__ import annotations

from checkpoints.families.common import ATTENTION, EXPERTS, FUSED_EXPERTS, IGNORED, MLP, TOP, Layout
from checkpoints.families.deepseek import SELECT_BIAS, SHARED

_LAYER = {**ATTENTION, **MLP, **SHARED, **SELECT_BIAS}

LAYOUTS = (
    Layout("dots1", TOP, _LAYER, EXPERTS, IGNORED),
    Layout("dots1-fused", TOP, _LAYER, FUSED_EXPERTS, IGNORED),
)
"""The released form first, then transformers 5's own."""
