"""gpt-oss: all experts of a layer in one tensor whose gates and ups alternate (transformers, models/gpt_oss). Plain, a linear map's tensor is
`[in, out]`; released, in mxfp4, it is `[out, in]`, for which only the columns of one output share scales."""

from __future__ import annotations

from checkpoints.families.common import ATTENTION, IGNORED, TOP, Layout, Rule

_M = "model.layers.{layer}.mlp."
_X = _M + "experts."
_GATE, _UP = (0, 1, 2), (1, 2, 2)

LAYER = {
    **ATTENTION,
    "attn.sinks.scale": Rule("model.layers.{layer}.self_attn.sinks"),
    "router.kernel": Rule(_M + "router.weight", in_axes=1),
    "router.bias": Rule(_M + "router.bias"),
    "expert_bias.w_in": Rule(_X + "gate_up_proj_bias", order=(0, 2, 1), matrix=1),
    "expert_bias.w_out": Rule(_X + "down_proj_bias", matrix=1),
}


def _experts(transposed: bool) -> dict[str, Rule]:
    return {
        "gate": Rule(_X + "gate_up_proj", in_axes=1, rows=_GATE, transposed=transposed, experts=True),
        "up": Rule(_X + "gate_up_proj", in_axes=1, rows=_UP, transposed=transposed, experts=True),
        "down": Rule(_X + "down_proj", in_axes=1, transposed=transposed, experts=True),
    }


LAYOUTS = (
    Layout("gpt_oss", TOP, LAYER, _experts(transposed=True), IGNORED),
    Layout("gpt_oss-mxfp4", TOP, LAYER, _experts(transposed=False), IGNORED, packed="mxfp4"),
)
"""The plain form first, which is also transformers 5's own."""
