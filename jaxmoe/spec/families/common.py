"""What reading one family's config.json shares with reading another's: checked fields, rotary positions, attention, the router's sizes.

Functions take the config as a dict and give parts of a spec; they raise `SpecError` and name the field.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

from jaxmoe.spec.types import AttentionSpec, ExpertSpec, LayerSpec, RopeScaling, RopeSpec, RouterSpec, SpecError

SHAPE = tuple(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_experts_per_tok rms_norm_eps max_position_embeddings".split()
)
"""Fields that nearly every family has."""

ROPE = ("rope_parameters", "rope_theta", "rope_scaling")
"""Where rotary positions are described: in one dict, or in two fields."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, as `layer_types` names them."""


@dataclasses.dataclass(frozen=True)
class Family:
    """How one `model_type` is read.

    Attributes:
        required: fields that must be there.
        optional: fields that change the graph and may be missing or null.
        layers: the layers of a checked config.
        models: some that people know.
        model: what else of `ModelSpec` the family sets; by field.
        nested: the field that holds the text model's config, in a checkpoint of several modalities.
        no_effect: fields of this family alone that its graph doesn't depend on.
        formats: what its weights may be quantized in on disk ('fp8', 'mxfp4').
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    layers: Callable[[dict], list[LayerSpec]]
    models: str = dataclasses.field(default="", kw_only=True)
    model: Callable[[dict], dict[str, Any]] = lambda config: {}
    nested: str | None = None
    no_effect: tuple[str, ...] = ()
    formats: tuple[str, ...] = ("fp8",)


def positive(config: dict, field: str) -> int:
    """A field that counts something."""
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise SpecError(f"config.json: {field} = {value!r} must be a positive integer")
    return value


def count(config: dict, field: str, default: int = 0) -> int:
    """A field that counts something and may be zero, null or missing."""
    value = config.get(field)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise SpecError(f"config.json: {field} = {value!r} must be an integer of at least 0")
    return value


def only(config: dict, field: str, *values: Any) -> None:
    """Refuses a field that has another value than these; a missing one is right."""
    if field in config and config[field] not in values:
        supported = " or ".join(map(repr, values))
        raise SpecError(f"config.json: {field} = {config[field]!r} is not supported ({supported} is)")


def layer_indices(config: dict, field: str) -> set[int]:
    """A field that lists layers by index; empty if missing.

    Raises:
        SpecError: no list, or one with an index that there is no layer for.
    """
    layers = positive(config, "num_hidden_layers")
    value = config.get(field) or ()
    if not isinstance(value, list | tuple) or not all(type(i) is int and 0 <= i < layers for i in value):
        raise SpecError(f"config.json: {field} = {value!r} must list layers, from 0 to {layers - 1}")
    return set(value)


def layer_kinds(config: dict, field: str, known: Collection[str], default: Callable[[int], str]) -> list[str]:
    """A field that names each layer's kind; by `default` if missing.

    Raises:
        SpecError: another number of them than there are layers, or an unknown kind.
    """
    layers = positive(config, "num_hidden_layers")
    kinds = config.get(field)
    if kinds is None:
        return [default(i) for i in range(layers)]
    if not isinstance(kinds, list | tuple) or len(kinds) != layers:
        raise SpecError(f"config.json: {field} = {kinds!r} must name the kinds of {layers} layers (num_hidden_layers)")
    for kind in kinds:
        if kind not in known:
            raise SpecError(f"config.json: {field} holds {kind!r}, which is not supported ({', '.join(sorted(known))} are)")
    return list(kinds)


def rope_fields(config: dict) -> dict[str, Any]:
    """What the config says of rotary positions, in either spelling: `rope_parameters`, or `rope_scaling` beside `rope_theta`.

    Raises:
        SpecError: one is no object, or both are there and differ.
    """
    for field in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(field) or {}, dict):
            raise SpecError(f"config.json: {field} = {config[field]!r} must be an object")
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if new and old and new != old:
        raise SpecError(f"config.json: rope_parameters = {new!r} and rope_scaling = {old!r} are to be the same")
    return dict(new or old)


def rotary_part(config: dict, needed: bool = False) -> Any:
    """`partial_rotary_factor`, wherever it stands; None if it is missing or null.

    Raises:
        SpecError: it is `needed` and not there.
    """
    part = rope_fields(config).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if needed and part is None:
        raise SpecError(f"config.json: {config.get('model_type')} needs the field 'partial_rotary_factor', which is missing or null")
    return part


def rope(config: dict, head_dim: int, theta: float, style: str = "half") -> RopeSpec:
    """Rotary positions of heads with `head_dim` channels, of which `partial_rotary_factor` turn.

    Args:
        config: see `rope_fields`.
        head_dim: channels of a head.
        theta: the base, if the config names none.
        style: see `RopeSpec`.
    """
    given = rope_fields(config)
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    base = _number({"rope_theta": given.pop("rope_theta", config.get("rope_theta"))}, "rope_theta", theta)
    part = _number({"partial_rotary_factor": rotary_part(config)}, "partial_rotary_factor", 1.0)
    given.pop("partial_rotary_factor", None)
    if not 0.0 < part <= 1.0:
        raise SpecError(f"config.json: partial_rotary_factor = {part!r} must be above 0 and at most 1")
    width, pairs = int(head_dim * part), None
    scaling = None
    if kind == "proportional":  # the pairs of a whole head, of which only the first turn
        width, pairs = head_dim, int(part * head_dim // 2)
    elif kind != "default":
        if kind not in _SCALINGS:
            known = ", ".join(["default", "proportional", *_SCALINGS])
            raise SpecError(f"config.json: rope type {kind!r} is not supported ({known} are)")
        scaling = _SCALINGS[kind](config, given)
    if given:
        field = sorted(given)[0]
        raise SpecError(f"config.json: rope_parameters.{field} = {given[field]!r} is not known for the rope type {kind!r}")
    if width <= 0 or width % 2:
        raise SpecError(f"config.json: {width} of a head's {head_dim} channels would turn: an even number, above 0, is needed")
    return RopeSpec(base, width, style, pairs, scaling)  # type: ignore[arg-type]


def whole_rope(config: dict, head_dim: int, theta: float, style: str = "half", wide: bool = False) -> RopeSpec:
    """`rope` of heads all of whose channels turn, whatever the config says; it must not say otherwise. `wide`: see `RopeSpec`."""
    turning = rope(config, head_dim, theta, style)
    if turning.width != head_dim:
        raise SpecError(f"config.json: partial_rotary_factor leaves {turning.width} of {head_dim} channels to turn: all do")
    return dataclasses.replace(turning, wide=wide)


def _number(given: dict, field: str, default: float | None = None) -> float:
    value = given.pop(field, None)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise SpecError(f"config.json: rope_parameters.{field} = {value!r} must be a number")
    return float(value)


def _original(config: dict, given: dict) -> int:
    value = given.pop("original_max_position_embeddings", None) or config.get("original_max_position_embeddings")
    return positive({"original_max_position_embeddings": value}, "original_max_position_embeddings")


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """By how much yarn multiplies queries and keys (arXiv:2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _linear(config: dict, given: dict) -> RopeScaling:
    return RopeScaling("linear", _number(given, "factor"))


def _llama3(config: dict, given: dict) -> RopeScaling:
    factor, low, high = (_number(given, field) for field in ("factor", "low_freq_factor", "high_freq_factor"))
    return RopeScaling("llama3", factor, _original(config, given), low, high)


def _yarn(config: dict, given: dict) -> RopeScaling:
    original = _original(config, given)
    factor = _number(given, "factor", config["max_position_embeddings"] / original)
    slow, fast = _number(given, "beta_slow", 1.0) or 1.0, _number(given, "beta_fast", 32.0) or 32.0  # zero is as good as missing
    scale, all_dim = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    magnitude = given.pop("attention_factor", None)
    if magnitude is None:
        both = yarn_magnitude(factor, scale) / yarn_magnitude(factor, all_dim) if scale and all_dim else yarn_magnitude(factor)
        magnitude = both
    truncate = bool(given.pop("truncate", True))
    return RopeScaling("yarn", factor, original, slow, fast, truncate, float(magnitude))


def _longrope(config: dict, given: dict) -> RopeScaling:
    original = _original(config, given)
    factor = _number(given, "factor", config["max_position_embeddings"] / original)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    both = _number(given, "attention_factor", default)
    short, long = _number(given, "short_mscale", both), _number(given, "long_mscale", both)
    factors = {}
    for name in ("short_factor", "long_factor"):
        value = given.pop(name, None)
        if not isinstance(value, list | tuple) or not value:
            raise SpecError(f"config.json: rope_parameters.{name} = {value!r} must list a factor for each frequency")
        factors[name] = tuple(map(float, value))
    return RopeScaling("longrope", factor, original, magnitude=short, long_magnitude=long, short=factors["short_factor"], long=factors["long_factor"])


_SCALINGS: dict[str, Callable[[dict, dict], RopeScaling]] = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}


