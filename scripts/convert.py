"""Converts a Hugging Face folder into one that loads expert by expert, and that stock Orbax restores.

    python scripts/convert.py HF_FOLDER OUT [--dtype float32|bfloat16] [--quantize int8|int4 [--group 128]] [--leaves]
    python scripts/convert.py hub:ORG/NAME[@REVISION] OUT    # downloads it first; needs the extra `hub`
    python scripts/convert.py HF_FOLDER OUT --dry-run        # what would go in and come out, what is missing, bytes and time
    python scripts/convert.py --list        # the families that can be converted, and what of each is supported

A run that was stopped goes on where it was when it is started again.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

if importlib.util.find_spec("scripts") is None:  # golden_cases is nowhere else, whether the packages are installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from checkpoints import hub
from checkpoints.convert import convert
from checkpoints.dry_run import dry_run
from checkpoints.errors import CheckpointError
from checkpoints.quantizer import Quantizer
from jaxmoe.compress.round_to_nearest import quantizer as rounding
from jaxmoe.report.command import run_command
from jaxmoe.report.conversion import listing, print_dry_run, summary
from jaxmoe.report.families import COLUMNS, NOTE
from jaxmoe.report.families import table as family_table
from jaxmoe.report.progress_bar import bytes_bar
from scripts import golden_cases


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Converts a Hugging Face folder (config.json, safetensors) for jaxmoe."""

    hf_folder: tyro.conf.Positional[str | None] = None
    """The folder to convert; hub:ORG/NAME or hub:ORG/NAME@REVISION downloads one."""
    out: tyro.conf.Positional[Path | None] = None
    """The folder to make; OUT.partial while it is unfinished."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """How weights are held; the source's own if not given."""
    quantize: Literal["int8", "int4"] | None = None
    """Round the routed experts to so many bits, each to the nearest of its group's steps."""
    group: int = 128
    """Numbers that share a scale, with --quantize."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Say what would be done, and write nothing."""
    leaves: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also list every leaf with shape, dtype, chunk and bytes."""
    list: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """List the families of models that can be converted, and what of each is supported; nothing else."""


def families() -> Table:
    """A row per family of models."""
    table = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, no_wrap=name == "family")
    for row in family_table(golden_cases.configs()):
        table.add_row(*(row[name] for name in COLUMNS))
    return table


def run(args: Arguments) -> None:
    """Converts with a progress bar on stderr, then prints what was written."""
    if args.list:
        console = Console(width=None if sys.stdout.isatty() else 200)
        console.print(families())
        console.print(NOTE)
        return
    if args.hf_folder is None or args.out is None:
        raise ValueError("give the folder to convert and the folder to make (--list alone shows what can be converted)")
    quantizer = rounding(int(args.quantize.removeprefix("int")), args.group) if args.quantize else None
    source = hub.download(args.hf_folder) if hub.is_hub(args.hf_folder) else Path(args.hf_folder)
    if args.dry_run:
        look(source, args.out, args.dtype, quantizer)
        return
    with bytes_bar("converting") as meter:
        manifest = convert(source, args.out, args.dtype, meter, quantizer)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if args.leaves:
        console.print(listing(manifest))
    console.print(summary(manifest))
    if manifest.dropped[0]:
        count, nbytes = manifest.dropped
        console.print(f"passed over, as nothing here uses them: {count:,} weights, {nbytes:,} bytes (manifest.json lists them)", soft_wrap=True)
    if manifest.absent_heads:
        console.print(f"the config has {manifest.absent_heads} extra head(s), whose tensors are not there: converted without", soft_wrap=True)
    if meter.first is None:
        console.print(f"{args.out} was there already, nothing was written", soft_wrap=True, markup=False)
        return
    kept = f", with {', '.join(manifest.files)}" if manifest.files else ""
    console.print(f"{args.out}: {meter.nbytes:,} bytes written in {meter.rate}{kept}", soft_wrap=True, markup=False)


def look(source: Path, out: Path, dtype: str | None, quantizer: Quantizer | None) -> None:
    """Prints what a conversion would do.

    Raises:
        CheckpointError: it could not be done; everything that was found has been printed.
    """
    found = dry_run(source, out, dtype, quantizer)
    print_dry_run(found, Console(width=None if sys.stdout.isatty() else 240))
    if found.problems:
        raise CheckpointError(f"{source}: {'; '.join(found.problems)}")


def main() -> int:
    """Exit code 2 with one line on stderr when the input or the output folder won't do."""
    args = tyro.cli(Arguments)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
