"""All experts in the arrays of a resident bank, which join gate and up and every layer: where the slices of those come from.

It knows the bank's layouts; leaves come through a callable.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from checkpoints.reading import Target
from jaxmoe import formats
from jaxmoe.formats import ExpertLayout
from jaxmoe.spec import Leaf, ModelSpec

Gather = Callable[[str, list[Target]], None]
"""Fills slices of the leaf at a path."""


def bank_leaves(spec: ModelSpec, dtype: str, layout: ExpertLayout, positions: int | None = None) -> tuple[Leaf, Leaf]:
    """w_in [L, E, D, 2, F] and w_out [L, E, F, D], the last axes in the order of `layout`; with `positions` in the place of E.

    Raises:
        SpecError: the model has no experts, or layers whose experts differ in shape.
    """
    router, experts = spec.moe
    outer, held = (len(spec.moe_layers), positions or router.experts), formats.leaf_dtype(dtype)
    shapes, names = formats.expert_shapes(spec.width, experts.width, layout), formats.expert_axis_names(layout)
    w_in, w_out = (Leaf((*outer, *shape), held, ("layers", "experts", *axes)) for shape, axes in zip(shapes, names, strict=True))
    return w_in, w_out


def fill_w_in(targets: list[Target], layers: tuple[int, ...], layout: ExpertLayout, gather: Gather) -> None:
    """Fills slices of w_in; `layers` are the model's layers with experts."""
    axes = formats.expert_axes(layout)[0]
    for j, name in enumerate(("gate", "up")):
        parts = []
        for box, out in targets:
            embed, (first, last), hidden = (box[2 + axis] for axis in axes)
            if first <= j < last:
                parts.append(Target((*box[:2], embed, hidden), out.transpose(0, 1, *(2 + axis for axis in axes))[:, :, :, j - first]))
        _fill(name, parts, layers, gather)


def fill_w_out(targets: list[Target], layers: tuple[int, ...], layout: ExpertLayout, gather: Gather) -> None:
    """Fills slices of w_out, likewise."""
    axes = (0, 1, *(2 + axis for axis in formats.expert_axes(layout)[1]))
    _fill("down", [Target(tuple(box[axis] for axis in axes), out.transpose(axes)) for box, out in targets], layers, gather)


def in_order(gather: Gather, layers: tuple[int, ...], order: Int[np.ndarray, "L P"]) -> Gather:
    """A `gather` of experts that stand in another order: position p of the layer `layers[i]` has expert `order[i, p]`."""

    def gathered(path: str, targets: list[Target]) -> None:
        row = order[layers.index(int(path.split(".")[1]))]
        parts = []
        for box, out in targets:
            for at in range(*box[0]):
                expert = int(row[at])
                here = at - box[0][0]
                parts.append(Target(((expert, expert + 1), *box[1:]), out[here : here + 1]))
        gather(path, parts)

    return gathered


def _fill(name: str, targets: list[Target], layers: tuple[int, ...], gather: Gather) -> None:
    """Layer by layer, slices [layers, experts, ...]."""
    for i, layer in enumerate(layers):
        here = [Target(box[1:], out[i - box[0][0]]) for box, out in targets if box[0][0] <= i < box[0][1]]
        if here:
            gather(f"experts.{layer}.{name}", here)
