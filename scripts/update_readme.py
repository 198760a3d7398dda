"""Writes the tables of the README and of the pages in docs/ from the records in benchmarks/, and that of model families from their data; nothing
there is typed.

    python scripts/update_readme.py [--readme README.md] [--offloading docs/offloading.md] [--planning docs/planning.md]
        [--serving docs/serving.md] [--benchmarks benchmarks]
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("scripts") is None:
    sys.path.insert(0, str(ROOT))

from jaxmoe.report import families, offload_tables, plan_page, policy_tables, record, serve_tables
from jaxmoe.report.command import run_command
from scripts import golden_cases


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write the tables of the README and of the pages in docs/."""

    readme: Path = ROOT / "README.md"
    """The file to change."""
    offloading: Path = ROOT / "docs" / "offloading.md"
    """The page on offloading; passed over where it does not exist."""
    planning: Path = ROOT / "docs" / "planning.md"
    """The page on meshes; passed over where it does not exist."""
    serving: Path = ROOT / "docs" / "serving.md"
    """The page on serving; passed over where it does not exist."""
    benchmarks: Path = ROOT / "benchmarks"
    """Folder of records."""


def generate_table(records: list[dict]) -> str:
    """Decoding and prefill of every engine, those of one model, dtype and batch together."""
    rows = []
    for r in (r for r in records if r["name"] == "generate"):
        s = r["settings"]
        mode = " --fast" if s["engine"] == "jaxmoe" and not s["row_invariant"] else ""
        prefill = r["counters"].get("prefill_tokens_per_second")
        shown = {"engine": s["engine"] + mode, "prefill": "" if prefill is None else f"{prefill:,.0f}"}
        rows.append((s["model"], s["dtype"], s["batch"], s["engine"] != "jaxmoe", mode, s["engine"], r | {"shown": shown}))
    columns = [
        ("model", "settings.model"), ("weights", "settings.dtype"), ("batch", "settings.batch", "d"), ("engine", "shown.engine"),
        ("decode tok/s", "counters.decode_tokens_per_second", ",.0f"), ("prefill tok/s", "shown.prefill", ">"),
        ("GB/s", "bound.achieved", ".1f"), ("of", "bound.ceiling", ".1f"), ("%", "bound.percent", ".0f"),
    ]  # fmt: skip
    return record.table([row[-1] for row in sorted(rows, key=lambda row: row[:-1])], columns)


def grouped_matmul_table(records: list[dict]) -> str:
    """One layer of experts at each number of tokens."""
    chosen = [r for r in records if r["name"] == "grouped_matmul"]
    chosen.sort(key=lambda r: (r["settings"]["dtype"], r["settings"]["tokens"], r["settings"]["op"], not r["settings"]["row_invariant"]))
    columns = [
        ("tokens", "settings.tokens", "d"), ("op", "settings.op"), ("weights", "settings.dtype"), ("seconds a layer", "timings.layer.median", ".4f"),
        ("times the bound", "counters.x_bound", ".2f"), ("bound by", "bound.kind"), ("reached", "bound.achieved", ".3g"),
        ("of", "bound.ceiling", ".3g"), ("unit", "bound.unit"), ("%", "bound.percent", ".0f"),
    ]  # fmt: skip
    return record.table(chosen, columns)


def expert_budget_table(records: list[dict]) -> str:
    """What fits in what: published models in the dtypes and budgets that the records have."""
    rows = []
    for r in (r for r in records if r["name"] == "expert_budget"):
        s, c = r["settings"], r["counters"]
        shown = {"slots": f"{c['slots']:.1f} of {c['experts']:.0f}", "runs": "yes" if s["supported"] else "not yet"}
        own = {name: f"{c[name]:,.0f}" if s["own_trace"] else "" for name in OWN_TRACE}
        rows.append((s["model"], s["experts_dtype"], c["slots"], r | {"shown": shown | own}))
    columns = [
        ("model", "settings.model"), ("experts in", "settings.experts_dtype"), ("budget", "settings.budget"), ("slots a layer", "shown.slots"),
        ("GB", "bound.achieved", ".1f"), ("resident GB", "bound.ceiling", ".1f"), ("saved %", "counters.saving_percent", ".0f"),
        ("fits in", "settings.fits_in"), ("resident fits in", "settings.resident_fits_in"),
        ("hits %, even", "counters.hit_even_percent", ".0f"), ("PCIe 4 tok/s", "counters.pcie4_even_tokens_per_second", ",.1f"),
        ("PCIe 5 tok/s", "counters.pcie5_even_tokens_per_second", ",.1f"), ("hits %, LFU", "shown.hit_trace_percent", ">"),
        ("PCIe 4 tok/s", "shown.pcie4_trace_tokens_per_second", ">"), ("PCIe 5 tok/s", "shown.pcie5_trace_tokens_per_second", ">"),
        ("runs", "shown.runs"),
    ]  # fmt: skip
    return record.table([row[-1] for row in sorted(rows, key=lambda row: row[:-1])], columns)


OWN_TRACE = ("hit_trace_percent", "pcie4_trace_tokens_per_second", "pcie5_trace_tokens_per_second")
"""What only a trace of the model itself can say."""


