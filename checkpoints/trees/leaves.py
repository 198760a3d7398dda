"""A pytree's leaves as a folder holds them: their names, arrays and records.

It knows pytrees and what can be saved of them, and no files.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np
from jax import tree_util

from checkpoints import commit, store
from checkpoints.errors import CheckpointError
from checkpoints.trees.format import BEGUN, PART, TREE, Keys, TreeLeaf
from checkpoints.trees.pieces import CHUNK_BYTES, chunk_shape

_NAME_BYTES = 255
# What `store.create_array` can write as it is; anything else is held as unsigned integers of its size.
_NATIVE = frozenset(
    "int2 int4 int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 bfloat16 float32 float64 "
    "float8_e4m3fn float8_e5m2 float8_e4m3b11fnuz float8_e4m3fnuz float8_e5m2fnuz float4_e2m1fn".split()
)
_NODES: dict[type, str] = {dict: "Dict", list: "List", tuple: "Tuple"}


def named_leaves(tree: Any) -> dict[str, tuple[Keys, Any]]:
    """A tree's leaves by path: path -> (keys, leaf).

    Raises:
        CheckpointError: there is no leaf, or a path can't be the name of a folder, or two leaves have the same.
    """
    out: dict[str, tuple[Keys, Any]] = {}
    try:
        entries_and_leaves = tree_util.tree_flatten_with_path(tree)[0]
    except ValueError as error:  # keys that can't be sorted
        raise CheckpointError(f"the tree isn't a pytree: {store.one_line(error)}") from error
    for entries, leaf in entries_and_leaves:
        keys = tuple(_key(entry) for entry in entries)
        path = ".".join(text for _, text in keys)
        if not keys:
            raise CheckpointError("the tree is one bare array: put it into a dict")
        if not _is_name(path) or any(not text or "/" in text or "\0" in text for _, text in keys):
            raise CheckpointError(f"leaf {path!r} can't be saved under that name: rename its keys")
        if path in out:
            raise CheckpointError(f"two leaves of the tree are called {path!r}: rename a key that has a dot in it")
        out[path] = (keys, leaf)
    if not out:
        raise CheckpointError("the tree has no arrays")
    return out


def _is_name(path: str) -> bool:
    """Whether a folder of that name can lie in a saved tree."""
    taken = path in (TREE, store.ORBAX_METADATA, commit.LOCK, BEGUN) or path.startswith(PART.split("{", 1)[0])
    return not taken and len(os.fsencode(path)) <= _NAME_BYTES and set(path) != {"."}


def _key(entry: Any) -> tuple[str, str]:
    if isinstance(entry, tree_util.SequenceKey):
        return "sequence", str(entry.idx)
    if isinstance(entry, tree_util.GetAttrKey):
        return "attribute", entry.name
    key = getattr(entry, "key", entry)
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise CheckpointError(f"a key of the tree is {key!r}: only strings and integers can be saved")
    return "dict", str(key)


def empty_nodes(tree: Any) -> tuple[tuple[Keys, str], ...]:
    """A tree's nodes that hold no array, as Orbax calls them."""
    nodes = tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: not jax.tree.leaves(node))[0]
    return tuple((tuple(map(_key, entries)), _NODES.get(type(node), "None")) for entries, node in nodes if not jax.tree.leaves(node))


def as_array(path: str, value: Any) -> Any:
    """A leaf as a jax or a numpy array.

    Raises:
        CheckpointError: it's deleted, or of a kind that can't be saved.
    """
    if isinstance(value, jax.Array):
        if value.is_deleted():
            raise CheckpointError(f"leaf {path} is deleted (donated to a jitted function?): it can't be saved any more")
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            raise CheckpointError(f"leaf {path} is a random key: save jax.random.key_data of it")
        return value
    array = np.asarray(value)
    if array.dtype.kind in "OUSMm" or array.dtype.fields is not None:
        raise CheckpointError(f"leaf {path} is {type(value).__name__} of dtype {array.dtype}: only arrays of numbers can be saved")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def describe(tree: Any, chunk_bytes: int = CHUNK_BYTES) -> tuple[dict[str, TreeLeaf], dict[str, Any]]:
    """A tree's leaves as they will be on disk, and their arrays, by path.

    Raises:
        CheckpointError: a leaf can't be saved; it's named.
    """
    leaves, arrays = {}, {}
    for path, (keys, value) in named_leaves(tree).items():
        array = arrays[path] = as_array(path, value)
        dtype = np.dtype(array.dtype)
        if dtype.name not in _NATIVE and dtype.itemsize not in (1, 2, 4, 8):
            raise CheckpointError(f"leaf {path} has dtype {dtype.name}, which can't be saved")
        stored = dtype.name if dtype.name in _NATIVE else f"uint{8 * dtype.itemsize}"
        shape = tuple(array.shape)
        shard = array.sharding.shard_shape(shape) if isinstance(array, jax.Array) else shape
        leaves[path] = TreeLeaf(keys, shape, dtype.name, stored, chunk_shape(shape, shard, dtype.itemsize, chunk_bytes))
    return leaves, arrays
