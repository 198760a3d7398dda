"""From the logical names of an array's axes to the axes of a mesh: where each leaf of a model goes.

Rules know names and sizes, neither models nor what splitting costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, Protocol

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

LOGICAL = (
    "layers", "experts", "vocab", "embed", "embed_out", "heads", "kv_heads", "head_dim", "hidden", "mlp_hidden", "shared_hidden",
    "batch", "positions",
)  # fmt: skip
"""Every name that an axis of a leaf can have (`jaxmoe.spec.abstract_params`, `abstract_experts`, and the axes of a bank)."""

MeshAxes = str | tuple[str, ...] | None
"""What an axis is split over: one mesh axis, several (the first is the outermost), or none."""


class AxisLeaf(Protocol):
    """Anything with a shape and a logical name, or None, for every axis."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def axes(self) -> tuple[str | None, ...]: ...


class RulesError(ValueError):
    """Rules that contradict each other, the mesh, or a leaf; one line that names the axes."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which mesh axes each logical axis is split over; those not named are whole on every device.

    Attributes:
        table: by logical name; a mapping is taken as well.
        uneven: 'refuse' an axis that doesn't divide among its devices, or 'replicate' it.

    Raises:
        RulesError: a logical name that no axis has.
    """

    table: tuple[tuple[str, MeshAxes], ...] | Mapping[str, MeshAxes]
    uneven: Literal["refuse", "replicate"] = "refuse"

    def __post_init__(self):
        table = dict(self.table)
        for name in table:
            if name not in LOGICAL:
                raise RulesError(f"no axis is called {name!r}: choose from {', '.join(LOGICAL)}")
        if self.uneven not in ("refuse", "replicate"):
            raise RulesError(f"uneven={self.uneven!r}: choose 'refuse' or 'replicate'")
        object.__setattr__(self, "table", tuple(sorted(table.items())))

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        """How a leaf with these axes is split.

        Raises:
            RulesError: two of its axes, or one of them twice, over the same mesh axis.
        """
        table = dict(self.table)
        out: list[MeshAxes] = []
        taken: dict[str, str | None] = {}
        for axis in axes:
            over = table.get(axis) if axis is not None else None
            for name in _names(over):
                if name in taken:
                    raise RulesError(f"a leaf with the axes {_shown(axes)} would be split over {name!r} twice: by {taken[name]!r} and by {axis!r}")
                taken[name] = axis
            out.append(over or None)
        return PartitionSpec(*out)

    def sharding(self, mesh: Mesh | AbstractMesh, leaf: AxisLeaf) -> NamedSharding:
        """Where a leaf goes; `functools.partial(rules.sharding, mesh)` is what `Checkpoint.restore_params` takes.

        Raises:
            RulesError: as `spec`; a mesh axis that the mesh doesn't have; an axis that doesn't divide, with `uneven='refuse'`.
        """
        for logical, over in dict(self.table).items():
            for name in _names(over):
                if name not in mesh.shape:
                    raise RulesError(f"{logical!r} is to be split over {name!r}, and the mesh has only {', '.join(map(repr, mesh.shape))}")
        parts = []
        for over, size, axis in zip(self.spec(leaf.axes), leaf.shape, leaf.axes, strict=True):
            count = 1
            for name in _names(over):
                count *= mesh.shape[name]
            if size % count and self.uneven == "refuse":
                sizes = " * ".join(f"{mesh.shape[name]} ({name})" for name in _names(over))
                raise RulesError(
                    f"the axis {axis!r} of {size} in a leaf {list(leaf.shape)} {_shown(leaf.axes)} doesn't divide by {sizes}: "
                    "use another mesh, or uneven='replicate'"
                )
            parts.append(over if size % count == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*parts))


def _names(over: MeshAxes) -> tuple[str, ...]:
    return (over,) if isinstance(over, str) else tuple(over or ())


def _shown(axes: tuple[str | None, ...]) -> str:
    return f"({', '.join(axis or '-' for axis in axes)})"
