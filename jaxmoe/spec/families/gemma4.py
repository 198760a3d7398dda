"""Gemma 4's mixture of experts: a dense network beside the experts, norms before and after everything, windows, and in between wider heads whose
values are their keys (transformers, models/gemma4)."""

from __future__ import annotations

import dataclasses
import math

from jaxmoe.spec.families.common import FULL, SHAPE, SLIDING, Family, attention, biases, layer_kinds, only, positive, router
from jaxmoe.spec.types import AttentionSpec, ExpertSpec, LayerSpec, SpecError


def _kinds(config: dict) -> list[str]:
    kinds = layer_kinds(config, "layer_types", (FULL, SLIDING), lambda i: FULL)
    if kinds[-1] != FULL:
        raise SpecError(f"config.json: layer_types ends with {kinds[-1]!r}, but the last layer is always of {FULL!r}")
    return kinds


def _full_sizes(config: dict, kinds: list[str]) -> dict[str, int]:
    """`head_dim` and `num_key_value_heads` of layers without a window: in fields of their own, or, where transformers saved the config, by layer."""
    if config.get("per_layer_config") is None:
        sizes = {"head_dim": positive(config, "global_head_dim")}
        if config["attention_k_eq_v"] and config.get("num_global_key_value_heads") is not None:
            sizes["num_key_value_heads"] = positive(config, "num_global_key_value_heads")
        return sizes
    given = config["per_layer_config"]
    for field in ("global_head_dim", "num_global_key_value_heads"):
        if config.get(field) is not None:
            raise SpecError(f"config.json: {field} = {config[field]!r} and per_layer_config = {given!r} can't both be given")
    if not isinstance(given, dict) or not all(isinstance(own, dict) for own in given.values()):
        raise SpecError(f"config.json: per_layer_config = {given!r} must be an object of objects")
    full = [str(i) for i, kind in enumerate(kinds) if kind == FULL]
    sizes = next(iter(given.values()), {})
    layers = sorted(key.lstrip("0") or "0" for key in given)  # transformers pads them: '05'
    same = all(own == sizes for own in given.values()) and set(sizes) <= {"head_dim", "num_key_value_heads"}
    if given and (layers != sorted(full) or not same):
        raise SpecError(f"config.json: per_layer_config = {given!r} must give head_dim or num_key_value_heads, the same for each layer of {FULL!r}")
    return {field: positive(sizes, field) for field in sizes}


def _rope(config: dict, kind: str) -> dict:
    """The rope's fields for a kind of layer."""
    all_given = config["rope_parameters"]
    if not isinstance(all_given, dict) or not set(all_given) <= {FULL, SLIDING}:
        raise SpecError(f"config.json: rope_parameters = {all_given!r} must have an object for {FULL!r} and one for {SLIDING!r}")
    given = all_given.get(kind)
    if not isinstance(given, dict) or type(given.get("rope_theta")) not in (int, float):
        raise SpecError(f"config.json: rope_parameters.{kind} = {given!r} must be an object with a number rope_theta")
    form, part = given.get("rope_type"), given.get("partial_rotary_factor")
    if form not in ("default", "proportional"):
        raise SpecError(f"config.json: rope type {form!r} of {kind!r} is not supported ('default' and 'proportional' are)")
    if form == "default" and part not in (None, 1.0):
        raise SpecError(f"config.json: partial_rotary_factor = {part!r} does not go with the rope type 'default', in which every channel turns")
    return given


def _attentions(config: dict) -> dict[str, AttentionSpec]:
    """By kind of layer."""
    kinds = _kinds(config)
    sizes, out = {FULL: _full_sizes(config, kinds)}, {}
    for kind in set(kinds):
        own = {**config, **sizes.get(kind, {}), "rope_parameters": _rope(config, kind)}
        out[kind] = attention(own, qk_norm="head", v_norm=True, scale=1.0, **biases(config))
    if SLIDING in out:
        out[SLIDING] = dataclasses.replace(out[SLIDING], window=positive(config, "sliding_window"))
    if config["attention_k_eq_v"]:
        out[FULL] = dataclasses.replace(out[FULL], values="keys")
    return out


def _layers(config: dict) -> list[LayerSpec]:
    for field, values in _ONLY.items():
        only(config, field, *values)
    kinds, attend = _kinds(config), _attentions(config)
    route = router(
        config, positive(config, "num_experts"), "top_k_experts", input_norm=True, normalize=True, expert_scale=True, weights_dtype="float32"
    )
    experts, dense = (ExpertSpec(positive(config, field), "gelu") for field in ("moe_intermediate_size", "intermediate_size"))
    layer = LayerSpec(None, route, experts, dense, post_norms=True, layer_scale=True)
    return [dataclasses.replace(layer, attention=attend[kind]) for kind in kinds]


def _model(config: dict) -> dict:
    cap, tied = config.get("final_logit_softcapping"), config.get("tie_word_embeddings")
    if cap is not None and (type(cap) not in (int, float) or cap <= 0):
        raise SpecError(f"config.json: final_logit_softcapping = {cap!r} must be a number above 0")
    return {
        "norm_wide": True,
        "tied": True if tied is None else bool(tied),  # every released one is
        "embed_scale": math.sqrt(config["hidden_size"]),
        "logit_cap": None if cap is None else float(cap),
    }


_ONLY: dict[str, tuple] = {
    "attention_k_eq_v": (True, False),
    "enable_moe_block": (True,),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "hidden_size_per_layer_input": (0,),
    "num_kv_shared_layers": (0, None),
    "rope_scaling": (None,),
    "rope_theta": (None,),
    "use_bidirectional_attention": ("vision", None),
    "use_double_wide_mlp": (False, None),
}
"""The only values that are supported: the dense models' embeddings by layer, keys and values that layers share, and text that sees what follows it
aren't. Parts of an image see each other ('vision'); text never does."""

TEXT = Family(
    (
        *(field for field in SHAPE if field != "num_experts_per_tok"),
        "num_key_value_heads", "head_dim", "sliding_window", "layer_types", "rope_parameters", "hidden_activation", "attention_k_eq_v",
        "enable_moe_block", "num_experts", "top_k_experts", "moe_intermediate_size", "hidden_size_per_layer_input",
    ),
    (
        "global_head_dim", "num_global_key_value_heads", "per_layer_config", "attention_bias", "final_logit_softcapping", "tie_word_embeddings",
        "num_kv_shared_layers", "use_double_wide_mlp", "use_bidirectional_attention",
    ),
    _layers,
    models="Gemma-4-26B-A4B, its text model alone",
    model=_model,
    no_effect=("vocab_size_per_layer_input",),
    formats=(),
)  # fmt: skip

WHOLE = dataclasses.replace(TEXT, nested="text_config", models="Gemma-4-26B-A4B")
