"""Turns a Hugging Face folder into a converted one, a chunk at a time, and goes on where an earlier run stopped.

Everything about the input is checked before the first byte is written. The work goes on in `OUT.partial`, with a line
in its progress file for each finished unit (a leaf, or one expert of one); the finished folder gets its name by one
rename.
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
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import tensorstore as ts

from checkpoints import store
from checkpoints.errors import CheckpointError
from checkpoints.families import Layout, Piece, choose_layout, hf_tensors, ignorable, leaf_paths, pieces_of
from checkpoints.manifest import (
    LEAF_LAYOUT,
    SPEC,
    VERSION,
    LeafRecord,
    Manifest,
    read_manifest,
    write_manifest,
    write_text,
)
from checkpoints.safetensors_reader import SafetensorsFolder
from jaxmoe import formats
from jaxmoe.spec import Leaf, ModelSpec, SpecError

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
_SYNCING = 16
_LISTED = 20  # tensors that an error lists


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is written, checksummed and resumed as one: a leaf, or one expert of it. `chunk` has the unit's axes."""

    path: str
    leaf: Leaf
    piece: Piece
    chunk: tuple[int, ...]

    @property
    def key(self) -> tuple[str, int | None]:
        """What names the unit: leaf and expert."""
        return self.path, self.piece.expert

    @property
    def array_chunk(self) -> tuple[int, ...]:
        """The chunk with the array's axes."""
        return self.chunk if self.piece.expert is None else (1, *self.chunk)

    @property
    def nbytes(self) -> int:
        """Bytes of the unit as stored."""
        return self.piece.rows * self.piece.cols * self.leaf.dtype.itemsize

    def region(self, axis: int, start: int, stop: int) -> tuple[slice, ...]:
        """Where a chunk of the unit lies in its array."""
        expert = self.piece.expert
        inner = tuple(slice(start, stop) if i == axis else slice(None) for i in range(len(self.piece.shape)))
        return inner if expert is None else (slice(expert, expert + 1), *inner)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion that has been checked: what it makes, of what, and under which identity."""

    spec: ModelSpec
    layout: Layout
    fingerprint: str
    source_files: tuple[tuple[str, int, str, str], ...]
    ignored: tuple[str, ...]
    units: tuple[Unit, ...]

    @property
    def dtype(self) -> str:
        """How weights are held: 'float32' or 'bfloat16'."""
        return self.spec.precision.params

    @property
    def nbytes(self) -> int:
        """Bytes of all units."""
        return sum(unit.nbytes for unit in self.units)

    def identity(self) -> dict:
        """What two runs must share for one to go on with the other's work."""
        return {
            "version": VERSION,
            "layout": LEAF_LAYOUT,
            "fingerprint": self.fingerprint,
            "spec_hash": self.spec.hash(),
            "dtype": self.dtype,
        }


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
    with SafetensorsFolder(hf) as source:
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


# --- before the first byte --------------------------------------------------------------------------------------------


def make_plan(hf: Path, source: SafetensorsFolder, dtype: str | None) -> Plan:
    """Checks config and tensors, and lists what is to be written.

    Raises:
        CheckpointError: see `convert`.
    """
    spec = read_config(hf)
    layout = choose_layout(spec, source.tensors)
    expected = hf_tensors(spec, layout)
    ignored = _check_names(hf, source, spec, layout, expected.keys())
    for name, (shape, _) in expected.items():
        source.check_shape(name, shape)
        source.held_dtype(name)
    spec = _with_dtype(hf, source, spec, expected.keys(), dtype)
    _check_tied(source, layout, ignored)
    files = tuple((f.name, f.nbytes, f.header_sha256, f.sample_sha256) for f in source.files)
    fingerprint = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return Plan(spec, layout, fingerprint, files, ignored, _units(spec, layout))


def read_config(hf: Path) -> ModelSpec:
    """The spec of a folder's config.json.

    Raises:
        CheckpointError: no folder, no config.json, not JSON, or a config that isn't supported.
    """
    path = hf / "config.json"
    if not hf.is_dir():
        raise CheckpointError(f"{hf}: no such folder")
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: not a JSON object") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: damaged: not a JSON object")
    try:
        return ModelSpec.from_hf(config)
    except SpecError as error:
        raise CheckpointError(f"{hf}: {error}") from error
    except (TypeError, ValueError) as error:  # a value of a type that no field of its kind has
        raise CheckpointError(f"{path}: damaged: {store.one_line(error)}") from error


