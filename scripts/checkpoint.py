"""Folders of weights: `inspect` says what is in one, `diff` compares two, `verify` reads one again, `reshard` cuts it otherwise, `export` writes one
back for Hugging Face.

    python scripts/checkpoint.py inspect FOLDER [--leaves] [--json FILE.json]
    python scripts/checkpoint.py diff A B [--limit 20] [--read-all] [--json FILE.json]      # exit code 0: equal, 1: different, 2: an error
    python scripts/checkpoint.py verify FOLDER [--source HF_FOLDER]
    python scripts/checkpoint.py reshard FOLDER OUT [--split heads=4 hidden=16] [--dtype bfloat16] [--config config.json]
    python scripts/checkpoint.py export FOLDER OUT [--dtype bfloat16] [--max-shard-gb 5]
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from checkpoints import kinds, trees
from checkpoints import reshard as resharding
from checkpoints import verify as verifying
from checkpoints.contents import describe
from checkpoints.diff import diff
from checkpoints.export import export_checkpoint
from checkpoints.load import open_checkpoint
from checkpoints.manifest import MANIFEST, read_manifest
from checkpoints.quantizer import Quantizer
from jaxmoe.compress import round_to_nearest
from jaxmoe.report import checkpoint_tables as tables
from jaxmoe.report import record
from jaxmoe.report.command import run_command
from jaxmoe.report.progress_bar import bytes_bar


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Says what a folder is and holds: converted, finished or not; Hugging Face; a saved tree; an Orbax save. Reads no numbers."""

    folder: tyro.conf.Positional[Path]
    """The folder."""
    leaves: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also list every leaf."""
    json: Path | None = None
    """Write everything to this file."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compares two folders, each converted or Hugging Face. Exit code 0: equal, 1: different, 2: an error."""

    a: tyro.conf.Positional[Path]
    """One folder."""
    b: tyro.conf.Positional[Path]
    """The other."""
    limit: int = 20
    """Rows of each table, at most."""
    read_all: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Read also what both manifests have the same checksum for."""
    json: Path | None = None
    """Write everything to this file."""


@dataclasses.dataclass(frozen=True)
class Verify:
    """Reads every chunk of a converted folder and compares it with the manifest's checksums."""

    folder: tyro.conf.Positional[Path]
    """The converted folder."""
    source: Path | None = None
    """The Hugging Face folder that it was made of: compare with what this becomes, too."""


@dataclasses.dataclass(frozen=True)
class Reshard:
    """Writes a folder again with other chunks or another dtype."""

    folder: tyro.conf.Positional[Path]
    """A converted folder, or an Orbax save of the same tree."""
    out: tyro.conf.Positional[Path]
    """The folder to make; OUT.partial while it is unfinished."""
    split: tuple[str, ...] = ()
    """Into how many parts axes are cut, such as heads=4 hidden=16; as a conversion would if not given."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """How weights are held; as they are if not given."""
    config: Path | None = None
    """The config.json of an Orbax save's model."""


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes a converted folder back as a Hugging Face folder: names, dtypes and numbers as they were."""

    folder: tyro.conf.Positional[Path]
    """The converted folder."""
    out: tyro.conf.Positional[Path]
    """The folder to make; OUT.partial while it is unfinished."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the tensors; each one's own in the source if not given."""
    max_shard_gb: float = 5.0
    """Of tensors in one file, 10^9 bytes."""


