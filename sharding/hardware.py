"""Accelerators and machines made of them: what memory, arithmetic and links can do at most, and what way a collective takes.

Numbers are the vendors' own, per device in the sense of `jax.devices()`, in bytes and seconds. `sharding.measure` replaces them by a machine's own.
It knows no model.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from sharding.split import AXES, Split

GB, GIB, TERA = 10**9, 2**30, 10**12
JAX_SHARE = 0.75
"""Of a GPU's memory that jax takes, and never more, unless XLA_CLIENT_MEM_FRACTION says otherwise (docs.jax.dev, GPU memory allocation)."""

Backend = Literal["tpu", "gpu", "cpu"]


class Level(NamedTuple):
    """One stage of a collective that goes over several kinds of links.

    Attributes:
        size: devices that take part.
        bytes_per_s: what each can send: over a switch; on a line in one direction; on a ring in both.
        hop_s, hops: the time of a hop, and how many lie between the two that are furthest apart.
        kind: how they are joined.
    """

    size: int
    bytes_per_s: float
    hop_s: float
    hops: int
    kind: Literal["switch", "line", "ring"]


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of device and how it is connected; rates are upper bounds, per device and direction unless said otherwise.

    Attributes:
        name: as `parse_hardware` reads it.
        backend: which of the kernels run.
        memory_bytes: of a device.
        usable_bytes: what of it a program can have.
        hbm_bytes_per_s: of device memory, reading and writing together.
        bf16, fp8, int8, fp32: multiply-adds count two; None where there is no such unit. `fp32` is with float32 products, as
            `jax.lax.Precision.HIGHEST` has them.
        dims: of the torus that chips form; 0 for a switch.
        link_bytes_per_s: of one link in one direction (torus), or of all that a device sends (switch).
        ring_multiple: a torus' dimension closes to a ring where its size is a multiple of this.
        link_hop_s: latency of a hop.
        chip_devices: devices that share a chip and its links.
        chip_bytes_per_s: between those.
        network_bytes_per_s: per host, between hosts that no torus joins.
        network_hop_s: its latency.
        host_link_bytes_per_s: between a host's memory and one device, as copies reach it.
        devices_per_host: at most.
        host_memory_bytes: of a typical host.
        launch_s: of a program.
        price: of a device and hour, in whatever unit the user has; None if it isn't given.

    Raises:
        ValueError: a number that isn't positive; the message names the field.
    """

    name: str
    backend: Backend
    memory_bytes: int
    usable_bytes: int
    hbm_bytes_per_s: float
    bf16: float
    fp32: float
    link_bytes_per_s: float
    host_link_bytes_per_s: float
    host_memory_bytes: int
    fp8: float | None = None
    int8: float | None = None
    dims: int = 0
    ring_multiple: int = 0
    link_hop_s: float = 1e-6
    chip_devices: int = 1
    chip_bytes_per_s: float | None = None
    network_bytes_per_s: float = 12.5e9
    network_hop_s: float = 5e-6
    devices_per_host: int = 8
    launch_s: float = 1e-4
    price: float | None = None

    def __post_init__(self):
        if self.backend not in ("tpu", "gpu", "cpu"):
            raise ValueError(f"hardware.backend = {self.backend!r}: choose from tpu, gpu, cpu")
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"hardware.name = {self.name!r}: a name is needed")
        may_be_zero = ("dims", "ring_multiple", "link_hop_s", "network_hop_s", "launch_s", "price")
        for field in dataclasses.fields(self):
            x = getattr(self, field.name)
            if field.name in ("name", "backend") or (x is None and field.default is None):
                continue
            if isinstance(x, bool) or not isinstance(x, int | float) or not (0 <= x < math.inf) or (x == 0 and field.name not in may_be_zero):
                raise ValueError(f"hardware.{field.name} = {x!r}: a positive number is needed")
        if self.usable_bytes > self.memory_bytes:
            raise ValueError(f"hardware.usable_bytes = {self.usable_bytes}: more than memory_bytes = {self.memory_bytes}")

    def flops(self, dtype: str) -> float:
        """Operations per second in products of numbers of `dtype`.

        Raises:
            ValueError: there is no unit for it.
        """
        rate = {"bfloat16": self.bf16, "float32": self.fp32, "float8": self.fp8, "int8": self.int8}.get(dtype)
        if rate is None:
            raise ValueError(f"dtype = {dtype!r}: {self.name} has no rate for it")
        return rate

    def with_memory(self, usable: int) -> Hardware:
        """The same with so many bytes for a program, such as another setting of jax or another variant of the device leaves."""
        return dataclasses.replace(self, usable_bytes=usable, memory_bytes=max(usable, self.memory_bytes))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `hardware_from_json` is the inverse."""
        return dataclasses.asdict(self)


