"""What a conversion will make, of what and under which identity: a Hugging Face folder checked whole, before anything is written.

This file only reads. It knows nothing of output folders, of progress or of how arrays are written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path

from checkpoints import store
from checkpoints.errors import CheckpointError
from checkpoints.families import Layout, Piece, choose_layout, hf_tensors, ignorable, leaf_paths, pieces_of
from checkpoints.manifest import LEAF_LAYOUT, VERSION
from checkpoints.safetensors_reader import SafetensorsFolder
from jaxmoe.spec import Leaf, ModelSpec, SpecError

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
