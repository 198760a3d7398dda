"""Which slices of a tree's leaves each group of devices holds, and where they lie among its bytes; every process finds the same.

It knows shardings, and neither folders nor how bytes travel.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints import trees
from checkpoints.errors import CheckpointError
from checkpoints.neighbour.ring import Ring
from checkpoints.reading import Box


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a slice of a leaf lies among a group's bytes."""

    path: str
    box: Box
    offset: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.path}[{', '.join(f'{a}:{b}' for a, b in self.box)}]"


@dataclasses.dataclass(frozen=True)
class Layout:
    """What every group holds."""

    slots: tuple[tuple[Slot, ...], ...]
    fingerprint: str

    def nbytes(self, group: int) -> int:
        """Bytes of a group's slots."""
        return sum(slot.nbytes for slot in self.slots[group])


def layout_of(leaves: dict[str, tuple[tuple[int, ...], str, Any]], ring: Ring) -> Layout:
    """The layout of leaves: path -> (shape, dtype, what has the sharding).

    Raises:
        CheckpointError: a leaf is on a device of no group, or nobody says where it is.
    """
    slots: list[list[Slot]] = [[] for _ in range(ring.count)]
    for path, (shape, dtype, value) in leaves.items():
        for group, held in enumerate(_boxes(path, shape, value, ring)):
            for box in held:
                offset = slots[group][-1].offset + slots[group][-1].nbytes if slots[group] else 0
                nbytes = math.prod(b - a for a, b in box) * trees.dtype_of(dtype).itemsize
                slots[group].append(Slot(path, box, offset, nbytes))
    content = [[(path, shape, dtype) for path, (shape, dtype, _) in leaves.items()], [[(s.path, s.box) for s in row] for row in slots]]
    return Layout(tuple(map(tuple, slots)), hashlib.sha256(json.dumps(content).encode()).hexdigest())


def _boxes(path: str, shape: tuple[int, ...], value: Any, ring: Ring) -> list[list[Box]]:
    """The different slices of a leaf that each group holds."""
    sharding = getattr(value, "sharding", None)
    if sharding is None and isinstance(value, jax.ShapeDtypeStruct):
        raise CheckpointError(f"leaf {path} has no sharding: only an array in the sharding that it was kept in can be restored from memory")
    if sharding is None or (jax.process_count() > 1 and sharding.is_fully_addressable):
        return [[tuple((0, n) for n in shape)]] * ring.count
    held: list[set[Box]] = [set() for _ in range(ring.count)]
    for device, index in sharding.devices_indices_map(shape).items():
        if device not in ring.group_of:
            raise CheckpointError(f"leaf {path} is on {device}, which is in no group")
        held[ring.group_of[device]].add(_box_of(index, shape))
    return [sorted(boxes) for boxes in held]


def _box_of(index: Any, shape: tuple[int, ...]) -> Box:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def bytes_of(array: Any, box: Box) -> np.ndarray:
    """A slice that this process holds as uint8 [nbytes]; on accelerators one shard at a time comes to the host."""
    if isinstance(array, jax.Array):
        shard = next((s.data for s in array.addressable_shards if _box_of(s.index, array.shape) == box), None)
        array = np.asarray(trees.own_view(shard) if shard is not None else jnp.copy(array))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
