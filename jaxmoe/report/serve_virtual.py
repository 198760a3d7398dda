"""Records of serving in virtual time: every comparison of `serve_compare` on recorded and drawn routing, each arm beside its controls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmoe.offload.trace import Trace
from jaxmoe.report import record
from jaxmoe.report.serve_compare import LINK, Found, Setup, goodput, grouping, offline, preemption, prefill
from jaxmoe.report.serve_routing import Routed, drawn, recorded

NAME = "serve_virtual"
REUSES = (0.0, 0.45, 0.8)
LAYERS = 16
"""Of drawn routing."""

COMPARISONS: dict[str, Callable[..., list[Found]]] = {
    "prefill": prefill, "grouping": grouping, "preemption": preemption, "offline": offline, "goodput": goodput,
    "goodput, tpot x 4": functools.partial(goodput, limits=(5.0, 4.0)),
}  # fmt: skip
RESIDENT = {"prefill": 0.5}
"""Share of the experts on the device; a quarter where not said."""
SEEDED = ("grouping", "offline", "goodput", "goodput, tpot x 4")
CONTROLS = {
    "prefill": ("whole", "chunked, 256"), "grouping": ("arrival", "one at a time"), "preemption": ("recompute",), "offline": ("arrival",),
    "goodput": ("chunked, recompute, fcfs",), "goodput, tpot x 4": ("chunked, recompute, fcfs",),
}  # fmt: skip
"""What the arms of each comparison are set beside."""
RATIOS = {
    "prefill": ("ttft", "gap", "prompt_bytes"), "grouping": ("distinct", "decode_bytes", "bytes_per_token", "per_token"),
    "preemption": ("resume", "resume_extra", "total", "expert_bytes"), "offline": ("computed", "total", "expert_bytes"), "goodput": ("goodput_rate",),
    "goodput, tpot x 4": ("goodput_rate",),
}  # fmt: skip
"""Which of their numbers."""


def ratios(what: str, found: Sequence[Found]) -> dict[str, dict[str, float]]:
    """The arms of a comparison beside its controls.

    Args:
        what: of `COMPARISONS`.
        found: its arms.

    Returns:
        By arm, "number / control" -> ratio; those whose control is 0 are left out.
    """
    numbers = {f.arm: {**f.counts, **f.seconds} for f in found}
    out: dict[str, dict[str, float]] = {}
    for arm, own in numbers.items():
        beside = [control for control in CONTROLS[what] if control in numbers and control != arm]
        out[arm] = {f"{name} / {c}": own[name] / numbers[c][name] for c in beside for name in RATIOS[what] if numbers[c][name]}
    return out


def virtual_records(
    traces: Mapping[str, Trace], seed: int = 0, reuses: Sequence[float] = REUSES, only: Sequence[str] = tuple(COMPARISONS), verify: bool = False,
    tell: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every comparison on every routing, in virtual time.

    Args:
        traces: recordings, by name; may be none.
        seed: of what is drawn: routing, order, lengths and arrivals.
        reuses: of drawn routing, two topics, 128 experts of which a token asks for 8, in `LAYERS` layers.
        only: which of `COMPARISONS`.
        verify: check every read and every invariant in every step; slower, and changes no number.
        tell: is told what comes next.

    Returns:
        A record (`jaxmoe.report.record`) an arm. `counters` holds counts, virtual seconds, and ratios by "number / control"; `bytes` what was copied.

    Raises:
        ValueError: there is no such comparison.
    """
    if unknown := [what for what in only if what not in COMPARISONS]:
        raise ValueError(f"there is no comparison {unknown[0]!r}: choose from {', '.join(COMPARISONS)}")
    routings = [recorded(trace, name) for name, trace in traces.items()]
    routings += [drawn(layers=LAYERS, reuse=reuse, seed=seed) for reuse in reuses]
    out = []
    for routed in routings:
        for what in only:
            tell(f"{routed.name}: {what}")
            setup = Setup(routed, RESIDENT.get(what, 0.25), verify)
            found = COMPARISONS[what](setup, seed=seed) if what in SEEDED else COMPARISONS[what](setup)
            beside = ratios(what, found)
            out += [_record(what, routed, f, beside[f.arm], seed) for f in found]
    return out


def _record(what: str, routed: Routed, found: Found, beside: Mapping[str, float], seed: int) -> dict[str, Any]:
    settings = {"what": what, "arm": found.arm, "clock": "virtual", "routing": routed.name, "source": routed.source, "reuse": round(routed.reuse, 4)}
    settings |= {"layers": routed.layers, "experts": routed.experts, "active": routed.table.shape[2], "link": LINK, **found.settings}
    bytes = {name: value for name, value in found.counts.items() if name.endswith("bytes")}
    counters = {name: value for name, value in found.counts.items() if name not in bytes} | dict(found.seconds) | dict(beside)
    bound = record.make_bound("link", LINK / 1e9, found.link * LINK / 1e9, "GB/s")
    return record.make_record(
        name=NAME, spec_hash="", settings=settings, seeds={"load": seed}, timings={}, compile_seconds=0.0, bytes=bytes, counters=counters, bound=bound
    )
