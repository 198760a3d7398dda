"""Model families as data: how each one's weight names map to ours."""

from __future__ import annotations

import re
from collections.abc import Collection

from checkpoints.errors import CheckpointError
from checkpoints.families import mixtral, olmoe, qwen3_moe
from checkpoints.families.common import Layout, Piece, flatten, hf_tensors, leaf_paths, pieces_of, unflatten
from jaxmoe.spec import ModelSpec

LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "mixtral": mixtral.LAYOUTS,
    "olmoe": olmoe.LAYOUTS,
    "qwen3_moe": qwen3_moe.LAYOUTS,
}
"""The layouts that each family's weights come in, by `ModelSpec.family`."""


def choose_layout(spec: ModelSpec, names: Collection[str]) -> Layout:
    """The layout of the spec's family that finds most of its tensors among `names`; the first one among equals.

    Raises:
        CheckpointError: there is no name map for the family.
    """
    if spec.family not in LAYOUTS:
        raise CheckpointError(
            f"no weight names are known for the family {spec.family!r} ({', '.join(LAYOUTS)} are known)"
        )
    held = set(names)
    return max(LAYOUTS[spec.family], key=lambda layout: len(hf_tensors(spec, layout).keys() & held))


def ignorable(spec: ModelSpec, layout: Layout, name: str) -> bool:
    """Whether a tensor that fills no leaf may be there all the same: a buffer, or the output matrix of a tied model."""
    if spec.tied and name == layout.top["lm_head.kernel"].hf:
        return True
    return any(re.fullmatch(pattern, name) for pattern in layout.ignored)


__all__ = [
    "LAYOUTS",
    "Layout",
    "Piece",
    "choose_layout",
    "flatten",
    "hf_tensors",
    "ignorable",
    "leaf_paths",
    "pieces_of",
    "unflatten",
]
