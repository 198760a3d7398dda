"""Reads Hugging Face config.json files into `ModelSpec`s.

A family is an entry of `FAMILIES`: the fields that its graph depends on, those it may carry without effect, and a short function from a checked
config to layers. A field that is in neither list raises: a field nobody has looked at may change the graph. Fields that change the graph are never
defaulted from a configuration class (the released values differ from the class defaults in several families), except where a missing key is
what released checkpoints have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxmoe.spec.types import (
    AttentionSpec,
    ExpertSpec,
    LayerSpec,
    ModelSpec,
    RopeSpec,
    RouterSpec,
    SpecError,
    segments_of,
)

_NO_EFFECT = frozenset(
    """_name_or_path architectures attn_implementation _attn_implementation attention_dropout auto_map bos_token_id chunk_size_feed_forward
    dtype eos_token_id experts_implementation id2label initializer_range is_decoder is_encoder_decoder label2id model_type output_attentions
    output_hidden_states output_router_logits pad_token_id problem_type quantization_config return_dict router_aux_loss_coef
    router_jitter_noise sep_token_id torch_dtype transformers_version use_cache unk_token_id max_window_layers cross_attention_hidden_size
    add_cross_attention tie_encoder_decoder layer_types use_bidirectional_attention pretraining_tp finetuning_task task_specific_params
    tokenizer_class prefix decoder_start_token_id torchscript use_bfloat16 pruned_heads bad_words_ids""".split()
)
"""Fields that no family's graph depends on. `quantization_config` and `layer_types` are checked by `_common_checks`."""


