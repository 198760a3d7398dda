"""Benchmarks placements of experts on devices: made from one half of a recorded routing's tokens, judged on the other half, in both directions.

    python scripts/bench_placement.py [TRACE ...] --devices 4 8 --out benchmarks

Prints devices' loads and hops between devices beside those of experts as they stand and of random placements, with solver seconds and the proven gap
to the optimum on the half that was fitted, and writes a record a trace.
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

from jaxmoe.report.command import run_command

SHARED = (ROOT / "tests/offload/data/qwen3_30b_a3b.npz", ROOT / "tests/offload/data/gemma4_26b_a4b.npz")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Benchmark placements."""

    traces: tyro.conf.Positional[tuple[Path, ...]] = SHARED
    """Traces, or route traces' .csv; the two that come with the tests if not given."""
    devices: tuple[int, ...] = (4, 8)
    """Numbers of devices."""
    seconds: float = 10.0
    """Time limit of each method."""
    seed: int = 0
    """Of searches."""
    out: Path | None = None
    """Folder for records; none are written if not given."""


def run(args: Arguments) -> None:
    """Measures, prints, writes."""
    from rich.console import Console

    from jaxmoe.offload.trace import load_or_import
    from jaxmoe.report import placement_bench

    if args.out is not None and not args.out.is_dir():
        raise ValueError(f"{args.out}: there is no such folder for records")
    console = Console()
    for path in args.traces:
        trace = load_or_import(path)
        with Console(stderr=True).status(path.name) as status:
            rows = placement_bench.measure(trace, args.devices, args.seconds, args.seed, lambda what, p=path: status.update(f"{p.name}: {what}"))
        console.print(placement_bench.table(rows, f"{trace.meta['model']}, {len(trace.ids)} tokens"))
        if args.out is not None:
            console.print(str(placement_bench.write(trace, rows, args.out, args.seconds, args.seed)), highlight=False, markup=False, soft_wrap=True)


def main() -> int:
    """Runs; gives the exit code."""
    parsed = tyro.cli(Arguments, description=__doc__)
    return run_command(lambda: run(parsed))


if __name__ == "__main__":
    sys.exit(main())
