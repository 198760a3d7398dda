"""Turns a Hugging Face folder into a converted one, a chunk at a time, and goes on where an earlier run stopped.

Everything about the input is checked, by `plan`, before the first byte is written. The work goes on in `OUT.partial`,
with a line in its progress file for each finished unit (a leaf, or one expert of one); the finished folder gets its
name by one rename. This file judges neither configs nor tensors; it writes what a plan says.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import tensorstore as ts

from checkpoints import store
from checkpoints.errors import CheckpointError
from checkpoints.families import Piece
from checkpoints.manifest import SPEC, LeafRecord, Manifest, read_manifest, write_manifest, write_text
from checkpoints.plan import Plan, Unit, make_plan
from checkpoints.quantized import Unpacked, open_source
from jaxmoe import formats

KEPT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""Small files that are copied where the source has them."""

PROGRESS = "_progress.jsonl"

_PENDING = 4  # chunks being written while the next is read
_BLOCK_BYTES = 8 << 20  # of the source that are decoded and picked from at once
_SYNCING = 16


def convert(
    hf_folder: str | os.PathLike,
    out_folder: str | os.PathLike,
    dtype: str | None = None,
    progress: store.Progress | None = None,
) -> Manifest:
    """Converts a Hugging Face folder (config.json, safetensors) into `out_folder`.

    Memory holds one tensor of the source at a time at most, and a few chunks. A run that was stopped leaves
    `OUT.partial`, which the next one continues; a finished folder of the same source and dtype is left as it is.

    Args:
        hf_folder: the source.
        out_folder: made here; it may be there empty, or hold the same conversion.
        dtype: 'float32', 'bfloat16', or None for the source's own (float16 becomes float32, which holds it exactly).
        progress: called with (bytes done, bytes in all, leaf path).

    Returns:
        The manifest of the finished folder.

    Raises:
        CheckpointError: a config, file or tensor that is missing, damaged or unexpected (nothing is written then); an
            output folder that holds something else (nothing is touched); not enough room on the disk (what was
            written can be resumed).
    """
    hf, out = Path(hf_folder), Path(out_folder)
    with open_source(hf) as source:
        plan = make_plan(hf, source, dtype)
        finished = _finished(hf, out, plan)
        if finished is not None:
            return finished
        partial = partial_of(out)
        _check_room(partial, plan, _read_progress(partial, plan))
        with _open_progress(partial, plan) as log:
            finished = _finished(hf, out, plan)
            if finished is not None:  # by another process, between our first look and the lock
                shutil.rmtree(partial, ignore_errors=True)
                return finished
            done = _read_progress(partial, plan)
            checksums = _write_units(source, plan, partial, done, log, progress)
            manifest = _finish(hf, plan, partial, checksums)
            _sync(partial)
            os.replace(partial, out)
        (out / PROGRESS).unlink()
    return manifest


def partial_of(out: Path) -> Path:
    """The folder in which `out` is being made."""
    return out.with_name(out.name + ".partial")


# --- an output folder that is there -----------------------------------------------------------------------------------


def _finished(hf: Path, out: Path, plan: Plan) -> Manifest | None:
    """The manifest of an output folder that is this conversion, finished; None where there is nothing yet."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        manifest = read_manifest(out)
    except (CheckpointError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{out}: exists and is not a converted checkpoint: choose another output folder"
        ) from error
    for key, value in plan.identity().items():
        if getattr(manifest, key) != value:
            raise CheckpointError(
                f"{out}: holds another model or dtype ({key} {getattr(manifest, key)}, wanted {value}): "
                "choose another output folder"
            )
    (out / PROGRESS).unlink(missing_ok=True)
    return _refresh_files(hf, out, manifest)


def _refresh_files(hf: Path, out: Path, manifest: Manifest) -> Manifest:
    """Copies the small files that changed since, so that an edited tokenizer or chat template isn't missed."""
    files = {name: _sha256(hf / name) for name in KEPT_FILES if (hf / name).is_file()}
    if files == manifest.files:
        return manifest
    _copy_files(hf, out)
    manifest = dataclasses.replace(manifest, files=files)
    write_manifest(out, manifest)
    return manifest


# --- progress ---------------------------------------------------------------------------------------------------------