@dataclasses.dataclass(frozen=True)
class Family:
    """How one `model_type` is read: required fields, optional fields that change the graph, and the function that makes its layers."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    layers: Callable[[dict], list[LayerSpec]]


def from_hf(config: dict) -> ModelSpec:
    """The spec of a config.json given as a dict.

    Raises:
        SpecError: unknown `model_type`, a missing or unknown field, or a value that isn't supported; the message names it.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise SpecError(f"config.json: unknown model_type {kind!r}; supported: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind]
    for field in family.required:
        if config.get(field) is None:
            raise SpecError(f"config.json: {kind} needs the field {field!r}, which is missing or null")
    known = _NO_EFFECT | set(family.required) | set(family.optional) | {"rope_parameters", "rope_theta", "rope_scaling", "hidden_act"}
    for field in config:
        if field not in known:
            raise SpecError(f"config.json: field {field!r} = {config[field]!r} of {kind} is not known here, and may change the model")
    _common_checks(config)
    return ModelSpec(
        family=kind,
        vocab=_positive(config, "vocab_size"),
        width=_positive(config, "hidden_size"),
        segments=segments_of(family.layers(config)),
        norm_eps=float(config["rms_norm_eps"]),
        max_positions=_positive(config, "max_position_embeddings"),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


_COUNTS = """vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    num_experts_per_tok max_position_embeddings""".split()


def _common_checks(config: dict) -> None:
    for field in _COUNTS:
        if config.get(field) is not None:
            _positive(config, field)
    if config.get("quantization_config") is not None:
        raise SpecError(f"config.json: quantization_config = {config['quantization_config']!r} is not supported")
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise SpecError(f"config.json: hidden_act = {act!r} is not supported (silu is)")
    for kind in config.get("layer_types") or ():
        if kind != "full_attention":
            raise SpecError(f"config.json: layer_types holds {kind!r}, which is not supported for {config['model_type']}")


def _positive(config: dict, field: str) -> int:
    value = config[field]
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise SpecError(f"config.json: {field} = {value!r} must be a positive integer")
    return value


def _rope(config: dict, width: int, default_theta: float) -> RopeSpec:
    """Both spellings occur: `rope_parameters` (one dict), or `rope_theta` with `rope_scaling`."""
    parameters: dict[str, Any] = dict(config.get("rope_parameters") or {})
    scaling = config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", scaling.get("rope_type", scaling.get("type", "default")))
    if kind != "default":
        raise SpecError(f"config.json: rope type {kind!r} is not supported (default is)")
    extra = set(parameters) - {"rope_theta", "rope_type", "type"}
    if extra:
        field = sorted(extra)[0]
        raise SpecError(f"config.json: rope_parameters.{field} = {parameters[field]!r} is not supported")
    theta = parameters.get("rope_theta", config.get("rope_theta"))
    return RopeSpec(theta=float(default_theta if theta is None else theta), width=width)


def _attention(config: dict, theta: float, **kwargs) -> AttentionSpec:
    heads = _positive(config, "num_attention_heads")
    width = config["hidden_size"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise SpecError(f"config.json: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}")
    head_dim = config.get("head_dim") or width // heads
    return AttentionSpec(heads, kv_heads, head_dim, rope=_rope(config, head_dim, theta), **kwargs)


def _router(config: dict, experts: int, **kwargs) -> RouterSpec:
    active = _positive(config, "num_experts_per_tok")
    if active > experts:
        raise SpecError(f"config.json: num_experts_per_tok = {active} is more than the {experts} experts")
    return RouterSpec(experts, active, **kwargs)


def _mixtral(config: dict) -> list[LayerSpec]:
    attention = _attention(config, 1e6, window=config.get("sliding_window"))
    router = _router(config, _positive(config, "num_local_experts"), normalize=True, weights_dtype="float32")
    return [LayerSpec(attention, router, ExpertSpec(config["intermediate_size"]))] * config["num_hidden_layers"]


def _olmoe(config: dict) -> list[LayerSpec]:
    bias = bool(config.get("attention_bias", False))
    attention = _attention(
        config, 10000.0, qk_norm="full", qkv_bias=bias, out_bias=bias, clip=config.get("clip_qkv")
    )
    router = _router(config, _positive(config, "num_experts"), normalize=bool(config["norm_topk_prob"]))
    return [LayerSpec(attention, router, ExpertSpec(config["intermediate_size"]))] * config["num_hidden_layers"]


def _qwen3_moe(config: dict) -> list[LayerSpec]:
    bias = bool(config.get("attention_bias", False))
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    attention = _attention(config, 10000.0, qk_norm="head", qkv_bias=bias, out_bias=bias, window=window)
    experts = config.get("num_experts") or config.get("num_local_experts")
    if not experts:
        raise SpecError("config.json: qwen3_moe needs the field 'num_experts', which is missing or null")
    router = _router(config, experts, normalize=bool(config["norm_topk_prob"]))
    sparse = LayerSpec(attention, router, ExpertSpec(config["moe_intermediate_size"]))
    dense = LayerSpec(attention, dense=ExpertSpec(config["intermediate_size"]))
    only = set(config.get("mlp_only_layers") or ())
    step = config.get("decoder_sparse_step", 1)
    return [
        sparse if i not in only and step and (i + 1) % step == 0 else dense for i in range(config["num_hidden_layers"])
    ]


_SHAPE = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_experts_per_tok rms_norm_eps "
    "max_position_embeddings"
)

FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        tuple(f"{_SHAPE} num_local_experts".split()),
        ("num_key_value_heads", "head_dim", "sliding_window", "tie_word_embeddings", "num_experts"),
        _mixtral,
    ),
    "olmoe": Family(
        tuple(f"{_SHAPE} num_experts norm_topk_prob".split()),
        ("num_key_value_heads", "attention_bias", "clip_qkv", "tie_word_embeddings", "num_local_experts", "head_dim"),
        _olmoe,
    ),
    "qwen3_moe": Family(
        tuple(f"{_SHAPE} moe_intermediate_size norm_topk_prob".split()),
        tuple(
            "num_key_value_heads head_dim attention_bias use_sliding_window sliding_window tie_word_embeddings decoder_sparse_step "
            "mlp_only_layers num_experts num_local_experts".split()
        ),
        _qwen3_moe,
    ),
}
"""The `model_type`s that can be read."""
