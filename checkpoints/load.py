"""Opens converted folders, and converts Hugging Face folders that are asked for as such.

How arrays are restored stands in `checkpoints.restore`; other formats than our own in `checkpoints.orbax`.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from checkpoints import store
from checkpoints.arrays import Placement
from checkpoints.convert import PROGRESS, convert
from checkpoints.errors import CheckpointError
from checkpoints.leaves import Leaves
from checkpoints.manifest import MANIFEST, VERSION, Manifest, read_manifest, read_spec_json
from checkpoints.orbax import OURS, stock_save
from checkpoints.plan import make_plan, read_config
from checkpoints.quantized import open_source
from checkpoints.reading import Box, Reader
from checkpoints.restore import WeightTree
from checkpoints.trees import TREE
from checkpoints.verify import check_folder
from jaxmoe.spec import ModelSpec

__all__ = ["Checkpoint", "Placement", "load_hf_or_checkpoint", "open_checkpoint", "read_spec"]


@dataclasses.dataclass(frozen=True)
class Checkpoint(WeightTree):
    """A converted folder that is open. `spec.precision.params` is the dtype on disk, or what quantized experts stand for."""

    folder: Path
    spec: ModelSpec
    manifest: Manifest
    leaves: Leaves = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        reader = Reader(str(self.folder), self._open, store.CRC_BYTES, self._check_chunks)
        leaves = Leaves(self.folder, self.manifest.leaves, reader, self.manifest.dtype, self.quantization, self._check_unit)
        object.__setattr__(self, "leaves", leaves)

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """`{"method", "bits", "group"}` where the routed experts are quantized; else None."""
        return self.manifest.quantization

    def file(self, name: str) -> Path | None:
        """The path of a kept file such as 'tokenizer.json'; None if the source had none."""
        return self.folder / name if name in self.manifest.files else None

    def verify(self, progress: store.Progress | None = None) -> None:
        """Reads every chunk and compares it with the manifest's checksums, and the kept files with theirs.

        Args:
            progress: called with (bytes read, bytes in all, leaf path).

        Raises:
            CheckpointError: all that is missing, damaged or altered.
        """
        check_folder(self.folder, self.manifest, store.Count(self.manifest.nbytes, progress))

    def _open(self, path: str) -> ts.TensorStore:
        return store.open_array(self.folder, path, self.manifest.leaves[path])

    def _check_chunks(self, path: str, box: Box) -> None:
        store.check_chunks(self.folder, path, self.manifest.leaves[path], box)

    def _check_unit(self, path: str, expert: int, data: np.ndarray) -> None:
        """Compares one expert's matrix [.., ..], in the dtype on disk, with its checksum."""
        record, crc = self.manifest.leaves[path], 0
        for axis, start, stop in store.unit_chunks(data.shape, record.chunk[1:]):
            crc = zlib.crc32(np.ascontiguousarray(data[(slice(None),) * axis + (slice(start, stop),)]).data, crc)
        if f"{crc:08x}" != record.crc32[expert]:
            raise CheckpointError(f"{self.folder}: leaf {path}, expert {expert}, has checksum {crc:08x}, the manifest says {record.crc32[expert]}")


def open_checkpoint(folder: str | os.PathLike) -> Checkpoint:
    """Opens a converted folder; reads its manifest and spec, no array.

    Raises:
        CheckpointError: no such folder, an unfinished or damaged one, or one of another version.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if (path / PROGRESS).exists() and path.name.endswith(".partial"):
        raise CheckpointError(f"{path}: an unfinished conversion: run it again, it will go on from there")
    if (path / TREE).exists():
        raise CheckpointError(f"{path}: a saved tree, not a converted model: checkpoints.trees.restore_tree restores it")
    if (stock := stock_save(path)) is not None:
        raise CheckpointError(stock)
    manifest = read_manifest(path)
    return Checkpoint(path, read_spec_json(path, manifest), manifest)


def read_spec(path: str | os.PathLike) -> ModelSpec:
    """The model that a folder of either kind, converted or Hugging Face, says it holds; no weights are read.

    Raises:
        CheckpointError: neither kind of folder, an unfinished or damaged one, or a model that isn't supported.
    """
    return open_checkpoint(path).spec if _is_converted(Path(path)) else read_config(Path(path))


def _is_converted(folder: Path) -> bool:
    """Whether a folder is a converted one, finished or not, rather than a Hugging Face folder."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if any((folder / name).exists() for name in OURS):  # one of them may be lost, and the folder has a config.json too
        return True
    if (stock := stock_save(folder)) is not None:
        raise CheckpointError(stock)
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder}: neither a Hugging Face folder (no config.json) nor a converted one (no {MANIFEST})"
        )
    return False


def load_hf_or_checkpoint(
    path: str | os.PathLike,
    cache_dir: str | os.PathLike,
    dtype: str | None = None,
    progress: store.Progress | None = None,
) -> Checkpoint:
    """Opens a converted folder, or converts a Hugging Face folder once into the cache and opens that.

    Args:
        path: either kind of folder.
        cache_dir: conversions are kept there, each under the source's fingerprint and the spec's hash.
        dtype: what a Hugging Face folder is converted to, as for `convert`; a converted one is opened as it is.
        progress: as for `convert`.

    Raises:
        CheckpointError: neither kind of folder, or whatever `convert` and `open_checkpoint` find.
    """
    folder = Path(path)
    if _is_converted(folder):
        return open_checkpoint(folder)
    with open_source(folder) as source:
        plan = make_plan(folder, source, dtype)
    out = Path(cache_dir) / f"{plan.fingerprint[:16]}-{plan.spec.hash()}-v{VERSION}"
    convert(folder, out, dtype, progress)
    return open_checkpoint(out)
