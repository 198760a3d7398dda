"""Restores a saved tree, whole or each device's slices of it, and verifies one; every chunk that is read is checked.

It knows folders and shardings, and not how the folder came to be.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import tree_util

from checkpoints import arrays, store
from checkpoints.errors import CheckpointError
from checkpoints.manifest import LeafRecord
from checkpoints.reading import Box, Target, within
from checkpoints.trees.format import EMPTY, TREE, Keys, TreeInfo, TreeLeaf, crc32, dtype_of, read_tree
from checkpoints.trees.leaves import named_leaves
from jaxmoe.spec import Leaf

Placement = jax.sharding.Sharding | Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding] | None
"""Where arrays go: one sharding for all, a function of a leaf's path and of its shape and dtype, or None."""


def restore_tree(folder: str | os.PathLike, like: Any = None, sharding: Placement = None) -> Any:
    """Restores a saved tree; every chunk that is read is checked.

    Args:
        folder: a saved tree.
        like: a tree of the same paths, shapes and dtypes, of jax arrays or `ShapeDtypeStruct`s (jax arrays come back, in their sharding if they have
            one), numpy arrays (numpy arrays), or numbers (numbers). Without it, nested dicts come back, whose keys are the saved ones as text.
        sharding: where the jax arrays go, for all of them or by (path, shape and dtype); each device's slice is read by itself. Without it and
            without `like`, numpy arrays come back.

    Raises:
        CheckpointError: a leaf is missing, damaged, or doesn't fit `like`; it's named.
    """
    folder, info = Path(folder), read_tree(folder)
    if like is None:
        found = [(leaf.keys, _restore_leaf(folder, path, leaf, None, sharding)) for path, leaf in info.leaves.items()]
        return _nested([*found, *((keys, EMPTY[kind]()) for keys, kind in info.empty)])
    wanted = named_leaves(like)
    check_fit(str(folder), {path: (leaf.shape, leaf.dtype) for path, leaf in info.leaves.items()}, like)
    values = [_restore_leaf(folder, path, info.leaves[path], value, sharding) for path, (_, value) in wanted.items()]
    return tree_util.tree_unflatten(tree_util.tree_structure(like), values)


def verify_tree(folder: str | os.PathLike, progress: store.Progress | None = None) -> TreeInfo:
    """Reads every chunk of a saved tree and compares it with its checksum.

    Args:
        folder: a saved tree.
        progress: called with (bytes read, bytes in all, leaf path) after each chunk.

    Raises:
        CheckpointError: the first leaf that is missing, damaged or altered.
    """
    folder, info = Path(folder), read_tree(folder)
    count = store.Count(info.nbytes, progress)
    for path, leaf in info.leaves.items():
        reader = LeafReader(folder, path, leaf)
        for key, box in leaf.chunks():
            count(reader.chunk(key, box).nbytes, path)
    return info


def is_complete(folder: Path) -> bool:
    """Whether a folder is a saved tree all of whose files are there and of full length; their content isn't read."""
    try:
        info = read_tree(folder)
        return all(
            (folder / path / "zarr.json").is_file()
            and all(store.chunk_intact(folder, path, leaf.chunk, dtype_of(leaf.stored).itemsize, _index(key)) for key, _ in leaf.chunks())
            for path, leaf in info.leaves.items()
        )
    except (CheckpointError, OSError, TypeError):
        return False


def _index(key: str) -> tuple[int, ...]:
    return tuple(map(int, key.split(".")))


