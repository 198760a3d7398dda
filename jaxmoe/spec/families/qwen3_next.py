"""Qwen3-Next and Qwen3.5-MoE: gated delta rules with gated attention in between, norms that add one to their scale, an expert that sees every token
behind a gate (transformers, models/qwen3_next and models/qwen3_5_moe)."""

from __future__ import annotations

import dataclasses

from jaxmoe.spec.families.common import FULL, SHAPE, Family, attention, biases, layer_kinds, only, positive, rope, rope_fields, rotary_part
from jaxmoe.spec.families.qwen2_moe import sparse
from jaxmoe.spec.families.qwen3_moe import sparse_steps
from jaxmoe.spec.types import AttentionSpec, DeltaSpec, LayerSpec, RopeSpec, SpecError

_LINEAR = "linear_attention"
_AXES = ("mrope_section", "mrope_interleaved")
"""How frequencies are dealt out to the axes of pictures; a text's positions are the same along all of them."""


def _rope(config: dict) -> RopeSpec:
    rotary_part(config, needed=True)
    given = {field: value for field, value in rope_fields(config).items() if field not in _AXES}
    return rope({**config, "rope_scaling": None, "rope_parameters": given}, positive(config, "head_dim"), 10000.0)


def _attention(config: dict) -> AttentionSpec:
    return attention(config, rope=_rope(config), qk_norm="head", gate=True, **biases(config))


def _delta(config: dict) -> DeltaSpec:
    k_heads, v_heads = positive(config, "linear_num_key_heads"), positive(config, "linear_num_value_heads")
    if v_heads % k_heads:
        raise SpecError(f"config.json: linear_num_value_heads = {v_heads} is not a multiple of linear_num_key_heads = {k_heads}")
    sizes = (positive(config, field) for field in ("linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim"))
    return DeltaSpec(k_heads, v_heads, *sizes)


def _kinds(config: dict) -> list[str]:
    """As named, or attention in every `full_attention_interval`-th layer; both must agree."""
    if config.get("full_attention_interval") is None:
        if config.get("layer_types") is None:
            raise SpecError(f"config.json: {config['model_type']} needs the field 'layer_types' or 'full_attention_interval'")
        return layer_kinds(config, "layer_types", (FULL, _LINEAR), lambda i: FULL)
    every = positive(config, "full_attention_interval")
    by_interval = [_LINEAR if (i + 1) % every else FULL for i in range(positive(config, "num_hidden_layers"))]
    kinds = layer_kinds(config, "layer_types", (FULL, _LINEAR), by_interval.__getitem__)
    if kinds != by_interval:
        raise SpecError(f"config.json: full_attention_interval = {every} is not what layer_types says: {kinds!r}")
    return kinds


def _layers(config: dict, normalize: bool) -> dict[str, LayerSpec]:
    """A sparse layer of each kind."""
    return {
        FULL: sparse(config, normalize, attention=_attention(config)),
        _LINEAR: sparse(config, normalize, delta=_delta(config)),
    }


def _next_layers(config: dict) -> list[LayerSpec]:
    only(config, "use_sliding_window", False, None)
    made = {kind: sparse_steps(config, layer) for kind, layer in _layers(config, bool(config["norm_topk_prob"])).items()}
    return [made[kind][i] for i, kind in enumerate(_kinds(config))]


def _v3_5_layers(config: dict) -> list[LayerSpec]:
    only(config, "attn_output_gate", True)
    only(config, "output_gate_type", "swish", "silu")
    only(config, "mamba_ssm_dtype", "float32")
    only(config, "norm_topk_prob", True)
    only(config, "mlp_only_layers", [], None)
    only(config, "decoder_sparse_step", 1)
    made = _layers(config, True)
    return [made[kind] for kind in _kinds(config)]


def _norms(config: dict) -> dict:
    return {"norm_offset": 1.0, "norm_wide": True}


_REQUIRED = (
    "moe_intermediate_size", "shared_expert_intermediate_size", "num_experts", "num_key_value_heads", "head_dim", "linear_num_key_heads",
    "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim",
)  # fmt: skip
_OPTIONAL = (
    "attention_bias", "tie_word_embeddings", "partial_rotary_factor", "full_attention_interval", "layer_types", "decoder_sparse_step",
    "mlp_only_layers",
)  # fmt: skip

NEXT = Family(
    (*SHAPE, *_REQUIRED, "norm_topk_prob"),
    (*_OPTIONAL, "use_sliding_window"),
    _next_layers,
    _norms,
    models="Qwen3-Next-80B-A3B",
)

V3_5_TEXT = Family(
    (*(field for field in SHAPE if field != "intermediate_size"), *_REQUIRED),
    (*_OPTIONAL, "attn_output_gate", "output_gate_type", "mamba_ssm_dtype", "norm_topk_prob"),
    _v3_5_layers,
    _norms,
    models="Qwen3.5-35B-A3B, 122B-A10B, 397B-A17B",
    no_effect=("intermediate_size", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"),
)

V3_5 = dataclasses.replace(V3_5_TEXT, nested="text_config")
