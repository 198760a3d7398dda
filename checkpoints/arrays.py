"""jax arrays out of host memory: which slices this process holds of a sharded array, filled once each and handed over.

It knows shardings and buffers; what fills a buffer comes in as a callable.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax.experimental.layout import Format

from checkpoints.reading import Target, box_of
from jaxmoe import formats
from jaxmoe.spec import Leaf

Place = jax.sharding.Sharding | Format
"""Devices, and with a format the order of axes in their memory too."""

Placement = Place | Callable[[Leaf], Place] | None
"""Where arrays go: one place for all, a function of the leaf (its shape and axes), or None for the default device."""

Fill = Callable[[list[Target]], None]
"""Fills every target's buffer."""

AHEAD = 4
"""Arrays that are read at the same time."""


def build(leaf: Leaf, place: Placement, fill: Fill) -> jax.Array:
    """One array; see `build_all`."""
    (array,) = build_all([(leaf, fill)], place)
    return array


def build_all(leaves: Iterable[tuple[Leaf, Fill]], place: Placement) -> Iterator[jax.Array]:
    """Arrays one after another, while the next few are being read.

    Each slice that a device of this process holds is filled once on the host and handed over whole; on the CPU, jax takes over the memory.

    Args:
        leaves: what each array is, and what fills slices of it.
        place: where they go.
    """
    waiting: deque[tuple[Leaf, Any, Future]] = deque()
    with ThreadPoolExecutor(AHEAD, thread_name_prefix="restore") as pool:
        try:
            for leaf, fill in leaves:
                target = _target(leaf, place)
                waiting.append((leaf, target, pool.submit(_host_slices, leaf, target, fill)))
                if len(waiting) == AHEAD:
                    yield _hand_over(*waiting.popleft())
            while waiting:
                yield _hand_over(*waiting.popleft())
        finally:
            for _, _, future in waiting:
                future.cancel()


def _target(leaf: Leaf, place: Placement) -> Place | None:
    return place if place is None or isinstance(place, Place) else place(leaf)


def _host_slices(leaf: Leaf, target: Place | None, fill: Fill) -> list[Target]:
    """Every different slice that this process's devices hold."""
    target = target.sharding if isinstance(target, Format) else target
    indices = [()] if target is None else target.addressable_devices_indices_map(leaf.shape).values()
    boxes = {box_of(index or (), leaf.shape)[0] for index in indices}
    slices = [Target(box, formats.aligned_empty(tuple(b - a for a, b in box), leaf.dtype)) for box in sorted(boxes)]
    fill(slices)
    return slices


def _hand_over(leaf: Leaf, target: Place | None, future: Future) -> jax.Array:
    slices = {part.box: part.out for part in future.result()}
    if target is None:
        return jax.device_put(*slices.values())
    return jax.make_array_from_callback(leaf.shape, target, lambda index: slices[box_of(index or (), leaf.shape)[0]])