def streaming_table(records: list[dict]) -> str:
    """Ways of running in the same device memory, over emulated links."""
    chosen = [r for r in records if r["name"] == "streaming"]
    demand = {
        (r["settings"]["model"], r["settings"]["link_gbps"]): r["counters"] for r in chosen if r["settings"]["arm"] == "on demand"
    }
    rows = []
    for r in chosen:
        s, c = r["settings"], r["counters"]
        base = demand[s["model"], s["link_gbps"]]
        shown = {"times": c["decode_tokens_per_second"] / base["decode_tokens_per_second"]}
        shown |= {"hits": 100 * c["hit_rate"]}
        shown |= {f"{p}_{k}": 100 * c[f"{p}_{k}_fraction"] for p in ("decode", "prefill") for k in ("serial", "overlapped")}
        rows.append((s["model"], s["link_gbps"], WAYS.index(s["arm"]), r | {"shown": shown}))
    columns = [
        ("model", "settings.model"), ("emulated GB/s", "settings.link_gbps", "g"), ("way", "settings.arm"), ("hits %", "shown.hits", ".0f"),
        ("decode tok/s", "counters.decode_tokens_per_second", ".1f"), ("times on demand", "shown.times", ".2f"),
        ("% of serial", "shown.decode_serial", ".0f"), ("% of overlapped", "shown.decode_overlapped", ".0f"),
        ("prefill s", "counters.prefill_seconds", ".2f"), ("% of serial", "shown.prefill_serial", ".0f"),
        ("% of overlapped", "shown.prefill_overlapped", ".0f"),
    ]  # fmt: skip
    return record.table([row[-1] for row in sorted(rows, key=lambda row: row[:-1])], columns)


def convert_table(records: list[dict]) -> str:
    """Conversions beside plain copies."""
    rows = []
    for r in (r for r in records if r["name"] == "convert"):
        b = r["bytes"]
        shown = {"gb": b["weights"] / 1e9, "peak": b["peak"] / 1e6, "before": b["before"] / 1e6}
        rows.append((b["weights"], ARMS.index(r["settings"]["arm"]), r | {"shown": shown}))
    columns = [
        ("checkpoint", "settings.model"), ("GB", "shown.gb", ".1f"), ("what", "settings.arm"), ("seconds", "timings.run.median", ".1f"),
        ("MB/s", "counters.megabytes_per_second", ",.0f"), ("% of copy", "bound.percent", ".0f"), ("peak MB", "shown.peak", ",.0f"),
        ("of these before it began", "shown.before", ",.0f"),
    ]  # fmt: skip
    return record.table([row[-1] for row in sorted(rows, key=lambda row: row[:-1])], columns)


def saving_table(records: list[dict]) -> str:
    """Steps beside saves: what one save in so many seconds of steps adds to them, and what saving continually adds."""
    rows = []
    for r in (r for r in records if r["name"] == "saving"):
        c, t = r["counters"], r["timings"]
        for mode in ("one", "continually"):
            every = r["settings"]["interval_seconds"] if mode == "one" else c["continually_every"]
            limits = f"{c[f'{mode}_low']:+.1f} to {c[f'{mode}_high']:+.1f}"
            shown = {"mb": r["bytes"]["tree"] / 1e6, "mode": MODES[mode], "every": every, "step": 1000 * t[f"{mode}_without"]["median"]}
            shown |= {"percent": c[f"{mode}_percent"], "limits": limits}
            rows.append((r["bytes"]["tree"], mode == "continually", r | {"shown": shown}))
    columns = [
        ("tree MB", "shown.mb", ",.0f"), ("saves", "shown.mode"), ("seconds a save alone", "timings.alone.median", ".2f"),
        ("of CPUs", "timings.alone_cpu.median", ".2f"), ("step ms without", "shown.step", ".0f"), ("a save every s", "shown.every", ".1f"),
        ("adds to steps %", "shown.percent", "+.1f"), ("95 % limits", "shown.limits", ">"), ("pairs", "settings.pairs", "d"),
    ]  # fmt: skip
    return record.table([row[-1] for row in sorted(rows, key=lambda row: row[:-1])], columns)


MODES = {"one": "one at a time", "continually": "each begins when the last is done"}
"""Names of rows."""


ARMS = ("copy", "convert", "convert int8", "convert int4", "export")
"""The order of rows of one checkpoint."""


WAYS = ("streamed, lfu", "streamed, lru", "whole layers resident", "on demand", "on demand, prompt by 32 tokens")
"""The order of rows."""


def run(args: Arguments) -> None:
    """Writes all tables."""
    records = record.load_records(args.benchmarks)
    tables = {
        "generate": generate_table(records), "grouped_matmul": grouped_matmul_table(records), "expert_budget": expert_budget_table(records),
        "streaming": streaming_table(records), "convert": convert_table(records),
        "saving": saving_table(records),
        "families": families.markdown(families.table(golden_cases.configs())),
    }  # fmt: skip
    write(args.readme, tables)
    if args.offloading.exists():
        write(args.offloading, policy_tables.tables(records) | offload_tables.tables(records))
    if args.planning.exists():
        write(args.planning, plan_page.tables(records))
    if args.serving.exists():
        write(args.serving, serve_tables.tables(records))


def write(page: Path, tables: dict[str, str]) -> None:
    """Puts tables between their markers."""
    for name, table in tables.items():
        changed = record.update_readme(page, name, table)
        print(f"{name}: {'written' if changed else 'as it was'}")


if __name__ == "__main__":
    parsed = tyro.cli(Arguments, description=__doc__)
    sys.exit(run_command(lambda: run(parsed)))
