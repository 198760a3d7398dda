"""Qwen3-MoE: one tensor per expert, norms per head, dense layers where the config says so (transformers,
models/qwen3_moe)."""

from __future__ import annotations

from checkpoints.families.common import ATTENTION, EXPERTS, FUSED_EXPERTS, IGNORED, MLP, TOP, Layout

LAYOUTS = (
    Layout("qwen3_moe", TOP, {**ATTENTION, **MLP}, EXPERTS, IGNORED),
    Layout("qwen3_moe-fused", TOP, {**ATTENTION, **MLP}, FUSED_EXPERTS, IGNORED),
)
"""The released form first, then transformers 5's own."""
