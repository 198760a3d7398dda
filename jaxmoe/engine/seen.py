"""What a layer's front tells the host that looks ahead, in one array."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8


class Seen(NamedTuple):
    """What the host needs for looking ahead; jax arrays on the device, numpy's on the host.

    It comes as one array, since every array that is read costs the host about as much. Attributes: `misses` see `_PlanningBank`; `ids` [T, A], the
    router's choice; `resident` [L, E], which experts are in slots; `scores` [depth, E] of the next layers' routers, None where they are not asked.
    """

    misses: Any
    ids: Any
    resident: Any
    scores: Any

    def joined(self) -> UInt8[Array, "N"]:
        """All as bytes, on the device."""
        parts = [x.astype(jnp.uint8) if x.dtype == bool else x for x in self if x is not None]
        return jnp.concatenate([jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(-1) for x in parts])

    @classmethod
    def parted(cls, joined: np.ndarray, ids: tuple[int, ...], resident: tuple[int, int], lists: int, depth: int) -> Seen:
        """What `joined` joined, on the host; `ids` and `resident` are shapes, `misses` has so many lists of E, and `depth` is 0 without scores."""
        experts = resident[1]
        shapes: list[tuple[int, ...]] = [(1 + lists * experts,), ids, resident, (depth, experts)]
        at, found = 0, list[Any]()
        for shape, dtype in zip(shapes, (np.int32, np.int32, np.bool_, np.float32), strict=True):
            size = math.prod(shape) * np.dtype(dtype).itemsize
            found.append(joined[at : at + size].view(dtype).reshape(shape))
            at += size
        misses, chosen, there, scores = found
        return cls(misses, chosen, there, scores if depth else None)
