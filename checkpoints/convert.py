"""Turns a Hugging Face folder into a converted one, a chunk at a time, and goes on where an earlier run stopped.

Everything about the input is checked, by `plan`, before the first byte is written. The work goes on in `OUT.partial`,
with a line in its journal for each finished unit (a leaf, or one expert of one); the finished folder gets its
name by one rename. This file judges neither configs nor tensors; it writes what a plan says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import tensorstore as ts

from checkpoints import commit, journal, store
from checkpoints.ahead import ahead
from checkpoints.commit import Syncing, partial_of, writing
from checkpoints.errors import CheckpointError
from checkpoints.journal import PROGRESS, Done
from checkpoints.manifest import MANIFEST, SPEC, LeafRecord, Manifest, read_manifest, write_manifest, write_text
from checkpoints.plan import Plan, make_plan
from checkpoints.quantized import Unpacked, open_source
from checkpoints.quantizer import Quantizer
from checkpoints.units import Output, Part, Unit, chunk_data

KEPT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""Small files that are copied where the source has them."""

_PENDING_BYTES = 40 << 20  # of chunks that are being written, if a single one isn't larger
_AHEAD_BYTES = 24 << 20  # of chunks that are read and arranged before they can be written
_DISK_BLOCK = 4096
_STREAMED_BYTES = 2 << 30  # from this size on, the system keeps neither source nor output in its memory: twice as fast as when it runs full


def convert(
    hf_folder: str | os.PathLike,
    out_folder: str | os.PathLike,
    dtype: str | None = None,
    progress: store.Progress | None = None,
    quantizer: Quantizer | None = None,
) -> Manifest:
    """Converts a Hugging Face folder (config.json, safetensors) into `out_folder`.

    Memory holds one tensor of the source at a time at most, and a few chunks. A run that was stopped leaves
    `OUT.partial`, which the next one continues, after it has read again what is there; a finished folder of the same
    source, dtype and quantization is left as it is.

    Args:
        hf_folder: the source.
        out_folder: made here; it may be there empty, or hold the same conversion.
        dtype: 'float32', 'bfloat16', or None for the source's own (float16 becomes float32, which holds it exactly).
        progress: called with (bytes done, bytes in all, leaf path).
        quantizer: how routed experts are quantized; None leaves them as they are.

    Returns:
        The manifest of the finished folder.

    Raises:
        CheckpointError: a config, file or tensor that is missing, damaged or unexpected (nothing is written then); an
            output folder that holds something else (nothing is touched); not enough room on the disk (what was
            written can be resumed).
    """
    hf, out = Path(hf_folder), Path(out_folder)
    check_apart(hf, out)
    with open_source(hf) as source:
        plan = make_plan(hf, source, dtype, quantizer)
        if finished(out, plan) is not None:
            return _settled(hf, out, plan)
        commit.check_place(out)
        partial = partial_of(out)
        _check_room(partial, plan, journal.read_journal(partial, plan))
        with journal.open_journal(partial, plan) as log:
            if finished(out, plan) is not None:  # by another process, between our first look and the lock
                shutil.rmtree(partial, ignore_errors=True)
                return _settled(hf, out, plan)
            claimed = journal.read_journal(partial, plan)
            checksums = _write_units(source, plan, partial, claimed, log, progress)
            with writing(partial):
                manifest = _finish(hf, plan, partial, checksums)
            commit.publish(partial, out, (PROGRESS,))
    return manifest


def check_apart(hf: Path, out: Path) -> None:
    """Makes sure that the output isn't the source, nor within it.

    Raises:
        CheckpointError: it is.
    """
    real = Path(os.path.realpath(hf))
    if real in Path(os.path.realpath(out)).parents:
        raise CheckpointError(f"{out}: lies within the source folder {hf}: choose another output folder")
    for folder in (out, partial_of(out)):
        if folder.exists() and hf.exists() and os.path.samefile(folder, hf):
            raise CheckpointError(f"{hf}: is both the source and the output folder: choose another output folder")


# --- an output folder that is there -----------------------------------------------------------------------------------


def finished(out: Path, plan: Plan) -> Manifest | None:
    """The manifest of an output folder that is this conversion, finished; None where there is nothing yet. Nothing is touched.

    Raises:
        CheckpointError: the folder holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        manifest = read_manifest(out)
    except (CheckpointError, NotADirectoryError) as error:
        if (out / MANIFEST).is_file():  # a checkpoint, but damaged or of another version
            raise CheckpointError(f"{error} (or choose another output folder)") from error
        raise CheckpointError(
            f"{out}: exists and is not a converted checkpoint: choose another output folder"
        ) from error
    for key, value in plan.identity().items():
        if getattr(manifest, key) != value:
            raise CheckpointError(
                f"{out}: holds another model or dtype ({key} {getattr(manifest, key)}, wanted {value}): "
                "choose another output folder"
            )
    return manifest


def _settled(hf: Path, out: Path, plan: Plan) -> Manifest:
    """A finished folder with what was left open, and with the small files as they are now."""
    manifest = finished(out, plan)
    assert manifest is not None
    with writing(out):
        commit.tidy(out, (PROGRESS,))
        return _refresh_files(hf, out, manifest)


def _refresh_files(hf: Path, out: Path, manifest: Manifest) -> Manifest:
    """Copies the small files that changed since, so that an edited tokenizer or chat template isn't missed."""
    files = {name: sha256_of(hf / name) for name in KEPT_FILES if (hf / name).is_file()}
    if files == manifest.files:
        return manifest
    copy_files(hf, out)
    manifest = dataclasses.replace(manifest, files=files)
    write_manifest(out, manifest)
    return manifest


