"""Phi-3.5-MoE: sparsemixer, norms with a mean and a bias, positions that are stretched by one of two lists (transformers, models/phimoe)."""

from __future__ import annotations

from jaxmoe.spec.families.common import SHAPE, Family, attention, biases, only, positive, rope_fields, router
from jaxmoe.spec.types import ExpertSpec, LayerSpec, SpecError


def _check_rope(config: dict) -> None:
    given = rope_fields(config)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "longrope"):
        raise SpecError(f"config.json: rope type {kind!r} of phimoe is not supported (default or longrope is)")
    if kind == "default":
        return
    for field in ("short_mscale", "long_mscale"):
        if type(given.get(field)) not in (int, float):
            raise SpecError(f"config.json: rope_parameters.{field} = {given.get(field)!r} must be a number")
    inner, outer = given.get("original_max_position_embeddings"), config.get("original_max_position_embeddings")
    if None not in (inner, outer) and inner != outer:
        raise SpecError(f"config.json: original_max_position_embeddings = {outer!r}, but {inner!r} within the rope's fields")


def _layers(config: dict) -> list[LayerSpec]:
    _check_rope(config)
    only(config, "num_experts_per_tok", 2)
    attend = attention(config, 1e6, window=config.get("sliding_window"), **biases(config))
    scaling = attend.rope.scaling if attend.rope else None
    for name in ("short", "long"):
        if scaling is not None and attend.rope is not None and len(getattr(scaling, name)) != attend.rope.width // 2:
            found = len(getattr(scaling, name))
            raise SpecError(f"config.json: rope_parameters.{name}_factor lists {found} factors for {attend.rope.width // 2} frequencies")
    jitter = config["router_jitter_noise"]
    if type(jitter) not in (int, float) or jitter < 0:
        raise SpecError(f"config.json: router_jitter_noise = {jitter!r} must be a number of at least 0")
    # Noise by its name, but inference takes it too: as the distance from the largest logit within which another one takes part.
    route = router(config, positive(config, "num_local_experts"), score="none", select="sparsemixer", weight_from="sparsemixer", jitter=float(jitter))
    return [LayerSpec(attend, route, ExpertSpec(positive(config, "intermediate_size")))] * positive(config, "num_hidden_layers")


def _model(config: dict) -> dict:
    bias = bool(config["lm_head_bias"])
    if bias and config.get("tie_word_embeddings"):
        raise SpecError("config.json: lm_head_bias = True is not supported with tie_word_embeddings = True")
    return {"norm": "layer", "head_bias": bias}


FAMILY = Family(
    (*SHAPE, "num_local_experts", "router_jitter_noise", "attention_bias", "lm_head_bias"),
    ("num_key_value_heads", "head_dim", "sliding_window", "original_max_position_embeddings", "tie_word_embeddings"),
    _layers,
    _model,
    no_effect=("input_jitter_noise", "hidden_dropout"),
    models="Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE",
)
