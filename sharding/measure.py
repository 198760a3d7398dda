"""This machine's own numbers in the place of the data sheet's: what copies, products, transfers and launches reach here.

A few timed programs, well under half a minute on a CPU. What isn't measured (network, topology) stays as the nearest known device has it.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from sharding.hardware import CHIPS, Backend, Hardware
from sharding.split import Split

KINDS = {
    "A100-SXM4-40GB": "a100-40gb", "A100": "a100-80gb", "H100": "h100", "H200": "h200", "B200": "b200", "RTX 4090": "rtx4090", "RTX 5090": "rtx5090",
    "L4": "l4", "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x",
}  # fmt: skip
"""Known devices by a part of what jax calls them; the first that fits."""

SECONDS = 0.4
"""Each program is repeated for so long."""

_CPU = Hardware("cpu", "cpu", 8 * 2**30, 8 * 2**30, 1e10, 1e11, 1e11, 1e10, 1e10, 8 * 2**30, devices_per_host=1024)


def known(kind: str) -> Hardware | None:
    """The device that jax calls `kind`, as its data sheet has it."""
    return next((CHIPS[name] for part, name in KINDS.items() if part in kind), None)


def measure(progress: Callable[[str], None] = lambda what: None, seconds: float = SECONDS) -> Hardware:
    """Measures this process's first device.

    Args:
        progress: told what is measured.
        seconds: each measurement repeats for so long.

    Returns:
        A device called 'measured: ...'.
    """
    device = jax.devices()[0]
    backend: Backend = "cpu" if device.platform == "cpu" else "tpu" if device.platform == "tpu" else "gpu"
    base = known(device.device_kind) or dataclasses.replace(_CPU, backend=backend)
    on_cpu = device.platform == "cpu"
    progress("memory")
    size, usable = _memory(device, base)
    progress("memory bandwidth")
    hbm = memory_rate(seconds, 2**24 if on_cpu else 2**27)
    found: dict[str, Any] = {"memory_bytes": size, "usable_bytes": min(size, usable), "hbm_bytes_per_s": hbm}
    for field, dtype in (("bf16", jnp.bfloat16), ("fp32", jnp.float32)):
        progress(f"products of {np.dtype(dtype).name}")
        found[field] = matmul_rate(dtype, seconds, 512 if on_cpu else 4096)
    progress("host link")
    found["host_link_bytes_per_s"] = hbm if on_cpu else host_rate(seconds)
    progress("launch")
    found["launch_s"] = launch_seconds(seconds)
    if jax.local_device_count() > 1 and not base.dims:
        progress("links")
        found["link_bytes_per_s"] = link_rate(seconds, 2**20 if on_cpu else 2**25)
    host = _meminfo("MemTotal")
    found |= {"host_memory_bytes": host} if host else {}
    return dataclasses.replace(base, name=f"measured: {device.device_kind.lower()}", fp8=None, int8=None, **found)


def _each(f: Callable[[], Any], seconds: float) -> float:
    """The median time of a call, without the first."""
    jax.block_until_ready(f())
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        at = time.perf_counter()
        jax.block_until_ready(f())
        times.append(time.perf_counter() - at)
    return statistics.median(times)


def memory_rate(seconds: float = SECONDS, n: int = 2**24) -> float:
    """Bytes a second of `a + 2 b` over `n` numbers: two arrays are read and one is written (STREAM's triad)."""
    a, b = jnp.ones(n, jnp.float32), jnp.ones(n, jnp.float32)
    triad = jax.jit(lambda a, b: a + 2 * b)
    return 3 * 4 * n / _each(lambda: triad(a, b), seconds)


def matmul_rate(dtype: Any, seconds: float = SECONDS, n: int = 512) -> float:
    """Operations a second of a product of two n x n matrices, at the highest precision where they are float32."""
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    x = jnp.ones((n, n), dtype)
    product = jax.jit(lambda x: jnp.dot(x, x, precision=exact))
    return 2 * n**3 / _each(lambda: product(x), seconds)


def host_rate(seconds: float = SECONDS, n: int = 2**26) -> float:
    """Bytes a second between the host's memory and the device: the slower of the two directions."""
    device = jax.devices()[0]
    here = np.ones(n, np.uint8)
    there = jax.device_put(here, device)
    bump = jax.jit(lambda x: x + 1)
    up = _each(lambda: jax.device_put(here, device), seconds)
    # An array keeps what it has been read as: each reading needs a new one, whose making is taken off again.
    down = _each(lambda: np.asarray(bump(there)), seconds) - _each(lambda: bump(there), seconds)
    return n / max(up, down)


def launch_seconds(seconds: float = SECONDS) -> float:
    """The time of a program that does nothing, from call to result."""
    x = jnp.zeros(8)
    nothing = jax.jit(lambda x: x + 1)
    return _each(lambda: nothing(x), seconds)


def link_rate(seconds: float = SECONDS, n: int = 2**22) -> float:
    """Bytes a second that a device sends in a sum over all devices of this process, by the closed form of `collective_seconds`."""
    devices = jax.local_devices()
    mesh = Split(data=len(devices)).mesh(devices)
    over = PartitionSpec("data")
    f = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=over, out_specs=PartitionSpec(), check_vma=False))
    x = jax.device_put(np.ones((len(devices), n), np.float32), jax.sharding.NamedSharding(mesh, over))
    return 2 * (len(devices) - 1) / len(devices) * 4 * n / _each(lambda: f(x), seconds)


def _memory(device: Any, base: Hardware) -> tuple[int, int]:
    """Bytes of the device and what a program can have of them."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return max(base.memory_bytes, limit), limit
    size, free = _meminfo("MemTotal"), _meminfo("MemAvailable")
    return (size, free) if size and free else (base.memory_bytes, base.usable_bytes)


def _meminfo(field: str) -> int | None:
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines[field].split()[0])
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