def say(console: Console, text: str) -> None:
    """A line that is not wrapped: it may have paths in it."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def inspect(args: Inspect, console: Console) -> None:
    """Prints what is in a folder."""
    if args.json is not None:
        record.check_path(args.json)
    found = describe(args.folder)
    say(console, f"{found.folder}: {found.what}{tables.progress(found)}")
    console.print(tables.about_table(found))
    if found.leaves:
        largest = tables.leaf_table(found.leaves) if args.leaves else tables.largest_table(found.leaves)
        console.print("", tables.kind_table(found.leaves, console), "", largest, "", sep="\n")
    for line in tables.expert_lines(found.leaves):
        say(console, line)
    for note in found.notes:
        say(console, f"note: {note}")
    if args.json is not None:
        sums = {"nbytes": found.nbytes, "kinds": [dataclasses.asdict(share) for share in kinds.shares(found.leaves)]}
        experts = {str(layer): nbytes for layer, nbytes in kinds.expert_layers(found.leaves).items()}
        record.write_record(args.json, dataclasses.asdict(found) | sums | {"expert_bytes": experts})


def compare(args: Compare, console: Console) -> bool:
    """Prints what two folders differ in; whether they do."""
    if args.limit < 1:
        raise ValueError(f"--limit {args.limit}: at least 1 is needed")
    if args.json is not None:
        record.check_path(args.json)
    with bytes_bar("comparing") as meter:
        found = diff(args.a, args.b, meter, not args.read_all)
    for part in tables.diff_tables(found, args.limit):
        console.print(part, "", sep="\n")
    for name, only in (("A", found.only_a), ("B", found.only_b)):
        if only:
            say(console, f"only in {name}: {tables.some(only, args.limit)}")
    if found.files:
        say(console, f"files that differ, or that one has alone: {', '.join(found.files)}")
    unread = f"; {found.by_checksum:,} leaves or experts are equal by their checksums, and were not read" if found.by_checksum else ""
    verdict = "equal" if found.equal else "different"
    say(console, f"{verdict}: {found.compared:,} leaves compared, {tables.size(found.nbytes)} read in {meter.seconds:.1f} s{unread}")
    if args.json is not None:
        record.write_record(args.json, dataclasses.asdict(found) | {"equal": found.equal})
    return not found.equal


def verify(args: Verify, console: Console) -> None:
    """Reads a folder again and says what was right."""
    if (args.folder / trees.TREE).exists():
        verify_tree(args, console)
        return
    if not (args.folder / MANIFEST).exists():
        open_checkpoint(args.folder)  # says what the folder is instead
    with bytes_bar("verifying") as meter:
        found = verifying.verify(args.folder, args.source, quantizer_of(args.folder) if args.source else None, meter)
    what = f"{found.leaves:,} leaves, {found.units:,} checksums, {found.files:,} files, {tables.size(found.nbytes)}"
    say(console, f"{args.folder}: whole: {what} ({meter.rate})")
    if args.source is not None:
        say(console, f"{args.source}: becomes the same: {found.source_units:,} leaves or experts made again")
    if found.strangers:
        say(console, f"note: also there, and nothing of ours: {tables.some(found.strangers, 20)}")


def quantizer_of(folder: Path) -> Quantizer | None:
    """What a folder's experts were quantized by, if that is known here."""
    about = read_manifest(folder).quantization
    if about is None or about["method"] != round_to_nearest.METHOD:
        return None
    return round_to_nearest.quantizer(about["bits"], about["group"])


def verify_tree(args: Verify, console: Console) -> None:
    """The same of a saved tree."""
    if args.source is not None:
        raise ValueError(f"{args.folder}: a saved tree, which has no source to compare with")
    with bytes_bar("verifying") as meter:
        found = trees.verify_tree(args.folder, meter)
    checksums = sum(len(leaf.crc32) for leaf in found.leaves.values())
    say(console, f"{args.folder}: whole: {len(found.leaves):,} leaves, {checksums:,} checksums ({meter.rate})")


def reshard(args: Reshard, console: Console) -> None:
    """Writes a folder again and prints chunks before and after."""
    parts = split_parts(args.split)
    before = describe(args.folder)
    with bytes_bar("resharding") as meter:
        resharding.reshard(args.folder, args.out, parts, args.dtype, args.config, meter)
    after = describe(args.out)
    console.print(tables.chunk_table(before, after))
    say(console, f"{args.out}: {tables.size(after.nbytes)} in {after.files:,} files ({before.files:,} before), {meter.rate}")


def split_parts(texts: tuple[str, ...]) -> dict[str, int] | None:
    """'heads=4' and so on as names and numbers; None if there are none."""
    out: dict[str, int] = {}
    for text in texts:
        name, _, count = text.partition("=")
        if not (name and count.isdecimal() and int(count) > 0):
            raise ValueError(f"--split {text}: an axis and a number are needed, such as heads=8")
        if name in out:
            raise ValueError(f"--split {text}: {name} is given twice")
        out[name] = int(count)
    return out or None


def export(args: Export, console: Console) -> None:
    """Writes a Hugging Face folder and says in what it differs from the source."""
    if not 0 < args.max_shard_gb < float("inf"):
        raise ValueError(f"--max-shard-gb {args.max_shard_gb}: a positive number is needed")
    with bytes_bar("exporting") as meter:
        found = export_checkpoint(args.folder, args.out, args.dtype, max(1, round(args.max_shard_gb * 1e9)), meter)
    kept = f", with {', '.join(found.kept)}" if found.kept else ""
    many = ", ".join(f"{count:,} {dtype}" for dtype, count in found.tensors.items())
    say(console, f"{found.folder}: {many} tensors, {tables.size(found.nbytes)} in {len(found.files)} file(s), {meter.rate}{kept}")
    for line in tables.export_notes(found):
        say(console, f"note: {line}")


COMMANDS: dict[type, Callable[[Any, Console], bool | None]] = {Inspect: inspect, Compare: compare, Verify: verify, Reshard: reshard, Export: export}


def main() -> int:
    """Runs; gives the exit code."""
    chosen = tyro.cli(
        Annotated[Inspect, tyro.conf.subcommand("inspect")]
        | Annotated[Compare, tyro.conf.subcommand("diff")]
        | Annotated[Verify, tyro.conf.subcommand("verify")]
        | Annotated[Reshard, tyro.conf.subcommand("reshard")]
        | Annotated[Export, tyro.conf.subcommand("export")],  # type: ignore[arg-type]
        description=__doc__,
    )
    different: list[bool | None] = []
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False)  # names may have brackets in them
    code = run_command(lambda: different.append(COMMANDS[type(chosen)](chosen, console)))
    return code or int(any(different))


if __name__ == "__main__":
    sys.exit(main())
