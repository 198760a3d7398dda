"""Qwen2-MoE: Qwen's names, and one expert that sees every token with a gate of its own (transformers, models/qwen2_moe)."""

from __future__ import annotations

from checkpoints.families.common import ATTENTION, EXPERTS, FUSED_EXPERTS, IGNORED, MLP, TOP, Layout, Rule

_M = "model.layers.{layer}.mlp."

SHARED = {
    "shared.gate.kernel": Rule(_M + "shared_expert.gate_proj.weight", in_axes=1),
    "shared.up.kernel": Rule(_M + "shared_expert.up_proj.weight", in_axes=1),
    "shared.down.kernel": Rule(_M + "shared_expert.down_proj.weight", in_axes=1),
    "shared_gate.kernel": Rule(_M + "shared_expert_gate.weight", in_axes=1),
}
"""The expert that sees every token, and its gate."""

_LAYER = {**ATTENTION, **MLP, **SHARED}

LAYOUTS = (
    Layout("qwen2_moe", TOP, _LAYER, EXPERTS, IGNORED),
    Layout("qwen2_moe-fused", TOP, _LAYER, FUSED_EXPERTS, IGNORED),
)
"""The released form first, then transformers 5's own."""
