"""Times steps beside `AsyncSaver`: blocks of a jitted step with a save in each, and without, in turn.

    python scripts/bench_saving.py [--pairs 40] [--megabytes 80] [--step-ms 80] [--interval 8] [--folder DIR] [--out benchmarks]

Two figures: what a save adds to the steps beside it, as a share of the `interval` between saves; and what saving continually adds, the next save
beginning as soon as the last one is done.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tyro

if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxmoe.report import record
from jaxmoe.report.command import run_command
from jaxmoe.report.saving_bench import LEAVES, Bench, compare


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Benchmark saving beside steps."""

    pairs: int = 40
    """Pairs of blocks, one with saves and one without."""
    megabytes: int = 80
    """Size of the tree that is saved."""
    step_ms: float = 80
    """About how long a step takes."""
    interval: float = 8
    """Seconds of steps between two saves."""
    block: float = 2.5
    """About how many seconds a block of steps takes; one that saves goes on until the save is done."""
    host_megabytes: int = 32
    """Most that the saver holds on the host."""
    folder: Path | None = None
    """Where to save."""
    out: Path | None = None
    """Folder for records."""


def write(args: Arguments, bench: Bench, found: dict[str, dict[str, Any]], alone: list[tuple[float, float]]) -> None:
    """One record."""
    counters = {f"{mode}_{key}": f[key] for mode, f in found.items() for key in ("percent", "low", "high", "mean", "saves", "every")}
    timings = {f"{mode}_{arm}": record.timing(f[arm]) for mode, f in found.items() for arm in ("without", "with")}
    timings |= {name: record.timing(seconds) for name, seconds in zip(("alone", "alone_cpu"), zip(*alone, strict=True), strict=True)}
    alone_rate = 1 / float(np.median(found["one"]["without"]))
    made = record.make_record(
        name="saving", spec_hash="",
        settings={
            "pairs": args.pairs, "interval_seconds": args.interval, "block_seconds": args.block, "step_seconds": bench.step_seconds,
            "leaves": LEAVES, "host_bytes": args.host_megabytes << 20,
        },
        seeds={"values": 0, "bootstrap": 0},
        timings=timings,
        compile_seconds=bench.compile_seconds,
        bytes={"tree": bench.nbytes, "peak_on_host": bench.saver.peak_bytes},
        counters=counters,
        bound=record.make_bound("compute", alone_rate, alone_rate / (1 + found["one"]["percent"] / 100), "steps/s"),
    )  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)  # type: ignore[union-attr]
    record.write_record(args.out / "saving-default.json", made)  # type: ignore[operator]


def run(args: Arguments) -> None:
    """Both comparisons."""
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="saving-", dir=args.folder))
    try:
        bench = Bench(root, args.megabytes * 1_000_000, args.step_ms / 1000, args.block, args.host_megabytes << 20)
        alone = [bench.save_alone() for _ in range(10)]
        wall, cpu = np.median(alone, axis=0)
        print(f"step {1000 * bench.step_seconds:.0f} ms; tree {bench.nbytes / 1e6:.0f} MB; a save alone {wall:.2f} s, {cpu:.2f} s of CPUs")
        found = {}
        for mode in ("one", "continually"):
            f = found[mode] = compare(bench, mode, args.pairs, args.interval)
            every = args.interval if mode == "one" else f["every"]
            print(
                f"a save every {every:.1f} s of steps adds {f['percent']:+.2f} % to them (median of {args.pairs} pairs, "
                f"95 % limits {f['low']:+.2f} to {f['high']:+.2f} %; mean {f['mean']:+.2f} %)",
                flush=True,
            )
        bench.saver.close()
        if args.out is not None:
            write(args, bench, found, alone)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    parsed = tyro.cli(Arguments, description=__doc__)
    sys.exit(run_command(lambda: run(parsed)))
