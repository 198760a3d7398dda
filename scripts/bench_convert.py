"""Times conversion of a random Mixtral-shaped checkpoint beside a plain copy of its files, in turn, and reads how much memory each takes.

    python scripts/bench_convert.py [--gigabytes 4] [--rounds 5] [--arms copy convert] [--folder DIR] [--out benchmarks]

DIR must be on the disk that is to be measured, with room for twice the checkpoint; it is where the checkpoint is made and kept.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import statistics
import sys
import tempfile
from pathlib import Path

import tyro

if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from jaxmoe.report import conversion_bench, record
from jaxmoe.report.command import run_command
from jaxmoe.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Benchmark conversion."""

    gigabytes: float = 4.0
    """Size of the checkpoint, 10^9 bytes."""
    rounds: int = 5
    """How often every arm runs, in turn with the others."""
    arms: tuple[str, ...] = ("copy", "convert")
    """Of copy, convert, 'convert int8', 'convert int4'."""
    folder: Path = Path(tempfile.gettempdir()) / "jaxmoe-bench-convert"
    """Where the checkpoint is made, and its copies and conversions."""
    out: Path | None = None
    """Folder for records."""


def run(args: Arguments) -> None:
    """Runs all arms, prints a table, writes a record an arm."""
    screen = Console(stderr=True)
    source = conversion_bench.mixtral_folder(args.folder / f"mixtral-{args.gigabytes:g}gb", args.gigabytes)
    nbytes = conversion_bench.weight_bytes(source)
    samples: dict[str, list[conversion_bench.Sample]] = {arm: [] for arm in args.arms}
    for round_ in range(args.rounds):
        for arm in args.arms if round_ % 2 == 0 else args.arms[::-1]:
            sample = conversion_bench.run(arm, source, args.folder / "out")
            samples[arm].append(sample)
            screen.print(f"[dim]{arm}: {sample.seconds:.1f} s, {nbytes / sample.seconds / 1e6:.0f} MB/s, peak {sample.peak / 1e6:.0f} MB[/dim]")
    copy = statistics.median(s.seconds for s in samples["copy"]) if "copy" in samples else None
    table = Table("arm", "seconds", "MB/s", "% of copy", "peak MB", "of these before it began")
    for arm, runs in samples.items():
        seconds, peak = statistics.median(s.seconds for s in runs), max(s.peak for s in runs)
        share = "" if copy is None else f"{100 * copy / seconds:.0f}"
        before = max(s.before for s in runs)
        table.add_row(arm, f"{seconds:.1f}", f"{nbytes / seconds / 1e6:.0f}", share, f"{peak / 1e6:.0f}", f"{before / 1e6:.0f}")
        if args.out is not None:
            write(args, source, nbytes, arm, runs, copy)
    Console().print(table)


def write(args: Arguments, source: Path, nbytes: int, arm: str, runs: list, copy: float | None) -> None:
    """One arm's record; its bound is the copy's speed."""
    seconds = statistics.median(s.seconds for s in runs)
    spec = ModelSpec.from_hf(json.loads((source / "config.json").read_text()))
    made = record.make_record(
        name="convert", spec_hash=spec.hash(),
        settings={"model": f"random Mixtral shape, {args.gigabytes:g} GB", "arm": arm, "rounds": args.rounds, "in_turn_with": list(args.arms)},
        seeds={"weights": 0}, timings={"run": record.timing([s.seconds for s in runs])}, compile_seconds=0.0,
        bytes={"weights": nbytes, "peak": max(s.peak for s in runs), "before": max(s.before for s in runs)},
        counters={"megabytes_per_second": nbytes / seconds / 1e6},
        bound=record.make_bound("bandwidth", nbytes / (copy or seconds) / 1e6, nbytes / seconds / 1e6, "MB/s"),
    )  # fmt: skip
    assert args.out is not None
    record.write_record(args.out / f"convert-mixtral-{args.gigabytes:g}gb-{arm.replace(' ', '-')}.json", made)


if __name__ == "__main__":
    parsed = tyro.cli(Arguments, description=__doc__)
    sys.exit(run_command(lambda: run(parsed)))
