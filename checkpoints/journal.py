"""What an unfinished conversion has done so far: a line for each finished unit, with the checksums of what it wrote.

A line is believed only when what it speaks of is read again and has those checksums: after a power cut, files can be there and hold nothing. The
file is locked by the process that writes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from checkpoints import store
from checkpoints.commit import writing
from checkpoints.errors import CheckpointError
from checkpoints.plan import Plan
from checkpoints.units import Unit

PROGRESS = "_progress.jsonl"

Done = dict[tuple[str, int | None], tuple[str, ...]]
"""The CRC-32 of each output of the units that are finished, by `Unit.key`."""


def read_journal(partial: Path, plan: Plan) -> Done:
    """What an earlier run says that it finished; nothing is read again yet.

    Raises:
        CheckpointError: the folder is something else, or belongs to another source, dtype or quantization.
    """
    if not partial.exists() or (partial.is_dir() and not any(partial.iterdir())):
        return {}
    try:
        lines = (partial / PROGRESS).read_bytes().decode("utf-8", "replace").splitlines()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{partial}: exists and is not an unfinished conversion: remove it or choose another output folder"
        ) from error
    entries = [entry for entry in map(_parse, lines) if entry is not None]
    header = entries[0] if entries else None
    if header is None and {p.name for p in partial.iterdir()} == {PROGRESS}:
        return {}  # stopped before the first line was whole
    for key, value in _header(plan).items():
        if header is None or header.get(key) != value:
            raise CheckpointError(
                f"{partial}: an unfinished conversion of another model or dtype ({key} differs): "
                "remove it or choose another output folder"
            )
    counts = {unit.key: len(unit.outputs) for unit in plan.units}
    claimed = {(e["leaf"], e["expert"]): tuple(e["crc32"]) for e in entries[1:] if e.keys() == {"leaf", "expert", "crc32"}}
    return {key: crc for key, crc in claimed.items() if counts.get(key) == len(crc)}


@contextlib.contextmanager
def open_journal(partial: Path, plan: Plan) -> Iterator[IO[str]]:
    """The file, locked and ready for another line.

    Raises:
        CheckpointError: another process has it, or the folder can't be written.
    """
    with writing(partial):
        partial.mkdir(parents=True, exist_ok=True)
        log = open(partial / PROGRESS, "a+", encoding="utf-8", errors="replace")
    try:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{partial}: another process is converting into it") from None
        with writing(partial):
            log.seek(0)
            text = log.read()
            if _parse(text.split("\n", 1)[0]) is None:
                log.truncate(0)
                log.write(json.dumps(_header(plan)) + "\n")
                log.flush()
                os.fsync(log.fileno())  # without this line, a power cut would leave a folder that nobody knows
            elif not text.endswith("\n"):
                log.write("\n")  # ends a line that was cut off
            log.flush()
        yield log
    finally:
        with contextlib.suppress(OSError):  # a line that couldn't be flushed has said so; closing tries it again
            log.close()


def _header(plan: Plan) -> dict:
    return plan.identity() | {"nbytes": plan.nbytes, "cut": plan.cut, "source_times": list(plan.source_times)}


def add(log: IO[str], unit: Unit, checksums: tuple[str, ...]) -> None:
    """Says that a unit is finished."""
    log.write(json.dumps({"leaf": unit.path, "expert": unit.piece.expert, "crc32": checksums}) + "\n")
    log.flush()


def reread(partial: Path, plan: Plan, claimed: Done, seen: Callable[[int], None] = lambda nbytes: None) -> Done:
    """Those of the claimed units that are there with the checksums they should have.

    Args:
        seen: called with the bytes of each unit that was read.
    """
    out = {}
    for unit in plan.units:
        if unit.key in claimed:
            if _unit_checksums(partial, unit) == claimed[unit.key]:
                out[unit.key] = claimed[unit.key]
            seen(unit.nbytes)
    return out


def _unit_checksums(partial: Path, unit: Unit) -> tuple[str, ...] | None:
    """CRC-32 of each output as it is on disk; None where something is missing or damaged."""
    if not all(os.path.isfile(path) for path in unit.files(partial)):
        return None
    try:
        arrays = [store.create_array(partial, output.path, output.leaf, output.chunk) for output in unit.outputs]
        crcs = [0] * len(arrays)
        for axis, start, stop in unit.chunks():
            for i, (output, array) in enumerate(zip(unit.outputs, arrays, strict=True)):
                data = store.read_array(partial, output.path, array, unit.region(output, axis, start, stop))
                crcs[i] = zlib.crc32(data.data, crcs[i])
    except (CheckpointError, OSError, ValueError):
        return None
    return tuple(f"{crc:08x}" for crc in crcs)


def _parse(line: str) -> dict | None:
    """One line; None for one that was cut off."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None
