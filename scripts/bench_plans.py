"""Predicts bytes and times of plans, compiles the same steps for TPUs and an H100 that aren't there, and prints how far off the predictions were.

    python scripts/bench_plans.py --out benchmarks [--cases mixtral h100] [--again] [--compare]

Each case is compiled in a process of its own, and kept: a run that was stopped goes on where it was. Needs the `compile` extra.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or the compilers' plugins look for devices
ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(ROOT))

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxmoe.report import plan_bench
from jaxmoe.report.command import run_command


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare predicted plans with compiled ones."""

    out: Path = ROOT / "benchmarks"
    """Folder of the records, one a case."""
    cases: Annotated[tuple[str, ...], tyro.conf.arg(help="Words; a case whose name has one of them is taken, all without any.")] = ()
    again: bool = False
    """Compile cases again that have a record."""
    compare: bool = False
    """Compile nothing: compare with the records that are there."""
    predict_again: bool = False
    """Put today's predictions into the records."""
    one: str | None = None
    """Compile this case, by its whole name, in this process."""


def chosen(args: Arguments) -> list[plan_bench.Case]:
    """The cases that the command line asks for.

    Raises:
        ValueError: no case has such a name.
    """
    found = [case for case in plan_bench.cases() if not args.cases or any(word in case.name for word in args.cases)]
    if not found:
        raise ValueError(f"--cases {' '.join(args.cases)}: no case's name has any of these words")
    return found


def compile_one(case: plan_bench.Case, folder: Path) -> None:
    """Predicts, compiles, and writes the record."""
    predicted, seconds = plan_bench.predict(case)
    plan_bench.write(plan_bench.Row(case, predicted, seconds, plan_bench.compile_case(case)), folder)


def compile_apart(case: plan_bench.Case, folder: Path) -> str | None:
    """`compile_one` in another process; why it failed, if it did."""
    done = subprocess.run(
        [sys.executable, __file__, "--out", str(folder), "--one", case.name], capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    return None if done.returncode == 0 else ((done.stderr or done.stdout).strip().splitlines() or ["no message"])[-1]


def table(rows: list[plan_bench.Row]) -> Table:
    """Predictions beside what compilers say."""
    out = Table("model", "target", "split", "step", "predicted GB", "compiled GB", "error", "temporaries", "host GB", "predicted ms", "XLA ms")
    for row in rows:
        case, c, p = row.case, row.compiled, row.predicted
        slots = "" if case.workload.slots is None else f", {case.workload.slots} slots"
        out.add_row(
            case.model, case.target, (case.split or "one device") + slots, case.phase, f"{p.total / 1e9:.3f}", f"{c.total / 1e9:.3f}",
            f"{100 * row.error:+.2f} %", f"{(p.activations + p.temporaries) / 1e6:.0f} / {c.temp / 1e6:.0f} MB",
            f"{p.host_store / 1e9:.2f} / {c.host / 1e9:.2f}", f"{row.seconds * 1e3:.2f}", "" if c.optimal is None else f"{c.optimal * 1e3:.2f}",
        )  # fmt: skip
    return out


def run(args: Arguments) -> bool:
    """Compiles what is asked for, and prints; whether every case compiled."""
    if args.one is not None:
        compile_one(next(case for case in plan_bench.cases() if case.name == args.one), args.out)
        return True
    wanted, failed = chosen(args), {}
    console = Console(stderr=True)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.compare:
        new = [case for case in wanted if args.again or not plan_bench.path_of(case, args.out).exists()]
        failed = {case.name: why for case in track(new, "compiling", console=console) if (why := compile_apart(case, args.out))}
    rows = [row for case in wanted if (row := plan_bench.read(case, args.out)) is not None]
    for row in rows if args.predict_again else ():
        plan_bench.predict_again(row, args.out)
    Console(width=max(console.width, 170)).print(table(rows))
    if rows:
        off = sorted(abs(row.error) for row in rows)
        print(f"{len(rows)} programs: bytes off by {100 * off[len(off) // 2]:.2f} % (median), {100 * off[-1]:.2f} % (worst)")
        found = plan_bench.rank_correlation(rows)
        print(f"rank correlation of predicted time with XLA's, TPU programs: {'(too few)' if found is None else f'{found:.3f}'}")
    for name, why in failed.items():
        print(f"{name}: {why}")
    return not failed


def main() -> int:
    """The command line; 1 if anything failed to compile."""
    args, good = tyro.cli(Arguments, description=__doc__), []
    return run_command(lambda: good.append(run(args))) or int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
