"""Prompts and decoding on separate devices, or together: how many requests a second each way serves within limits (goodput), in closed form.

After Splitwise (arXiv:2311.18677) and DistServe (arXiv:2401.09670): an instance that only reads prompts is a queue of fixed service time, one that
only decodes is limited by its step time, and one that does both pays for each with the other. Means, no percentiles; requests are alike, arrive at
random (Poisson), and a load balancer sees all instances. An instance is a mesh of its own with its own copy of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from jaxmoe.spec import ModelSpec
from sharding.choices import MOST_ROWS, Search, layouts
from sharding.fitting import DeviceBytes, Fits
from sharding.hardware import Machine
from sharding.split import Layout, Split, SplitError
from sharding.time_model import Known, predict
from sharding.workload import WIDTH, Workload


@dataclasses.dataclass(frozen=True)
class Pool:
    """Equal instances: how many, the mesh of each, the sequences that it decodes together (0: none), and requests a second of all of them."""

    instances: int
    split: Split
    rows: int
    rate: float

    @property
    def devices(self) -> int:
        """Of all instances."""
        return self.instances * self.split.devices


@dataclasses.dataclass(frozen=True)
class PhaseSplit:
    """The best of both ways.

    Attributes:
        together: instances that do both; None if none keeps the limits.
        prefill, decode: instances of one each; None likewise.
        handoff: seconds that a prompt's keys and values take from one to the other.
        rate: of the separate pools together, requests a second.
    """

    together: Pool | None
    prefill: Pool | None
    decode: Pool | None
    handoff: float
    rate: float

    @property
    def separate(self) -> bool:
        """Whether separate pools serve more."""
        return self.rate > (self.together.rate if self.together else 0.0)


def prefill_rate(service: float, limit: float) -> float:
    """Requests a second of a queue with fixed service time whose mean time to leave is within a limit.

    M/D/1 (Pollaczek and Khinchine; as DistServe has it): `D + r D^2 / (2 (1 - r D)) = limit`, so `r = 2 s / (D^2 + 2 s D)` with `s = limit - D`.

    Args:
        service: D, seconds of a prompt.
        limit: seconds; infinite gives 1 / D.
    """
    if limit == float("inf"):
        return 1 / service
    slack = limit - service
    return 0.0 if slack <= 0 else 2 * slack / (service**2 + 2 * slack * service)


def queueing(service: float, rate: float) -> float:
    """Seconds from arrival to the end in that queue; infinite where it doesn't keep up."""
    busy = rate * service
    return service + busy * service / (2 * (1 - busy)) if busy < 1 else float("inf")


def handoff_seconds(spec: ModelSpec, machine: Machine, workload: Workload, devices: int) -> float:
    """Time for a prompt's keys and values to move between meshes whose smaller has so many devices: all of them send at once, none of it hidden.

    Between hosts behind switches they share the network; chips of a torus send over one link each.
    """
    nbytes = spec.kept_per_token * workload.prompt * WIDTH[workload.kv_dtype]
    h = machine.hardware
    if machine.torus or machine.hosts == 1:
        rate = h.link_bytes_per_s / h.chip_devices
    else:
        rate = h.network_bytes_per_s / min(h.devices_per_host, machine.topology[1])
    return nbytes / (rate * devices)


