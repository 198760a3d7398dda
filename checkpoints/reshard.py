"""Rewrites a converted folder, or a stock Orbax save, with other chunks or in another dtype, so that the splits it is read by fall between chunks.

Every array is read by the chunks that will be written; memory holds a few of them. The old folder stays as it is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from checkpoints import commit, store
from checkpoints.commit import LOCK, locked, partial_of, publish, writing
from checkpoints.convert import copy_files
from checkpoints.errors import CheckpointError
from checkpoints.families import layouts_of, leaf_dtype_name, leaf_paths, pieces_of, pinned_paths
from checkpoints.load import Checkpoint, open_checkpoint
from checkpoints.manifest import SPEC, LeafRecord, Manifest, write_manifest, write_text
from checkpoints.orbax import OURS, OrbaxSave, open_orbax
from checkpoints.plan import read_config_file
from checkpoints.verify import check_folder
from jaxmoe import formats
from jaxmoe.spec import Leaf, ModelSpec

_PENDING_BYTES = 24 << 20
_DISK_BLOCK = 4096


def reshard(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    parts: Mapping[str, int] | None = None,
    dtype: str | None = None,
    config: str | os.PathLike | None = None,
    progress: store.Progress | None = None,
) -> Manifest:
    """Writes a folder's leaves again.

    Args:
        folder: a converted folder, or what stock Orbax saved of the same tree.
        out: made here; it may be there empty.
        parts: into how many chunks leaves are cut along a logical axis ('heads', 'kv_heads', 'hidden', 'vocab', 'embed', ...); a leaf goes by the
            first of its axes that is named. Others, and all without `parts`, are cut as `convert` cuts them.
        dtype: 'float32' or 'bfloat16' for all leaves that aren't float32 in any model; None keeps what is there. Quantized leaves stay as they are.
        config: the config.json of a stock Orbax save, which doesn't say what model it holds.
        progress: called with (bytes read to verify the folder and bytes written, bytes of both in all, leaf path).

    Returns:
        The manifest of the new folder.

    Raises:
        CheckpointError: a folder that is missing or damaged (it is verified first), parts that don't divide an axis, an `out` that holds something,
            or a disk that is full. `out` is not there then.
    """
    source, target = _open(Path(folder), config), Path(out)
    _check_out(Path(folder), target)
    if dtype is not None and dtype not in formats.DTYPES:
        raise CheckpointError(f"unsupported dtype {dtype!r}: choose one of {', '.join(formats.DTYPES)}")
    arrays = _arrays(source, dict(parts or {}), dtype)
    nbytes = sum(array.leaf.nbytes for array in arrays)
    count = store.Count(nbytes + (source.manifest.nbytes if isinstance(source, Checkpoint) else 0), progress)
    if isinstance(source, Checkpoint):
        check_folder(source.folder, source.manifest, count)
    partial = partial_of(target)
    needed = sum(store.bytes_on_disk(array.leaf, array.chunk, _DISK_BLOCK) for array in arrays)
    if needed > commit.free_bytes(partial):
        raise CheckpointError(f"{partial}: {needed} bytes are to be written, the disk has {commit.free_bytes(partial)} free")
    with locked(partial):
        _check_out(Path(folder), target)  # another process may have finished it before the lock
        with writing(partial):
            _clear(partial)
            records = _write(source, partial, arrays, count)
            manifest = _finish(source, partial, records, dtype, config)
        publish(partial, target)
    return manifest


@dataclasses.dataclass(frozen=True)
class _Array:
    """One array to write: `dtype` is that of its numbers, `read_as` what it is read as (None: as it is)."""

    path: str
    leaf: Leaf
    chunk: tuple[int, ...]
    dtype: str
    read_as: str | None


def _open(folder: Path, config: str | os.PathLike | None) -> Checkpoint | OrbaxSave:
    if config is None:
        return open_checkpoint(folder)
    if any((folder / name).exists() for name in OURS):
        raise CheckpointError(f"{folder}: a converted folder says itself which model it is: a config is for what stock Orbax saved")
    return open_orbax(folder, read_config_file(Path(config)))


def _check_out(folder: Path, out: Path) -> None:
    if out.exists() and os.path.samefile(folder, out):
        raise CheckpointError(f"{out}: is both the source and the output folder: choose another output folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already: choose another output folder")
    commit.check_place(out)
    partial = partial_of(out)
    if partial.exists() and any(partial.iterdir()) and not (partial / LOCK).exists():
        raise CheckpointError(f"{partial}: exists and is not an unfinished output: remove it or choose another output folder")


def _clear(partial: Path) -> None:
    """Removes what an earlier run left, but not the lock."""
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


# --- what is written --------------------------------------------------------------------------------------------------


def _arrays(source: Checkpoint | OrbaxSave, parts: dict[str, int], dtype: str | None) -> list[_Array]:
    if "hidden" in parts:  # of experts and dense networks alike, unless the latter have their own
        parts = {"mlp_hidden": parts["hidden"]} | parts
    plain, pinned = leaf_paths(source.spec), pinned_paths(source.spec)
    pieces = pieces_of(source.spec, layouts_of(source.spec)[0])
    known = {axis for leaf in plain.values() for axis in leaf.axes if axis is not None}
    unknown = sorted(parts.keys() - known - {"mlp_hidden"})
    if unknown:
        raise CheckpointError(f"no leaf has an axis {unknown[0]!r}: {', '.join(sorted(known))} are there")
    out = []
    for path, record in source.leaves.records.items():
        if record.dtype in ("int8", "int4") or path not in plain:
            leaf, kind, read_as = Leaf(record.shape, np.dtype(source.leaves.reader.array(path).dtype.name), record.axes), record.dtype, None
        else:
            kind = read_as = "float32" if path in pinned else dtype or leaf_dtype_name(plain[path])
            leaf = Leaf(record.shape, formats.leaf_dtype(kind), plain[path].axes)
        weights = plain.get(path) or plain[path.rsplit(".", 1)[0]]
        piece = pieces.get(path) or pieces[path.rsplit(".", 1)[0]]
        chunk = _chunk(source, path, leaf, weights, piece[0], parts)
        out.append(_Array(path, leaf, chunk, kind, read_as))
    return out


def _chunk(source: Checkpoint | OrbaxSave, path: str, leaf: Leaf, weights: Leaf, piece, parts: dict[str, int]) -> tuple[int, ...]:
    """`weights` are the plain ones that the leaf stands for, which differ from it where it is quantized."""
    step = _step(source, path, weights)
    cut = next((i for i, axis in enumerate(leaf.axes) if axis in parts and not (axis == "experts" and piece.expert is not None)), None)
    if cut is None:
        whole = store.chunk_shape(weights, piece, step if weights.axes[1:2] == ("hidden",) else 1)
        return tuple(c * n // w for c, n, w in zip(whole, leaf.shape, weights.shape, strict=True))
    axis = leaf.axes[cut]
    count = parts[axis] if axis is not None else 1
    size = weights.shape[cut]
    quantum = f" in steps of {step}" if cut == 1 and step > 1 else ""
    if count < 1 or size % count or (quantum and (size // count) % step):
        raise CheckpointError(f"leaf {path}: {count} parts don't divide its axis {axis!r} of {size}{quantum}")
    chunk = [n // count if i == cut else n for i, n in enumerate(leaf.shape)]
    if piece.expert is not None:
        chunk[0] = 1
        return tuple(chunk)
    while math.prod(chunk) * leaf.dtype.itemsize > 2 * store.CHUNK_BYTES and chunk[cut] % 2 == 0:
        chunk[cut] //= 2
    return tuple(chunk)


def _step(source: Checkpoint | OrbaxSave, path: str, weights: Leaf) -> int:
    """Numbers along K, a quantized expert's first axis, that chunks may not part."""
    how = source.quantization
    if how is None or not path.endswith((".values", ".scales")):
        return 1
    return math.lcm(how["group"], formats.pack_block(weights.shape[1])) if how["bits"] == 4 else how["group"]


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(source: Checkpoint | OrbaxSave, partial: Path, arrays: list[_Array], count: store.Count) -> dict[str, LeafRecord]:
    records = {}
    try:
        for array in arrays:
            target = store.create_array(partial, array.path, array.leaf, array.chunk)
            crcs = []
            for expert in range(array.leaf.shape[0]) if array.path.startswith("experts.") else [None]:
                crcs.append(f"{_write_unit(source, array, target, expert):08x}")
                count(array.leaf.nbytes // (1 if expert is None else array.leaf.shape[0]), array.path)
            ends = store.chunk_crcs(partial, array.path, array.leaf.shape, array.chunk)
            records[array.path] = _record(source, array, tuple(crcs), ends)
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise commit.failure(partial, error) from error
    return records


def _write_unit(source: Checkpoint | OrbaxSave, array: _Array, target: ts.TensorStore, expert: int | None) -> int:
    """Writes a leaf, or one expert of it; gives its CRC-32."""
    crc = 0
    with store.Writes(_PENDING_BYTES) as writes:
        for index in _regions(array, expert):
            data = formats.contiguous(source.read(array.path, index, array.read_as))
            writes.begin(target, index, data)
            crc = zlib.crc32(data.data, crc)
    return crc


def _regions(array: _Array, expert: int | None) -> Iterator[tuple[slice, ...]]:
    first = () if expert is None else (slice(expert, expert + 1),)
    shape, chunk = array.leaf.shape[len(first) :], array.chunk[len(first) :]
    for axis, start, stop in store.unit_chunks(shape, chunk):
        yield (*first, *(slice(start, stop) if i == axis else slice(0, n) for i, n in enumerate(shape)))


def _record(source: Checkpoint | OrbaxSave, array: _Array, crc32: tuple[str, ...], ends: str) -> LeafRecord:
    new: dict[str, Any] = {
        "shape": array.leaf.shape,
        "dtype": array.dtype,
        "stored": array.leaf.dtype.name,
        "axes": array.leaf.axes,
        "chunk": array.chunk,
        "crc32": crc32,
        "nbytes": array.leaf.nbytes,
        "chunk_crc32c": ends,
    }
    if isinstance(source, Checkpoint):
        return dataclasses.replace(source.manifest.leaves[array.path], **new)
    pieces = pieces_of(source.spec, layouts_of(source.spec)[0])[array.path]
    kind = {"float32": "F32", "bfloat16": "BF16"}[array.dtype]
    return LeafRecord(**new, op=pieces[0].op, sources=tuple(piece.hf for piece in pieces), source_dtypes=(kind,))


def _finish(
    source: Checkpoint | OrbaxSave, partial: Path, records: dict[str, LeafRecord], dtype: str | None, config: str | os.PathLike | None
) -> Manifest:
    spec = source.spec if dtype is None else source.spec.with_precision(dtype)
    write_text(partial / SPEC, json.dumps(spec.to_json(), indent=1) + "\n")
    store.write_orbax_metadata(partial, {path: Leaf(r.shape, np.dtype(r.stored), r.axes) for path, r in records.items()})
    nbytes = sum(record.nbytes for record in records.values())
    if isinstance(source, Checkpoint):
        files = copy_files(source.folder, partial)
        manifest = dataclasses.replace(
            source.manifest, spec_hash=spec.hash(), dtype=spec.precision.params, files=files, nbytes=nbytes, leaves=records
        )
    else:
        manifest = _new_manifest(spec, source.folder, copy_files(Path(os.fspath(config or "")).parent, partial), nbytes, records)
    write_manifest(partial, manifest)
    return manifest


def _new_manifest(spec: ModelSpec, folder: Path, files: dict[str, str], nbytes: int, records: dict[str, LeafRecord]) -> Manifest:
    return Manifest(
        spec_hash=spec.hash(),
        dtype=spec.precision.params,
        names=layouts_of(spec)[0].name,
        fingerprint=f"orbax:{folder.name}",
        source_files=(),
        files=files,
        ignored=(),
        nbytes=nbytes,
        leaves=records,
    )
