"""A placement of experts on devices: the order in which a layer's experts stand along their axis, and its file.

Whoever loads a model applies it: see `Placement`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

from sharding.placement.problem import check_devices
from sharding.placement.rows import read_hash, read_object, read_rows, whole, with_rows

FORMAT = "jaxmoe-placement"
VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """Which device holds which experts; each holds as many of every layer.

    To apply it: `w[l] -> w[l, order[l]]` for every array of the layer's experts, along the axis of experts, which is then split evenly as before; and
    routed ids `ids[t, l, a] -> position_of_expert[l, ids[t, l, a]]` after the router has chosen (-1 stays). The router itself keeps its order, by
    which it decides ties and knows groups of experts.

    Attributes:
        order: position p of the permuted axis of layer l holds the original expert order[l, p]; device d owns the positions from d * E / n on.
        devices: n.
        spec_hash: of the model it was made for; None if not known.
        meta: what else is to be said of it: the method, the trace; plain JSON values.

    Raises:
        ValueError: a layer's row is not a permutation; names the layer.
        SplitError: the experts don't divide among the devices.
    """

    order: Int32[np.ndarray, "L E"]
    devices: int
    spec_hash: str | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.order.ndim != 2 or 0 in self.order.shape or not np.issubdtype(self.order.dtype, np.integer):
            raise ValueError(f"order is {self.order.dtype}{list(self.order.shape)}; needed: whole numbers [layers, experts]")
        object.__setattr__(self, "order", self.order.astype(np.int32))
        check_devices(self.devices, self.experts)
        for layer, row in enumerate(self.order):
            check_permutation(row, layer)

    @property
    def layers(self) -> int:
        """Layers that have experts (L)."""
        return self.order.shape[0]

    @property
    def experts(self) -> int:
        """Experts of a layer (E)."""
        return self.order.shape[1]

    @property
    def position_of_expert(self) -> Int32[np.ndarray, "L E"]:
        """The inverse of `order`: where each original expert stands."""
        return np.argsort(self.order, axis=1, kind="stable").astype(np.int32)

    @property
    def device_of(self) -> Int32[np.ndarray, "L E"]:
        """The device that holds each original expert."""
        return self.position_of_expert // np.int32(self.experts // self.devices)

    def place(self, ids: Int[np.ndarray, "T L A"]) -> Int[np.ndarray, "T L A"]:
        """Routed ids as positions along the permuted axis; -1 stays."""
        at = np.take_along_axis(self.position_of_expert[None], np.maximum(ids, 0).reshape(len(ids), self.layers, -1), 2)
        return np.where(ids >= 0, at.reshape(ids.shape), ids).astype(ids.dtype)

    def check_model(self, layers: int, experts: int, spec_hash: str | None) -> None:
        """Refuses a model that the placement isn't of; one whose hash isn't known on either side is compared by its sizes.

        Raises:
            ValueError: it names what differs.
        """
        check_model(self, layers, experts, spec_hash)

    def to_json(self) -> str:
        """A small file's text; `from_json` reads it."""
        head = {"format": FORMAT, "version": VERSION, "spec_hash": self.spec_hash, "devices": int(self.devices)}
        sizes = {"layers": self.layers, "experts": self.experts, "meta": dict(self.meta)}
        return with_rows(head | sizes, "order", self.order)

    @staticmethod
    def from_json(text: str) -> Placement:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: it is something else, or damaged; names the field, and the layer where a row is wrong.
        """
        found = read_object(text, FORMAT, VERSION, "placement")
        layers, experts = (whole(found, name, "placement") for name in ("layers", "experts"))
        rows = read_rows(found, "order", layers, experts, "placement")
        for layer, row in enumerate(rows):
            check_permutation(row, layer)
        return Placement(rows, whole(found, "devices", "placement"), read_hash(found, "placement"), found.get("meta") or {})


def placement_of(device_of: Int[np.ndarray, "L E"], devices: int, spec_hash: str | None = None, meta: Mapping[str, Any] | None = None) -> Placement:
    """The placement in which each device holds the experts given to it, in their original order.

    Raises:
        ValueError: a device gets more or fewer than E / n experts of a layer; names both.
    """
    L, E = device_of.shape
    check_devices(devices, E)
    for layer, row in enumerate(device_of):
        count = np.bincount(np.maximum(row, 0), minlength=devices)
        if row.min() < 0 or len(count) > devices or (count != E // devices).any():
            raise ValueError(f"device_of: layer {layer}: {devices} devices are to hold {E // devices} experts each, they hold {count.tolist()}")
    return Placement(np.argsort(device_of, axis=1, kind="stable"), devices, spec_hash, dict(meta or {}))


def contiguous(layers: int, experts: int, devices: int) -> Placement:
    """Experts as they stand: the first E / n on the first device, and so on."""
    return Placement(np.tile(np.arange(experts, dtype=np.int32), (layers, 1)), devices)


def shuffled(layers: int, experts: int, devices: int, seed: int) -> Placement:
    """Experts placed at random, every layer by itself."""
    rng = np.random.default_rng(seed)
    return Placement(np.stack([rng.permutation(experts) for _ in range(layers)]), devices)


def check_model(placement: Any, layers: int, experts: int, spec_hash: str | None) -> None:
    """What `Placement.check_model` says, of whatever has its `layers`, `experts` and `spec_hash`."""
    for name, mine, found in (("layers of experts", placement.layers, layers), ("experts a layer", placement.experts, experts)):
        if mine != found:
            raise ValueError(f"the placement is of a model of {mine} {name}, this one has {found}: make one from a trace of this model")
    own = placement.spec_hash
    if None not in (own, spec_hash) and own != spec_hash:
        raise ValueError(f"the placement is of the model {own}, this one is {spec_hash}: make one from a trace of this model")


def check_permutation(row: np.ndarray, layer: int) -> None:
    """Raises: ValueError: a layer's row holds an expert twice, or one that isn't there."""
    experts = len(row)
    wrong = row[(row < 0) | (row >= experts)]
    if wrong.size:
        raise ValueError(f"order: layer {layer}: expert {int(wrong[0])} is outside the {experts} experts")
    count = np.bincount(row, minlength=experts)
    if (count != 1).any():
        raise ValueError(f"order: layer {layer} is not a permutation: expert {int(np.argmax(count > 1))} stands there twice")
