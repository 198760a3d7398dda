"""Placements of experts on devices, made from one half of a trace's tokens and judged on the other: rows, tables and records.

Rows are plain JSON values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from rich import box
from rich.table import Table

from jaxmoe.offload.trace import Trace
from jaxmoe.report import record
from sharding.placement import Plan, Report, baselines, judge, judge_devices, solve, solve_replicas
from sharding.placement.judge import SEEDS
from sharding.placement.problem import SPANS, check_devices
from sharding.placement.solve import PLACES, SLACK

ARMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("moetuner", {}), ("exflow", {}), ("combined", {}), ("combined", {"slack": 0.0, "spans": 0}), ("combined", {"slack": SLACK, "spans": 0}),
    ("combined", {"slack": 0.1}), ("combined", {"slack": 0.2}),
)  # fmt: skip
"""Methods and what of their settings isn't the default; the last four show what the defaults trade."""

HALVES = ("first", "second")
METRICS = ("max_over_mean", "worst_layer", "all_layers", "hops", "top_hops", "devices_a_token")

Tell = Callable[[str], None]


def halves(ids: Int[np.ndarray, "T L A"]) -> tuple[np.ndarray, np.ndarray]:
    """The earlier and the later half of the tokens, as they were recorded.

    Raises:
        ValueError: there are fewer than two.
    """
    if len(ids) < 2:
        raise ValueError("a trace of one token has no halves")
    return ids[: len(ids) // 2], ids[len(ids) // 2 :]


def measure(trace: Trace, devices: Sequence[int], seconds: float = 10.0, seed: int = 0, tell: Tell = lambda what: None) -> list[dict[str, Any]]:
    """Every method in both directions.

    Args:
        trace: recorded routing.
        devices: numbers of devices.
        seconds: a method's time limit.
        seed: of searches.
        tell: is told what is done next.

    Returns:
        A row a number of devices, direction and method: `devices`, `judged` half, `method`, `options`, `extra` slots a layer, `METRICS`, `seconds` of
        solving, `stages` with value, bound and gap, and `lower`: whether load (`max_over_mean`) and hops both are below those of experts as they
        stand and of random placements.
    """
    for n in devices:
        check_devices(n, trace.experts)
    parts, out = halves(trace.ids), []
    for n in devices:
        for judged, (fit, on) in ((1, parts), (0, parts[::-1])):
            base = baselines(on, trace.experts, n)
            rows: list[dict[str, Any]] = [
                {"method": name, "options": {}, "extra": 0, **_metrics(found), "seconds": None, "stages": []} for name, found in base.items()
            ]
            for method, options in ARMS:
                tell(f"{n} devices, {HALVES[judged]} half judged: {method}")
                placement, report = solve(fit, trace.experts, n, method, seconds, seed, **options)  # type: ignore[arg-type]
                rows.append({"method": method, "options": options, "extra": 0, **_metrics(judge(placement, on)), **_solved(report)})
            extra = n if n > 1 else 0  # a copy a device
            copies, report = solve_replicas(fit, trace.experts, n, extra)
            found = judge_devices(copies.devices_of(on), n)
            rows.append({"method": "eplb", "options": {}, "extra": extra, **_metrics(found), **_solved(report)})
            out += [{"devices": n, "judged": HALVES[judged]} | row | {"lower": lower(row, base)} for row in rows]
    return out


def _metrics(found: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in zip(METRICS, found.values(), strict=True)}


def _solved(report: Report) -> dict[str, Any]:
    stages = [
        {"name": stage.name, "value": stage.value, "bound": round(stage.bound, 3), "gap": round(stage.gap, 5), "seconds": round(stage.seconds, 3)}
        for stage in report.stages
    ]
    return {"seconds": round(report.seconds, 3), "stages": stages}


def lower(row: Mapping[str, Any], base: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether load and hops both are below those of every baseline."""
    return all(row[name] < round(found[name], 5) for found in base.values() for name in ("max_over_mean", "hops"))


def table(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """Rows for a terminal."""
    out = _table(title, "by method", "solver s", "most gap", "both lower")
    before = None
    for row in rows:
        group = f"{row['devices']} devices, {row['judged']} half"
        if group != before:
            out.add_row(f"[bold]{group}[/bold]")
        before = group
        solved = ["", "", ""]
        if row["seconds"] is not None:
            gap = max(stage["gap"] for stage in row["stages"])
            solved = [f"{row['seconds']:.1f}", f"{gap:.1%}", "yes" if row["lower"] else "no"]
        out.add_row(f" {name_of(row)}", *_shown(row), *solved)
    return out


def plan_table(plans: Mapping[str, Plan], title: str = "") -> Table:
    """What plans say of their placements beside the baselines, for a terminal."""
    out = _table(title, "by placement", "devices a token")
    for name, plan in plans.items():
        out.add_row(f"[bold]{name}[/bold]")
        for placement, found in plan.judged.items():
            out.add_row(f" {placement}", *_shown(found), f"{found['devices']:.2f}")
    return out


def _table(title: str, first: str, *more: str) -> Table:
    out = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left")
    out.caption = "peak load: of the fullest device over the mean, averaged over layers; hops: pairs of a token's experts on different devices"
    out.add_column(first, no_wrap=True)
    for name in ("peak load", "hops", "top-1 hops", *more):
        out.add_column(name, justify="right")
    return out


def name_of(row: Mapping[str, Any]) -> str:
    """A method with how it was set."""
    settings = [f"{name} {value}" for name, value in row["options"].items()] + ([f"{row['extra']} copies"] if row["extra"] else [])
    return ", ".join([row["method"], *settings])


def _shown(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['max_over_mean']:.3f}", f"{row['hops']:.1%}", f"{row['top_hops']:.1%}"]


def make_record(trace: Trace, rows: Sequence[Mapping[str, Any]], seconds: float, seed: int) -> dict[str, Any]:
    """A record of `measure`'s rows; its bound is ExFlow's: the share of pairs kept on a device, beside what no placement exceeds."""
    meta = trace.meta
    about = {"model": meta["model"], "layers": meta["layers"], "experts": meta["experts"], "active": meta["active"], "tokens": len(trace.ids)}
    run = {"source": meta.get("source"), "halves": "earlier and later half of the tokens", "seconds": seconds, "random_placements": SEEDS}
    settings = about | run | {"slack": SLACK, "spans": SPANS}
    first = next(row for row in rows if row["method"] == "exflow")
    stage, earlier = first["stages"][-1], halves(trace.ids)[0]
    pairs = _pairs(earlier)
    kept = (1 - stage["bound"] / pairs, 1 - stage["value"] / pairs)
    bound = record.make_bound("capacity", *kept, f"share of the fitted half's pairs kept on a device, exflow, {first['devices']} devices")
    timings = {name: record.timing([row["seconds"] for row in rows if row["method"] == name]) for name in (*PLACES, "eplb")}
    size, seeds = {"expert": int(meta["expert_bytes"][0])}, {"search": seed}
    counters: dict[str, Any] = {"rows": list(rows)}
    return record.make_record("placement", meta["spec_hash"] or "", settings, seeds, timings, 0.0, size, counters, bound)


def _pairs(ids: np.ndarray) -> int:
    asked = (ids >= 0).sum(2).astype(np.int64)
    return int((asked[:, :-1] * asked[:, 1:]).sum())


def write(trace: Trace, rows: Sequence[Mapping[str, Any]], folder: Path, seconds: float, seed: int) -> Path:
    """Writes the record of a trace; gives its file."""
    path = folder / f"placement-{str(trace.meta['model']).lower().replace('_', '-').replace('/', '-')}.json"
    record.write_record(path, make_record(trace, rows, seconds, seed))
    return path
