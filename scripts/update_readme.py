"""Writes the README's tables from the records in benchmarks/; no number there is typed.

    python scripts/update_readme.py [--readme README.md] [--benchmarks benchmarks]
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(ROOT))

from jaxmoe.report import record
from jaxmoe.report.command import run_command


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write the README's tables."""

    readme: Path = ROOT / "README.md"
    """The file to change."""
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


def run(args: Arguments) -> None:
    """Writes both tables."""
    records = record.load_records(args.benchmarks)
    for name, table in {"generate": generate_table(records), "grouped_matmul": grouped_matmul_table(records)}.items():
        changed = record.update_readme(args.readme, name, table)
        print(f"{name}: {'written' if changed else 'as it was'}")


if __name__ == "__main__":
    parsed = tyro.cli(Arguments, description=__doc__)
    sys.exit(run_command(lambda: run(parsed)))
