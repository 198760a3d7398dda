"""Reads Hugging Face config.json files into `ModelSpec`s.

A family (`jaxmoe.spec.families`) says which fields its graph depends on, which it may carry without effect, and how a checked config becomes layers.
A field that is in neither list raises: a field nobody has looked at may change the graph. Fields that change the graph are never defaulted from a
configuration class (the released values differ from the class defaults in several families), except where a missing key is what released
checkpoints have.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmoe.spec.families import FAMILIES
from jaxmoe.spec.families.common import ROPE, Family, only, positive
from jaxmoe.spec.types import LayerSpec, ModelSpec, SpecError, segments_of

_NO_EFFECT = frozenset(
    """_name_or_path architectures attn_implementation _attn_implementation attention_dropout auto_map bos_token_id chunk_size_feed_forward
    dtype eos_token_id experts_implementation id2label initializer_range is_decoder is_encoder_decoder label2id model_type output_attentions
    output_hidden_states output_router_logits pad_token_id problem_type quantization_config return_dict router_aux_loss_coef
    router_jitter_noise sep_token_id torch_dtype transformers_version use_cache unk_token_id max_window_layers cross_attention_hidden_size
    add_cross_attention tie_encoder_decoder layer_types use_bidirectional_attention pretraining_tp finetuning_task task_specific_params
    tokenizer_class prefix decoder_start_token_id torchscript use_bfloat16 pruned_heads bad_words_ids""".split()
)
"""Fields that no family's graph depends on, unless it lists them. `quantization_config` and `layer_types` are checked by `_common_checks`."""


PREGATED = "jaxmoe_pregated"
"""Of any family: true where the routers were trained to choose a layer ahead (`RouterSpec.pregated`)."""


def from_hf(config: dict) -> ModelSpec:
    """The spec of a config.json given as a dict.

    Raises:
        SpecError: unknown `model_type`, a missing or unknown field, or a value that isn't supported; the message names it.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise SpecError(f"config.json: unknown model_type {kind!r}; supported: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind]
    if family.nested is not None:
        config = _text_config(config, family.nested)
    for field in family.required:
        if config.get(field) is None:
            raise SpecError(f"config.json: {kind} needs the field {field!r}, which is missing or null")
    known = _NO_EFFECT | {*family.required, *family.optional, *family.no_effect, *ROPE, "hidden_act", PREGATED}
    for field in config:
        if field not in known:
            raise SpecError(f"config.json: field {field!r} = {config[field]!r} of {kind} is not known here, and may change the model")
    _common_checks(config, family)
    layers = segments_of(_pregated(config, family.layers(config)))
    given: dict[str, Any] = {
        "norm_eps": float(config.get("rms_norm_eps") or 0.0),
        "max_positions": config.get("max_position_embeddings"),
        "tied": bool(config.get("tie_word_embeddings", False)),
    }
    return ModelSpec(kind, positive(config, "vocab_size"), positive(config, "hidden_size"), layers, **(given | family.model(config)))


def _pregated(config: dict, layers: list[LayerSpec]) -> list[LayerSpec]:
    only(config, PREGATED, True, False, None)
    if not config.get(PREGATED):
        return layers
    return [
        layer if layer.router is None else dataclasses.replace(layer, router=dataclasses.replace(layer.router, pregated=True)) for layer in layers
    ]


def _text_config(config: dict, field: str) -> dict:
    """The text model's part of a config of several modalities, in which what the whole says of its weights counts; the config itself where it has no
    parts."""
    inner = config.get(field)
    if inner is None:
        return config
    if not isinstance(inner, dict):
        raise SpecError(f"config.json: {field} = {inner!r} must be an object")
    outer = {key: config[key] for key in ("quantization_config", "tie_word_embeddings", PREGATED) if key in config}
    return {"model_type": config["model_type"]} | inner | outer


_COUNTS = """vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    num_experts_per_tok num_experts num_local_experts n_routed_experts max_position_embeddings sliding_window""".split()
_MOST_LAYERS = 10_000  # a damaged number shouldn't be worked on for hours


def _common_checks(config: dict, family: Family) -> None:
    unused = {"sliding_window"} if config.get("use_sliding_window") is False else set()  # some configs then say 0
    for field in _COUNTS:
        if config.get(field) is not None and field not in unused:
            positive(config, field)
    if (config.get("num_hidden_layers") or 0) > _MOST_LAYERS:
        raise SpecError(f"config.json: num_hidden_layers = {config['num_hidden_layers']}, no model has more than {_MOST_LAYERS}")
    _check_format(config, family)
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise SpecError(f"config.json: hidden_act = {act!r} is not supported (silu is)")
    if "layer_types" not in (*family.required, *family.optional):
        for kind in config.get("layer_types") or ():
            if kind != "full_attention":
                raise SpecError(f"config.json: layer_types holds {kind!r}, which is not supported for {config['model_type']}")


def _check_format(config: dict, family: Family) -> None:
    """Quantized weights can be read in the family's formats; which of them a tensor is in shows in the files."""
    given = config.get("quantization_config")
    if given is None:
        return
    method = given.get("quant_method") if isinstance(given, dict) else given
    if method not in family.formats:
        raise SpecError(f"config.json: quantization_config.quant_method = {method!r} is not supported ({', '.join(family.formats) or 'none'} is)")
    block = given.get("weight_block_size")
    if method == "fp8" and (not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block)):
        raise SpecError(f"config.json: quantization_config.weight_block_size = {block!r} must be two positive integers")
    if method == "fp8" and given.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise SpecError(f"config.json: quantization_config.fmt = {given['fmt']!r} is not supported (e4m3 is)")
