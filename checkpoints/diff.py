"""What two folders of weights, converted or Hugging Face ones, differ in: their models, leaves, shapes, dtypes and numbers.

Both are seen as the leaves that a converted folder has. Memory holds a few blocks of one leaf, or one expert's matrix, of each side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints import store
from checkpoints.convert import KEPT_FILES, sha256_of
from checkpoints.dequantize import Packing
from checkpoints.errors import CheckpointError
from checkpoints.families import Piece, leaf_paths, pieces_of, pinned_paths
from checkpoints.kinds import kind_of
from checkpoints.load import Checkpoint, open_checkpoint, read_spec
from checkpoints.orbax import OURS
from checkpoints.plan import examine
from checkpoints.quantized import Unpacked, open_source
from checkpoints.quantizer import SCALES, VALUES
from checkpoints.units import read_rows
from jaxmoe import formats
from jaxmoe.spec import ModelSpec

BLOCK_BYTES = 16 << 20
"""Of one side that are compared at once, counted as float32; four times that where a block touches every chunk."""

_WIDENED = 1 << 20  # numbers that are widened at a time


@dataclasses.dataclass(frozen=True)
class LeafDiff:
    """A leaf that both have, and that differs.

    Attributes:
        shapes, dtypes: of both.
        numbers: how many it has.
        differ: how many of these have other bits, as float32.
        experts: how many experts have any.
        max_abs, max_rel: largest |a - b|, and largest |a - b| / max(|a|, |b|), over finite numbers.
        not_finite: how many of those that differ are infinite or not a number on either side.
    """

    path: str
    kind: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    numbers: int = 0
    differ: int = 0
    experts: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    not_finite: int = 0


@dataclasses.dataclass(frozen=True)
class Diff:
    """What two folders differ in.

    Attributes:
        spec: fields of the models' specs, (name, in A, in B).
        only_a, only_b: leaves that one has alone.
        leaves: see `LeafDiff`.
        compared: how many leaves both have; `by_checksum` of their units (a leaf, or one expert of it) were equal by their checksums, and not read.
        by_kind: (leaves, leaves that differ, numbers, numbers that differ) of the leaves that both have.
        nbytes: that were read of both.
        files: small files, such as a tokenizer's, that differ or that one has alone; what config.json says is compared as `spec`.
    """

    spec: tuple[tuple[str, Any, Any], ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    leaves: tuple[LeafDiff, ...]
    compared: int
    by_checksum: int
    by_kind: dict[str, tuple[int, int, int, int]]
    nbytes: int
    files: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether they differ in nothing."""
        return not (self.spec or self.only_a or self.only_b or self.leaves or self.files)


def diff(a: Path, b: Path, progress: store.Progress | None = None, checksums: bool = True) -> Diff:
    """Compares two folders.

    Args:
        a, b: converted or Hugging Face folders.
        progress: called with (bytes compared, bytes in all, leaf path), bytes as of A.
        checksums: believe the manifests of converted folders where both name the same checksum; otherwise everything is read.

    Raises:
        CheckpointError: a folder that is neither, or is unfinished or damaged.
    """
    with _open(a) as left, _open(b) as right:
        both = [path for path in left.leaves if path in right.leaves]
        total, done, read, skipped = sum(left.nbytes(path) for path in both), 0, 0, 0
        found: list[LeafDiff] = []
        kinds: dict[str, tuple[int, int, int, int]] = {}
        for path in both:
            one, equal, seen = _compare(left, right, path, checksums)
            done, read, skipped = done + left.nbytes(path), read + seen, skipped + equal
            if one.differ or one.shapes[0] != one.shapes[1] or one.dtypes[0] != one.dtypes[1]:
                found.append(one)
            kinds[one.kind] = _added(kinds.get(one.kind, (0, 0, 0, 0)), (1, int(found[-1:] == [one]), one.numbers, one.differ))
            if progress is not None:
                progress(done, total, path)
        return Diff(
            spec=tuple(_spec_diff(left.spec, right.spec)),
            only_a=tuple(path for path in left.leaves if path not in right.leaves),
            only_b=tuple(path for path in right.leaves if path not in left.leaves),
            leaves=tuple(found),
            compared=len(both),
            by_checksum=skipped,
            by_kind=kinds,
            nbytes=read,
            files=tuple(name for name in KEPT_FILES if name != "config.json" and left.files.get(name) != right.files.get(name)),
        )