def _read_progress(partial: Path, plan: Plan) -> dict[tuple[str, int | None], str]:
    """Checksums of the units that an earlier run finished; only those whose chunks are all there and whole.

    Raises:
        CheckpointError: the folder is something else, or belongs to another source or dtype.
    """
    if not partial.exists() or (partial.is_dir() and not any(partial.iterdir())):
        return {}
    try:
        lines = (partial / PROGRESS).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{partial}: exists and is not an unfinished conversion: remove it or choose another output folder"
        ) from error
    entries = [entry for entry in map(_parse_line, lines) if entry is not None]
    header = entries[0] if entries else None
    if header is None and {p.name for p in partial.iterdir()} == {PROGRESS}:
        return {}  # stopped before the first line was whole
    for key, value in plan.identity().items():
        if header is None or header.get(key) != value:
            raise CheckpointError(
                f"{partial}: an unfinished conversion of another model or dtype ({key} differs): "
                "remove it or choose another output folder"
            )
    claimed = {(e["leaf"], e["expert"]): e["crc32"] for e in entries[1:] if e.keys() == {"leaf", "expert", "crc32"}}
    units = {unit.key: unit for unit in plan.units}
    return {key: crc for key, crc in claimed.items() if key in units and _unit_intact(partial, units[key])}


def _parse_line(line: str) -> dict | None:
    """One line; None for one that was cut off."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _unit_intact(partial: Path, unit: Unit) -> bool:
    for axis, start, _ in store.unit_chunks(unit.piece.shape, unit.chunk):
        index = [0] * len(unit.chunk)
        index[axis] = start // unit.chunk[axis]
        full = tuple(index) if unit.piece.expert is None else (unit.piece.expert, *index)
        if not store.chunk_intact(partial, unit.path, unit.array_chunk, unit.leaf.dtype.itemsize, full):
            return False
    return True


def _check_room(partial: Path, plan: Plan, done: dict) -> None:
    needed = sum(unit.nbytes for unit in plan.units if unit.key not in done)
    place = next(p for p in (partial.absolute(), *partial.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"{partial}: {needed} bytes are to be written, the disk has {free} free: free {needed - free} bytes more"
        )


def _open_progress(partial: Path, plan: Plan) -> IO[str]:
    """The progress file, locked and ready for another line."""
    partial.mkdir(parents=True, exist_ok=True)
    log = open(partial / PROGRESS, "a+", encoding="utf-8")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.close()
        raise CheckpointError(f"{partial}: another process is converting into it") from None
    log.seek(0)
    text = log.read()
    if _parse_line(text.split("\n", 1)[0]) is None:
        log.truncate(0)
        log.write(json.dumps(plan.identity()) + "\n")
    elif not text.endswith("\n"):
        log.write("\n")  # ends a line that was cut off
    log.flush()
    return log


# --- writing ----------------------------------------------------------------------------------------------------------


def _write_units(source: Unpacked, plan: Plan, partial: Path, done: dict, log: IO[str], progress) -> dict:
    """Writes every unit that isn't done; gives the checksums of all."""
    total = plan.nbytes
    written = sum(unit.nbytes for unit in plan.units if unit.key in done)
    checksums = dict(done)
    arrays: dict[str, ts.TensorStore] = {}

    def report(nbytes: int, path: str) -> None:
        nonlocal written
        written += nbytes
        if progress is not None:
            progress(written, total, path)

    report(0, "")
    try:
        for unit in plan.units:
            if unit.key in done:
                continue
            if unit.path not in arrays:
                arrays = {unit.path: store.create_array(partial, unit.path, unit.leaf, unit.array_chunk)}
            reported = functools.partial(report, path=unit.path)
            crc = _write_unit(arrays[unit.path], _chunks(source, unit), reported)
            checksums[unit.key] = f"{crc:08x}"
            log.write(json.dumps({"leaf": unit.path, "expert": unit.piece.expert, "crc32": checksums[unit.key]}) + "\n")
            log.flush()
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _writing_failed(error, partial, written, total) from error
    return checksums


def _write_unit(
    array: ts.TensorStore, chunks: Iterator[tuple[tuple[slice, ...], np.ndarray]], report: Callable[[int], None]
) -> int:
    """Writes chunks, a few at a time, and gives their CRC-32. However it ends, nothing is being written any more when
    it returns."""
    crc = 0
    pending: deque[ts.Future] = deque()
    try:
        for region, data in chunks:
            crc = zlib.crc32(data.data, crc)
            if len(pending) == _PENDING:
                pending.popleft().result()
            pending.append(store.write_chunk(array, region, data))
            report(data.nbytes)
        while pending:
            pending.popleft().result()
    finally:
        for future in pending:
            future.exception()  # waits; what went wrong first is already on its way
    return crc


