"""Tables of `scripts/bench_offload.py`'s records, for the terminal and for docs/offloading.md: the same columns in both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

Row = Mapping[str, Any]
Columns = Sequence[tuple[str, Callable[[Row], str]]]


def _percent(name: str, sign: str = "") -> Callable[[Row], str]:
    return lambda row: "" if row.get(name) is None else f"{100 * row[name]:{sign}.1f}"


def _limits(mean: float, low: float, high: float, digits: int = 2, sign: str = "+") -> str:
    return f"{mean:{sign}.{digits}f} ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"


def _gain(row: Row) -> str:
    return "" if row["way"] == "lfu" else _limits(row["over_lfu"], row["over_lfu_low"], row["over_lfu_high"], 2, "")


def _sent(row: Row) -> str:
    return " / ".join(f"{row[f'{kind}_bytes'] / 1e6:.1f}" for kind in ("useful", "late", "wasted")) if "useful_bytes" in row else ""


PREFETCH: Columns = (
    ("emulated GB/s", lambda row: f"{row['gbps']:g}"),
    ("way", lambda row: row["way"]),
    ("hits %", _percent("hit_rate")),
    ("ms a token", lambda row: f"{row['ms']:.1f}"),
    ("times on demand", lambda row: f"{row['over_on_demand']:.2f}"),
    ("times lfu, rounds from to", _gain),
    ("foretold ms", lambda row: f"{row['foretold_ms']:.1f}" if "foretold_ms" in row else ""),
    ("foretold gain", lambda row: f"{row['foretold_gain']:.2f}" if "foretold_gain" in row else ""),
    ("gained of that %", lambda row: "" if row.get("share_of_foretold") is None else f"{100 * row['share_of_foretold']:.0f}"),
    ("demand MB", lambda row: f"{row['demand_bytes'] / 1e6:.1f}"),
    ("useful / late / wasted MB", _sent),
    ("stalled %", _percent("stall")),
    ("same tokens", lambda row: "yes" if row["same_ids"] else "NO"),
)
"""Ways of running over emulated links."""


def _change(row: Row) -> str:
    found = row["perplexity"]
    return _limits(100 * found["mean"], 100 * found["low"], 100 * found["high"])


QUALITY: Columns = (
    ("setting", lambda row: row["name"]),
    ("at fewer bits %", _percent("degraded")),
    ("left out %", _percent("skipped")),
    ("rerouted %", _percent("rerouted")),
    ("bytes of misses, times exact", lambda row: f"{row['ratio']:.2f}"),
    ("perplexity %", _change),
    ("bit-equal", lambda row: "yes" if row["bit_equal"] else ""),
)
"""Settings of the precision ladder."""


PREGATE: Columns = (
    ("model", lambda row: row["name"]),
    ("held-out nats per token", lambda row: f"{row['nats']:.4f}"),
    ("perplexity %", lambda row: f"{100 * row['change']:+.2f}"),
)
"""What routers that choose a layer ahead cost."""


def _less(row: Row) -> str:
    return "" if row["policy"] == "arrival" else _limits(100 * row["reduction"], 100 * row["low"], 100 * row["high"], 1, "")


REGROUP: Columns = (
    ("batch", lambda row: str(row["batch"])),
    ("policy", lambda row: row["policy"] + (f", held {row['held_cost']:g}" if row["held_cost"] < 1 else "")),
    ("path from", lambda row: row["source"]),
    ("requests waiting", lambda row: str(row["rows"])),
    ("bound", lambda row: "-" if row["bound"] is None else str(row["bound"])),
    ("waited at most", lambda row: str(row["waited"])),
    ("steps a round", lambda row: str(row["every"])),
    ("distinct a layer", lambda row: f"{row['distinct']:.2f}"),
    ("fewer %", _less),
    ("fewer loads % at a quarter of the slots", lambda row: f"{100 * next(iter(row['caches'].values()))['reduction']:.1f}"),
    ("scheduler µs a step", lambda row: f"{row['microseconds']:.0f}"),
    ("pays below GB/s", lambda row: f"{next(iter(row['caches'].values()))['break_even_gbps']:.2g}"),
)
"""Grouping policies on simulated queues."""


def terminal(columns: Columns, rows: Iterable[Row]) -> Table:
    """A rich table."""
    out = Table(*(name for name, _ in columns), box=box.SIMPLE)
    for row in rows:
        out.add_row(*(show(row) for _, show in columns))
    return out


def markdown(columns: Columns, rows: Sequence[Row]) -> str:
    """A table in markdown; empty without rows."""
    if not rows:
        return ""
    lines = [[name for name, _ in columns], ["---"] * len(columns), *([show(row) for _, show in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Every table that the records allow, by the name of its marker."""
    kinds = {"prefetch": PREFETCH, "quality": QUALITY, "regroup": REGROUP, "pregate": PREGATE}
    out = {}
    for name, columns in kinds.items():
        for key, own in _by_model(name, records).items():
            rows = [row for r in own for row in _shown(name, r["counters"]["rows"])]
            if rows:
                out[key] = markdown(columns, rows)
    return out


SHIPPED = "default"
"""The shipped model's folder."""


def _by_model(name: str, records: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Records of a kind by the name of their table: prefetching has one for each model, `prefetch_MODEL` but for the shipped one."""
    out: dict[str, list[Mapping[str, Any]]] = {}
    for r in records:
        if r["name"] == name:
            model = r.get("settings", {}).get("model", SHIPPED) if name == "prefetch" else SHIPPED
            out.setdefault(name if model == SHIPPED else f"{name}_{model}", []).append(r)
    return out


def _shown(name: str, rows: Sequence[Row]) -> Sequence[Row]:
    """Rows in the order to be read in; of regrouping those that a reader compares."""
    if name == "prefetch":
        return sorted(rows, key=lambda row: row["gbps"])
    if name != "regroup":
        return rows
    plain = [row for row in rows if row["every"] == 1 and row["source"] != "token, sets" and (row["bound"] in (None, 2, 16))]
    return [row for row in plain if row["policy"] != "greedy" or row["rows"] >= 4 * row["batch"]]
