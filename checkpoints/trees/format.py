"""What a saved tree says of itself: its records, the names of its files, `tree.json`, and `_METADATA` for stock Orbax.

It knows files, and neither jax nor the pytrees that the records were made of.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints import store
from checkpoints.errors import CheckpointError
from checkpoints.manifest import content_sha256, parse_json, write_text
from checkpoints.reading import Box

FORMAT = "jaxmoe-tree"
VERSION = 1
TREE = "tree.json"
"""The file that a folder has when it is whole."""
BEGUN = "begun.json"
"""The file that an unfinished folder has: its arrays are made, and are being written."""
PART = "part.{}.json"
"""What process {} reports to process 0 in an unfinished folder."""

Keys = tuple[tuple[str, str], ...]
EMPTY: dict[str, Callable[[], Any]] = {"Dict": dict, "List": list, "Tuple": tuple, "None": lambda: None}
"""The kinds of nodes that hold no array, as Orbax calls them, and what makes one."""

_KEY_TYPES = {"sequence": 1, "dict": 2, "attribute": 2}  # Orbax's


@dataclasses.dataclass(frozen=True)
class TreeLeaf:
    """One array: `keys` lead to it from the tree's root, each as (kind: 'dict' | 'sequence' | 'attribute', text); `stored` is the dtype of the array
    on disk, `dtype` wherever that is possible; `crc32` is of each chunk's values in C order, by the name of the chunk's file."""

    keys: Keys
    shape: tuple[int, ...]
    dtype: str
    stored: str
    chunk: tuple[int, ...]
    crc32: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array in memory."""
        return math.prod(self.shape) * dtype_of(self.dtype).itemsize

    def chunks(self) -> Iterator[tuple[str, Box]]:
        """Its chunks, each as (name of its file, what it holds)."""
        for corner in itertools.product(*(range(0, n, c) for n, c in zip(self.shape, self.chunk, strict=True))):
            ends = zip(corner, self.chunk, self.shape, strict=True)
            yield self.chunk_key(corner), tuple((at, min(at + c, n)) for at, c, n in ends)

    def chunk_key(self, corner: tuple[int, ...]) -> str:
        """The name of the file of the chunk that begins there."""
        return ".".join(str(at // c) for at, c in zip(corner, self.chunk, strict=True)) or "0"


@dataclasses.dataclass(frozen=True)
class TreeInfo:
    """What `tree.json` says; `metadata` is the user's, `empty` are the nodes that hold no array, each as (keys, what it is)."""

    step: int
    metadata: Any
    leaves: dict[str, TreeLeaf]
    empty: tuple[tuple[Keys, str], ...] = ()
    token: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays in memory."""
        return sum(leaf.nbytes for leaf in self.leaves.values())


def dtype_of(name: str) -> np.dtype:
    """The dtype of a name, numpy's or ml_dtypes'."""
    return np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)


def crc32(data: np.ndarray) -> str:
    """Of the values in C order, in hexadecimal."""
    return f"{zlib.crc32(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data):08x}"


def write_tree(folder: Path, info: TreeInfo) -> None:
    """Writes `tree.json`, a leaf a line."""
    data = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(info)}
    data["sha256"] = content_sha256(data)
    leaves = data.pop("leaves")
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()]
    rows = ",\n".join(f"    {json.dumps(path)}: {json.dumps(record)}" for path, record in leaves.items())
    write_text(folder / TREE, "{\n" + ",\n".join([*lines, f'  "leaves": {{\n{rows}\n  }}']) + "\n}\n")


def read_tree(folder: str | os.PathLike) -> TreeInfo:
    """What a folder says that it holds; no array is opened.

    Raises:
        CheckpointError: it's no saved tree, an unfinished or damaged one, or of a newer version.
    """
    path = Path(folder) / TREE
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        what = "not a saved tree" if Path(folder).is_dir() else "no such folder"
        raise CheckpointError(f"{folder}: {what}: {TREE} is missing") from None
    data = parse_json(path, raw)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not the description of a {FORMAT}")
    version = data.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(f"{path}: version {version} was written by a newer jaxmoe, this one reads up to {VERSION}: update jaxmoe")
    if data.pop("sha256", None) != content_sha256(data):
        raise CheckpointError(f"{path}: damaged: its content doesn't have the checksum that it names")
    try:
        return _info_of(data)
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error


def _info_of(data: dict[str, Any]) -> TreeInfo:
    leaves = {name: _leaf_of(record) for name, record in data["leaves"].items()}
    empty = tuple((_keys_of(keys), str(kind)) for keys, kind in data["empty"])
    unknown = [kind for _, kind in empty if kind not in EMPTY]
    if unknown:
        raise ValueError(f"a node is {unknown[0]!r}")
    return TreeInfo(data["step"], data["metadata"], leaves, empty, data["token"])


def _keys_of(keys: list) -> Keys:
    return tuple((str(kind), str(text)) for kind, text in keys)


def _leaf_of(record: dict[str, Any]) -> TreeLeaf:
    shape, chunk = tuple(record["shape"]), tuple(record["chunk"])
    return TreeLeaf(_keys_of(record["keys"]), shape, record["dtype"], record["stored"], chunk, dict(record["crc32"]))


def write_orbax_metadata(folder: Path, info: TreeInfo) -> None:
    """As `store.write_orbax_metadata`, for trees that also have sequences and empty nodes."""
    values: list[tuple[Keys, dict[str, Any]]] = [
        (leaf.keys, {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": list(leaf.shape)}) for leaf in info.leaves.values()
    ]
    values += [(keys, {"value_type": kind, "skip_deserialize": True}) for keys, kind in info.empty]
    tree = {
        str(tuple(text for _, text in keys)): {
            "key_metadata": [{"key": text, "key_type": _KEY_TYPES[kind]} for kind, text in keys],
            "value_metadata": value,
        }
        for keys, value in values
    }
    data = {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": True, "store_array_data_equal_to_fill_value": True, "custom_metadata": None}
    write_text(folder / store.ORBAX_METADATA, json.dumps(data))
