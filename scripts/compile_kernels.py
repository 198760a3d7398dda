"""Compiles every kernel at every real shape for H100 and four TPUs, with none of them there; prints what each needs beside its arguments.

    python scripts/compile_kernels.py [--targets h100 v6e:4x4] [--ops glu matmul attention] [--models olmoe-1b-7b]

All of them take some 25 minutes. Needs the `compile` extra.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
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

from jaxmoe.report import kernel_compiles
from jaxmoe.report.command import run_command


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compile every kernel at every real shape."""

    targets: Annotated[tuple[str, ...], tyro.conf.arg(help="Devices.")] = kernel_compiles.TARGETS
    ops: Annotated[tuple[str, ...], tyro.conf.arg(help="glu, matmul, attention.")] = ("glu", "matmul", "attention")
    models: Annotated[tuple[str, ...], tyro.conf.arg(help="Models whose shapes are taken; all of them if none is named.")] = ()
    steps: Annotated[tuple[str, ...], tyro.conf.arg(help="Tokens (1, 8, ...) or attention's regimes (decode, ...); all if none is named.")] = ()


def chosen(args: Arguments) -> list[kernel_compiles.Case]:
    """The cases that the command line asks for.

    Raises:
        ValueError: a name that no case has.
    """
    every = kernel_compiles.cases()
    for what, names in (("target", args.targets), ("op", args.ops), ("model", args.models), ("step", args.steps)):
        known = {getattr(case, what) for case in every}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"--{what}s {unknown[0]}: choose from {', '.join(map(str, sorted(known)))}")
    of_target_and_op = [c for c in every if c.target in args.targets and c.op in args.ops]
    return [c for c in of_target_and_op if (not args.models or c.model in args.models) and (not args.steps or c.step in args.steps)]


def run(args: Arguments) -> bool:
    """Compiles and prints; whether all of them compiled."""
    wanted = chosen(args)
    console = Console(stderr=True)
    results = [kernel_compiles.compile_case(case) for case in track(wanted, "compiling", console=console)]
    table = Table("target", "op", "weights", "programs", "failed", "largest temporaries", "of the weights", "seconds")
    for key in dict.fromkeys((r.case.target, r.case.op, r.case.form) for r in results):
        mine = [r for r in results if (r.case.target, r.case.op, r.case.form) == key]
        good = [r for r in mine if r.failed is None]
        most = max(good, key=lambda r: r.temporaries, default=None)
        size = (f"{most.temporaries / 1e6:.1f} MB", f"{100 * most.temporaries / most.weights:.1f} %") if most else ("", "")
        table.add_row(*key, str(len(mine)), str(len(mine) - len(good)), *size, f"{sum(r.seconds for r in mine):.0f}")
    Console(width=max(console.width, 120)).print(table)
    for r in results:
        if r.failed:
            print(f"{r.case.name}: {r.failed}")
    return not any(r.failed for r in results)


def main() -> int:
    """The command line; 1 if anything failed to compile."""
    args, good = tyro.cli(Arguments, description=__doc__), []
    return run_command(lambda: good.append(run(args))) or int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
