"""What a conversion will make, of what and under which identity: a Hugging Face folder checked whole, before anything is written.

This file only reads. It knows nothing of output folders, of progress or of how arrays are written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from checkpoints import store
from checkpoints.errors import CheckpointError
from checkpoints.families import (
    Layout,
    Piece,
    choose_layout,
    hf_tensors,
    ignorable,
    is_weight,
    leaf_paths,
    pieces_of,
    pinned_paths,
    tied_head,
)
from checkpoints.manifest import LEAF_LAYOUT, VERSION
from checkpoints.quantized import Unpacked
from checkpoints.quantizer import Quantizer
from checkpoints.safetensors_header import DTYPES
from checkpoints.units import Unit
from jaxmoe.spec import ModelSpec, SpecError

_LISTED = 20  # tensors that an error lists
_QUANTIZED = ("gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion that has been checked: what it makes, of what, and under which identity."""

    spec: ModelSpec
    layout: Layout
    fingerprint: str
    source_files: tuple[tuple[str, int, str, str], ...]
    ignored: tuple[str, ...]
    dropped: tuple[int, int]
    absent_heads: int
    units: tuple[Unit, ...]
    quantizer: Quantizer | None
    revision: str
    source_dtypes: dict[str, str]
    source_times: tuple[int, ...] = ()

    @property
    def dtype(self) -> str:
        """How weights are held: 'float32' or 'bfloat16'; some leaves are float32 in either (`Unit.dtype`)."""
        return self.spec.precision.params

    @property
    def nbytes(self) -> int:
        """Bytes of all units."""
        return sum(unit.nbytes for unit in self.units)

    @property
    def cut(self) -> str:
        """Names the chunks of all arrays: what an unfinished folder must share as well, and a finished one needn't."""
        arrays = {output.path: output.chunk for unit in self.units for output in unit.outputs}
        return hashlib.sha256(json.dumps(sorted(arrays.items())).encode()).hexdigest()[:16]

    def identity(self) -> dict:
        """What two runs must share for one to go on with the other's work."""
        return {
            "version": VERSION,
            "layout": LEAF_LAYOUT,
            "fingerprint": self.fingerprint,
            "spec_hash": self.spec.hash(),
            "dtype": self.dtype,
            "quantization": self.quantizer.describe() if self.quantizer else None,
        }


@dataclasses.dataclass(frozen=True)
class Findings:
    """A Hugging Face folder held against its config, before anything is decided.

    Attributes:
        spec: the model; without its extra heads where their tensors aren't there.
        layout: how its weights lie on disk.
        expected: for each tensor that the model needs, its shape and what it is made into.
        left: tensors that fill no leaf.
        unexpected: those of them that may not be there.
        absent_heads: extra heads of the config that the tensors lack.
        wrong: all that is wrong, a phrase for each kind.
    """

    spec: ModelSpec
    layout: Layout
    expected: dict[str, tuple[tuple[int, ...], tuple[tuple[str, Piece], ...]]]
    left: tuple[str, ...]
    unexpected: tuple[str, ...]
    absent_heads: int
    wrong: tuple[str, ...]


def examine(hf: Path, source: Unpacked) -> Findings:
    """Compares names, shapes and dtypes of a folder's tensors with what its config needs.

    Raises:
        CheckpointError: a config that can't be used at all.
    """
    spec = read_config(hf)
    layout = choose_layout(spec, source.tensors, source.form)
    heads = len(spec.extra_heads)
    spec = _without_absent_heads(spec, layout, source)
    expected = hf_tensors(spec, layout)
    left = tuple(name for name in source.tensors if name not in expected)
    unexpected = tuple(name for name in left if not ignorable(spec, layout, name))
    wrong = (
        *([_list(source.problems)] if source.problems else []),
        *_check_names(source, expected, unexpected),
        *_check_tensors(source, {name: shape for name, (shape, _) in expected.items() if name in source.tensors}),
    )
    return Findings(spec, layout, expected, left, unexpected, heads - len(spec.extra_heads), wrong)


def make_plan(hf: Path, source: Unpacked, dtype: str | None, quantizer: Quantizer | None = None) -> Plan:
    """Checks config and tensors, and lists what is to be written.

    Raises:
        CheckpointError: see `convert`.
    """
    found = examine(hf, source)
    if found.wrong:
        raise CheckpointError(f"{hf}: {'; '.join(found.wrong)}")
    layout, left = found.layout, found.left
    spec = _with_dtype(hf, source, found.spec, layout, dtype)
    _check_tied(source, spec, layout, left)
    files = tuple((f.name, f.nbytes, f.header_sha256, f.sample_sha256) for f in source.files)
    fingerprint = hashlib.sha256(json.dumps([*files, *source.identity]).encode()).hexdigest()
    lost = [source[name].nbytes for name in left if is_weight(spec, layout, name)]
    units = _units(spec, layout, quantizer)
    dtypes = {name: source[name].dtype for name in found.expected}
    times = tuple((hf / f.name).stat().st_mtime_ns for f in source.files)
    return Plan(
        spec, layout, fingerprint, files, left, (len(lost), sum(lost)), found.absent_heads, units, quantizer, source_revision(hf), dtypes, times
    )


def source_revision(hf: Path) -> str:
    """The commit that a folder was downloaded at, as huggingface_hub's cache and its local folders tell it; '' where they don't."""
    names = hf.resolve().parts
    if len(names) > 1 and names[-2] == "snapshots" and re.fullmatch("[0-9a-f]{40}", names[-1]):
        return names[-1]
    try:
        first = (hf / ".cache/huggingface/download/config.json.metadata").read_text(encoding="utf-8").split("\n")[0].strip()
    except (OSError, ValueError):
        return ""
    return first if re.fullmatch("[0-9a-f]{40}", first) else ""


