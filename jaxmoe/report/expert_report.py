"""What a run with streamed experts achieved: hits beside the optimum, bytes over the link beside its bounds, device bytes beside the resident ones.

Bounds are of two kinds: *overlapped* is the longer of the link's time and the memory's, *serial* is their sum. A percentage of one is its time over
the time that a step took.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np

from jaxmoe.engine.generate import Timings
from jaxmoe.engine.streaming import Streamed, foretell
from jaxmoe.experts import SlotBank
from jaxmoe.offload.budget import format_bytes
from jaxmoe.offload.replay import replay
from jaxmoe.offload.staging import Staging
from jaxmoe.residency import find_policy

LINK_REPEATS = 15
_NO_LINK: dict[str, Any] = {
    "prefetch": None, "lossy": None,
    "link_gbps": None, "link_emulated": False, "link_bound_fraction": None, "serial_bound_fraction": None, "stall": None,
}  # fmt: skip


def measure_link(record_bytes: int) -> float | None:
    """GB/s at which `device_put` moves one record from pinned host memory to the device; None on a CPU, which has no such link."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return None
    pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    record = jax.block_until_ready(jax.device_put(np.ones(record_bytes, np.uint8), pinned))
    times = []
    for _ in range(LINK_REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(jax.device_put(record, jax.sharding.SingleDeviceSharding(device)))
        times.append(time.perf_counter() - began)
    return record_bytes / statistics.median(times) / 1e9


def expert_report(streamed: Streamed, timings: Timings, memory_gbps: float, rows: int) -> dict[str, Any]:
    """The run in numbers, for people and for JSON.

    Args:
        streamed: what ran; its engine recorded the routing.
        timings: of the run.
        memory_gbps: what the device reads from its own memory, 10^9 bytes per second.
        rows: sequences in a step.

    Returns:
        `hit_rate`, `opt_hit_rate` and `regret` of decoding; `bytes_per_token`, sent ahead included; `prefill_bytes` and `prefill_bytes_ratio` (of the
        experts that were asked for and not there); `link_gbps` and `link_emulated`; `link_bound_fraction` (overlapped), `serial_bound_fraction`,
        `stall`; `device_bytes` and `resident_device_bytes`; `foretold`, what the budget promised; `prefetch`, bytes sent ahead by what became of
        them, and the gain that was measured; `lossy`, what was given up. What can't be known is None.
    """
    plan, bank = streamed.plan.budget, streamed.model.bank
    resident = plan.resident_bytes + streamed.model.bytes()["params"] + streamed.engine.kv_bytes()
    out: dict[str, Any] = {
        "expert_mode": "resident" if plan.all_resident else streamed.plan.mode, "expert_policy": streamed.plan.asked.policy,
        "pinned_experts": 0 if streamed.plan.pinned is None else int(streamed.plan.pinned.sum()),
        "slots": list(plan.slots), "staging": plan.staging, "device_bytes": resident - plan.resident_bytes + bank.device_bytes,
        "resident_device_bytes": resident,
    }  # fmt: skip
    if plan.all_resident:
        nothing_streams = {"hit_rate": 1.0, "opt_hit_rate": 1.0, "regret": 0.0, "bytes_per_token": 0.0, "prefill_bytes": 0}
        return out | nothing_streams | {"prefill_bytes_ratio": None, "foretold": None, **_NO_LINK}
    size, decode, prefill = bank.record_bytes, _totals(timings.decode_experts), _totals(timings.prefill_experts)
    shared = find_policy(streamed.plan.asked.policy).shared
    best = replay(streamed.engine.trace(), plan.slots, "opt", pool=shared).hit_rate if timings.decode_steps else None
    hit_rate = decode["hits"] / decode["requests"] if decode["requests"] else None
    missed = prefill["requests"] - prefill["hits"]
    out |= {
        "hit_rate": hit_rate,
        "opt_hit_rate": best,
        "regret": None if not best or hit_rate is None else 1 - hit_rate / best,
        "bytes_per_token": None,
        "prefill_bytes": prefill["loads"] * size,
        "prefill_bytes_ratio": prefill["loads"] / missed if missed else None,
    }
    out["prefetch"] = prefetched(streamed.staging, streamed.plan.asked.predictor)
    out["lossy"] = given_up(timings.decode_experts, bank, streamed.source)
    ahead = 0 if out["prefetch"] is None else sum(out["prefetch"][name] for name in ("useful", "late", "wasted", "held"))
    sent = ahead + (decode["loads"] * size if out["lossy"] is None else out["lossy"]["bytes"])
    if timings.decode_tokens:
        out["bytes_per_token"] = sent / timings.decode_tokens
    out |= _link(streamed, timings, sent, memory_gbps, rows)
    told = foretell(streamed.plan, streamed.model.spec, rows, streamed.engine.positions, out["link_gbps"])
    return out | {"foretold": told.splitlines()[1]}


def prefetched(staging: Staging | None, predictor: str | None) -> dict[str, Any] | None:
    """What became of the records that were sent ahead, in bytes, and what it brought; None without prefetching."""
    if staging is None:
        return None
    switch = staging.switch
    found: dict[str, Any] = dataclasses.asdict(staging.counters)
    return found | {"held": staging.held_bytes(), "predictor": predictor, "gain": switch.gain, "on": staging.on, "depth": staging.depth}


def given_up(counters: dict[str, np.ndarray], bank: SlotBank, source: Any) -> dict[str, Any] | None:
    """What a lossy run gave up: shares of token-expert pairs, and bytes of misses beside those that exactness would have brought; None if exact."""
    if bank.lossy is None:
        return None
    pairs = max(1, int(counters["pairs"].sum()))
    shares = {name: int(counters[name].sum()) / pairs for name in ("degraded", "skipped", "rerouted")}
    by_bits = counters["loads_by_bits"].sum(0)
    size = getattr(source, "bytes_at", lambda bits: bank.record_bytes)
    sent = sum(int(by_bits[bits]) * size(int(bits)) for bits in np.flatnonzero(by_bits))
    exact = int(counters["exact"].sum()) * bank.record_bytes
    return shares | {"bytes": sent, "exact_bytes": exact, "miss_byte_ratio": sent / exact if exact else None}


def _lossy_lines(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    shares = ", ".join(f"{100 * found[name]:.1f} % {name}" for name in ("degraded", "skipped", "rerouted"))
    ratio = "" if found["miss_byte_ratio"] is None else f"; {found['miss_byte_ratio']:.2f}x the bytes of exact misses"
    return [f"LOSSY: of all token-expert pairs {shares}{ratio}"]


def _totals(counters: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: int(counters[name].sum()) for name in ("requests", "hits", "loads")}


def _link(streamed: Streamed, timings: Timings, sent: int, memory_gbps: float, rows: int) -> dict[str, Any]:
    """Decoding beside its bounds. In a compiled step on a CPU nothing crosses a link, and no time is given as if."""
    emulated = streamed.link is not None and streamed.link.gbps is not None
    gbps = streamed.link.gbps if streamed.link is not None and emulated else measure_link(streamed.model.bank.record_bytes)
    out = {name: value for name, value in _NO_LINK.items() if name not in ("prefetch", "lossy")} | {"link_gbps": gbps, "link_emulated": emulated}
    if gbps is None or not timings.decode_steps:
        return out
    link = sent / gbps / 1e9
    memory = timings.decode_steps * streamed.model.bytes_per_token(rows) / memory_gbps / 1e9
    out["link_bound_fraction"] = max(link, memory) / timings.decode_seconds
    out["serial_bound_fraction"] = (link + memory) / timings.decode_seconds
    if streamed.link is not None:
        out["stall"] = timings.decode_stall_seconds / timings.decode_seconds
    return out


def _prefetch_lines(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    parts = ", ".join(f"{format_bytes(found[name])} {name}" for name in ("useful", "late", "wasted"))
    gain = "too few steps to judge it" if found["gain"] is None else f"steps {found['gain']:.2f}x as fast with it: {'on' if found['on'] else 'off'}"
    return [f"sent ahead by {found['predictor']}: {parts}; {gain}"]


def emulation_mark(found: dict[str, Any]) -> str:
    """What every line of a run with an emulated link ends with, for its times are no machine's; nothing for another run."""
    return ", with an EMULATED link" if found.get("link_emulated") else ""


def lines(found: dict[str, Any], experts: int) -> list[str]:
    """The report in a few lines for the terminal."""
    return [line + emulation_mark(found) for line in _lines(found, experts)]


def _lines(found: dict[str, Any], experts: int) -> list[str]:
    saved = 100 * (1 - found["device_bytes"] / found["resident_device_bytes"])
    here, resident = (format_bytes(found[name]) for name in ("device_bytes", "resident_device_bytes"))
    memory = f"device bytes {here} with KV, resident {resident} ({saved:.0f} % saved)"
    if found["expert_mode"] == "resident":
        return [f"experts: all {experts} of every layer on the device", memory]
    foretold = f"foretold from the budget: {found['foretold']}"
    low, high = min(found["slots"]), max(found["slots"])
    slots = f"{low}" if low == high else f"{low} to {high}"
    text = f"experts: {slots} of {experts} a layer and {found['staging']} in staging, {found['expert_policy']}, {found['expert_mode']}"
    if found.get("pinned_experts"):
        text += f", {found['pinned_experts']} pinned"
    if found["hit_rate"] is not None:
        text += f": {100 * found['hit_rate']:.1f} % hits"
        if found["opt_hit_rate"]:
            text += f", {100 * found['opt_hit_rate']:.1f} % at best (regret {100 * found['regret']:.0f} %)"
        text += f", {format_bytes(round(found['bytes_per_token']))} a token over the link"
    out = [text]
    ratio = found["prefill_bytes_ratio"]
    out.append(f"prefill brought {format_bytes(found['prefill_bytes'])}" + ("" if ratio is None else f", {ratio:.2f}x the experts it lacked"))
    out += _prefetch_lines(found.get("prefetch")) + _lossy_lines(found.get("lossy"))
    if found["link_gbps"] is None:
        return [*out, "host and device are one memory here: bytes are counted, and no speed of a link is claimed", memory, foretold]
    link = f"link of {found['link_gbps']:.3g} GB/s{'' if found['link_emulated'] else ' measured'}"
    if found["link_bound_fraction"] is not None:
        bounds = f"{100 * found['link_bound_fraction']:.0f} % of the overlapped bound, {100 * found['serial_bound_fraction']:.0f} % of the serial one"
        stall = "" if found["stall"] is None else f", stalled {100 * found['stall']:.0f} % of the time"
        link += f": {bounds}{stall}"
    return [*out, link, memory, foretold]