def hardware_from_json(data: Any) -> Hardware:
    """The inverse of `Hardware.to_json`.

    Raises:
        ValueError: a field that is missing or isn't known, or as the class.
    """
    if not isinstance(data, dict):
        raise ValueError(f"hardware = {data!r}: an object with the fields of a device is needed")
    fields = {f.name: f for f in dataclasses.fields(Hardware)}
    for name in data:
        if name not in fields:
            raise ValueError(f"hardware.{name} is not known: choose from {', '.join(fields)}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in data:
            raise ValueError(f"hardware.{name} is missing")
    return Hardware(**data)


def _gpu(name: str, memory: int, hbm: float, bf16: float, fp32: float, fp8: float | None, int8: float, link: float, host: float, **more) -> Hardware:
    return Hardware(
        name, "gpu", memory, int(memory * JAX_SHARE), hbm * GB, bf16 * TERA, fp32 * TERA, link * GB, host * GB, more.pop("host_memory", 2 * 10**12),
        None if fp8 is None else fp8 * TERA, int8 * TERA, **more,
    )  # fmt: skip


def _tpu(
    name: str, memory: int, usable: float, hbm: float, bf16: float, fp8: float | None, int8: float | None, link: float, host: float, **more
) -> Hardware:  # fmt: skip
    # A product of float32 numbers is six of bfloat16 ones at the highest precision (jax.lax.Precision).
    return Hardware(
        name, "tpu", memory, int(usable * GIB), hbm * GB, bf16 * TERA, bf16 / 6 * TERA, link * GB, host * GB, more.pop("host_memory"),
        None if fp8 is None else fp8 * TERA, None if int8 is None else int8 * TERA, **more,
    )  # fmt: skip


# GPUs. Dense rates (data sheets print twice as much, "with sparsity"), products summed in float32; NVLink's printed number is both directions. Copies
# from the host reach 25 GB/s on PCIe 4 x16 and 50 on PCIe 5 x16 (32 and 64 nominal). Bytes: what CUDA reports of an H100 and of 24 and 32 GiB cards,
# else what is printed. Network: the eight adapters of NVIDIA's DGX systems, 200 (A100) or 400 Gb/s; of single cards an assumption. Launch and hop
# times are assumptions: `measure` has a machine's own.
# TPUs. cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: the tables' rates per chip. The printed inter-chip bandwidth is all links in both
# directions: per link and direction, it is divided by 2 * ports. v4's 50 GB/s a link: arXiv:2304.01433, table 4 (not checked again). What a program
# can have is what libtpu says of one that is too large ("exceeds available HBM (15.75G)"; jax 0.10.2). v4 and tpu7x show two devices a chip there,
# each with half of all. Host links are unpublished but for v6e's PCIe 5: 15 GB/s is assumed. Hop: about 1 us, as JAX's scaling guide has it
# (not measured). A ring closes at 16 chips (v5e, v6e) and at multiples of 4 (the others).
CHIPS: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        _gpu("a100-40gb", 40 * GIB, 1555, 312, 19.5, None, 624, 300, 25, network_bytes_per_s=200e9, host_memory=10**12),
        _gpu("a100-80gb", 80 * GIB, 2039, 312, 19.5, None, 624, 300, 25, network_bytes_per_s=200e9),
        _gpu("h100", 84_942_979_072, 3350, 989, 67, 1979, 1979, 450, 50, network_bytes_per_s=400e9),
        _gpu("h200", 141 * GB, 4800, 989, 67, 1979, 1979, 450, 50, network_bytes_per_s=400e9),
        _gpu("b200", 180 * GB, 8000, 2250, 80, 4500, 4500, 900, 50, network_bytes_per_s=400e9),
        _gpu("rtx4090", 24 * GIB, 1008, 165.2, 82.6, 330.3, 660.6, 25, 25, network_bytes_per_s=1.25e9, host_memory=64 * GIB),
        _gpu("rtx5090", 32 * GIB, 1792, 209.5, 104.8, 419, 838, 50, 50, network_bytes_per_s=1.25e9, host_memory=64 * GIB),
        _gpu("l4", 24 * GIB, 300, 121, 30.3, 242, 242, 25, 25, host_memory=192 * GIB),
        _tpu(
            "v4", 16 * GIB, 15.25, 600, 137.5, None, 137.5, 50, 15, dims=3, ring_multiple=4, chip_devices=2, chip_bytes_per_s=300e9,
            host_memory=400 * GB,
        ),
        _tpu("v5e", 16 * GIB, 15.75, 819, 197, None, 393, 50, 15, dims=2, ring_multiple=16, network_bytes_per_s=25e9, host_memory=512 * GIB),
        _tpu(
            "v5p", 96 * GIB, 95.74, 2765, 459, 459, 918, 100, 15, dims=3, ring_multiple=4, network_bytes_per_s=25e9, devices_per_host=4,
            host_memory=448 * GB,
        ),
        _tpu("v6e", 32 * GIB, 31.25, 1638, 918, 918, 1836, 100, 32, dims=2, ring_multiple=16, network_bytes_per_s=100e9, host_memory=1536 * GIB),
        _tpu(
            "tpu7x", 96 * GIB, 94.75, 3690, 1153.5, 2307, None, 100, 15, dims=3, ring_multiple=4, chip_devices=2, chip_bytes_per_s=600e9,
            network_bytes_per_s=50e9, host_memory=960 * GB,
        ),
    )
}  # fmt: skip
"""Every device that is known, by its name."""

