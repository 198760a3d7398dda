"""What a converted folder says about itself: `manifest.json`, read and written whole.

It knows names, shapes and checksums; it opens no array. The file carries the SHA-256 of its own content, so that a damaged manifest can't pass for
another one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError
from jaxmoe.spec import ModelSpec, SpecError

FORMAT = "jaxmoe-checkpoint"
VERSION = 3
LEAF_LAYOUT = "layered-1"
"""Names the leaf tree: `params.` as `abstract_params`, `experts.` as `abstract_experts`, layers unstacked."""

MANIFEST = "manifest.json"
SPEC = "spec.json"


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """One array on disk.

    `dtype` is that of the numbers, `stored` that of the array which holds them (bfloat16 is held as uint16, int8 and int4 as int8).
    `sources` are the Hugging Face tensors it was made of and `op` how (see `checkpoints.families.rules`); one source, or one per expert. `crc32` has
    a checksum per source: over the stored bytes of its chunks, chunk after chunk, each in C order. `source_dtypes` has what the source's files call
    their dtypes ('BF16'): one for each source, or one for all. `chunk_crc32c` is what the files of its chunks end with, 8 hexadecimal digits each,
    in C order: it tells a chunk that is whole, but another one.
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
    source_dtypes: tuple[str, ...] = ()
    chunk_crc32c: str = ""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A converted model. `source_files` are (name, bytes, SHA-256 of the header, SHA-256 of a sample of the data);
    `files` maps the small files kept beside the arrays to their SHA-256; `ignored` lists source tensors that were passed over, and `dropped` says how
    many of those are weights (neither buffers nor copies), and how many bytes; `absent_heads` counts the extra heads that the config has and the
    source's tensors lack; `nbytes` is the size of all leaves; `dtype` is that of those leaves which aren't float32 in any model, and of what
    quantized weights stand for; `quantization` says how the experts were quantized, `{"method", "bits", "group"}`, if they were; `revision` is the
    source's commit, where it is known."""

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
    quantization: dict[str, Any] | None = None
    revision: str = ""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json`, whole or not at all."""
    data = {"format": FORMAT, **dataclasses.asdict(manifest)}
    data["sha256"] = content_sha256(data)
    leaves = data.pop("leaves")
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()]
    rows = ",\n".join(f"    {json.dumps(path)}: {json.dumps(record)}" for path, record in leaves.items())
    write_text(folder / MANIFEST, "{\n" + ",\n".join([*lines, f'  "leaves": {{\n{rows}\n  }}']) + "\n}\n")


def content_sha256(data: dict[str, Any]) -> str:
    """SHA-256 of what a JSON object says, whatever way it is laid out; its own `sha256` doesn't count."""
    content = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse_json(path: Path, raw: bytes) -> Any:
    """JSON in which no object has a key twice.

    Raises:
        CheckpointError: it isn't that.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a key that occurs twice")
        return out

    try:
        return json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        why = "a key that occurs twice" if "occurs twice" in str(error) else "not JSON"
        raise CheckpointError(f"{path}: damaged: {why}") from error


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
        raw = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise CheckpointError(f"{folder}: not a converted checkpoint: {MANIFEST} is missing") from None
    data = parse_json(path, raw)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not the manifest of a {FORMAT}")
    _check_version(path, data)
    if data.pop("sha256", None) != content_sha256(data):
        raise CheckpointError(f"{path}: damaged: its content doesn't have the checksum that it names")
    del data["format"]
    try:
        leaves = {name: LeafRecord(**_tuples(record)) for name, record in data.pop("leaves").items()}
        files, quantization = data.pop("files"), data.pop("quantization")
        return Manifest(**_tuples(data), leaves=leaves, files=dict(files), quantization=quantization)
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error


def read_spec_json(folder: Path, manifest: Manifest) -> ModelSpec:
    """The model of a folder, from its `spec.json`.

    Raises:
        CheckpointError: the file is missing, damaged, or of another model than the manifest.
    """
    path = folder / SPEC
    try:
        spec = ModelSpec.from_json(json.loads(path.read_bytes()))
    except OSError as error:
        raise CheckpointError(f"{path}: missing or unreadable: {error.strerror}") from None
    except (SpecError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {' '.join(str(error).split())}") from error
    if spec.hash() != manifest.spec_hash:
        raise CheckpointError(f"{path}: damaged: it is spec {spec.hash()}, the manifest is of {manifest.spec_hash}")
    return spec


def _check_version(path: Path, data: dict) -> None:
    version, layout = data.get("version"), data.get("layout")
    if version == VERSION and layout == LEAF_LAYOUT:
        return
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(f"{path}: version {version} was written by a newer jaxmoe, this one reads up to {VERSION}: update jaxmoe")
    raise CheckpointError(
        f"{path}: version {version!r} with leaf layout {layout!r} cannot be read here ({VERSION} with {LEAF_LAYOUT!r} can): convert the model again"
    )


def _tuples(data: dict) -> dict:
    return {key: _tuple(value) for key, value in data.items()}


def _tuple(value):
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value