def _writing_failed(error: Exception, partial: Path, written: int, total: int) -> CheckpointError:
    if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
        return CheckpointError(
            f"{partial}: the disk is full after about {written} of {total} bytes: "
            f"free {total - written} more and run again, it will go on from there"
        )
    return CheckpointError(f"{partial}: writing failed, a second run will go on from there: {store.one_line(error)}")


def _chunks(source: Unpacked, unit: Unit) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """The unit's chunks in order: where each goes in the array, and its numbers `[(1,) *chunk]`.

    Where chunks are cut along the tensor's rows, only a chunk's rows are in memory; otherwise the whole tensor is (an
    expert's `down`).
    """
    piece = unit.piece
    whole = None
    for axis, start, stop in store.unit_chunks(piece.shape, unit.chunk):
        if axis == piece.row_axis:
            step = piece.rows_per_step
            block = piece.to_leaf(read_rows(source, piece, start * step, stop * step, unit.dtype))
        else:
            if whole is None:
                whole = piece.to_leaf(read_rows(source, piece, 0, piece.rows, unit.dtype))
            block = whole[tuple(slice(start, stop) if i == axis else slice(None) for i in range(whole.ndim))]
        data = np.ascontiguousarray(block)
        yield unit.region(axis, start, stop), data if piece.expert is None else data[None]


def read_rows(source: Unpacked, piece: Piece, start: int, stop: int, dtype: str) -> np.ndarray:
    """Rows `start` to `stop` of a piece, as `dtype` is held; the source is read in blocks, so that what lies between them is never in memory whole.

    Returns:
        `[stop - start, cols]`.
    """
    out = np.empty((stop - start, piece.cols), formats.leaf_dtype(dtype))
    for block in piece.blocks(start, stop, max(1, _BLOCK_BYTES // (4 * piece.width))):
        rows = source.read_matrix(piece.hf, piece.width, block.first, block.stop, block.at)
        out[block.rows.start - start : block.rows.stop - start] = formats.store_numpy(piece.take_columns(rows), dtype)
    return out


# --- the end ----------------------------------------------------------------------------------------------------------


def _finish(hf: Path, plan: Plan, partial: Path, checksums: dict) -> Manifest:
    """Everything beside the arrays; the manifest last."""
    write_text(partial / SPEC, json.dumps(plan.spec.to_json(), indent=1) + "\n")
    store.write_orbax_metadata(partial, {unit.path: unit.leaf for unit in plan.units})
    files = _copy_files(hf, partial)
    manifest = Manifest(
        spec_hash=plan.spec.hash(),
        dtype=plan.dtype,
        names=plan.layout.name,
        fingerprint=plan.fingerprint,
        source_files=plan.source_files,
        files=files,
        ignored=plan.ignored,
        dropped=plan.dropped,
        absent_heads=plan.absent_heads,
        nbytes=plan.nbytes,
        leaves=_records(plan, checksums),
    )
    write_manifest(partial, manifest)
    return manifest


def _records(plan: Plan, checksums: dict) -> dict[str, LeafRecord]:
    by_path: dict[str, list[Unit]] = {}
    for unit in plan.units:
        by_path.setdefault(unit.path, []).append(unit)
    return {
        path: LeafRecord(
            shape=units[0].leaf.shape,
            dtype=units[0].dtype,
            stored=units[0].leaf.dtype.name,
            axes=units[0].leaf.axes,
            chunk=units[0].array_chunk,
            op=units[0].piece.op,
            sources=tuple(unit.piece.hf for unit in units),
            crc32=tuple(checksums[unit.key] for unit in units),
            nbytes=units[0].leaf.nbytes,
        )
        for path, units in by_path.items()
    }


def _copy_files(hf: Path, folder: Path) -> dict[str, str]:
    """Copies the small files; gives their SHA-256."""
    out = {}
    for name in KEPT_FILES:
        if (hf / name).is_file():
            temporary = folder / f"{name}.tmp"
            try:
                shutil.copyfile(hf / name, temporary)
                os.replace(temporary, folder / name)
            finally:
                temporary.unlink(missing_ok=True)
            out[name] = _sha256(folder / name)
    return out


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sync(folder: Path) -> None:
    """Waits until every file is on the disk, so that the rename never names a folder whose data a power cut could take.

    Many at once: the disk then joins what would be thousands of small waits.
    """
    with ThreadPoolExecutor(_SYNCING) as pool:
        for root, _, names in os.walk(folder):
            list(pool.map(_sync_file, [os.path.join(root, name) for name in names]))  # raises what a thread raised
            _sync_file(root)


def _sync_file(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