ALIASES = {"a100": "a100-80gb", "ironwood": "tpu7x", "v7x": "tpu7x", "trillium": "v6e", "h100-sxm": "h100"}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices and how they stand.

    Attributes:
        hardware: of each device.
        topology: chips along each dimension of a torus; hosts and devices of each, behind a switch.
    """

    hardware: Hardware
    topology: tuple[int, ...]

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self.topology) * (self.hardware.chip_devices if self.hardware.dims else 1)

    @property
    def hosts(self) -> int:
        """How many there are; the last may be partly used."""
        return -(-self.devices // self.hardware.devices_per_host) if self.hardware.dims else self.topology[0]

    @property
    def per_host(self) -> int:
        """Devices of a host, all of them where there are fewer than it has room for."""
        return min(self.hardware.devices_per_host, self.devices if self.torus else self.topology[1])

    @property
    def torus(self) -> bool:
        """Whether chips have links to their neighbours, rather than a switch."""
        return self.hardware.dims > 0

    def of(self, devices: int) -> Machine:
        """A machine of so many of these devices, as compact as it gets: to see what more would bring.

        Raises:
            ValueError: chips don't divide so, or there is no torus of so many.
        """
        h = self.hardware
        if not self.torus:
            inside = min(devices, h.devices_per_host)
            if devices % inside:
                raise ValueError(f"devices = {devices}: hosts have {h.devices_per_host} of {h.name}, use a multiple")
            return Machine(h, (devices // inside, inside))
        if devices % h.chip_devices:
            raise ValueError(f"devices = {devices}: a chip of {h.name} is {h.chip_devices}, use a multiple")
        try:
            shape = compact(devices // h.chip_devices, h.dims)
        except ValueError:
            raise ValueError(f"devices = {devices}: there is no slice of so many of {h.name}, use a power of two") from None
        return Machine(h, _torus(h, shape, f"{h.name}:{'x'.join(map(str, shape))}"))

    def levels(self, split: Split, axes: Sequence[str]) -> tuple[Level, ...]:
        """The links that a collective over some axes of a mesh goes over, nearest first.

        The mesh's innermost axis takes neighbours, as `mesh_utils.create_device_mesh` would lay it: first the devices of a chip, then the
        torus' first dimension, and so on; behind switches, first the devices of a host.
        """
        physical = self._physical()
        used = 1  # devices that inner axes take of the dimension at hand
        at = 0
        out: list[Level] = []
        for axis in reversed(AXES):
            left = getattr(split, axis)
            while left > 1 and at < len(physical):
                size, kind = physical[at]
                room = size // used
                part = left if left <= room else math.gcd(left, room)
                if part > 1 and axis in axes:
                    out.append(self._level(kind, part, used, size))
                used, left = used * part, left // part
                if used >= size or left > 1:
                    at, used = at + 1, 1
            if left > 1 and axis in axes:
                out.append(self._level(physical[-1][1], left, 1, left * 2))  # what finds no room goes the slowest way
        return tuple(out)

    def _physical(self) -> list[tuple[int, str]]:
        """Sizes and kinds of links, nearest first."""
        if not self.torus:
            hosts, inside = self.topology
            found = [(inside, "switch"), (hosts, "network")]
        else:
            found = [(self.hardware.chip_devices, "chip"), *((size, "torus") for size in self.topology)]
        return [(size, kind) for size, kind in found if size > 1] or found[:1]

    def _level(self, kind: str, part: int, stride: int, size: int) -> Level:
        h = self.hardware
        if kind == "switch":
            return Level(part, h.link_bytes_per_s, h.link_hop_s, 1, "switch")
        if kind == "network":  # every device of a host sends at once
            return Level(part, h.network_bytes_per_s / min(h.devices_per_host, self.topology[1]), h.network_hop_s, 1, "switch")
        if kind == "chip":
            return Level(part, h.chip_bytes_per_s or h.link_bytes_per_s, h.link_hop_s, 1, "switch")
        closed = part * stride == size and size % h.ring_multiple == 0
        # A chip's devices share its links, and so do the groups that lie between each other where neighbours belong to another axis.
        rate = h.link_bytes_per_s * (2 if closed else 1) / stride / h.chip_devices
        return Level(part, rate, h.link_hop_s, (part // 2 if closed else part - 1) * stride, "ring" if closed else "line")

    def __str__(self) -> str:
        """As `parse_hardware` reads it."""
        if not self.torus and self.topology[0] == 1:
            return self.hardware.name if self.topology[1] == 1 else f"{self.hardware.name}:{self.topology[1]}"
        return f"{self.hardware.name}:{'x'.join(map(str, self.topology))}"


def compact(chips: int, dims: int) -> tuple[int, ...]:
    """The sizes, in rising order, of the torus of so many chips whose largest dimension is smallest.

    Raises:
        ValueError: there is none.
    """
    found = [s for s in _shapes(chips, dims) if all(_side(n, dims) for n in s)]
    if not found:
        raise ValueError(f"chips = {chips}: there is no torus of {dims} dimensions of so many, use a power of two")
    return min(found, key=lambda s: (s[-1], s))


def _side(n: int, dims: int) -> bool:
    """Whether slices have a side of n chips: powers of two in two dimensions; 1, 2 and whole cubes of 4 in three (cloud.google.com/tpu/docs)."""
    return n & (n - 1) == 0 if dims == 2 else n in (1, 2) or n % 4 == 0


def _shapes(n: int, dims: int, least: int = 1) -> list[tuple[int, ...]]:
    if dims == 1:
        return [(n,)] if n >= least else []
    return [(d, *rest) for d in range(least, n + 1) if n % d == 0 for rest in _shapes(n // d, dims - 1, d)]


def parse_hardware(text: str, hardware: Hardware | None = None) -> Machine:
    """A machine from 'v5e:4x4', 'v5p:2x2x1', 'h100', 'h100:8' or 'h100:2x8' (hosts x devices of each).

    Args:
        text: as above; with `hardware`, only what comes after the colon counts.
        hardware: a device that has no name here, such as a measured one.

    Raises:
        ValueError: a name that isn't known, or a number of dimensions or chips that there can't be.
    """
    name, colon, shape = text.strip().lower().partition(":")
    if hardware is None:
        hardware = CHIPS.get(ALIASES.get(name, name))
    if hardware is None:
        raise ValueError(f"hardware = {text!r}: {name!r} is not known, choose from {', '.join((*CHIPS, *ALIASES))}")
    if colon and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(f"hardware = {text!r}: write how many, like {hardware.name}:{_example(hardware)}")
    sizes = tuple(map(int, shape.split("x"))) if colon else (1,)
    return Machine(hardware, _torus(hardware, sizes, text) if hardware.dims else _hosts(hardware, sizes, text))


def _example(hardware: Hardware) -> str:
    return {0: "8", 2: "4x4"}.get(hardware.dims, "2x2x1")


def _torus(hardware: Hardware, sizes: tuple[int, ...], text: str) -> tuple[int, ...]:
    if sizes == (1,):
        return (1,) * hardware.dims
    if len(sizes) != hardware.dims:
        raise ValueError(f"hardware = {text!r}: chips of {hardware.name} form a torus of {hardware.dims} dimensions, like {_example(hardware)}")
    most = {2: 256, 3: 9216}[hardware.dims]  # the pods of v5e and v6e, and of the largest of the others
    if math.prod(sizes) > most or (hardware.dims == 2 and max(sizes) > 16):
        raise ValueError(f"hardware = {text!r}: a pod of {hardware.name} has at most {'16x16' if hardware.dims == 2 else most} chips")
    if not all(_side(n, hardware.dims) for n in sizes):
        near = " or ".join(f"{hardware.name}:{'x'.join(str(_nearest(n, hardware.dims, way)) for n in sizes)}" for way in (-1, 1))
        sides = "1, 2, 4, 8 or 16" if hardware.dims == 2 else "1, 2 or a multiple of 4"
        raise ValueError(f"hardware = {text!r}: sides of a slice of {hardware.name} are {sides} chips, use {near}")
    return sizes


def _nearest(n: int, dims: int, way: int) -> int:
    while not _side(n, dims):
        n += way
    return n


def _hosts(hardware: Hardware, sizes: tuple[int, ...], text: str) -> tuple[int, ...]:
    if len(sizes) > 2:
        raise ValueError(f"hardware = {text!r}: write {hardware.name}:DEVICES, or HOSTSxDEVICES")
    hosts, inside = (1, *sizes)[-2:]
    if inside > hardware.devices_per_host:
        most = hardware.devices_per_host
        at = f"{hardware.name}:{-(-inside // most)}x{most}"
        raise ValueError(f"hardware = {text!r}: a host has at most {most} of {hardware.name}; for more hosts write {at}")
    return hosts, inside