class LeafReader:
    """Reads slices of one leaf; each chunk that they touch is read once, whole, and checked."""

    def __init__(self, folder: Path, path: str, leaf: TreeLeaf):
        self._folder, self._path, self._leaf = folder, path, leaf
        record = LeafRecord(leaf.shape, leaf.dtype, leaf.stored, (None,) * len(leaf.shape), leaf.chunk, "", (), (), 0)
        self._array = store.open_array(folder, path, record)

    def chunk(self, key: str, box: Box) -> np.ndarray:
        """One chunk.

        Raises:
            CheckpointError: it's missing, damaged, or not the one that was written.
        """
        data = store.read_array(self._folder, self._path, self._array, tuple(slice(*span) for span in box))
        found, expected = crc32(data), self._leaf.crc32.get(key)
        if found != expected:
            raise CheckpointError(f"{self._folder}: leaf {self._path}, chunk {key}, has checksum {found}, {TREE} says {expected}")
        return data.view(dtype_of(self._leaf.dtype))

    def fill(self, targets: Sequence[Target]) -> None:
        """Fills every target's `out`.

        Raises:
            CheckpointError: as `chunk`.
        """
        for key, box in self._leaf.chunks():
            shared = [(target, part) for target in targets if (part := _shared(box, target.box)) is not None]
            data = self.chunk(key, box) if shared else None
            for target, part in shared:
                target.out[within(part, target.box)] = data[within(part, box)]  # type: ignore[index]


def _shared(a: Box, b: Box) -> Box | None:
    """What two boxes have in common."""
    box = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
    return box if all(start < stop for start, stop in box) else None


def _restore_leaf(folder: Path, path: str, leaf: TreeLeaf, like: Any, sharding: Placement) -> Any:
    reader, dtype = LeafReader(folder, path, leaf), dtype_of(leaf.dtype)
    if (like is None and sharding is None) or is_host_leaf(like):
        whole = Target(tuple((0, n) for n in leaf.shape), np.empty(leaf.shape, dtype))
        reader.fill([whole])
        return as_like(like, whole.out)
    return place(path, leaf.shape, dtype, like, sharding, reader.fill)


def _nested(values: list[tuple[Keys, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for keys, value in values:
        node = out
        for _, text in keys[:-1]:
            node = node.setdefault(text, {})
        node[keys[-1][1]] = value
    return out


def check_fit(where: str, saved: Mapping[str, tuple[tuple[int, ...], str]], like: Any) -> None:
    """Raises a CheckpointError that names the first leaf in which a tree differs from a saved one (path -> shape, dtype)."""
    wanted = {path: value for path, (_, value) in named_leaves(like).items()}
    for these, those, text in ((wanted, saved, "isn't in the saved tree"), (saved, wanted, "is in the saved tree, and not in the one asked for")):
        lost = sorted(these.keys() - those.keys())
        if lost:
            more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
            raise CheckpointError(f"{where}: leaf {lost[0]}{more} {text}")
    for path, value in wanted.items():
        (shape, dtype), found = saved[path], value if hasattr(value, "dtype") else np.asarray(value)
        if tuple(found.shape) != shape or np.dtype(found.dtype).name != dtype:
            asked = f"{np.dtype(found.dtype).name}{list(found.shape)}"
            raise CheckpointError(f"{where}: leaf {path} is {dtype}{list(shape)}, the tree asked for has {asked}")


def is_host_leaf(like: Any) -> bool:
    """Whether a leaf that stands for a wanted one asks for a numpy array or a number, rather than a jax array."""
    return isinstance(like, np.ndarray | np.generic | bool | int | float | complex)


def as_like(like: Any, value: np.ndarray) -> Any:
    """A restored value as what stands for it: a numpy array (also where nothing does), a numpy scalar, or a number."""
    return value if isinstance(like, np.ndarray | None) else value[()] if isinstance(like, np.generic) else value.item()


def place(path: str, shape: tuple[int, ...], dtype: np.dtype, like: Any, sharding: Placement, fill: arrays.Fill) -> jax.Array:
    """A jax array of what `fill` puts into the slices of this process's devices, in `sharding`, or else as `like` is, or else on the first device.

    Raises:
        CheckpointError: jax can't hold the dtype, or the sharding doesn't fit the shape; or what `fill` raises.
    """
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise CheckpointError(f"leaf {path} has dtype {dtype.name}, which jax holds with jax_enable_x64 only: ask for numpy arrays")
    target = sharding(path, jax.ShapeDtypeStruct(shape, dtype)) if callable(sharding) else sharding
    target = target or getattr(like, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        target.addressable_devices_indices_map(shape)
    except ValueError as error:
        raise CheckpointError(f"leaf {path} with shape {list(shape)} can't be placed: {store.one_line(error)}") from error
    return arrays.build(Leaf(shape, dtype, (None,) * len(shape)), target, fill)
