"""OLMoE: Qwen's names for experts, norms over the whole projected q and k (transformers, models/olmoe)."""

from __future__ import annotations

from checkpoints.families.common import ATTENTION, EXPERTS, FUSED_EXPERTS, IGNORED, MLP, TOP, Layout

LAYOUTS = (
    Layout("olmoe", TOP, {**ATTENTION, **MLP}, EXPERTS, IGNORED),
    Layout("olmoe-fused", TOP, {**ATTENTION, **MLP}, FUSED_EXPERTS, IGNORED),
)
"""The released form first, then transformers 5's own."""
