"""What fits on a machine, what doesn't and by how much, and the smallest changes that would."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from jaxmoe.spec import ModelSpec
from sharding.choices import Search, arms, layouts
from sharding.hardware import Backend, Hardware, Machine
from sharding.split import Layout, SplitError
from sharding.workload import Workload

TRIED = 256
"""Splits that a change is tried on: those that need least as it is."""


class DeviceBytes(Protocol):
    """What a device needs: `sharding.memory.device_bytes`, whose `Bytes` has their sum `total`, its `items` and `host_store`."""

    def __call__(self, spec: ModelSpec, layout: Layout, workload: Workload, backend: Backend, hardware: Hardware, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Change:
    """A change that would fit: in words, with what it leads to."""

    text: str
    workload: Workload
    machine: Machine


class DoesNotFit(ValueError):
    """No split fits into the devices' memory; says what is needed, what the largest items are, and the smallest changes that fit.

    Attributes:
        changes: see `Change`.
    """

    def __init__(self, message: str, changes: Sequence[Change] = ()):
        super().__init__(message)
        self.changes = tuple(changes)


class Fits:
    """What layouts need on a machine, each asked once."""

    def __init__(self, spec: ModelSpec, machine: Machine, device_bytes: DeviceBytes):
        self.spec, self.machine, self.device_bytes = spec, machine, device_bytes
        self._known: dict[tuple[Layout, Workload], Any] = {}

    def need(self, layout: Layout, workload: Workload) -> Any:
        """Bytes of a device."""
        key = (layout, workload)
        if key not in self._known:
            h = self.machine.hardware
            self._known[key] = self.device_bytes(self.spec, layout, workload, h.backend, h)
        return self._known[key]

    def over(self, layout: Layout, workload: Workload) -> tuple[int, str]:
        """Bytes too many, of a device or of a host, whichever has more too many; not above zero where all fits."""
        need, h = self.need(layout, workload), self.machine.hardware
        host = need.host_store * min(self.machine.per_host, layout.split.devices) - h.host_memory_bytes
        return max((need.total - h.usable_bytes, "memory"), (host, "host memory"))

    def most(self, layout: Layout, asked: Sequence[Workload]) -> Workload | None:
        """The last of several workloads that fits, each of which needs no less than the one before; None if not even the first does."""
        low, high = -1, len(asked)
        while high - low > 1:
            at = (low + high) // 2
            low, high = (low, at) if self.over(layout, asked[at])[0] > 0 else (at, high)
        return asked[low] if low >= 0 else None

    def why_not(self, layout: Layout, workload: Workload) -> str:
        """By how much, in words."""
        n, where = self.over(layout, workload)
        return f"{where} over by {gigabytes(n)} with {sequences(workload.rows)}"


def sequences(n: int) -> str:
    """How many, in words."""
    return f"{n} sequence{'s' * (n != 1)}"


def gigabytes(n: float) -> str:
    """Bytes in words, in 10^9."""
    return f"{n / 1e9:.2f} GB" if abs(n) >= 1e8 else f"{n / 1e6:.2f} MB"


def does_not_fit(fits: Fits, workload: Workload, search: Search, good: Sequence[Layout]) -> DoesNotFit:
    """The error for a workload that no layout of `good` fits: from the one that needs least."""
    machine = fits.machine
    ways = arms(fits.spec, good, workload, search)
    if not search.resident and workload.slots is None:
        ways += arms(fits.spec, good, workload, search, streamed=True)
    ways.sort(key=lambda arm: fits.over(arm.layout, arm.least))
    layout, asked = ways[0].layout, ways[0].least
    need, (n, where) = fits.need(layout, asked), fits.over(layout, asked)
    if where == "memory":
        largest = ", ".join(f"{name} {gigabytes(size)}" for name, size in need.items[:3] if size)
        slots = "" if asked.slots is None else f" with {asked.slots} slots a layer"
        room = gigabytes(machine.hardware.usable_bytes)
        what = f"needs {gigabytes(need.total)} a device{slots} ({largest}), a program on {machine} can have {room}"
    else:
        there = min(machine.per_host, layout.split.devices)
        what = f"needs {gigabytes(need.host_store * there)} of host memory, a host has {gigabytes(machine.hardware.host_memory_bytes)}"
    tried = changes(fits, asked, search, [arm.layout for arm in ways])
    advice = f"what would fit: {', or '.join(change.text for change in tried)}" if tried else "no single change would fit, use a larger machine"
    return DoesNotFit(f"does not fit: the least, {layout.split} with {sequences(asked.rows)}, {what}: {gigabytes(n)} too much; {advice}", tried)


def changes(fits: Fits, workload: Workload, search: Search, by_need: Sequence[Layout]) -> list[Change]:
    """Single changes that make a workload fit, each the smallest of its kind that does: found by trying them, on the layouts that need least."""
    found: list[Change] = []
    for kind in (_smaller_kv, fewer_rows, _shorter, _fewer_slots, more_devices):
        for change in kind(fits.spec, fits.machine, workload):
            if _fits_some(fits, change, search, by_need):
                found.append(change)
                break
    return found


def _fits_some(fits: Fits, change: Change, search: Search, by_need: Sequence[Layout]) -> bool:
    known = fits if change.machine == fits.machine else Fits(fits.spec, change.machine, fits.device_bytes)
    if known is not fits:
        try:
            by_need = sorted(layouts(fits.spec, change.machine, search)[0], key=_shares_most)
        except SplitError:
            return False
    ways = arms(fits.spec, by_need, change.workload, dataclasses.replace(search, objective="throughput", any_rows=False))
    return any(known.over(arm.layout, arm.least)[0] <= 0 for arm in ways[:TRIED])


def _shares_most(layout: Layout) -> tuple:
    """An order: with the most devices first, of those the ones that divide experts, which are most of a model, by most, and then the caches."""
    split = layout.split
    experts = layout.size(layout.experts) * layout.size(layout.expert_hidden) * split.stage
    return (-split.devices, -experts, -layout.size(layout.heads), -layout.shards, split.shape)


def _smaller_kv(spec: ModelSpec, machine: Machine, workload: Workload) -> Iterator[Change]:
    if workload.kv_dtype == "float32":
        yield Change("--kv-dtype bfloat16", dataclasses.replace(workload, kv_dtype="bfloat16"), machine)


def fewer_rows(spec: ModelSpec, machine: Machine, workload: Workload) -> Iterator[Change]:
    """Half as many sequences, and so on."""
    rows = workload.rows
    while rows > 1:
        rows //= 2
        yield Change(f"--rows {rows}", dataclasses.replace(workload, rows=rows), machine)


def _shorter(spec: ModelSpec, machine: Machine, workload: Workload) -> Iterator[Change]:
    prompt = workload.prompt
    while prompt > 128:
        prompt //= 2
        yield Change(f"--prompt {prompt}", dataclasses.replace(workload, prompt=prompt), machine)


def _fewer_slots(spec: ModelSpec, machine: Machine, workload: Workload) -> Iterator[Change]:
    routers = [layer.router for segment in spec.segments for layer in segment.pattern if layer.router is not None]
    slots = (workload.slots or max((r.experts for r in routers), default=0)) // 2
    while routers and slots >= max(r.active for r in routers):
        yield Change(f"--slots {slots}", dataclasses.replace(workload, slots=slots), machine)
        slots //= 2


def more_devices(spec: ModelSpec, machine: Machine, workload: Workload) -> Iterator[Change]:
    """Twice as many devices, and so on."""
    for times in (2, 4, 8, 16, 32, 64):
        try:
            more = machine.of(machine.devices * times)
        except ValueError:
            continue
        yield Change(f"--hardware {more}", workload, more)
