"""Reads what stock Orbax saved of the same tree, `{'params': ..., 'experts': ...}`: slices only, by the same methods as our own folders.

Taken are saves of `StandardCheckpointer`, of `PyTreeCheckpointer` (with OCDBT or without, Zarr v2 or v3) and steps of a `CheckpointManager`.
`_METADATA` is Orbax's own description of a tree; arrays are read through tensorstore, never through Orbax, which would read them whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorstore as ts

from checkpoints import store
from checkpoints.errors import CheckpointError
from checkpoints.families import leaf_paths, pinned_paths
from checkpoints.leaves import Leaves
from checkpoints.reading import Reader
from checkpoints.restore import WeightTree
from jaxmoe.spec import Leaf, ModelSpec

METADATA = "_METADATA"

OURS = ("manifest.json", "spec.json", "_progress.jsonl", "tree.json")
"""What a folder of our own has, finished or not, one of them damaged or not: it has Orbax's `_METADATA` as well."""

ITEMS = ("default", "state")
"""What a `CheckpointManager` calls a tree where nobody named it, and what people call it."""

DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "uint16": "bfloat16", "float16": "float16"}
"""What the numbers of a saved array are, by its dtype; uint16 holds the bits of bfloat16."""

_NODES = ("Dict", "List", "Tuple", "NamedTuple", "None")  # empty ones, which Orbax lists among the leaves
_LISTED = 20
_NAMES_BYTES = 64 << 20  # of OCDBT's own index, kept in memory


@dataclasses.dataclass(frozen=True)
class SavedLeaf:
    """One array of a save; see `checkpoints.leaves.Record`."""

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class OrbaxSave(WeightTree):
    """A stock save that is open. It has no checksums of ours, so that `verify=True` compares nothing; bytes are counted in whole chunks as they are
    in memory, not as they were compressed."""

    folder: Path
    spec: ModelSpec
    leaves: Leaves = dataclasses.field(repr=False, compare=False)


def open_orbax(folder: str | os.PathLike, spec: ModelSpec) -> OrbaxSave:
    """Opens a stock Orbax save of a model; reads no numbers.

    Args:
        folder: the save, a step of a `CheckpointManager`, or a manager's folder that holds one step.
        spec: the model. Its precision becomes that of the save; extra heads of which the save has nothing are left out.

    Raises:
        CheckpointError: no such save, an unfinished or damaged one, or one of another tree: all leaves that are missing, unexpected, or of another
            shape or dtype are listed.
    """
    item = _item(Path(folder))
    metadata = _read_metadata(item)
    saved = {".".join(keys) for keys, kind in _tree(item, metadata) if kind not in _NODES}
    expected, spec = _expected(spec, saved)
    problems = [f"missing: {_some(sorted(expected.keys() - saved))}"] if expected.keys() - saved else []
    problems += [f"unexpected: {_some(sorted(saved - expected.keys()))}"] if saved - expected.keys() else []
    arrays, broken = _open_all(item, metadata, sorted(expected.keys() & saved))
    problems += broken
    problems += [text for path, array in arrays.items() if (text := _misfit(path, array, expected[path])) is not None]
    if problems:
        raise CheckpointError(f"{folder}: not a save of the model {spec.hash()}: {'; '.join(problems)}")
    records = {path: SavedLeaf(tuple(array.shape), DTYPES[array.dtype.name], expected[path].axes) for path, array in arrays.items()}
    spec = spec.with_precision(_precision(spec, records))
    reader = Reader(str(item), arrays.__getitem__)
    return OrbaxSave(item, spec, Leaves(item, records, reader, spec.precision.params))


def stock_save(folder: Path) -> str | None:
    """What to say of a folder that stock Orbax saved and that was taken for one of our own; None if it isn't such a folder."""
    if _is_ours(folder) or not _holds_save(folder):
        return None
    return (
        f"{folder}: saved by Orbax itself, which doesn't say which model it is: convert it with "
        f"`python scripts/checkpoint.py reshard {folder} OUT --config config.json`, or read it in place with "
        "checkpoints.orbax.open_orbax(folder, spec)"
    )


# --- folders ----------------------------------------------------------------------------------------------------------


def _is_ours(folder: Path) -> bool:
    return any((folder / name).exists() for name in OURS)


def _holds_save(folder: Path) -> bool:
    return (folder / METADATA).is_file() or bool(_items(folder)) or any(_items(step) for step in _steps(folder))


def _items(folder: Path) -> list[Path]:
    """The trees of a step."""
    return sorted(path.parent for path in folder.glob(f"*/{METADATA}") if not _is_ours(path.parent))


