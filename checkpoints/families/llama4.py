"""Llama 4: all experts of a layer in one tensor, transposed (transformers, models/llama4). In a checkpoint that also sees images, the text model's
names begin with 'language_model.', and the rest is passed over."""

from __future__ import annotations

import dataclasses

from checkpoints.families.common import ATTENTION, IGNORED, TOP, Layout, Rule

_F = "model.layers.{layer}.feed_forward."

LAYER = {
    **ATTENTION,
    "router.kernel": Rule(_F + "router.weight", in_axes=1),
    **{f"mlp.{name}.kernel": Rule(_F + f"{name}_proj.weight", in_axes=1) for name in ("gate", "up", "down")},
    **{f"shared.{name}.kernel": Rule(_F + f"shared_expert.{name}_proj.weight", in_axes=1) for name in ("gate", "up", "down")},
}

EXPERTS = {
    "gate": Rule(_F + "experts.gate_up_proj", in_axes=1, part=(0, 2), transposed=True, experts=True),
    "up": Rule(_F + "experts.gate_up_proj", in_axes=1, part=(1, 2), transposed=True, experts=True),
    "down": Rule(_F + "experts.down_proj", in_axes=1, transposed=True, experts=True),
}

IMAGES = (r"vision_model\..+", r"multi_modal_projector\..+")

TEXT_LAYOUTS = (Layout("llama4_text", TOP, LAYER, EXPERTS, IGNORED),)
"""Transformers 5 saves what was released."""

LAYOUTS = tuple(
    dataclasses.replace(layout, name="llama4", prefixes=(("", "language_model."),), ignored=(*IGNORED, *IMAGES)) for layout in TEXT_LAYOUTS
)
