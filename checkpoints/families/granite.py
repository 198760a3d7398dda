"""Granite-MoE: all experts of a layer in one tensor in the released form too, and gate and up of the shared expert in another (transformers,
models/granitemoe and models/granitemoeshared)."""

from __future__ import annotations

from checkpoints.families.common import ATTENTION, FUSED_EXPERTS, IGNORED, TOP, Layout, Rule, moved

_L = "model.layers.{layer}."
_MOE = _L + "block_sparse_moe."

_SHARED = {
    "shared.gate.kernel": Rule(_L + "shared_mlp.input_linear.weight", in_axes=1, part=(0, 2)),
    "shared.up.kernel": Rule(_L + "shared_mlp.input_linear.weight", in_axes=1, part=(1, 2)),
    "shared.down.kernel": Rule(_L + "shared_mlp.output_linear.weight", in_axes=1),
}
_LAYER = {**ATTENTION, **_SHARED}
_EXPERTS = {
    "gate": Rule(_MOE + "input_linear.weight", in_axes=1, part=(0, 2), experts=True),
    "up": Rule(_MOE + "input_linear.weight", in_axes=1, part=(1, 2), experts=True),
    "down": Rule(_MOE + "output_linear.weight", in_axes=1, experts=True),
}


def _layouts(name: str) -> tuple[Layout, ...]:
    released = {**_LAYER, "router.kernel": Rule(_MOE + "router.layer.weight", in_axes=1)}
    own = {**_LAYER, "router.kernel": Rule(_MOE + "router.weight", in_axes=1)}
    return (
        Layout(name, TOP, released, _EXPERTS, IGNORED),
        Layout(f"{name}-fused", TOP, own, moved(FUSED_EXPERTS, _L + "mlp.", _MOE), IGNORED),
    )


MOE_LAYOUTS = _layouts("granitemoe")
"""The released form first, then transformers 5's own."""

SHARED_LAYOUTS = _layouts("granitemoeshared")
"""The same, with a shared expert."""