def heads(config: dict) -> tuple[int, int, int]:
    """H, K and C of grouped-query attention."""
    count = positive(config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or count
    if count % kv_heads:
        raise SpecError(f"config.json: num_attention_heads = {count} is not a multiple of num_key_value_heads = {kv_heads}")
    return count, kv_heads, config.get("head_dim") or config["hidden_size"] // count


def biases(config: dict, field: str = "attention_bias") -> dict[str, Any]:
    """`qkv_bias` and `out_bias` of `AttentionSpec`, which one field gives to all projections; none if it is missing."""
    only(config, field, True, False, None)
    return {"qkv_bias": bool(config.get(field)), "out_bias": bool(config.get(field))}


def attention(config: dict, theta: float = 10000.0, **kwargs: Any) -> AttentionSpec:
    """Grouped-query attention whose heads turn as a whole, with the base `theta` if the config names none; `kwargs` are further fields of
    `AttentionSpec`, perhaps another `rope`."""
    count, kv_heads, head_dim = heads(config)
    if "rope" not in kwargs:
        kwargs["rope"] = whole_rope(config, head_dim, theta)
    return AttentionSpec(count, kv_heads, head_dim, **kwargs)


def router(config: dict, experts: int, active: str = "num_experts_per_tok", **kwargs: Any) -> RouterSpec:
    """A router to `experts`, as many of which see a token as the field `active` says; `kwargs` are further fields of `RouterSpec`."""
    chosen = positive(config, active)
    if chosen > experts:
        raise SpecError(f"config.json: {active} = {chosen} is more than the {experts} experts")
    return RouterSpec(experts, chosen, **kwargs)


def dense_first(config: dict, field: str, sparse: LayerSpec) -> list[LayerSpec]:
    """As many dense layers of width `intermediate_size` as `field` says, then sparse ones."""
    layers, first = positive(config, "num_hidden_layers"), count(config, field)
    if first > layers:
        raise SpecError(f"config.json: {field} = {first} is more than num_hidden_layers = {layers}")
    dense = LayerSpec(sparse.attention, dense=ExpertSpec(positive(config, "intermediate_size")))
    return [dense] * first + [sparse] * (layers - first)
