"""Mixtral: w1 is the gate, w3 up, w2 down, under `block_sparse_moe` (transformers, models/mixtral)."""

from __future__ import annotations

from checkpoints.families.common import ATTENTION, FUSED_EXPERTS, IGNORED, MLP, TOP, Layout, Rule

_MOE = "model.layers.{layer}.block_sparse_moe."

LAYOUTS = (
    Layout(
        "mixtral",
        TOP,
        {**ATTENTION, "router.kernel": Rule(_MOE + "gate.weight", in_axes=1)},
        {
            "gate": Rule(_MOE + "experts.{expert}.w1.weight", in_axes=1),
            "up": Rule(_MOE + "experts.{expert}.w3.weight", in_axes=1),
            "down": Rule(_MOE + "experts.{expert}.w2.weight", in_axes=1),
        },
        IGNORED,
    ),
    Layout("mixtral-fused", TOP, {**ATTENTION, "router.kernel": MLP["router.kernel"]}, FUSED_EXPERTS, IGNORED),
)
"""The released form first, then transformers 5's own."""
