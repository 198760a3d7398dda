"""What a converted folder says about itself: `manifest.json`, read and written whole.

It knows names, shapes and checksums; it opens no array.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from checkpoints.errors import CheckpointError

FORMAT = "jaxmoe-checkpoint"
VERSION = 2
LEAF_LAYOUT = "layered-1"
"""Names the leaf tree: `params.` as `abstract_params`, `experts.` as `abstract_experts`, layers unstacked."""

MANIFEST = "manifest.json"
SPEC = "spec.json"


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """One array on disk.

    `dtype` is that of the numbers, `stored` that of the array which holds them (bfloat16 is held as uint16).
    `sources` are the Hugging Face tensors it was made of and `op` how (see `checkpoints.families.rules`); one source, or one per expert. `crc32` has
    a checksum per source: over the stored bytes of its chunks, chunk after chunk, each in C order.
    """

    shape: tuple[int, ...]
    dtype: str
    stored: str
    axes: tuple[str | None, ...]
    chunk: tuple[int, ...]
    op: str
    sources: tuple[str, ...]
    crc32: tuple[str, ...]
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A converted model. `source_files` are (name, bytes, SHA-256 of the header, SHA-256 of a sample of the data);
    `files` maps the small files kept beside the arrays to their SHA-256; `ignored` lists source tensors that were passed over, and `dropped` says how
    many of those are weights (neither buffers nor copies), and how many bytes; `absent_heads` counts the extra heads that the config has and the
    source's tensors lack; `nbytes` is the size of all leaves; `dtype` is that of those leaves which aren't float32 in any model."""

    spec_hash: str
    dtype: str
    names: str
    fingerprint: str
    source_files: tuple[tuple[str, int, str, str], ...]
    files: dict[str, str]
    ignored: tuple[str, ...]
    nbytes: int
    leaves: dict[str, LeafRecord]
    version: int = VERSION
    layout: str = LEAF_LAYOUT
    dropped: tuple[int, int] = (0, 0)
    absent_heads: int = 0


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json`, whole or not at all."""
    data = {"format": FORMAT, **dataclasses.asdict(manifest)}
    leaves = data.pop("leaves")
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()]
    rows = ",\n".join(f"    {json.dumps(path)}: {json.dumps(record)}" for path, record in leaves.items())
    write_text(folder / MANIFEST, "{\n" + ",\n".join([*lines, f'  "leaves": {{\n{rows}\n  }}']) + "\n}\n")


def write_text(path: Path, text: str) -> None:
    """Writes a small file under another name first, syncs it and renames it, so that it is never seen half written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_manifest(folder: Path) -> Manifest:
    """Reads `manifest.json`.

    Raises:
        CheckpointError: it's missing, damaged, of another program or of a version that isn't known here.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: not a converted checkpoint: {MANIFEST} is missing") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: not JSON") from error
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path}: not the manifest of a {FORMAT}")
    if data.get("version") != VERSION or data.get("layout") != LEAF_LAYOUT:
        raise CheckpointError(
            f"{path}: version {data.get('version')!r} with leaf layout {data.get('layout')!r} cannot be read here "
            f"(version {VERSION} with {LEAF_LAYOUT!r} can): convert the model again"
        )
    try:
        leaves = {name: LeafRecord(**_tuples(record)) for name, record in data.pop("leaves").items()}
        files = data.pop("files")
        return Manifest(**_tuples(data), leaves=leaves, files=dict(files))
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error


def _tuples(data: dict) -> dict:
    return {key: _tuple(value) for key, value in data.items()}


def _tuple(value):
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value
