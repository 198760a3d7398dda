"""Tables of docs/planning.md, from records: predictions beside compilers' own numbers, placements, and what attention over split positions sends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scipy import stats

from jaxmoe.report.record import table

METHODS = ("contiguous", "random", "moetuner", "exflow", "combined", "eplb")
"""The order of rows of one trace."""


def plan_bytes(records: Sequence[dict]) -> str:
    """A row for each compiled step that formulas were fitted to: predicted bytes of a device beside the compiler's."""
    return _bytes(_plans(records, held_out=False))


def plan_held_out(records: Sequence[dict]) -> str:
    """The same of those that nothing was fitted to."""
    rows = _plans(records, held_out=True)
    every = [r for r in records if r["name"] == "plans"]
    return f"{_bytes(rows)}\n\n{_rank(rows)}\n{_rank(every, 'of both tables')}" if rows else ""


def _plans(records: Sequence[dict], held_out: bool) -> list[dict]:
    return [r for r in records if r["name"] == "plans" and r["settings"].get("held_out", False) == held_out]


def _bytes(rows: list[dict]) -> str:
    if not rows:
        return ""
    rows.sort(key=lambda r: tuple(r["settings"][name] for name in ("target", "model", "split", "phase")))
    shown = []
    for r in rows:
        s = r["settings"]
        work = s["workload"]
        slots = "all" if work["slots"] is None else f"{work['slots']} slots"
        total = {"predicted": f"{s['predicted']['total'] / 1e9:.3f}", "compiled": f"{r['bytes']['total'] / 1e9:.3f}"}
        host = f"{r['bytes']['host'] / 1e9:.1f}" if r["bytes"]["host"] else ""
        more = {"split": s["split"] or "-", "experts": slots, "rows": work["rows"], "host": host}
        shown.append(r | {"shown": total | more})
    columns = [
        ("machine", "settings.target"), ("model", "settings.model"), ("split", "shown.split"), ("step", "settings.phase"),
        ("sequences", "shown.rows", "d"), ("experts", "shown.experts"), ("predicted GB", "shown.predicted", ">"),
        ("compiled GB", "shown.compiled", ">"), ("host GB", "shown.host", ">"), ("off by %", "counters.error_percent", "+.1f"),
    ]  # fmt: skip
    errors = sorted(abs(r["counters"]["error_percent"]) for r in rows)
    within = sum(e <= 5 for e in errors)
    median = errors[len(errors) // 2]
    return table(shown, columns) + f"\n\n{within} of {len(errors)} within 5 %; the worst is off by {errors[-1]:.1f} %, the median by {median:.2f} %."


def plan_rank(records: Sequence[dict]) -> str:
    """How predicted step times of TPU programs rank beside XLA's own estimates."""
    return _rank(_plans(records, held_out=False))


def _rank(rows: list[dict], where: str = "above") -> str:
    pairs = [
        (r["settings"]["predicted_seconds"], r["settings"]["optimal_seconds"])
        for r in rows
        if r["settings"].get("optimal_seconds") is not None and r["settings"]["workload"]["slots"] is None  # a loop over missing experts counts once
    ]
    if len(pairs) < 3:
        return ""
    rank = float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    which = f"Over the {len(pairs)} TPU programs {where} with all experts resident"
    return f"{which}, Spearman's rank correlation of predicted seconds and XLA's `optimal_seconds` is {rank:.3f}."


def placement(records: Sequence[dict]) -> str:
    """Placements fitted on one half of a trace and judged on the other; the mean of both directions."""
    rows: list[dict[str, Any]] = []
    for r in records:
        if r["name"] != "placement":
            continue
        plain = [x for x in r["counters"]["rows"] if not x["options"]]
        for devices in sorted({x["devices"] for x in plain}):
            for method in METHODS:
                own = [x for x in plain if x["devices"] == devices and x["method"] == method]
                if own:
                    rows.append({"shown": _judged(r["settings"]["model"], devices, method, own)})
    columns = [
        ("trace", "shown.trace"), ("devices", "shown.devices", "d"), ("placement", "shown.method"), ("fullest over mean", "shown.peak", ".2f"),
        ("hops %", "shown.hops", ".1f"), ("devices a token", "shown.devices_a_token", ".2f"), ("solver s", "shown.seconds", ">"),
        ("gaps %", "shown.gaps", ">"),
    ]  # fmt: skip
    return table(rows, columns) if rows else ""


def _judged(trace: str, devices: int, method: str, own: list[dict]) -> dict[str, Any]:
    def mean(name: str) -> float:
        return sum(x[name] for x in own) / len(own)

    solved = [x for x in own if x["seconds"] is not None]
    stages = [stage for x in solved for stage in x["stages"]]
    worst: dict[str, float] = {}
    for stage in stages:
        if stage["gap"] is not None:
            worst[stage["name"]] = max(worst.get(stage["name"], 0.0), stage["gap"])
    return {
        "trace": trace, "devices": devices, "method": method, "peak": mean("max_over_mean"), "hops": 100 * mean("hops"),
        "devices_a_token": mean("devices_a_token"), "seconds": f"{max(x['seconds'] for x in solved):.1f}" if solved else "",
        "gaps": ", ".join(f"{100 * gap:.0f}" for gap in worst.values()),
    }  # fmt: skip


def ring_attention(records: Sequence[dict]) -> str:
    """What one layer's attention sends over eight devices, by what travels, and from how many keys a query on queries send less."""
    rows = sorted((r for r in records if r["name"] == "ring_attention"), key=lambda r: r["settings"]["model"])
    shown = []
    for r in rows:
        b, c = r["bytes"], r["counters"]
        sent = {way: f"{b[f'{way}_sent'] / 1e6:.2f}" for way in ("ring", "token", "direct")}
        errors = max(c[f"{way}_error"] for way in ("ring", "token", "direct"))
        shown.append(r | {"shown": sent | {"error": f"{errors:.0e}"}})
    columns = [
        ("model", "settings.model"), ("heads to a key", "counters.group", ".0f"), ("keys travel MB", "shown.ring", ">"),
        ("queries travel MB", "shown.token", ">"), ("published TokenRing MB", "shown.direct", ">"),
        ("queries from keys a query", "counters.keys_a_query_even", ".0f"),
        ("contiguous work", "counters.contiguous_work", ".2f"), ("zig-zag work", "counters.zigzag_runs_work", ".2f"), ("error", "shown.error", ">"),
    ]  # fmt: skip
    return table(shown, columns) if rows else ""


def tables(records: Sequence[dict]) -> dict[str, str]:
    """The page's tables by marker; those without records are left out."""
    makers = {
        "plan_bytes": plan_bytes, "plan_rank": plan_rank, "plan_held_out": plan_held_out, "placement": placement, "ring_attention": ring_attention,
    }  # fmt: skip
    found = {name: make(records) for name, make in makers.items()}
    return {name: text for name, text in found.items() if text}
