"""What memory there is for experts, on the device and on the host, before any of it is asked for."""

from __future__ import annotations

import math
import os
from pathlib import Path

import jax

from jaxmoe.experts.source import check_host_memory, least_host_memory
from jaxmoe.offload import budget
from jaxmoe.spec import ModelSpec

RESERVE = 0.1
"""Share of an accelerator's memory that `auto` leaves for activations, temporaries and the runtime."""


def free_device_bytes(shapes: budget.ExpertShapes, tokens: int) -> int | None:
    """What the device has free for experts beside everything else; None where it does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    free = stats["bytes_limit"] * (1 - RESERVE) - stats.get("bytes_in_use", 0)
    return max(0, int(free) - shapes.dense_bytes - tokens * shapes.kv_bytes_per_token)


def check_fits_host(spec: ModelSpec, host_memory: str | None, all_bytes: int, all_resident: bool) -> None:
    """Refuses experts that don't fit into this machine's memory, while there is still a choice."""
    needed, least = all_bytes, least_host_memory(spec)
    if host_memory is not None:
        amount = budget.parse_memory(host_memory)
        if amount.kind == "auto":
            raise ValueError("--host-memory auto: give an amount, like 8GB or 50% of all experts")
        given = amount.resolve(all_bytes, None)
        check_host_memory(spec, given)
        needed = min(needed, given)
    free = available_host_memory()
    if all_resident or free is None or needed <= free:
        return
    short = f"{budget.format_bytes(needed)} of experts do not fit into the {budget.format_bytes(free)} of host memory that is available"
    percent = math.ceil(100 * max(free // 2, least) / all_bytes)
    if percent * all_bytes > 100 * min(free, needed):
        raise ValueError(f"{short}, and at least {budget.format_bytes(least)} are needed")
    raise ValueError(f"{short}: --host-memory {percent}% keeps that share of them and reads the others from disk")


def available_host_memory() -> int | None:
    """Bytes that new arrays can take without swapping, as the operating system says; None where it does not."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _reclaimable()
    except (ValueError, OSError, AttributeError):
        return None


def _reclaimable() -> int:
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * (int(fields["MemAvailable"].split()[0]) - int(fields["MemFree"].split()[0]))
    except (OSError, KeyError, ValueError):
        return 0
