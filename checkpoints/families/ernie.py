"""ERNIE 4.5: Qwen's names, perhaps with biases, and a bias for selection in [1, E] (transformers, models/ernie4_5_moe)."""

from __future__ import annotations

from checkpoints.families.common import ATTENTION, EXPERTS, FUSED_EXPERTS, IGNORED, MLP, TOP, Layout, Rule
from checkpoints.families.deepseek import SHARED

_M = "model.layers.{layer}.mlp."
_BIASES = {
    f"{ours}.{part}.bias": Rule(f"{_M}{theirs}{part}_proj.bias")
    for ours, theirs in (("mlp", ""), ("shared", "shared_experts."))
    for part in ("gate", "up", "down")
}
_LAYER = {**ATTENTION, **MLP, **SHARED, **_BIASES}
_TOP = {**TOP, "lm_head.bias": Rule("lm_head.bias")}
_SELECT = "moe_statics.e_score_correction_bias"
_IGNORED = (*IGNORED, r"(model\.)?mtp_.+")

LAYOUTS = (
    Layout("ernie4_5_moe", _TOP, {**_LAYER, "router.select_bias": Rule(_M + _SELECT, unit_axis=0)}, EXPERTS, _IGNORED),
    Layout("ernie4_5_moe-fused", _TOP, {**_LAYER, "router.select_bias": Rule(f"{_M}gate.{_SELECT}", unit_axis=0)}, FUSED_EXPERTS, _IGNORED),
)
"""The released form first, then transformers 5's own; heads of multi-token prediction are passed over."""
