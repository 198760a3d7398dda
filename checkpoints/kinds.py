"""Leaves by what they are for: embedding, attention, experts and so on. Sums for whoever shows them; nothing here opens a file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

KINDS = ("embedding", "attention", "router", "shared experts", "dense feed-forward", "norms", "experts", "output", "extra heads")
"""What a model's leaves are for."""

_OF_LAYER = {
    "attn": "attention",
    "delta": "attention",
    "router": "router",
    "shared": "shared experts",
    "shared_gate": "shared experts",
    "mlp": "dense feed-forward",
    "expert_bias": "experts",
}
_OF_TOP = {"embed": "embedding", "lm_head": "output", "final_norm": "norms", "extra": "extra heads"}


@dataclasses.dataclass(frozen=True)
class LeafInfo:
    """One array: `parameters` are the numbers that it stands for, `files` how many it is in (0: it shares them), `chunk` None where it isn't cut."""

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    nbytes: int
    chunk: tuple[int, ...] | None = None
    files: int = 0


@dataclasses.dataclass(frozen=True)
class Share:
    """Leaves that belong together: how many, how many parameters, and bytes."""

    name: str
    leaves: int
    parameters: int
    nbytes: int


def shares(leaves: Iterable[LeafInfo]) -> list[Share]:
    """Leaves by kind, in the order of `KINDS`."""
    by_kind: dict[str, list[LeafInfo]] = {}
    for leaf in leaves:
        by_kind.setdefault(leaf.kind, []).append(leaf)
    order = {kind: i for i, kind in enumerate(KINDS)}
    return [_share(kind, by_kind[kind]) for kind in sorted(by_kind, key=lambda kind: (order.get(kind, len(order)), kind))]


def alike(leaves: Iterable[LeafInfo]) -> list[tuple[Share, LeafInfo]]:
    """Leaves that differ in nothing but their layer, together, with one of them; those with most bytes first."""
    groups: dict[tuple, list[LeafInfo]] = {}
    for leaf in leaves:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", leaf.path)
        groups.setdefault((name, leaf.shape, leaf.dtype, leaf.chunk), []).append(leaf)
    found = [(_share(key[0] if len(group) > 1 else group[0].path, group), group[0]) for key, group in groups.items()]
    return sorted(found, key=lambda pair: -pair[0].nbytes)


def expert_layers(leaves: Iterable[LeafInfo]) -> dict[int, int]:
    """Bytes of the routed experts by layer."""
    out: dict[int, int] = {}
    for leaf in leaves:
        if leaf.path.startswith("experts."):
            layer = int(leaf.path.split(".")[1])
            out[layer] = out.get(layer, 0) + leaf.nbytes
    return out


def kind_of(path: str, n_layers: int | None = None) -> str:
    """What a leaf of a model is for; the first part of its path if it is no model's."""
    first, *rest = path.split(".")
    if first == "experts" and len(rest) > 1 and rest[0].isdigit():
        return "extra heads" if n_layers is not None and int(rest[0]) >= n_layers else "experts"
    if first != "params" or len(rest) < 2:
        return first
    if rest[0] == "layers" and len(rest) > 2:
        return _OF_LAYER.get(rest[2], "norms")
    return _OF_TOP.get(rest[0], rest[0])


def _share(name: str, leaves: list[LeafInfo]) -> Share:
    return Share(name, len(leaves), sum(leaf.parameters for leaf in leaves), sum(leaf.nbytes for leaf in leaves))
