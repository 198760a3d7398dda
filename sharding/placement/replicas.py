"""EPLB: copies of the experts that most tokens ask for, so that devices' loads become equal (DeepSeek-V3, arXiv 2412.19437, section 3.4).

Data for an exchange that sends each request to one of the copies; knows loads and ids only.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int32

from sharding.placement.assignment import Placement, check_model
from sharding.placement.problem import check_ids
from sharding.placement.rows import read_hash, read_object, read_rows, whole, with_rows
from sharding.split import SplitError

FORMAT = "jaxmoe-replicas"
VERSION = 1
MOST_TURNS = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Replicas:
    """Which expert stands in which slot; a device owns P / n neighbouring slots of every layer.

    To apply it: `w[l] -> w[l, expert_of[l]]` for every array of the layer's experts, which are P then, split evenly; and routed ids -> `choose`, or
    in a jitted step `position_of_expert[l, ids, turn % C]`. Loaders take it where they take a `Placement`.

    Attributes:
        expert_of: the expert in each slot; every expert has one at least.
        experts: E.
        devices: n.
        spec_hash: of the model; None if not known.
        meta: what else is to be said; plain JSON values.

    Raises:
        ValueError: a layer lacks an expert or holds one that isn't there; names the layer.
        SplitError: the slots don't divide among the devices.
    """

    expert_of: Int32[np.ndarray, "L P"]
    experts: int
    devices: int
    spec_hash: str | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_slots(self.experts, self.slots - self.experts, self.devices)
        for layer, row in enumerate(self.expert_of):
            wrong = row[(row < 0) | (row >= self.experts)]
            if wrong.size:
                raise ValueError(f"expert_of: layer {layer}: expert {int(wrong[0])} is outside the {self.experts} experts")
            missing = np.setdiff1d(np.arange(self.experts), row)
            if missing.size:
                raise ValueError(f"expert_of: layer {layer} lacks expert {int(missing[0])}")

    @property
    def layers(self) -> int:
        """Layers that have experts (L)."""
        return self.expert_of.shape[0]

    @property
    def slots(self) -> int:
        """Slots of a layer on all devices (P)."""
        return self.expert_of.shape[1]

    @property
    def copies(self) -> Int32[np.ndarray, "L E"]:
        """How many slots hold each expert."""
        return np.stack([np.bincount(row, minlength=self.experts) for row in self.expert_of]).astype(np.int32)

    @property
    def slots_of(self) -> Int32[np.ndarray, "L E C"]:
        """The slots of each expert, in order; -1 where it has fewer than the most copies."""
        out = np.full((self.layers, self.experts, int(self.copies.max())), -1, np.int32)
        for layer, row in enumerate(self.expert_of):
            count = np.zeros(self.experts, int)
            for slot, expert in enumerate(row):
                out[layer, expert, count[expert]] = slot
                count[expert] += 1
        return out

    @property
    def order(self) -> Int32[np.ndarray, "L P"]:
        """`expert_of`, by a placement's name."""
        return self.expert_of

    @property
    def position_of_expert(self) -> Int32[np.ndarray, "L E C"]:
        """The slot of each expert at each turn. C is the least number that all counts of copies divide, so that copies have equal shares; at most
        `MOST_TURNS`, where shares differ by one turn."""
        copies = self.copies
        turns = min(int(np.lcm.reduce(copies.ravel().astype(np.int64))), MOST_TURNS)
        return np.take_along_axis(self.slots_of, np.arange(turns)[None, None, :] % copies[:, :, None], 2).astype(np.int32)

    def check_model(self, layers: int, experts: int, spec_hash: str | None) -> None:
        """Refuses a model that these copies aren't of; see `Placement.check_model`."""
        check_model(self, layers, experts, spec_hash)

    def choose(self, ids: Int[np.ndarray, "T L A"], turn: Int[np.ndarray, "T"] | None = None) -> Int32[np.ndarray, "T L A"]:
        """The slot that each request goes to; -1 stays.

        Args:
            ids: routed experts.
            turn: any numbers that run on from token to token; copies take turns by them. The tokens' order if not given. In a jitted step the same is
                `slots_of[l, ids, turn % copies[l, ids]]`.
        """
        check_ids(ids, self.experts)
        turn = np.arange(len(ids)) if turn is None else turn
        layer, expert = np.arange(self.layers)[None, :, None], np.maximum(ids, 0)
        slot = self.slots_of[layer, expert, turn[:, None, None] % self.copies[layer, expert]]
        return np.where(ids >= 0, slot, np.int32(-1))

    def devices_of(self, ids: Int[np.ndarray, "T L A"]) -> Int32[np.ndarray, "T L A"]:
        """The device that each request goes to; -1 stays."""
        slot = self.choose(ids)
        return np.where(slot >= 0, slot // np.int32(self.slots // self.devices), np.int32(-1))

    def device_loads(self, load: Float[np.ndarray, "L E"]) -> Float[np.ndarray, "L n"]:
        """Requests of each device, where an expert's are split evenly among its copies."""
        each = np.take_along_axis(load / self.copies, self.expert_of, 1)
        return each.reshape(self.layers, self.devices, -1).sum(2)

    def to_json(self) -> str:
        """A small file's text; `from_json` reads it."""
        head = {"format": FORMAT, "version": VERSION, "spec_hash": self.spec_hash, "devices": int(self.devices), "layers": self.layers}
        return with_rows(head | {"experts": int(self.experts), "slots": self.slots, "meta": dict(self.meta)}, "expert_of", self.expert_of)

    @staticmethod
    def from_json(text: str) -> Replicas:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: it is something else, or damaged; names the field, and the layer where a row is wrong.
        """
        found = read_object(text, FORMAT, VERSION, "table of replicas")
        layers, experts, slots, devices = (whole(found, name, "table of replicas") for name in ("layers", "experts", "slots", "devices"))
        rows = read_rows(found, "expert_of", layers, slots, "table of replicas")
        return Replicas(rows, experts, devices, read_hash(found, "table of replicas"), found.get("meta") or {})


def read_placement(text: str) -> Placement | Replicas:
    """Reads what `scripts/place.py` wrote, a placement or a table of replicas.

    Raises:
        ValueError: it is neither, or damaged.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not a placement: {error}") from None
    return (Replicas if isinstance(found, dict) and found.get("format") == FORMAT else Placement).from_json(text)


def replicate(load: Float[np.ndarray, "L E"], devices: int, extra: int) -> Replicas:
    """Copies of the most loaded experts, packed so that devices' loads are even.

    Args:
        load: tokens that asked for each expert.
        devices: n.
        extra: slots of a layer beyond E, on all devices together.

    Raises:
        SplitError: E + extra doesn't divide among the devices, or is more than a copy of every expert on every device.
    """
    check_slots(load.shape[1], extra, devices)
    rows = [_pack(row / count, count, devices) for row in load for count in [copies_of(row, devices, extra)]]
    return Replicas(np.asarray(rows, np.int32), load.shape[1], devices)


def copies_of(load: Float[np.ndarray, "E"], devices: int, extra: int) -> Int[np.ndarray, "E"]:
    """Copies of each expert: each extra one of that whose copies have most to do, which makes the busiest copy's load the least possible.

    An expert gets no more copies than there are devices: a further one would change nothing (EPLB's own program would make it).
    """
    count = np.ones(len(load), np.int64)
    for _ in range(extra):
        count[np.argmax(np.where(count < devices, load / count, -1.0))] += 1
    return count


def _pack(each: np.ndarray, count: np.ndarray, devices: int) -> list[int]:
    """Copies, the heaviest first, to the lightest device that has room; one without a copy of that expert, if there is one."""
    room, total = np.full(devices, int(count.sum()) // devices), np.zeros(devices)
    held: list[list[int]] = [[] for _ in range(devices)]
    for expert in np.argsort(-each, kind="stable"):
        for _ in range(count[expert]):
            has = np.array([expert in mine for mine in held])
            free = (room > 0) & ~has
            to = int(np.argmin(np.where(free if free.any() else room > 0, total, np.inf)))
            held[to].append(int(expert))
            total[to] += each[expert]
            room[to] -= 1
    return [expert for mine in held for expert in sorted(mine)]


def check_slots(experts: int, extra: int, devices: int) -> None:
    """Refuses slots that don't divide.

    Raises:
        SplitError: so it is.
    """
    if devices < 1:
        raise SplitError(f"devices = {devices}: copies need at least 1 device")
    if extra < 0 or extra > experts * (devices - 1):
        raise SplitError(f"extra = {extra}: {experts} experts on {devices} devices take 0 to {experts * (devices - 1)} further copies")
    if (experts + extra) % devices:
        up = extra + -(experts + extra) % devices
        raise SplitError(f"extra = {extra}: {experts} + {extra} slots don't divide among {devices} devices: choose {up}")