class _Instances:
    """Times of instances of each size, of layouts that fit."""

    def __init__(self, spec: ModelSpec, machine: Machine, workload: Workload, search: Search, device_bytes: DeviceBytes):
        self.spec, self.machine, self.workload, self.search = spec, machine, workload, search
        self.device_bytes = device_bytes
        slo = search.slo
        self.ttft, self.tpot = (float("inf") if x is None else x for x in (slo.ttft, slo.tpot))

    def sizes(self) -> list[int]:
        return [n for n in range(1, self.machine.devices + 1) if self.machine.devices % n == 0]

    def of_size(self, devices: int) -> Iterator[tuple[Machine, Layout, Fits]]:
        """Layouts over exactly so many devices, as a machine of their own."""
        try:
            part = self.machine.of(devices)
            good = layouts(self.spec, part, dataclasses.replace(self.search, split=None))[0]
        except (ValueError, SplitError):
            return
        fits = Fits(self.spec, part, self.device_bytes)
        yield from ((part, layout, fits) for layout in good if layout.split.devices == devices)

    def prefill(self, devices: int, handoff: float) -> tuple[float, Split] | None:
        """The most requests a second, and the mesh."""
        best: tuple[float, Split] | None = None
        for part, layout, fits in self.of_size(devices):
            asked = dataclasses.replace(self.workload, rows=layout.shards)
            rate = layout.shards * prefill_rate(predict(self.spec, part, layout, asked).ttft, self.ttft - handoff)
            if rate > (best[0] if best else 0.0) and fits.over(layout, asked)[0] <= 0:
                best = rate, layout.split
        return best

    def decode(self, devices: int, together: bool) -> tuple[float, Split, int] | None:
        """The most requests a second, the mesh and its sequences; `together`: it reads the prompts too."""
        best: tuple[float, Split, int] | None = None
        known: Known = {}
        for part, layout, fits in self.of_size(devices):
            rows = tuple(layout.shards * 2**i for i in range(MOST_ROWS.bit_length()))
            most = fits.most(layout, [dataclasses.replace(self.workload, rows=n) for n in rows])
            for n in (n for n in rows if most is not None and n <= most.rows):
                rate = self._rate(part, layout, n, together, known)
                if rate > (best[0] if best else 0.0):
                    best = rate, layout.split, n
        return best

    def _rate(self, part: Machine, layout: Layout, rows: int, together: bool, known: Known) -> float:
        """Requests a second with so many under way: each takes `new_tokens` steps, and where prompts are read in between, waits for `rows` of them,
        each group of devices reading its own."""
        asked = dataclasses.replace(self.workload, rows=rows)
        times = predict(self.spec, part, layout, asked, known=known)
        stalls = rows / layout.shards * times.ttft / asked.new_tokens if together else 0.0
        tpot = times.tpot + stalls
        rate = rows / (asked.new_tokens * tpot)
        if tpot > self.tpot:
            return 0.0
        return rate if not together or queueing(times.ttft, rate / layout.shards) + times.tpot <= self.ttft else 0.0


def split_phases(
    spec: ModelSpec, machine: Machine, workload: Workload, search: Search, device_bytes: DeviceBytes,
    progress: Callable[[str], None] = lambda what: None,
) -> PhaseSplit:  # fmt: skip
    """The most requests a second within `search.slo`, with prompts and decoding on the same devices and on separate ones; see `search_plan`."""
    at = _Instances(spec, machine, workload, search, device_bytes)
    progress("prompts and decoding together")
    together = max(
        (Pool(machine.devices // n, found[1], found[2], machine.devices // n * found[0]) for n in at.sizes() if (found := at.decode(n, True))),
        key=lambda pool: pool.rate, default=None,
    )  # fmt: skip
    progress("decoding alone")
    decoders = {n: found for n in at.sizes() if (found := at.decode(n, False))}
    progress("prompts alone")
    best = PhaseSplit(together, None, None, 0.0, 0.0)
    for p in at.sizes():
        readers: dict[float, tuple[float, Split] | None] = {}
        for q, (rate, split, rows) in decoders.items():
            handoff = handoff_seconds(spec, machine, workload, min(p, q))
            if handoff not in readers:
                readers[handoff] = at.prefill(p, handoff)
            reader = readers[handoff]
            for n in range(1, (machine.devices - q) // p + 1) if reader else ():
                assert reader is not None
                m = (machine.devices - n * p) // q
                total = min(n * reader[0], m * rate)
                if total > best.rate:
                    best = PhaseSplit(together, Pool(n, reader[1], 0, n * reader[0]), Pool(m, split, rows, m * rate), handoff, total)
    return best
