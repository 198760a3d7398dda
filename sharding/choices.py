"""What a planner can choose from: splits of a machine's devices, and what each could be asked to do."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import get_args

from jaxmoe.spec import ModelSpec
from sharding.hardware import Machine
from sharding.plan import Objective
from sharding.split import AXES, Attention, Exchange, Layout, Split, SplitError, layout_of
from sharding.time_model import Times, split_of
from sharding.workload import Workload

MOST_ROWS = 128
"""Sequences that a search over batch sizes goes up to, in each group of devices: the largest bucket of a decode step (`jaxmoe.engine.steps`)."""

@dataclasses.dataclass(frozen=True)
class Slo:
    """What a plan has to keep, in seconds: `ttft` to the first token of a prompt that comes alone, `tpot` to each further one. None: no limit.

    Raises:
        ValueError: a limit that isn't positive.
    """

    ttft: float | None = None
    tpot: float | None = None

    def __post_init__(self):
        for name in ("ttft", "tpot"):
            x = getattr(self, name)
            if x is not None and not x > 0:
                raise ValueError(f"slo.{name} = {x!r}: a positive time is needed")

    def missed(self, times: Times) -> str | None:
        """Which limit is exceeded, in words."""
        for name in ("ttft", "tpot"):
            limit, have = getattr(self, name), getattr(times, name)
            if limit is not None and have > limit:
                return f"{name} of {have * 1e3:.3g} ms is above {limit * 1e3:.3g} ms"
        return None

    def excess(self, times: Times) -> float:
        """The largest ratio of a time to its limit."""
        return max((getattr(times, name) / limit for name in ("ttft", "tpot") if (limit := getattr(self, name))), default=0.0)


@dataclasses.dataclass(frozen=True)
class Search:
    """What a search may choose.

    Attributes:
        objective: 'latency' is the time of the workload per new token of a sequence, 'throughput' new tokens per second of the whole machine, 'cost'
            new tokens per device-second, or per unit of price where the hardware has one.
        slo: limits.
        split: only this one.
        any_rows: choose the number of sequences too, among powers of two times the groups of devices; without, it is the workload's. Not for
            'latency', which a single sequence is best for.
        axes: those that may have more than one device.
        attention, exchange: modes to choose from.
        resident: never put experts into host memory unless the workload says so.

    Raises:
        ValueError: a field that contradicts another.
    """

    objective: Objective = "latency"
    slo: Slo = Slo()
    split: Split | None = None
    any_rows: bool = False
    axes: tuple[str, ...] = AXES
    attention: tuple[Attention, ...] = get_args(Attention)
    exchange: tuple[Exchange, ...] = get_args(Exchange)
    resident: bool = False

    def __post_init__(self):
        if self.objective not in get_args(Objective):
            raise ValueError(f"objective = {self.objective!r}: choose from {', '.join(get_args(Objective))}")
        if self.any_rows and self.objective == "latency":
            raise ValueError("any_rows with objective = 'latency': give the number of sequences")
        for field, known in (("axes", AXES), ("attention", get_args(Attention)), ("exchange", get_args(Exchange))):
            for name in getattr(self, field):
                if name not in known:
                    raise ValueError(f"{field} = {name!r}: choose from {', '.join(known)}")


def splits(devices: int, search: Search, spec: ModelSpec) -> Iterator[Split]:
    """Every split over so many devices or a part of them: sizes whose product divides them."""
    if search.split is not None:
        yield search.split
        return
    for used in (n for n in range(1, devices + 1) if devices % n == 0):
        for sizes in _products(used, len(AXES)):
            split = split_of(sizes)
            if any(getattr(split, axis) > 1 and axis not in search.axes for axis in AXES):
                continue
            if split.expert == 1:
                yield split
            elif spec.moe_layers:
                yield from _modes(split, search)


def _modes(split: Split, search: Search) -> Iterator[Split]:
    for attention in search.attention:
        if attention == "tensor":
            yield dataclasses.replace(split, attention=attention)
        else:
            yield from (dataclasses.replace(split, attention=attention, exchange=exchange) for exchange in search.exchange)


@functools.lru_cache(maxsize=256)
def _products(n: int, axes: int) -> tuple[tuple[int, ...], ...]:
    if axes == 1:
        return ((n,),)
    return tuple((d, *rest) for d in range(1, n + 1) if n % d == 0 for rest in _products(n // d, axes - 1))


def layouts(spec: ModelSpec, machine: Machine, search: Search) -> tuple[list[Layout], int]:
    """The splits that the model can be divided by, and how many others there are.

    Raises:
        SplitError: there are none; the reason of the first.
    """
    if search.split is not None and search.split.devices > machine.devices:
        raise SplitError(f"split = {search.split}: it takes {search.split.devices} devices, {machine} has {machine.devices}")
    good: list[Layout] = []
    refused: list[str] = []
    for split in splits(machine.devices, search, spec):
        try:
            good.append(layout_of(spec, split))
        except SplitError as error:
            refused.append(str(error))
    if not good:
        raise SplitError(refused[0] if refused else f"no split of {machine} is allowed")
    return good, len(refused)


@dataclasses.dataclass(frozen=True)
class Arm:
    """A layout and what it could be asked to do: the same workload for each number of sequences in `rows`, with each number of `slots` (None: all
    experts), both in rising order."""

    layout: Layout
    workload: Workload
    rows: tuple[int, ...]
    slots: tuple[int | None, ...]

    def asked(self, rows: int, slots: int | None) -> Workload:
        """The workload with so many sequences and slots."""
        return dataclasses.replace(self.workload, rows=rows, slots=slots)

    @property
    def least(self) -> Workload:
        """What needs least."""
        return self.asked(self.rows[0], self.slots[0])


def arms(spec: ModelSpec, good: Sequence[Layout], workload: Workload, search: Search, streamed: bool = False) -> list[Arm]:
    """Every layout that divides the sequences and that the engine runs, with experts as the workload says, or `streamed`: with any number of slots,
    cut into halvings."""
    found = []
    for layout in good:
        rows = tuple(layout.shards * 2**i for i in range(MOST_ROWS.bit_length())) if search.any_rows else (workload.rows,)
        fits = _rows_fit(layout, rows[0]) and _slots_fit(spec, layout, workload) and _copies_fit(spec, layout, workload)
        if fits and (_streams(layout) or (workload.resident and not streamed)):
            ways = _slots(spec, layout) if streamed else [(workload.slots,)]
            found += [Arm(layout, workload, rows, slots) for slots in ways]
    return found


def why_none(spec: ModelSpec, machine: Machine, good: Sequence[Layout], workload: Workload, search: Search) -> ValueError:
    """The error to raise where `arms` finds nothing for a workload."""
    if not search.any_rows:
        divided = [layout for layout in good if workload.rows % layout.shards == 0]
        if not divided and search.split is not None:
            try:
                workload.local_rows(good[0])
            except SplitError as error:
                return error
        if not divided:
            return SplitError(f"rows = {workload.rows}: no split of {machine} divides so many sequences, use another number")
        most = MOST_ROWS * max(layout.shards for layout in good)
        good = [layout for layout in divided if _rows_fit(layout, workload.rows)]
        if not good:
            there = f"at most {MOST_ROWS} in each group of devices that share their sequences"
            return SplitError(f"rows = {workload.rows}: {there}, so at most {most} with these splits")
    if not any(_slots_fit(spec, layout, workload) for layout in good):
        ranges = [slots_range(spec, layout) for layout in good]
        low, high = min(r[0] for r in ranges if r), max(r[1] for r in ranges if r)
        return ValueError(f"slots = {workload.slots}: {spec.family} needs {low} to {high}")
    if not any(_copies_fit(spec, layout, workload) for layout in good):
        experts = spec.moe[0].experts if spec.moe_layers else 0
        return SplitError(f"copies = {workload.copies}: no split divides {experts} experts and so many copies among several devices")
    return SplitError("exchange = 'weights' sends experts from device to device, with slots they are in host memory: choose another exchange")


def _rows_fit(layout: Layout, rows: int) -> bool:
    return rows % layout.shards == 0 and rows // layout.shards <= MOST_ROWS


def _slots_fit(spec: ModelSpec, layout: Layout, workload: Workload) -> bool:
    """Whether the workload's own slots, where it has any, are enough for a token and not more than a device has experts."""
    between = slots_range(spec, layout)
    return workload.slots is None or between is None or between[0] <= workload.slots <= between[1]


