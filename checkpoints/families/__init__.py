"""Model families as data: how each one's weight names map to ours."""

from __future__ import annotations

import re
from collections.abc import Collection

from checkpoints.errors import CheckpointError
from checkpoints.families import (
    deepseek,
    dots1,
    ernie,
    gemma4,
    glm4_moe,
    gpt_oss,
    granite,
    llama4,
    minimax,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_moe,
    qwen3_next,
)
from checkpoints.families.common import BUFFERS
from checkpoints.families.rules import (
    Layout,
    Piece,
    Rule,
    flatten,
    held_in,
    hf_tensors,
    leaf_dtype_name,
    leaf_paths,
    pieces_of,
    pinned_paths,
    unflatten,
)
from jaxmoe.spec import ModelSpec

LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "deepseek_v2": deepseek.V2_LAYOUTS,
    "deepseek_v3": deepseek.V3_LAYOUTS,
    "dots1": dots1.LAYOUTS,
    "ernie4_5_moe": ernie.LAYOUTS,
    "gemma4": gemma4.LAYOUTS,
    "gemma4_text": gemma4.TEXT_LAYOUTS,
    "glm4_moe": glm4_moe.LAYOUTS,
    "glm4_moe_lite": deepseek.GLM_LITE_LAYOUTS,
    "gpt_oss": gpt_oss.LAYOUTS,
    "granitemoe": granite.MOE_LAYOUTS,
    "granitemoeshared": granite.SHARED_LAYOUTS,
    "kimi_k2": deepseek.KIMI_LAYOUTS,
    "llama4": llama4.LAYOUTS,
    "llama4_text": llama4.TEXT_LAYOUTS,
    "minimax_m2": minimax.LAYOUTS,
    "mixtral": mixtral.LAYOUTS,
    "olmoe": olmoe.LAYOUTS,
    "phimoe": phimoe.LAYOUTS,
    "qwen2_moe": qwen2_moe.LAYOUTS,
    "qwen3_5_moe": qwen3_next.V3_5_LAYOUTS,
    "qwen3_5_moe_text": qwen3_next.V3_5_LAYOUTS,
    "qwen3_moe": qwen3_moe.LAYOUTS,
    "qwen3_next": qwen3_next.NEXT_LAYOUTS,
}
"""The layouts that each family's weights come in, by `ModelSpec.family`."""


def layouts_of(spec: ModelSpec, packed: str = "") -> tuple[Layout, ...]:
    """The layouts that the spec's family has for weights in a quantized form; those for plain ones where that form changes no names.

    Raises:
        CheckpointError: there is no name map for the family.
    """
    if spec.family not in LAYOUTS:
        raise CheckpointError(f"no weight names are known for the family {spec.family!r} ({', '.join(LAYOUTS)} are known)")
    own = tuple(layout for layout in LAYOUTS[spec.family] if layout.packed == packed)
    return own or tuple(layout for layout in LAYOUTS[spec.family] if not layout.packed)


def choose_layout(spec: ModelSpec, names: Collection[str], packed: str = "") -> Layout:
    """The layout of the spec's family that finds most of its tensors among `names`; the first one among equals.

    Raises:
        CheckpointError: there is no name map for the family.
    """
    held = set(names)
    return max(layouts_of(spec, packed), key=lambda layout: len(hf_tensors(spec, layout).keys() & held))


def tied_head(spec: ModelSpec, layout: Layout) -> str | None:
    """The name that a tied model's output matrix may have on disk."""
    rule = layout.top.get("lm_head.kernel")
    return layout.on_disk(rule.hf) if spec.tied and rule is not None else None


def ignorable(spec: ModelSpec, layout: Layout, name: str) -> bool:
    """Whether a tensor that fills no leaf may be there all the same: one that the layout passes over, or the output matrix of a tied model."""
    if name == tied_head(spec, layout):
        return True
    return any(re.fullmatch(pattern.replace("{n_layers}", str(spec.n_layers)), name) for pattern in layout.ignored)


def is_weight(spec: ModelSpec, layout: Layout, name: str) -> bool:
    """Whether an ignorable tensor holds something that is lost: neither a buffer nor a copy."""
    return name != tied_head(spec, layout) and not any(re.fullmatch(pattern, name) for pattern in BUFFERS)


__all__ = [
    "LAYOUTS",
    "Layout",
    "Piece",
    "Rule",
    "choose_layout",
    "flatten",
    "held_in",
    "hf_tensors",
    "ignorable",
    "is_weight",
    "layouts_of",
    "leaf_dtype_name",
    "leaf_paths",
    "pieces_of",
    "pinned_paths",
    "tied_head",
    "unflatten",
]
