"""Qwen3-Next and Qwen3.5-MoE: queries beside their gates head by head, and delta rules, whose projections the one groups by key heads and the other
does not (transformers, models/qwen3_next and models/qwen3_5_moe)."""

from __future__ import annotations

from collections.abc import Callable

from checkpoints.families.common import ATTENTION, EXPERTS, FUSED_EXPERTS, IGNORED, MLP, TOP, Layout, Rule
from checkpoints.families.qwen2_moe import SHARED
from checkpoints.families.rules import Rows
from jaxmoe.spec import DeltaSpec, LayerSpec

_A = "model.layers.{layer}.self_attn."
_D = "model.layers.{layer}.linear_attn."


def _head(layer: LayerSpec, part: int) -> Rows:
    assert layer.attention is not None
    width = layer.attention.head_dim
    return part * width, (part + 1) * width, 2 * width


def _part(sizes: Callable[[DeltaSpec], tuple[int, ...]], index: int) -> Callable[[LayerSpec], Rows]:
    """The rows of the part `index` where parts of these sizes follow each other, again and again."""

    def rows(layer: LayerSpec) -> Rows:
        assert layer.delta is not None
        each = sizes(layer.delta)
        return sum(each[:index]), sum(each[: index + 1]), sum(each)

    return rows


def _qkvz_of_key_head(d: DeltaSpec) -> tuple[int, ...]:
    values = d.v_heads // d.k_heads * d.v_dim
    return d.k_dim, d.k_dim, values, values


def _pair_of_key_head(d: DeltaSpec) -> tuple[int, ...]:
    return d.v_heads // d.k_heads, d.v_heads // d.k_heads


def _qkv(d: DeltaSpec) -> tuple[int, ...]:
    return d.k_heads * d.k_dim, d.k_heads * d.k_dim, d.v_heads * d.v_dim


GATED = {
    **ATTENTION,
    "attn.q.kernel": Rule(_A + "q_proj.weight", in_axes=1, rows=lambda layer: _head(layer, 0)),
    "attn.q.bias": Rule(_A + "q_proj.bias", rows=lambda layer: _head(layer, 0)),
    "attn.gate.kernel": Rule(_A + "q_proj.weight", in_axes=1, rows=lambda layer: _head(layer, 1)),
    "attn.gate.bias": Rule(_A + "q_proj.bias", rows=lambda layer: _head(layer, 1)),
}
"""Attention: of each head, the rows of q_proj are its query's and then its gate's."""

DELTA = {
    **{f"delta.conv_{name}.kernel": Rule(_D + "conv1d.weight", matrix=2, rows=_part(_qkv, i), unit_axis=1) for i, name in enumerate("qkv")},
    "delta.a_log.scale": Rule(_D + "A_log"),
    "delta.dt_bias.bias": Rule(_D + "dt_bias"),
    "delta.norm.scale": Rule(_D + "norm.weight"),
    "delta.o.kernel": Rule(_D + "out_proj.weight", in_axes=2),
}
"""What both families' delta rules share."""

_GROUPED = {
    **{f"delta.{name}.kernel": Rule(_D + "in_proj_qkvz.weight", in_axes=1, rows=_part(_qkvz_of_key_head, i)) for i, name in enumerate("qkvz")},
    **{
        f"delta.{name}.kernel": Rule(_D + "in_proj_ba.weight", in_axes=1, rows=_part(_pair_of_key_head, i))
        for i, name in enumerate(("beta", "decay"))
    },
}
_PLAIN = {
    **{f"delta.{name}.kernel": Rule(_D + "in_proj_qkv.weight", in_axes=1, rows=_part(_qkv, i)) for i, name in enumerate("qkv")},
    "delta.z.kernel": Rule(_D + "in_proj_z.weight", in_axes=1),
    "delta.beta.kernel": Rule(_D + "in_proj_b.weight", in_axes=1),
    "delta.decay.kernel": Rule(_D + "in_proj_a.weight", in_axes=1),
}

_LAYER = {**GATED, **MLP, **SHARED, **DELTA}
_NEXT, _V3_5 = {**_LAYER, **_GROUPED}, {**_LAYER, **_PLAIN}
_HEAD = r"mtp\..+"
_NESTED = (("model.", "model.language_model."),)

NEXT_LAYOUTS = (
    Layout("qwen3_next", TOP, _NEXT, EXPERTS, (*IGNORED, _HEAD)),
    Layout("qwen3_next-fused", TOP, _NEXT, FUSED_EXPERTS, (*IGNORED, _HEAD)),
)
"""The released form first, then transformers 5's own; the head of multi-token prediction is passed over."""

_V3_5_IGNORED = (*IGNORED, _HEAD, r"model\.visual\..+")

V3_5_LAYOUTS = (
    Layout("qwen3_5_moe", TOP, _V3_5, FUSED_EXPERTS, _V3_5_IGNORED, prefixes=_NESTED),
    Layout("qwen3_5_moe-experts", TOP, _V3_5, EXPERTS, _V3_5_IGNORED, prefixes=_NESTED),
    Layout("qwen3_5_moe-text", TOP, _V3_5, FUSED_EXPERTS, _V3_5_IGNORED),
)
"""The released form first, then that of releases in fp8, then transformers 5's own of the text model alone; the part that sees pictures and the head
of multi-token prediction are passed over."""
