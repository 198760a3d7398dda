"""What a run on a mesh achieved: how the model was split, what each device holds, and how often streamed experts were there."""

from __future__ import annotations

from typing import Any

from jaxmoe.engine.generate import Engine, Timings
from jaxmoe.engine.switching import Switching
from jaxmoe.experts import SlotBank
from jaxmoe.offload.budget import format_bytes


def mesh_report(engine: Engine, timings: Timings) -> dict[str, Any]:
    """The run in numbers, for people and for JSON.

    Returns:
        `split`; `devices`; `device_bytes` by kind, of each device; where steps switch exchanges, `exchanges`, how many went by each; and where
        experts are streamed, `slots`, the `hit_rate` of decoding over all devices' own experts, and `bytes_per_token` over all their links.
    """
    model, decode = engine.model, timings.decode_experts
    held = model.bytes() | {"kv": engine.kv_bytes()}
    out: dict[str, Any] = {"split": str(model.on.layout.split), "devices": model.on.layout.split.devices, "device_bytes": held}
    if isinstance(engine.programs, Switching):
        out["exchanges"] = dict(engine.programs.used)
    if isinstance(model.bank, SlotBank):
        requests, hits, loads = (int(decode[name].sum()) for name in ("requests", "hits", "loads"))
        out["slots"] = list(model.bank.slots)
        out["hit_rate"] = hits / requests if requests else None
        out["bytes_per_token"] = loads * model.bank.record_bytes / timings.decode_tokens if timings.decode_tokens else None
    return out


def lines(found: dict[str, Any]) -> list[str]:
    """The report for people."""
    held = ", ".join(f"{name} {format_bytes(n)}" for name, n in found["device_bytes"].items())
    out = [f"{found['devices']} devices ({found['split']}); each holds {held}"]
    if "exchanges" in found:
        out.append("steps by exchange: " + ", ".join(f"{name} {n}" for name, n in sorted(found["exchanges"].items())))
    if found.get("hit_rate") is not None:
        slots = sorted(set(found["slots"]))
        shown = str(slots[0]) if len(slots) == 1 else f"{slots[0]} to {slots[-1]}"
        brought = format_bytes(int(found["bytes_per_token"]))
        out.append(f"{shown} slots a layer on each device: {100 * found['hit_rate']:.1f} % hits, {brought} a token over all links")
    return out
