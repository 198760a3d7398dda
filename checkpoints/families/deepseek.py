"""DeepSeek-V2 and V3, Kimi-K2 and GLM-4.7-Flash: latent attention whose up-projections share a tensor, shared experts, V3's bias for selection and
its head of multi-token prediction (transformers, models/deepseek_v2 and models/deepseek_v3; the head as the released checkpoints name it)."""

from __future__ import annotations

from checkpoints.families.common import ATTENTION, EXPERTS, FUSED_EXPERTS, IGNORED, MLP, TOP, Layout, Rule
from jaxmoe.spec import LatentSpec, LayerSpec

_L = "model.layers.{layer}."
_A = _L + "self_attn."


def _latent(layer: LayerSpec) -> LatentSpec:
    assert layer.attention is not None and layer.attention.latent is not None
    return layer.attention.latent


def _down(layer: LayerSpec) -> tuple[int, int]:
    assert layer.attention is not None and layer.attention.rope is not None
    return _latent(layer).kv_rank, layer.attention.rope.width


def _kv(layer: LayerSpec) -> tuple[int, int, int]:
    rank, turned = _down(layer)
    return 0, rank, rank + turned


def _k_rope(layer: LayerSpec) -> tuple[int, int, int]:
    rank, turned = _down(layer)
    return rank, rank + turned, rank + turned


def _k_up(layer: LayerSpec) -> tuple[int, int, int]:
    m = _latent(layer)
    return 0, m.plain, m.plain + m.value


def _v_up(layer: LayerSpec) -> tuple[int, int, int]:
    m = _latent(layer)
    return m.plain, m.plain + m.value, m.plain + m.value


LATENT = {
    "norm_attn.scale": ATTENTION["norm_attn.scale"],
    "norm_mlp.scale": ATTENTION["norm_mlp.scale"],
    "attn.q.kernel": Rule(_A + "q_proj.weight", in_axes=1),
    "attn.q_down.kernel": Rule(_A + "q_a_proj.weight", in_axes=1),
    "attn.q_down.bias": Rule(_A + "q_a_proj.bias"),
    "attn.q_norm.scale": Rule(_A + "q_a_layernorm.weight"),
    "attn.q_up.kernel": Rule(_A + "q_b_proj.weight", in_axes=1),
    "attn.kv_down.kernel": Rule(_A + "kv_a_proj_with_mqa.weight", in_axes=1, rows=_kv),
    "attn.kv_down.bias": Rule(_A + "kv_a_proj_with_mqa.bias", rows=_kv),
    "attn.k_rope.kernel": Rule(_A + "kv_a_proj_with_mqa.weight", in_axes=1, rows=_k_rope),
    "attn.k_rope.bias": Rule(_A + "kv_a_proj_with_mqa.bias", rows=_k_rope),
    "attn.kv_norm.scale": Rule(_A + "kv_a_layernorm.weight"),
    "attn.k_up.kernel": Rule(_A + "kv_b_proj.weight", matrix=2, rows=_k_up),
    "attn.v_up.kernel": Rule(_A + "kv_b_proj.weight", matrix=2, rows=_v_up),
    "attn.o.kernel": ATTENTION["attn.o.kernel"],
    "attn.o.bias": ATTENTION["attn.o.bias"],
}
"""Latent attention."""

SHARED = {
    "shared.gate.kernel": Rule(_L + "mlp.shared_experts.gate_proj.weight", in_axes=1),
    "shared.up.kernel": Rule(_L + "mlp.shared_experts.up_proj.weight", in_axes=1),
    "shared.down.kernel": Rule(_L + "mlp.shared_experts.down_proj.weight", in_axes=1),
}
"""Experts that see every token, as one network."""

SELECT_BIAS = {"router.select_bias": Rule(_L + "mlp.gate.e_score_correction_bias")}

EXTRA = {
    "embed_norm.scale": Rule(_L + "enorm.weight"),
    "hidden_norm.scale": Rule(_L + "hnorm.weight"),
    "join.kernel": Rule(_L + "eh_proj.weight", in_axes=2),
    "norm.scale": Rule(_L + "shared_head.norm.weight"),
}
"""A head of multi-token prediction, a layer after the last."""

SHARED_WITH_HEAD = (r"model\.layers\.\d+\.embed_tokens\.weight", r"model\.layers\.\d+\.shared_head\.head\.weight")
"""Copies of the model's own embedding and output matrix, which released heads come with."""

_LAYER = {**LATENT, **MLP, **SHARED, **SELECT_BIAS}
_IGNORED = (*IGNORED, *SHARED_WITH_HEAD)


def _layouts(name: str) -> tuple[Layout, Layout]:
    """The released form first, then transformers 5's own."""
    return Layout(name, TOP, _LAYER, EXPERTS, _IGNORED, EXTRA), Layout(f"{name}-fused", TOP, _LAYER, FUSED_EXPERTS, _IGNORED, EXTRA)


V3_LAYOUTS = _layouts("deepseek_v3")
V2_LAYOUTS = _layouts("deepseek_v2")
KIMI_LAYOUTS = _layouts("kimi_k2")
GLM_LITE_LAYOUTS = _layouts("glm4_moe_lite")