def _steps(folder: Path) -> list[Path]:
    """The steps of a `CheckpointManager`, by number."""
    steps = {int(found[1]): path for path in folder.iterdir() if path.is_dir() and (found := re.fullmatch(r"(?:\w+_)?(\d+)", path.name))}
    return [steps[number] for number in sorted(steps)]


def _item(folder: Path) -> Path:
    """The folder of the tree itself."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if ".orbax-checkpoint-tmp" in folder.absolute().name:
        raise CheckpointError(f"{folder}: an unfinished Orbax save, which Orbax would not have left under this name: use an earlier one")
    if (folder / METADATA).is_file():
        return folder
    steps = [step for step in _steps(folder) if _items(step)]
    if len(steps) > 1:
        raise CheckpointError(f"{folder}: holds the steps {_some([step.name for step in steps])}: name one of those folders")
    items = _items(steps[0] if steps else folder)
    named = [item for name in ITEMS for item in items if item.name == name]
    if len(items) > 1 and not named:
        raise CheckpointError(f"{folder}: holds the items {_some([item.name for item in items])}: name one of those folders")
    if not items:
        raise CheckpointError(f"{folder}: not an Orbax save of a tree: {METADATA} is missing")
    return (named or items)[0]


def _read_metadata(item: Path) -> dict[str, Any]:
    path = item / METADATA
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: damaged: {store.one_line(error)}") from error
    if not isinstance(data, dict) or not isinstance(data.get("tree_metadata"), dict):
        raise CheckpointError(f"{path}: damaged: it describes no tree")
    return data


def _tree(item: Path, metadata: Mapping[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """Keys and kind of every leaf that `_METADATA` lists."""
    try:
        return [
            (tuple(str(key["key"]) for key in leaf["key_metadata"]), leaf["value_metadata"]["value_type"])
            for leaf in metadata["tree_metadata"].values()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{item / METADATA}: damaged: a leaf without {error}") from error


# --- arrays -----------------------------------------------------------------------------------------------------------


def _expected(spec: ModelSpec, saved: set[str]) -> tuple[dict[str, Leaf], ModelSpec]:
    """The leaves that the save must have, and the model that they are of."""
    without = dataclasses.replace(spec, extra_heads=())
    own = leaf_paths(spec).keys() - leaf_paths(without).keys()
    spec = spec if own & saved else without
    return leaf_paths(spec), spec


def _array_spec(item: Path, metadata: Mapping[str, Any], path: str) -> dict[str, Any]:
    if (item / "manifest.ocdbt").exists():
        base = {"driver": "file", "path": f"{os.path.realpath(item)}/"}
        kvstore: dict[str, Any] = {"driver": "ocdbt", "base": base, "path": f"{path}/", "cache_pool": "cache_pool#names"}
    else:
        kvstore = {"driver": "file", "path": f"{os.path.realpath(item)}/{path}/"}
    out: dict[str, Any] = {"driver": "zarr3" if metadata.get("use_zarr3") else "zarr", "kvstore": kvstore}
    if metadata.get("store_array_data_equal_to_fill_value"):
        out["fill_missing_data_reads"] = False  # then a chunk that isn't there is lost, and not zeros
    return out


def _open_all(item: Path, metadata: Mapping[str, Any], paths: list[str]) -> tuple[dict[str, ts.TensorStore], list[str]]:
    """The arrays, and what is wrong with those that can't be opened."""
    context = ts.Context({"cache_pool#names": {"total_bytes_limit": _NAMES_BYTES}})
    futures = {path: ts.open(_array_spec(item, metadata, path), open=True, read=True, context=context) for path in paths}
    arrays, broken = {}, []
    for path, future in futures.items():
        try:
            arrays[path] = future.result()
        except (ValueError, OSError) as error:
            broken.append(f"{path} is missing or damaged: {store.one_line(error)}")
    return arrays, broken if len(broken) < _LISTED else [*broken[:_LISTED], f"and {len(broken) - _LISTED} more like that"]


def _misfit(path: str, array: ts.TensorStore, leaf: Leaf) -> str | None:
    if tuple(array.shape) != leaf.shape:
        return f"{path} has shape {list(array.shape)}, the model needs {list(leaf.shape)}"
    if array.dtype.name not in DTYPES:
        return f"{path} has dtype {array.dtype.name}, and only {', '.join(DTYPES)} can be read"
    return None


def _precision(spec: ModelSpec, records: Mapping[str, SavedLeaf]) -> str:
    """bfloat16 if everything is that isn't float32 in any model."""
    pinned = pinned_paths(spec)
    free = {record.dtype for path, record in records.items() if path not in pinned}
    return "bfloat16" if free == {"bfloat16"} else "float32"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
