"""What a conversion would do: every tensor that goes in, every leaf that comes out, what is unused, missing or wrong, bytes and time.

Nothing stays on the disk. Time is foretold from a sample of the real work: some units are read and arranged, and as much is written to a file
without a name where the output would be.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
import zlib
from pathlib import Path

from checkpoints import commit, journal
from checkpoints.commit import partial_of, writing
from checkpoints.convert import check_apart, finished, room_needed
from checkpoints.errors import CheckpointError
from checkpoints.families import is_weight, tied_head
from checkpoints.plan import Findings, Plan, examine, make_plan
from checkpoints.quantized import Unpacked, open_source
from checkpoints.quantizer import Quantizer
from checkpoints.units import Unit, chunk_data
from jaxmoe.spec import ModelSpec

SAMPLE_BYTES = 96 << 20
"""Of the output: read and arranged, and written, to see how fast this goes."""

_PIECE = 8 << 20


@dataclasses.dataclass(frozen=True)
class TensorRow:
    """One tensor of the source: `status` is 'used', 'copy' (of the embedding), 'buffer', 'passed over', 'missing', 'unexpected', 'misshapen' or
    'unsupported'; `becomes` are the leaves that are made of it; a missing one's dtype is '' and its shape the one it should have."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    status: str
    becomes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LeafRow:
    """One array of the output: its chunks are one file each."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    nbytes: int
    files: int


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Bytes to write in all, and those of an unfinished run that are there already; bytes the disk needs and has free; measured bytes per second of
    reading and arranging, and of writing; seconds that this would take."""

    nbytes: int
    done: int
    needed: int
    free: int
    read_rate: float
    write_rate: float

    @property
    def seconds(self) -> float:
        """How long the conversion would take."""
        left = self.nbytes - self.done
        return left / self.read_rate + left / self.write_rate + self.done / self.read_rate


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What a conversion would do. `problems` is empty where it could begin; `leaves` and `forecast` are, where it couldn't; `finished` says that it
    has been done already, and there is no `forecast` then."""

    spec: ModelSpec
    layout: str
    tensors: tuple[TensorRow, ...]
    leaves: tuple[LeafRow, ...]
    problems: tuple[str, ...]
    forecast: Forecast | None
    finished: bool = False

    @property
    def bytes_in(self) -> int:
        """Of the tensors that are used."""
        return sum(row.nbytes for row in self.tensors if row.status == "used")


def dry_run(
    hf_folder: str | os.PathLike, out_folder: str | os.PathLike, dtype: str | None = None, quantizer: Quantizer | None = None
) -> DryRun:
    """Looks at everything that `convert` with these arguments would look at, and writes nothing that stays.

    Raises:
        CheckpointError: a source that can't be read at all, or a place that can't be written to. What is wrong with single tensors stands in
            `problems`.
    """
    hf, out = Path(hf_folder), Path(out_folder)
    check_apart(hf, out)
    with open_source(hf) as source:
        found = examine(hf, source)
        tensors = tuple(_tensor_rows(source, found))
        try:
            plan = make_plan(hf, source, dtype, quantizer)
        except CheckpointError as error:
            return DryRun(found.spec, found.layout.name, tensors, (), found.wrong or (str(error).removeprefix(f"{hf}: "),), None)
        try:
            if finished(out, plan) is not None:
                return DryRun(plan.spec, plan.layout.name, tensors, _leaf_rows(plan), (), None, finished=True)
            commit.check_place(out)
            journal.read_journal(partial_of(out), plan)
        except CheckpointError as error:
            return DryRun(plan.spec, plan.layout.name, tensors, _leaf_rows(plan), (str(error),), None)
        forecast = _forecast(source, plan, out)
    short = forecast.needed - forecast.free
    problems = (f"the disk has {forecast.free} bytes free, {forecast.needed} are needed: free {short} bytes more",) if short > 0 else ()
    return DryRun(plan.spec, plan.layout.name, tensors, _leaf_rows(plan), problems, forecast)


def _tensor_rows(source: Unpacked, found: Findings):
    for name, info in source.tensors.items():
        if name not in found.expected:
            yield TensorRow(name, info.dtype, info.shape, info.nbytes, _left_status(found, name), ())
            continue
        shape, parts = found.expected[name]
        status = "misshapen" if info.shape != shape else "used" if source.supports(name) else "unsupported"
        yield TensorRow(name, info.dtype, info.shape, info.nbytes, status, _leaves_of(parts))
    for name, (shape, parts) in found.expected.items():
        if name not in source.tensors:
            yield TensorRow(name, "", shape, 0, "missing", _leaves_of(parts))


def _left_status(found: Findings, name: str) -> str:
    if name in found.unexpected:
        return "unexpected"
    if name == tied_head(found.spec, found.layout):
        return "copy"
    return "passed over" if is_weight(found.spec, found.layout, name) else "buffer"


def _leaves_of(parts) -> tuple[str, ...]:
    return tuple(path if piece.expert is None else f"{path}[{piece.expert}]" for path, piece in parts)


def _leaf_rows(plan: Plan) -> tuple[LeafRow, ...]:
    rows = {}
    for unit in plan.units:
        for o in unit.outputs:
            files = math.prod(-(-n // c) for n, c in zip(o.leaf.shape, o.chunk, strict=True))
            rows[o.path] = LeafRow(o.path, o.dtype, o.leaf.shape, o.chunk, o.leaf.nbytes, files)
    return tuple(rows.values())


def _forecast(source: Unpacked, plan: Plan, out: Path) -> Forecast:
    partial = partial_of(out)
    claimed = journal.read_journal(partial, plan)
    done = sum(unit.nbytes for unit in plan.units if unit.key in claimed)
    needed = room_needed(plan, claimed)
    sample = min(SAMPLE_BYTES, plan.nbytes)
    read_rate = _read_rate(source, _spread(plan.units, sample))
    write_rate = _write_rate(commit.existing(partial), min(sample, commit.free_bytes(partial) // 2))
    return Forecast(plan.nbytes, done, needed, commit.free_bytes(partial), read_rate, write_rate)


def _spread(units: tuple[Unit, ...], nbytes: int) -> list[Unit]:
    """Some units of about so many bytes in all, from everywhere; the widest first, as they say most."""
    chosen: list[Unit] = []
    held = 0
    for unit in sorted(units, key=lambda unit: -unit.nbytes)[:: max(1, len(units) // 16)]:
        if chosen and held + unit.nbytes > nbytes:
            continue
        chosen.append(unit)
        held += unit.nbytes
    return chosen


def _read_rate(source: Unpacked, units: list[Unit]) -> float:
    """Bytes of output per second of reading, arranging and checksumming."""
    done, start = 0, time.perf_counter()
    for unit in units:
        for parts in chunk_data(source, unit):
            for _, data in parts:
                zlib.crc32(data.data)
                done += data.nbytes
            if done > 2 * SAMPLE_BYTES:
                break
    return max(done, 1) / (time.perf_counter() - start)


def _write_rate(folder: Path, nbytes: int) -> float:
    """Bytes per second of writing a file without a name, and waiting until it is on the disk."""
    piece = os.urandom(min(_PIECE, max(1, nbytes)))
    with writing(folder):
        done, start = 0, time.perf_counter()
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:  # has a name for a moment where the disk knows no files without
            try:
                while done < max(1, nbytes):
                    done += file.write(piece) or 0
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in commit.DISK_FULL:
                    raise  # what is missing is told from the bytes that are needed
    return max(1, done) / (time.perf_counter() - start)
