"""Llama 4: layers that turn and see a chunk, layers without positions that see everything, one expert a token beside a shared one (transformers,
models/llama4). Alone ('llama4_text'), or as the text model of a checkpoint that also sees images ('llama4')."""

from __future__ import annotations

from dataclasses import replace

from jaxmoe.spec.families.common import FULL, SHAPE, Family, attention, biases, layer_indices, layer_kinds, only, positive, router, whole_rope
from jaxmoe.spec.types import AttentionSpec, ExpertSpec, LayerSpec, SpecError, Temperature

_CHUNKED = "chunked_attention"


def _turning(config: dict) -> list[bool]:
    """Which layers have positions: 1 in `no_rope_layers` (which says the opposite of its name), or all but each `no_rope_layer_interval`-th."""
    layers, given = positive(config, "num_hidden_layers"), config.get("no_rope_layers")
    if not given:
        every = 4 if config.get("no_rope_layer_interval") is None else positive(config, "no_rope_layer_interval")
        return [(i + 1) % every != 0 for i in range(layers)]
    if not isinstance(given, list | tuple) or len(given) != layers or any(value not in (0, 1) for value in given):
        raise SpecError(f"config.json: no_rope_layers = {given!r} must hold 0 or 1 for each of {layers} layers (num_hidden_layers)")
    return [bool(value) for value in given]


def _sparse(config: dict) -> set[int]:
    """Which layers have experts: those of `moe_layers`, or each `interleave_moe_layer_step`-th."""
    layers = positive(config, "num_hidden_layers")
    if config.get("moe_layers") is not None:
        field, found = "moe_layers", layer_indices(config, "moe_layers")
    else:
        field, step = "interleave_moe_layer_step", positive(config, "interleave_moe_layer_step")
        found = set(range(step - 1, layers, step))
    if not found:
        raise SpecError(f"config.json: {field} = {config[field]!r} leaves none of {layers} layers with experts")
    return found


def _temperature(config: dict) -> Temperature | None:
    """Of layers without positions. The first released configs lack all three fields, those after them have a 4 that means true."""
    tuned = config.get("attn_temperature_tuning", True)
    if not isinstance(tuned, int) or tuned < 0:
        raise SpecError(f"config.json: attn_temperature_tuning = {tuned!r} must be true, false or an integer of at least 0")
    scale = config.get("attn_scale", 0.1)
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise SpecError(f"config.json: attn_scale = {scale!r} must be a number")
    every = 8192 if config.get("floor_scale") is None else positive(config, "floor_scale")
    return Temperature(float(every), float(scale)) if tuned else None


def _attentions(config: dict) -> list[AttentionSpec]:
    plain = attention(config, rope=None, temperature=_temperature(config), **biases(config))
    turning_by = whole_rope(config, positive(config, "head_dim"), 500000.0, "interleaved", wide=True)
    turned = replace(plain, rope=turning_by, qk_norm="after_rope" if config["use_qk_norm"] else None, temperature=None)
    turning = _turning(config)
    kinds = layer_kinds(config, "layer_types", (_CHUNKED, FULL), lambda i: _CHUNKED if turning[i] else FULL)
    chunk = positive(config, "attention_chunk_size") if _CHUNKED in kinds else None
    own = [turned if turns else plain for turns in turning]
    return [replace(a, chunk=chunk) if kind == _CHUNKED else a for a, kind in zip(own, kinds, strict=True)]


def _layers(config: dict) -> list[LayerSpec]:
    """The one expert that a token has sees its input times the router's weight; of several, transformers would add up what each makes of its share,
    and no checkpoint has several."""
    only(config, "num_experts_per_tok", 1)
    only(config, "num_experts", config["num_local_experts"], None)
    chosen = router(config, positive(config, "num_local_experts"), score="none", weight_from="sigmoid_selected_logits", apply="input")
    expert = ExpertSpec(positive(config, "intermediate_size"))
    dense = ExpertSpec(positive(config, "intermediate_size_mlp"))
    sparse = _sparse(config)
    return [
        LayerSpec(a, chosen, expert, shared=expert) if i in sparse else LayerSpec(a, dense=dense) for i, a in enumerate(_attentions(config))
    ]


TEXT = Family(
    (*SHAPE, "num_key_value_heads", "head_dim", "intermediate_size_mlp", "num_local_experts", "use_qk_norm"),
    (
        "attention_bias", "attention_chunk_size", "attn_scale", "attn_temperature_tuning", "floor_scale", "interleave_moe_layer_step", "layer_types",
        "moe_layers", "no_rope_layer_interval", "no_rope_layers", "num_experts", "tie_word_embeddings",
    ),
    _layers,
    no_effect=("_attn_implementation_autoset", "cache_implementation", "for_llm_compressor"),
    models="Llama-4-Scout-17B-16E, its text model alone",
    formats=(),
)  # fmt: skip

WHOLE = replace(TEXT, nested="text_config", models="Llama-4-Scout-17B-16E, Llama-4-Maverick-17B-128E")