def read_config(hf: Path) -> ModelSpec:
    """The spec of a folder's config.json.

    Raises:
        CheckpointError: no folder, no config.json, not JSON, or a config that isn't supported.
    """
    if not hf.is_dir():
        raise CheckpointError(f"{hf}: no such folder")
    return read_config_file(hf / "config.json")


def read_config_file(path: Path) -> ModelSpec:
    """The spec of a config.json.

    Raises:
        CheckpointError: it's missing, not JSON, or not supported.
    """
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: not a JSON object") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: damaged: not a JSON object")
    try:
        return ModelSpec.from_hf(config)
    except SpecError as error:
        raise CheckpointError(f"{path.parent}: {error}") from error
    except (TypeError, ValueError) as error:  # a value of a type that no field of its kind has
        raise CheckpointError(f"{path}: damaged: {store.one_line(error)}") from error


def _without_absent_heads(spec: ModelSpec, layout: Layout, source: Unpacked) -> ModelSpec:
    """The model without its extra heads where not one tensor of theirs is there: many tools save models without them, and leave their configs as
    they were."""
    without = dataclasses.replace(spec, extra_heads=())
    if spec == without:
        return spec
    own = hf_tensors(spec, layout).keys() - hf_tensors(without, layout).keys()
    return spec if any(name in source.tensors for name in own) else without


def _check_names(source: Unpacked, expected: Collection[str], unexpected: Collection[str]) -> Iterator[str]:
    missing = [name for name in expected if name not in source.tensors]
    if missing:
        yield f"{_count(missing, 'tensor')} missing that the config needs: {_list(sorted(missing))}"
    if unexpected:
        yield f"{_count(unexpected, 'tensor')} unexpected, which the config has no place for: {_list(list(unexpected))}"


def _check_tensors(source: Unpacked, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    misshapen, unsupported = [], []
    for name in sorted(shapes):
        info = source[name]
        if info.shape != shapes[name]:
            misshapen.append(f"tensor {name} has shape {list(info.shape)}, the config needs {list(shapes[name])}")
        if not source.supports(name):
            unsupported.append(f"tensor {name} has dtype {info.dtype}")
    if misshapen:
        yield _list(misshapen)
    if unsupported:
        yield f"{_list(unsupported)}, which is not supported ({', '.join(DTYPES)} are)"


def _count(names: Collection[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s are' if len(names) > 1 else ' is'}"


def _list(items: list[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more


def _with_dtype(hf: Path, source: Unpacked, spec: ModelSpec, layout: Layout, dtype: str | None) -> ModelSpec:
    """Without a wish, the source's own dtype, which is bfloat16 where it is quantized; tensors that are held in float32 whatever the model is have no
    say in it."""
    if dtype is None and source.packed:
        dtype = "bfloat16"
    elif dtype is None:
        pinned = pinned_paths(spec)
        tensors = hf_tensors(spec, layout).items()
        kinds = Counter(source[name].dtype for name, (_, parts) in tensors if not all(path in pinned for path, _ in parts))
        if len(kinds) > 1:
            found = ", ".join(f"{n} of {kind}" for kind, n in kinds.most_common())
            raise CheckpointError(f"{hf}: tensors of several dtypes ({found}): choose one, float32 or bfloat16")
        dtype = {"F32": "float32", "F16": "float32", "BF16": "bfloat16"}[next(iter(kinds))]
    try:
        return spec.with_precision(dtype)
    except SpecError as error:
        raise CheckpointError(str(error)) from error


def _check_tied(source: Unpacked, spec: ModelSpec, layout: Layout, ignored: tuple[str, ...]) -> None:
    """A tied model's output matrix may be on disk, if it is the embedding."""
    head, embed = tied_head(spec, layout), layout.on_disk(layout.top["embed.table"].hf)
    if head is None or head not in ignored:
        return
    size, step = source[embed].size, store.CHUNK_BYTES
    if source[head].shape != source[embed].shape:
        raise CheckpointError(
            f"{source.folder}: tie_word_embeddings is true, but {head} has shape {list(source[head].shape)}, {embed} {list(source[embed].shape)}"
        )
    if source[head].dtype == source[embed].dtype and all(
        source.read_elements(head, at, min(step, size - at)).tobytes()
        == source.read_elements(embed, at, min(step, size - at)).tobytes()
        for at in range(0, size, step)
    ):
        return
    raise CheckpointError(f"{source.folder}: tie_word_embeddings is true, but {head} differs from {embed}")


def _units(spec: ModelSpec, layout: Layout, quantizer: Quantizer | None) -> tuple[Unit, ...]:
    leaves = leaf_paths(spec)
    out: list[Unit] = []
    wrong = []
    for path, pieces in pieces_of(spec, layout).items():
        leaf = leaves[path]
        chosen = quantizer if quantizer and path.startswith("experts.") and path.split(".")[-1] in _QUANTIZED else None
        problem = chosen.check(path, leaf) if chosen else None
        if problem:
            wrong.append(problem)
            continue
        step = chosen.step(leaf.shape[1]) if chosen and leaf.axes[1] == "hidden" else 1
        chunk = store.chunk_shape(leaf, pieces[0], step)
        out.extend(Unit(path, leaf, piece, chunk if piece.expert is None else chunk[1:], chosen) for piece in pieces)
    if wrong:
        more = f" (and {len(wrong) - 1} more leaves)" if len(wrong) > 1 else ""
        raise CheckpointError(f"{wrong[0]}{more}")
    return tuple(out)
