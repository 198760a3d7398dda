"""Writes weights as a Hugging Face folder: the converter's tables, read the other way. Tensors go to their files block by block of rows.

How a block comes about, and what memory holds then, is `tensor_rows`' affair; here it is decided which tensors there are, and in which dtype.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from checkpoints import store
from checkpoints.errors import CheckpointError
from checkpoints.families import LAYOUTS, Layout, Piece, hf_tensors, layouts_of, pinned_paths, tied_head
from checkpoints.load import Checkpoint, open_checkpoint
from checkpoints.manifest import Manifest
from checkpoints.quantizer import VALUES
from checkpoints.safetensors_header import PACKED
from checkpoints.safetensors_writer import MAX_SHARD_BYTES, Shard, Tensor, new_folder, plan_shards, write_file, write_shards
from checkpoints.tensor_rows import Parts, Rows, leaf_parts, tensor_blocks
from jaxmoe.spec import ModelSpec

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Dtypes that can be written, and how files spell them."""

_BITS = {"F32": 24, "F16": 11, "BF16": 8}  # significant ones
_QUANTIZED = "quantization_config"


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export wrote, and in what it differs from the source.

    Attributes:
        folder: the finished one.
        files: of tensors; `nbytes` are theirs.
        kept: small files beside them.
        tensors: how many of each dtype ('BF16').
        layout: whose names they have.
        rounded: tensors whose numbers lost bits when they were converted: they are back in the source's dtype, not with its numbers.
        narrowed: tensors whose dtype, which was asked for, has fewer bits than the converted numbers.
        dequantized: tensors made of quantized experts.
        unpacked: tensors that were packed in the source (fp8, mxfp4) and are plain here.
        copies: tensors that the converted folder doesn't hold, since they are others' copies; written again.
        missing: tensors of the source that were passed over when it was converted.
    """

    folder: Path
    files: tuple[str, ...]
    nbytes: int
    kept: tuple[str, ...]
    tensors: dict[str, int]
    layout: str
    rounded: tuple[str, ...]
    narrowed: tuple[str, ...]
    dequantized: tuple[str, ...]
    unpacked: tuple[str, ...]
    copies: tuple[str, ...]
    missing: tuple[str, ...]


def export_checkpoint(
    checkpoint_folder: str | os.PathLike,
    out: str | os.PathLike,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: store.Progress | None = None,
) -> Exported:
    """Writes a converted folder back as a Hugging Face folder, which is the source's again, bit for bit, where conversion lost nothing.

    Every leaf is compared with its checksum while it is read. Memory: see `tensor_rows`.

    Args:
        checkpoint_folder: the converted folder.
        out: made here; it may be there empty. A run that fails leaves nothing behind.
        dtype: 'float32', 'bfloat16' or 'float16'; None for each tensor's own in the source, or bfloat16 where it was packed. Tensors of leaves that
            are float32 in any model stay as they were.
        max_shard_bytes: of tensors in one file.
        progress: called with (bytes done, bytes in all, tensor's name).

    Returns:
        What was written, and in what it differs from the source.

    Raises:
        CheckpointError: a folder that is missing, damaged or unfinished; numbers that float16 can't hold; an output folder that holds something
            else, or can't be written; no room.
    """
    source, out = open_checkpoint(checkpoint_folder), Path(out)
    if out.resolve().is_relative_to(source.folder.resolve()):
        raise CheckpointError(f"{out}: lies in the folder that is exported: choose another output folder")
    plan = _Export.of(source, dtype)
    shards = plan_shards(list(plan.tensors), max_shard_bytes)
    kept = _kept_files(source, dtype)
    total, done = sum(tensor.nbytes for tensor in plan.tensors), 0

    def wrote(nbytes: int, name: str) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total, name)

    with new_folder(out, sum(shard.nbytes for shard in shards) + sum(map(len, kept.values()))) as partial:
        for name, data in kept.items():
            (partial / name).write_bytes(data)
        write_shards(partial, shards, plan.blocks, wrote)
    return plan.report(out, shards, tuple(kept))


def export_hf(spec: ModelSpec, leaves: Mapping[str, np.ndarray], config: dict, folder: Path, dtype: str) -> int:
    """Writes `model.safetensors` and `config.json`, in the family's first layout for plain weights.

    Args:
        spec: the model.
        leaves: canonical arrays by dotted path, such as `experts.0.gate`; float32, or bfloat16 held as uint16, each on its own.
        config: the config.json to go with them; its `dtype` is set.
        folder: made if it isn't there.
        dtype: 'float32' or 'bfloat16' on disk; float32 is rounded to nearest even. Tensors of leaves that are float32 in any model stay so.

    Returns:
        Bytes of `model.safetensors`.

    Raises:
        CheckpointError: a leaf is missing or has another shape.
    """
    pinned = pinned_paths(spec)
    made_of: dict[Tensor, Parts] = {}
    for name, (shape, parts) in hf_tensors(spec, layouts_of(spec)[0]).items():
        made_of[Tensor(name, "F32" if all(path in pinned for path, _ in parts) else _spelled(dtype), shape)] = parts
        for path, piece in parts:
            _check_leaf(leaves, path, piece, name)

    def rows_of(path: str, piece: Piece) -> Rows:
        leaf = np.asarray(leaves[path])
        return Rows(piece, iter([(0, piece.shape[piece.row_axis], leaf if piece.expert is None else leaf[piece.expert])]))

    folder.mkdir(parents=True, exist_ok=True)
    (shard,) = plan_shards(list(made_of), None)
    target, unfinished = folder / shard.file, folder / f"{shard.file}.partial"
    try:
        write_file(unfinished, shard, lambda tensor: tensor_blocks(tensor, made_of[tensor], rows_of))
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")
    return target.stat().st_size


def _check_leaf(leaves: Mapping[str, np.ndarray], path: str, piece: Piece, name: str) -> None:
    if path not in leaves:
        raise CheckpointError(f"{path}: missing, {name} needs it")
    shape = leaves[path].shape if piece.expert is None else leaves[path].shape[1:]
    if shape != piece.shape:
        raise CheckpointError(f"{path}: its shape is {shape}, {name} needs {piece.shape}")


# --- out of a converted folder ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Export:
    """What is to be written: tensors, and the leaves that each is made of."""

    source: Checkpoint
    layout: Layout
    tensors: dict[Tensor, Parts]
    copies: tuple[str, ...]

    @staticmethod
    def of(source: Checkpoint, dtype: str | None) -> _Export:
        asked = None if dtype is None else _spelled(dtype)
        layout = layout_of(source)
        pinned = pinned_paths(source.spec)
        tensors: dict[Tensor, Parts] = {}
        for name, (shape, parts) in hf_tensors(source.spec, layout).items():
            kind = asked
            if kind is None or all(path in pinned for path, _ in parts):
                kind = _source_dtype(source.manifest, parts)
            tensors[Tensor(name, "BF16" if kind in PACKED else kind, shape)] = parts
        head, copies = tied_head(source.spec, layout), tuple[str, ...]()
        if head is not None and head in source.manifest.ignored:  # it had the embedding's bits, or there would be no conversion
            embed = next(tensor for tensor in tensors if tensor.name == layout.on_disk(layout.top["embed.table"].hf))
            tensors[dataclasses.replace(embed, name=head)] = tensors[embed]
            copies = (head,)
        return _Export(source, layout, tensors, copies)

    def blocks(self, tensor: Tensor) -> Iterator[np.ndarray]:
        """A tensor's numbers."""
        return tensor_blocks(tensor, self.tensors[tensor], lambda path, piece: Rows(piece, leaf_parts(self.source, path, piece)))

    def report(self, out: Path, shards: Sequence[Shard], kept: tuple[str, ...]) -> Exported:
        """What was written."""
        rounded, narrowed, dequantized, unpacked = [], [], [], []
        for tensor, parts in self.tensors.items():
            kind, held = _source_dtype(self.source.manifest, parts), self._held(parts)
            if held is None:
                dequantized.append(tensor.name)
                continue
            if kind in PACKED:
                unpacked.append(tensor.name)
            elif _loses(kind, held):
                rounded.append(tensor.name)
            if _loses(held, tensor.dtype) and tensor.dtype != kind:
                narrowed.append(tensor.name)
        return Exported(
            folder=out,
            files=tuple(shard.file for shard in shards),
            nbytes=sum(shard.nbytes for shard in shards),
            kept=kept,
            tensors=dict(Counter(tensor.dtype for tensor in self.tensors)),
            layout=self.layout.name,
            rounded=tuple(rounded),
            narrowed=tuple(narrowed),
            dequantized=tuple(dequantized),
            unpacked=tuple(unpacked),
            copies=self.copies,
            missing=tuple(name for name in self.source.manifest.ignored if name not in self.copies),
        )

    def _held(self, parts: Parts) -> str | None:
        """The dtype with fewest bits among a tensor's leaves; None if any is quantized."""
        leaves = self.source.manifest.leaves
        if any(path not in leaves for path, _ in parts):
            return None
        return min((DTYPES[leaves[path].dtype] for path, _ in parts), key=lambda kind: _BITS[kind])


def _spelled(dtype: str) -> str:
    if dtype not in DTYPES:
        raise CheckpointError(f"unsupported dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _loses(kind: str, into: str) -> bool:
    """Whether numbers of one dtype may lose bits in another."""
    return kind != into and (_BITS[kind] > _BITS[into] or (kind, into) == ("BF16", "F16"))


def layout_of(source: Checkpoint) -> Layout:
    """The layout in which a converted folder's weights came, or the family's first one for plain weights if that is for packed ones.

    Raises:
        CheckpointError: one that isn't known here.
    """
    known = {layout.name: layout for layout in LAYOUTS.get(source.spec.family, ())}
    if source.manifest.names not in known:
        raise CheckpointError(f"{source.folder}: its names are those of {source.manifest.names!r}, which isn't known here: convert the model again")
    layout = known[source.manifest.names]
    return layouts_of(source.spec)[0] if layout.packed else layout


def _source_dtype(manifest: Manifest, parts: Parts) -> str:
    """What a tensor's dtype was in the source; the widest if its parts' differ."""
    kinds = set()
    for path, piece in parts:
        record = manifest.leaves.get(path) or manifest.leaves[f"{path}.{VALUES}"]
        of_each = record.source_dtypes or (DTYPES.get(record.dtype, "BF16"),)
        kinds.add(of_each[piece.expert or 0] if len(of_each) > 1 else of_each[0])
    return max(kinds, key=lambda kind: _BITS.get(kind, 0))


# --- beside the tensors -----------------------------------------------------------------------------------------------


def _kept_files(source: Checkpoint, dtype: str | None) -> dict[str, bytes]:
    """The small files' content; config.json says what is written now."""
    out = {}
    for name, sha256 in source.manifest.files.items():
        try:
            out[name] = (source.folder / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{source.folder / name}: cannot be read: {error.strerror}") from error
        if hashlib.sha256(out[name]).hexdigest() != sha256:
            raise CheckpointError(f"{source.folder / name}: damaged: its SHA-256 isn't the one that the manifest has")
    if "config.json" in out:
        out["config.json"] = _config(out["config.json"], dtype)
    return out


def _config(raw: bytes, dtype: str | None) -> bytes:
    """config.json without quantization, and with another dtype if one was asked for; otherwise as it is, to the byte."""
    config = json.loads(raw)
    if dtype is None and all(_QUANTIZED not in part for part in _config_parts(config)):
        return raw
    for part in _config_parts(config):
        part.pop(_QUANTIZED, None)
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and key in part:
                part[key] = dtype
    if dtype is not None and not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = dtype
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _config_parts(config: dict) -> list[dict]:
    return [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