def room_needed(plan: Plan, done: Done) -> int:
    """Bytes that are still to be written, in whole blocks of the disk."""
    arrays = {output.path: output for unit in plan.units for output in unit.outputs}
    needed = sum(store.bytes_on_disk(output.leaf, output.chunk, _DISK_BLOCK) for output in arrays.values())
    return needed - sum(unit.nbytes for unit in plan.units if unit.key in done)


def _check_room(partial: Path, plan: Plan, done: Done) -> None:
    needed, free = room_needed(plan, done), commit.free_bytes(partial)
    if needed > free:
        raise CheckpointError(
            f"{partial}: {needed} bytes are to be written, the disk has {free} free: free {needed - free} bytes more"
        )


# --- writing ----------------------------------------------------------------------------------------------------------


def _write_units(source: Unpacked, plan: Plan, partial: Path, claimed: Done, log: IO[str], progress) -> Done:
    """Writes every unit that isn't done; gives the checksums of all."""
    report = store.Count(plan.nbytes, progress)
    source.streaming = streamed = plan.nbytes >= _STREAMED_BYTES and hasattr(os, "posix_fadvise")
    done = journal.reread(partial, plan, claimed)
    report(sum(unit.nbytes for unit in plan.units if unit.key in done))
    arrays: dict[str, ts.TensorStore] = {}
    left = {unit.key: unit for unit in plan.units if unit.key not in done}
    stream = ((key, parts) for key, unit in left.items() for parts in chunk_data(source, unit))
    try:
        made = ahead(stream, _AHEAD_BYTES, lambda item: sum(data.nbytes for _, data in item[1]))
        with contextlib.closing(made) as chunks, Syncing(streamed) as syncing:
            for key, group in itertools.groupby(chunks, key=lambda item: item[0]):
                unit = left[key]
                if unit.outputs[0].path not in arrays:
                    arrays = {o.path: store.create_array(partial, o.path, o.leaf, o.chunk) for o in unit.outputs}
                parts = (parts for _, parts in group)
                crcs = _write_unit([arrays[o.path] for o in unit.outputs], parts, functools.partial(report, path=unit.path))
                done[key] = tuple(f"{crc:08x}" for crc in crcs)
                journal.add(log, unit, done[key])
                syncing.begin(list(unit.files(partial)))
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _writing_failed(error, partial, report.done, plan.nbytes) from error
    return done


def _write_unit(arrays: list[ts.TensorStore], chunks: Iterator[tuple[Part, ...]], report: Callable[[int], None]) -> list[int]:
    """Writes chunks, a few at a time, and gives the CRC-32 of what each array got. However it ends, nothing is being written any more when it
    returns."""
    crcs = [0] * len(arrays)
    with store.Writes(_PENDING_BYTES) as writes:
        for parts in chunks:
            for i, (array, (region, data)) in enumerate(zip(arrays, parts, strict=True)):
                writes.begin(array, region, data)
                crcs[i] = zlib.crc32(data.data, crcs[i])
                report(data.nbytes)
    return crcs


def _writing_failed(error: Exception, partial: Path, written: int, total: int) -> CheckpointError:
    if commit.errno_of(error) in commit.DISK_FULL or os.strerror(errno.ENOSPC) in str(error):
        return CheckpointError(
            f"{partial}: the disk is full after about {written} of {total} bytes: "
            f"free {total - written} more and run again, it will go on from there"
        )
    return commit.failure(partial, error, ", a second run will go on from there")


# --- the end ----------------------------------------------------------------------------------------------------------


def _finish(hf: Path, plan: Plan, partial: Path, checksums: Done) -> Manifest:
    """Everything beside the arrays; the manifest last."""
    write_text(partial / SPEC, json.dumps(plan.spec.to_json(), indent=1) + "\n")
    store.write_orbax_metadata(partial, {output.path: output.leaf for unit in plan.units for output in unit.outputs})
    files = copy_files(hf, partial)
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
        leaves=_records(plan, checksums, partial),
        quantization=plan.quantizer.describe() if plan.quantizer else None,
        revision=plan.revision,
    )
    write_manifest(partial, manifest)
    return manifest


def _records(plan: Plan, checksums: Done, partial: Path) -> dict[str, LeafRecord]:
    by_path: dict[str, list[Unit]] = {}
    for unit in plan.units:
        by_path.setdefault(unit.path, []).append(unit)
    records = {}
    for units in by_path.values():
        for i, output in enumerate(units[0].outputs):
            ends = store.chunk_crcs(partial, output.path, output.leaf.shape, output.chunk)
            records[output.path] = _record(plan, units, output, tuple(checksums[unit.key][i] for unit in units), ends)
    return records


def _record(plan: Plan, units: list[Unit], output: Output, crc32: tuple[str, ...], ends: str) -> LeafRecord:
    dtypes = tuple(plan.source_dtypes[unit.piece.hf] for unit in units)
    return LeafRecord(
        shape=output.leaf.shape,
        dtype=output.dtype,
        stored=output.leaf.dtype.name,
        axes=output.leaf.axes,
        chunk=output.chunk,
        op=units[0].piece.op,
        sources=tuple(unit.piece.hf for unit in units),
        crc32=crc32,
        nbytes=output.leaf.nbytes,
        source_dtypes=dtypes[:1] if len(set(dtypes)) == 1 else dtypes,
        chunk_crc32c=ends,
    )


def copy_files(hf: Path, folder: Path) -> dict[str, str]:
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
            out[name] = sha256_of(folder / name)
    return out


def sha256_of(path: Path) -> str:
    """SHA-256 of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