def _check_names(hf: Path, source: SafetensorsFolder, spec: ModelSpec, layout: Layout, expected) -> tuple[str, ...]:
    missing = [name for name in expected if name not in source.tensors]
    if missing:
        raise CheckpointError(f"{hf}: {_count(missing, 'tensor')} missing that the config needs: {_list(missing)}")
    left = [name for name in source.tensors if name not in expected]
    unexpected = [name for name in left if not ignorable(spec, layout, name)]
    if unexpected:
        raise CheckpointError(
            f"{hf}: {_count(unexpected, 'tensor')} unexpected, which the config has no place for: {_list(unexpected)}"
        )
    return tuple(left)


def _count(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s are' if len(names) > 1 else ' is'}"


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(sorted(names)[:_LISTED]) + more


def _with_dtype(hf: Path, source: SafetensorsFolder, spec: ModelSpec, expected, dtype: str | None) -> ModelSpec:
    if dtype is None:
        kinds = Counter(source[name].dtype for name in expected)
        if len(kinds) > 1:
            found = ", ".join(f"{n} of {kind}" for kind, n in kinds.most_common())
            raise CheckpointError(f"{hf}: tensors of several dtypes ({found}): choose one, float32 or bfloat16")
        dtype = {"F32": "float32", "F16": "float32", "BF16": "bfloat16"}[next(iter(kinds))]
    try:
        return spec.with_precision(dtype)
    except SpecError as error:
        raise CheckpointError(str(error)) from error


def _check_tied(source: SafetensorsFolder, layout: Layout, ignored: tuple[str, ...]) -> None:
    """A tied model's output matrix may be on disk, if it is the embedding."""
    head, embed = layout.top["lm_head.kernel"].hf, layout.top["embed.table"].hf
    if head not in ignored:
        return
    source.check_shape(head, source[embed].shape)
    size, step = source[embed].size, store.CHUNK_BYTES
    if source[head].dtype == source[embed].dtype and all(
        source.read_elements(head, at, min(step, size - at)).tobytes()
        == source.read_elements(embed, at, min(step, size - at)).tobytes()
        for at in range(0, size, step)
    ):
        return
    raise CheckpointError(f"{source.folder}: tie_word_embeddings is true, but {head} differs from {embed}")


def _units(spec: ModelSpec, layout: Layout) -> tuple[Unit, ...]:
    leaves = leaf_paths(spec)
    out = []
    for path, pieces in pieces_of(spec, layout).items():
        chunk = store.chunk_shape(leaves[path], pieces[0])
        for piece in pieces:
            out.append(Unit(path, leaves[path], piece, chunk if piece.expert is None else chunk[1:]))
    return tuple(out)


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


def _write_units(source: SafetensorsFolder, plan: Plan, partial: Path, done: dict, log: IO[str], progress) -> dict:
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
            crc = _write_unit(arrays[unit.path], _chunks(source, unit, plan.dtype), reported)
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


def _chunks(source: SafetensorsFolder, unit: Unit, dtype: str) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """The unit's chunks in order: where each goes in the array, and its numbers `[(1,) *chunk]`.

    Where chunks are cut along the tensor's rows, only a chunk's rows are in memory; otherwise the whole tensor is (an
    expert's `down`).
    """
    piece = unit.piece
    whole = None
    for axis, start, stop in store.unit_chunks(piece.shape, unit.chunk):
        if axis == piece.row_axis:
            step = piece.rows_per_step
            block = piece.to_leaf(_rows(source, piece, start * step, stop * step))
        else:
            if whole is None:
                whole = piece.to_leaf(_rows(source, piece, 0, piece.rows))
            block = whole[tuple(slice(start, stop) if i == axis else slice(None) for i in range(whole.ndim))]
        data = formats.store_numpy(np.ascontiguousarray(block), dtype)
        yield unit.region(axis, start, stop), data if piece.expert is None else data[None]


def _rows(source: SafetensorsFolder, piece: Piece, start: int, stop: int) -> np.ndarray:
    first = (piece.first + start) * piece.cols
    return source.read_elements(piece.hf, first, (stop - start) * piece.cols).reshape(-1, piece.cols)


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
            dtype=plan.dtype,
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
            for _ in pool.map(_sync_file, [os.path.join(root, name) for name in names]):
                pass
            _sync_file(root)


def _sync_file(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
