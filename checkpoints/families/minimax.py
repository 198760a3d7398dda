"""MiniMax-M2: Mixtral's names, and a bias for selection at the block's own level (transformers, models/minimax_m2)."""

from __future__ import annotations

import dataclasses

from checkpoints.families import mixtral
from checkpoints.families.common import Rule

_L = "model.layers.{layer}."
_RELEASED, _FUSED = mixtral.LAYOUTS
_BIAS = "router.select_bias"

LAYOUTS = (
    dataclasses.replace(_RELEASED, name="minimax_m2", layer={**_RELEASED.layer, _BIAS: Rule(_L + "block_sparse_moe.e_score_correction_bias")}),
    dataclasses.replace(_FUSED, name="minimax_m2-fused", layer={**_FUSED.layer, _BIAS: Rule(_L + "mlp.e_score_correction_bias")}),
)
"""The released form first, then transformers 5's own."""