def _copies_fit(spec: ModelSpec, layout: Layout, workload: Workload) -> bool:
    """Whether the workload's copies of experts, where it has any, divide among the devices."""
    if not workload.copies:
        return True
    devices = layout.size(layout.experts)
    return bool(spec.moe_layers) and devices > 1 and (spec.moe[0].experts + workload.copies) % devices == 0


def _streams(layout: Layout) -> bool:
    """Whether experts may be in host memory: not where they are sent from device to device (`jaxmoe.experts.exchange`)."""
    split = layout.split
    return split.expert == 1 or split.attention != "data" or split.exchange != "weights"


def slots_range(spec: ModelSpec, layout: Layout) -> tuple[int, int] | None:
    """The fewest slots that a token can need on a device, and how many experts the device has of a layer; None without experts."""
    routers = [layer.router for segment in spec.segments for layer in segment.pattern if layer.router is not None]
    if not routers:
        return None
    high = min(r.experts for r in routers) // layout.size(layout.experts)
    return min(high, max(r.active for r in routers)), high


def _slots(spec: ModelSpec, layout: Layout) -> Sequence[tuple[int, ...]]:
    """Slots for fewer than a device's own experts, and not for fewer than a token can need: from half of them on, from a quarter on, and so on."""
    least, high = slots_range(spec, layout) or (0, 0)
    found = []
    while high > least:
        low = max(least, high // 2)
        found.append(tuple(range(low, high)))
        high = low
    return found


def score(objective: Objective, machine: Machine, split: Split, workload: Workload, times: Times) -> float:
    """What a candidate is ranked by, the lower the better; see `Search.objective`."""
    if objective == "latency":
        return times.prefill / workload.new_tokens + times.tpot
    if objective == "throughput":
        return 1 / times.tokens_per_s
    price = machine.hardware.price
    return split.devices / times.tokens_per_s * (1 if price is None else price / 3600)
