"""Gemma 4: a router and experts beside the dense network, all experts of a layer in one tensor in the released form too; the text model alone, or
with towers for images and sound, which are passed over (transformers, models/gemma4)."""

from __future__ import annotations

from checkpoints.families.common import ATTENTION, FUSED_EXPERTS, IGNORED, MLP, TOP, Layout, Rule, moved

_L = "model.layers.{layer}."

_NORMS = {
    "norm_attn": "input_layernorm",
    "norm_attn_out": "post_attention_layernorm",
    "norm_mlp": "pre_feedforward_layernorm",
    "norm_mlp_own": "post_feedforward_layernorm_1",
    "norm_experts": "pre_feedforward_layernorm_2",
    "norm_experts_out": "post_feedforward_layernorm_2",
    "norm_mlp_out": "post_feedforward_layernorm",
}
_LAYER = {
    **ATTENTION,
    **MLP,
    **{f"{ours}.scale": Rule(f"{_L}{theirs}.weight") for ours, theirs in _NORMS.items()},
    "router.kernel": Rule(_L + "router.proj.weight", in_axes=1),
    "router.input_scale": Rule(_L + "router.scale"),
    "router.expert_scale": Rule(_L + "router.per_expert_scale"),
    "layer_scale.scale": Rule(_L + "layer_scalar"),
}
_EXPERTS = moved(FUSED_EXPERTS, _L + "mlp.", _L)
_TOWERS = (r"model\.(vision_tower|embed_vision|audio_tower|embed_audio)\..+",)

TEXT_LAYOUTS = (Layout("gemma4_text", TOP, _LAYER, _EXPERTS, IGNORED),)
"""The same in the released form and in transformers 5's own."""

LAYOUTS = (Layout("gemma4", TOP, _LAYER, _EXPERTS, (*IGNORED, *_TOWERS), prefixes=(("model.", "model.language_model."),)),)
"""The text model within the whole."""
