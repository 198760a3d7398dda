"""Phi-3.5-MoE: Mixtral's names, and a bias beside every norm and the output matrix (transformers, models/phimoe)."""

from __future__ import annotations

from checkpoints.families import mixtral
from checkpoints.families.common import ATTENTION, FUSED_EXPERTS, IGNORED, TOP, Layout, Rule

_L = "model.layers.{layer}."
_TOP = {**TOP, "final_norm.bias": Rule("model.norm.bias"), "lm_head.bias": Rule("lm_head.bias")}
_LAYER = {
    **ATTENTION,
    "norm_attn.bias": Rule(_L + "input_layernorm.bias"),
    "norm_mlp.bias": Rule(_L + "post_attention_layernorm.bias"),
}
_RELEASED = mixtral.LAYOUTS[0]

LAYOUTS = (
    Layout("phimoe", _TOP, {**_LAYER, "router.kernel": _RELEASED.layer["router.kernel"]}, _RELEASED.experts, IGNORED),
    Layout("phimoe-fused", _TOP, {**_LAYER, "router.kernel": Rule(_L + "mlp.router.weight", in_axes=1)}, FUSED_EXPERTS, IGNORED),
)
"""The released form first, then transformers 5's own."""
