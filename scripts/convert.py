"""Converts a Hugging Face folder into one that loads expert by expert, and that stock Orbax restores.

    python scripts/convert.py HF_FOLDER OUT [--dtype float32|bfloat16] [--leaves]
    python scripts/convert.py --list        # the families that can be converted, and what of each is supported

A run that was stopped goes on where it was when it is started again.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

if importlib.util.find_spec("scripts") is None:  # golden_cases is nowhere else, whether the packages are installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from checkpoints.convert import convert
from checkpoints.manifest import Manifest
from jaxmoe.report.command import run_command
from jaxmoe.report.families import COLUMNS, NOTE
from jaxmoe.report.families import table as family_table
from scripts import golden_cases


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Converts a Hugging Face folder (config.json, safetensors) for jaxmoe."""

    hf_folder: tyro.conf.Positional[Path | None] = None
    """The folder to convert."""
    out: tyro.conf.Positional[Path | None] = None
    """The folder to make; OUT.partial while it is unfinished."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """How weights are held; the source's own if not given."""
    leaves: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also list every leaf with shape, dtype, chunk and bytes."""
    list: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """List the families of models that can be converted, and what of each is supported; nothing else."""


def summary(manifest: Manifest) -> Table:
    """Leaves and bytes by kind."""
    table = Table(box=None, pad_edge=False)
    for name in ("kind", "leaves", "dtype", "bytes"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for kind in ("params", "experts"):
        records = [record for path, record in manifest.leaves.items() if path.startswith(f"{kind}.")]
        dtypes = ", ".join(sorted({record.dtype for record in records})) or manifest.dtype
        table.add_row(kind, str(len(records)), dtypes, f"{sum(record.nbytes for record in records):,}")
    table.add_row("total", str(len(manifest.leaves)), "", f"{manifest.nbytes:,}")
    return table


def listing(manifest: Manifest) -> Table:
    """A row per leaf."""
    table = Table(box=None, pad_edge=False)
    table.add_column("leaf", no_wrap=True)
    for name in ("shape", "dtype", "chunk", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for path, record in manifest.leaves.items():
        table.add_row(path, _dims(record.shape), record.dtype, _dims(record.chunk), f"{record.nbytes:,}")
    return table


def families() -> Table:
    """A row per family of models."""
    table = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, no_wrap=name == "family")
    for row in family_table(golden_cases.configs()):
        table.add_row(*(row[name] for name in COLUMNS))
    return table


def _dims(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def run(args: Arguments) -> None:
    """Converts with a progress bar on stderr, then prints what was written."""
    if args.list:
        console = Console(width=None if sys.stdout.isatty() else 200)
        console.print(families())
        console.print(NOTE)
        return
    if args.hf_folder is None or args.out is None:
        raise ValueError("give the folder to convert and the folder to make (--list alone shows what can be converted)")
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    first, last, start = None, 0, time.perf_counter()
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("converting", total=None)

        def progress(done: int, total: int, _: str) -> None:
            nonlocal first, last
            if first is None:  # what an earlier run wrote doesn't count into the speed
                first = done
            last = done
            bar.update(task, completed=done, total=total)

        manifest = convert(args.hf_folder, args.out, args.dtype, progress)
    seconds, written = time.perf_counter() - start, last - (first or 0)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if args.leaves:
        console.print(listing(manifest))
    console.print(summary(manifest))
    if manifest.dropped[0]:
        count, nbytes = manifest.dropped
        console.print(f"passed over, as nothing here uses them: {count:,} weights, {nbytes:,} bytes (manifest.json lists them)", soft_wrap=True)
    if manifest.absent_heads:
        console.print(f"the config has {manifest.absent_heads} extra head(s), whose tensors are not there: converted without", soft_wrap=True)
    if first is None:
        console.print(f"{args.out} was there already, nothing was written", soft_wrap=True, markup=False)
        return
    kept = f", with {', '.join(manifest.files)}" if manifest.files else ""
    console.print(
        f"{args.out}: {written:,} bytes written in {seconds:.1f} s, {written / seconds / 1e6:.0f} MB/s{kept}",
        soft_wrap=True,
        markup=False,
    )


def main() -> int:
    """Exit code 2 with one line on stderr when the input or the output folder won't do."""
    args = tyro.cli(Arguments)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