def _added(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


def _spec_diff(a: ModelSpec, b: ModelSpec) -> Iterator[tuple[str, Any, Any]]:
    """Fields that differ; of layers, one entry for all in which a field differs alike, and none for layers that one model lacks."""
    left, right = (dict(_fields({**dataclasses.asdict(spec), "segments": None, "extra_heads": None})) for spec in (a, b))
    left |= {"layers": a.n_layers, "extra_heads": len(a.extra_heads)}
    right |= {"layers": b.n_layers, "extra_heads": len(b.extra_heads)}
    yield from _unequal(left, right)
    for name, ours, theirs in (("layers", a.layers, b.layers), ("extra_heads", a.extra_heads, b.extra_heads)):
        common = list(zip(ours, theirs, strict=False))
        found: dict[tuple[str, str, str], tuple[Any, Any, list[int]]] = {}
        for i, (one, other) in enumerate(common):
            for field, x, y in _unequal(dict(_fields(dataclasses.asdict(one))), dict(_fields(dataclasses.asdict(other)))):
                found.setdefault((field, repr(x), repr(y)), (x, y, []))[2].append(i)
        for (field, *_), (x, y, at) in found.items():
            yield f"{name}.{'*' if len(at) == len(common) else ','.join(map(str, at))}.{field}", x, y


def _unequal(left: dict[str, Any], right: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(left.keys() | right.keys()):
        if left.get(name) != right.get(name):
            yield name, left.get(name), right.get(name)


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if entries is None:
        yield name, value
        return
    for key, inner in entries:
        yield from _fields(inner, f"{name}.{key}" if name else str(key))


# --- a leaf -----------------------------------------------------------------------------------------------------------


def _compare(a: _Side, b: _Side, path: str, by_checksum: bool) -> tuple[LeafDiff, int, int]:
    """What a leaf differs in, how many of its units are equal by checksums, and bytes that were read."""
    shapes = a.leaves[path], b.leaves[path]
    kind = kind_of(path, a.spec.n_layers)
    dtypes = a.dtype(path), b.dtype(path)
    out = LeafDiff(path, kind, shapes, dtypes, math.prod(shapes[0]))
    if shapes[0] != shapes[1]:
        return out, 0, 0
    equal = read = 0
    for expert in range(shapes[0][0]) if path.startswith("experts.") else (None,):
        checksum = a.checksum(path, expert) if by_checksum else None
        if checksum is not None and checksum == b.checksum(path, expert):
            equal += 1
            continue
        before = out.differ
        read += (a.nbytes(path) + b.nbytes(path)) // (1 if expert is None else shapes[0][0])
        for left, right in _blocks(a, b, path, expert):
            out = _counted(out, left, right)
        if out.differ > before:
            out = dataclasses.replace(out, experts=out.experts + 1)
    return out, equal, read


def _counted(one: LeafDiff, a: np.ndarray, b: np.ndarray) -> LeafDiff:
    """`one` with what two blocks, as they are held, differ in."""
    step = max(1, _WIDENED * len(a) // max(1, a.size))
    for start in range(0, len(a), step):
        one = _counted_rows(one, *(np.ascontiguousarray(formats.load_numpy(x[start : start + step])) for x in (a, b)))
    return one


def _counted_rows(one: LeafDiff, a: np.ndarray, b: np.ndarray) -> LeafDiff:
    where = a.view(np.uint32) != b.view(np.uint32)
    count = int(where.sum())
    if not count:
        return one
    x, y = a[where].astype(np.float64), b[where].astype(np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    gap, size = np.abs(x[finite] - y[finite]), np.maximum(np.abs(x[finite]), np.abs(y[finite]))
    return dataclasses.replace(
        one,
        differ=one.differ + count,
        max_abs=max(one.max_abs, float(gap.max(initial=0.0))),
        max_rel=max(one.max_rel, float((gap / np.where(size == 0, 1.0, size)).max(initial=0.0))),
        not_finite=one.not_finite + count - int(finite.sum()),
    )


def _blocks(a: _Side, b: _Side, path: str, expert: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both sides' numbers, as they are held, block by block along an axis that suits both; experts without one, or quantized, all at once."""
    shape = a.leaves[path] if expert is None else a.leaves[path][1:]
    axes = a.axis(path), b.axis(path)
    axis = axes[0] if isinstance(a, _HuggingFace) else axes[1]
    suits = axes[0] == axes[1] and not any(side.dtype(path).startswith("int") for side in (a, b))
    limit = BLOCK_BYTES if suits else 4 * BLOCK_BYTES
    step = shape[axis] if expert is not None and not suits else max(1, limit // max(1, 4 * math.prod(shape) // shape[axis]))
    for start in range(0, shape[axis], step):
        stop = min(start + step, shape[axis])
        yield a.read(path, expert, axis, start, stop, b.dtype(path)), b.read(path, expert, axis, start, stop, a.dtype(path))


# --- folders ----------------------------------------------------------------------------------------------------------


class _Converted:
    """A converted folder; experts that are quantized there are seen as one leaf."""

    def __init__(self, source: Checkpoint):
        self.source, self.spec = source, source.spec
        self._records = source.manifest.leaves
        self.files = _hashes(source.folder)
        plain = leaf_paths(source.spec)
        self.leaves = {path: leaf.shape for path, leaf in plain.items() if path in self._records or f"{path}.{VALUES}" in self._records}

    def _of(self, path: str) -> list[str]:
        return [path] if path in self._records else [f"{path}.{VALUES}", f"{path}.{SCALES}"]

    def dtype(self, path: str) -> str:
        return self._records[self._of(path)[0]].dtype

    def nbytes(self, path: str) -> int:
        return sum(self._records[name].nbytes for name in self._of(path))

    def checksum(self, path: str, expert: int | None) -> Any:
        """Equal only where the bytes are."""
        records = [self._records[name] for name in self._of(path)]
        return [(record.dtype, record.shape, record.chunk, record.crc32[expert or 0]) for record in records]

    def axis(self, path: str) -> int:
        """The one along which chunks are cut, without the experts'."""
        record = self._records[self._of(path)[0]]
        skip = int(path.startswith("experts."))
        pairs = zip(record.shape[skip:], record.chunk[skip:], strict=True)
        return next((i for i, (n, c) in enumerate(pairs) if c < n), 0)

    def read(self, path: str, expert: int | None, axis: int, start: int, stop: int, like: str) -> np.ndarray:
        """Quantized numbers are rounded to bfloat16 where the other side holds that: that is how they are restored and exported."""
        outer = () if expert is None else (expert,)
        data = [self._array(name, outer) for name in self._of(path)] if len(self._of(path)) > 1 else []
        where = (slice(None),) * axis + (slice(start, stop),)
        if data:
            about: dict[str, Any] = self.source.manifest.quantization or {}
            whole = Packing(about["bits"], about["group"], self.leaves[path][1]).dequantize(*data)
            return formats.store_numpy(whole[where], "bfloat16") if like == "bfloat16" else whole[where]
        return self._array(path, (*outer, *where))

    def _array(self, name: str, index: tuple) -> np.ndarray:
        folder = self.source.folder
        return store.read_array(folder, name, store.open_array(folder, name, self._records[name]), index)


class _HuggingFace:
    """A Hugging Face folder, seen as what it would be converted to."""

    def __init__(self, folder: Path, source: Unpacked):
        found = examine(folder, source)
        if found.wrong:
            raise CheckpointError(f"{folder}: {'; '.join(found.wrong)}")
        self.source, self.spec = source, found.spec
        self.files = _hashes(folder)
        self._pieces = pieces_of(found.spec, found.layout)
        self._pinned = pinned_paths(found.spec)
        self.leaves = {path: leaf.shape for path, leaf in leaf_paths(found.spec).items()}
        free = {self.dtype(path) for path in self.leaves if path not in self._pinned}
        self.spec = found.spec.with_precision("bfloat16" if free == {"bfloat16"} else "float32")

    def _kinds(self, path: str) -> set[str]:
        return {self.source[piece.hf].dtype for piece in self._pieces[path]}

    def _packed(self, path: str) -> bool:
        return any(piece.hf in self.source.packed for piece in self._pieces[path])

    def dtype(self, path: str) -> str:
        if path in self._pinned:
            return "float32"
        return "bfloat16" if self._packed(path) or self._kinds(path) == {"BF16"} else "float32"

    def nbytes(self, path: str) -> int:
        return sum(piece.rows * piece.cols for piece in self._pieces[path]) * formats.leaf_dtype(self.dtype(path)).itemsize

    def checksum(self, path: str, expert: int | None) -> Any:
        return None

    def axis(self, path: str) -> int:
        return self._pieces[path][0].row_axis

    def read(self, path: str, expert: int | None, axis: int, start: int, stop: int, like: str) -> np.ndarray:
        """Packed numbers are rounded to bfloat16 unless the other side holds float32: that is how they are converted."""
        piece: Piece = self._pieces[path][expert or 0]
        dtype = "float32" if self._packed(path) and like == "float32" else self.dtype(path)
        each = piece.rows_per_step
        if axis == piece.row_axis:
            return piece.to_leaf(read_rows(self.source, piece, start * each, stop * each, dtype))
        whole = piece.to_leaf(read_rows(self.source, piece, 0, piece.rows, dtype))
        return whole[(slice(None),) * axis + (slice(start, stop),)]


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the small files that are there."""
    return {name: sha256_of(folder / name) for name in KEPT_FILES if (folder / name).is_file()}


_Side = _Converted | _HuggingFace


@contextlib.contextmanager
def _open(folder: Path) -> Iterator[_Side]:
    if any((folder / name).exists() for name in OURS):
        yield _Converted(open_checkpoint(folder))
        return
    if not (folder / "config.json").exists():
        read_spec(folder)  # says why it is neither kind
    with open_source(folder) as source:
        yield _HuggingFace(folder, source)
