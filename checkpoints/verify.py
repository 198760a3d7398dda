"""Reads a converted folder again, whole, and compares it with what its manifest says, and with the source where that is at hand.

Nothing is written. What is wrong is collected, so that one run tells all of it.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from checkpoints import store
from checkpoints.convert import sha256_of
from checkpoints.errors import CheckpointError
from checkpoints.manifest import MANIFEST, SPEC, LeafRecord, Manifest, read_manifest, read_spec_json
from checkpoints.plan import Plan, make_plan
from checkpoints.quantized import open_source
from checkpoints.quantizer import Quantizer
from checkpoints.units import Unit, chunk_data

_LISTED = 20


@dataclasses.dataclass(frozen=True)
class Verified:
    """What was found to be right: arrays, checksummed units of them (a leaf, or one expert of one), their bytes, small files; units made again from
    the source; and what else is in the folder, which nothing here knows."""

    leaves: int
    units: int
    nbytes: int
    files: int
    source_units: int
    strangers: tuple[str, ...]


def verify(
    folder: str | os.PathLike, source: str | os.PathLike | None = None, quantizer: Quantizer | None = None, progress: store.Progress | None = None
) -> Verified:
    """Compares every array and kept file with the manifest, and what the source would become with it as well.

    Args:
        folder: a converted folder.
        source: the Hugging Face folder that it was made of; None compares with the manifest alone.
        quantizer: how the folder's experts were quantized, if they were; only a source needs it.
        progress: called with (bytes read, bytes in all, leaf path); a source counts as much as the folder.

    Raises:
        CheckpointError: all that is missing, damaged or altered, in one line.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    read_spec_json(path, manifest)
    read = store.Count(manifest.nbytes * (1 if source is None else 2), progress)
    problems = [*_check_files(path, manifest), *_check_leaves(path, manifest, read)]
    made = 0
    if source is not None:
        plan = _plan_of(path, manifest, Path(source), quantizer)
        problems += _check_source(plan, manifest, Path(source), read)
        made = len(plan.units)
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise CheckpointError(f"{path}: {'; '.join(problems[:_LISTED])}{more}")
    units = sum(len(record.crc32) for record in manifest.leaves.values())
    return Verified(len(manifest.leaves), units, manifest.nbytes, len(manifest.files) + 3, made, _strangers(path, manifest))


def check_folder(folder: Path, manifest: Manifest, count: store.Count) -> None:
    """Reads every array and kept file and compares it with the manifest's checksums; counts the arrays' bytes.

    Raises:
        CheckpointError: all that are missing, damaged or altered, in one line.
    """
    problems = [*_check_files(folder, manifest), *_check_leaves(folder, manifest, count)]
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(problems[:_LISTED])}")


def _check_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    for name, expected in manifest.files.items():
        if not (folder / name).is_file():
            yield f"{name} is missing"
        elif sha256_of(folder / name) != expected:
            yield f"{name} has been altered: it doesn't have the SHA-256 of the manifest"
    problem = store.orbax_metadata_problem(folder, {path: record.shape for path, record in manifest.leaves.items()})
    if problem:
        yield problem


def _check_leaves(folder: Path, manifest: Manifest, read: store.Count) -> Iterator[str]:
    for path, record in manifest.leaves.items():
        try:
            array = store.open_array(folder, path, record)
        except CheckpointError as error:
            yield str(error).removeprefix(f"{folder}: ")
            read(record.nbytes, path)
            continue
        for unit, expected in enumerate(record.crc32):
            expert = unit if path.startswith("experts.") else None
            name = f"leaf {path}" if expert is None else f"leaf {path}, expert {unit},"
            try:
                got = f"{_unit_crc(folder, path, record, array, expert, read):08x}"
            except CheckpointError as error:
                yield str(error).removeprefix(f"{folder}: ")
                continue
            if got != expected:
                yield f"{name} has checksum {got}, the manifest says {expected}"


def _unit_crc(folder: Path, path: str, record: LeafRecord, array, expert: int | None, read: store.Count) -> int:
    first = () if expert is None else (slice(expert, expert + 1),)
    shape, chunk, crc = record.shape[len(first) :], record.chunk[len(first) :], 0
    for axis, start, stop in store.unit_chunks(shape, chunk):
        index = tuple(slice(start, stop) if i == axis else slice(None) for i in range(len(shape)))
        data = store.read_array(folder, path, array, (*first, *index))
        crc = zlib.crc32(data.data, crc)
        read(data.nbytes, path)
    return crc


def _plan_of(folder: Path, manifest: Manifest, hf: Path, quantizer: Quantizer | None) -> Plan:
    if manifest.quantization is not None and quantizer is None:
        raise CheckpointError(f"{folder}: its experts are quantized ({manifest.quantization}): comparing with the source needs that quantizer")
    with open_source(hf) as source:
        plan = make_plan(hf, source, manifest.dtype, quantizer if manifest.quantization else None)
    for key, value in plan.identity().items():
        if getattr(manifest, key) != value:
            raise CheckpointError(f"{hf}: is not what {folder} was made of ({key} is {value}, the manifest has {getattr(manifest, key)})")
    return plan


def _check_source(plan: Plan, manifest: Manifest, hf: Path, read: store.Count) -> Iterator[str]:
    """Makes every unit again and compares checksums."""
    with open_source(hf) as source:
        for unit in (_as_written(unit, manifest) for unit in plan.units):
            crcs = [0] * len(unit.outputs)
            for parts in chunk_data(source, unit):
                for i, (_, data) in enumerate(parts):
                    crcs[i] = zlib.crc32(data.data, crcs[i])
                    read(data.nbytes, unit.path)
            for output, crc in zip(unit.outputs, crcs, strict=True):
                expected = manifest.leaves[output.path].crc32[unit.piece.expert or 0]
                if f"{crc:08x}" != expected:
                    yield f"{unit.piece.hf} of {hf} becomes {output.path} with checksum {crc:08x}, the manifest says {expected}"


def _as_written(unit: Unit, manifest: Manifest) -> Unit:
    """The unit cut as the folder is, which `reshard` may have cut otherwise: checksums go over chunks."""
    record = manifest.leaves[unit.outputs[0].path]
    axes = len(unit.piece.shape)
    sizes = zip(record.chunk[-axes:], unit.piece.shape, record.shape[-axes:], strict=True)
    return dataclasses.replace(unit, chunk=tuple(chunk * plain // stored for chunk, plain, stored in sizes))


def _strangers(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    known = {*manifest.leaves, *manifest.files, MANIFEST, SPEC, store.ORBAX_METADATA}
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.name not in known))
