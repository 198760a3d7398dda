"""Folders that hold any pytree of arrays: trained models, adapters, predictors, optimizer states.

One Zarr v3 array a leaf, `_METADATA` with which stock Orbax restores the folder, and `tree.json`, which says what is in it: shapes, dtypes, chunks,
and a CRC-32 of each chunk. Processes write what they own into one unfinished folder; process 0 gives it its name when all are done. This file knows
nothing of models, and nothing of when trees are saved.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tensorstore as ts
from jax import tree_util

from checkpoints import commit, store
from checkpoints.errors import CheckpointError
from checkpoints.manifest import LeafRecord, content_sha256, parse_json, write_text
from jaxmoe.spec import Leaf

FORMAT = "jaxmoe-tree"
VERSION = 1
TREE = "tree.json"
CHUNK_BYTES = 16 << 20
"""Most bytes in a chunk."""

Keys = tuple[tuple[str, str], ...]
Region = tuple[slice, ...]
Placement = jax.sharding.Sharding | Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding] | None

_BEGUN, _PART = "begun.json", "part.{}.json"  # from process 0 to the others, and back
_POLL_SECONDS = 0.02
_NAME_BYTES = 255
# What `store.create_array` can write as it is; anything else is held as unsigned integers of its size.
_NATIVE = frozenset(
    "int2 int4 int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 bfloat16 float32 float64 "
    "float8_e4m3fn float8_e5m2 float8_e4m3b11fnuz float8_e4m3fnuz float8_e5m2fnuz float4_e2m1fn".split()
)


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


@dataclasses.dataclass(frozen=True)
class TreeInfo:
    """What `tree.json` says; `metadata` is the user's, `empty` are the nodes that hold no array, each as (keys, what it is)."""

    step: int
    metadata: Any
    leaves: dict[str, TreeLeaf]
    empty: tuple[tuple[Keys, str], ...] = ()
    token: str = ""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One chunk that this process writes: `region` of leaf `path`, which is `inner` of `source` (a numpy array, or a jax array on one device)."""

    path: str
    key: str
    region: Region
    source: Any
    inner: Region
    nbytes: int


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
        taken = path in (TREE, store.ORBAX_METADATA, commit.LOCK, _BEGUN) or path.startswith("part.")
        if taken or any(not text or "/" in text or "\0" in text for _, text in keys) or len(os.fsencode(path)) > _NAME_BYTES or set(path) == {"."}:
            raise CheckpointError(f"leaf {path!r} can't be saved under that name: rename its keys")
        if path in out:
            raise CheckpointError(f"two leaves of the tree are called {path!r}: rename a key that has a dot in it")
        out[path] = (keys, leaf)
    if not out:
        raise CheckpointError("the tree has no arrays")
    return out


_EMPTY: dict[str, Callable[[], Any]] = {"Dict": dict, "List": list, "Tuple": tuple, "None": lambda: None}


def empty_nodes(tree: Any) -> tuple[tuple[Keys, str], ...]:
    """A tree's nodes that hold no array, as Orbax calls them."""
    nodes = tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: not jax.tree.leaves(node))[0]
    kinds: dict[type, str] = {dict: "Dict", list: "List", tuple: "Tuple"}
    return tuple((tuple(map(_key, entries)), kinds.get(type(node), "None")) for entries, node in nodes if not jax.tree.leaves(node))


def _key(entry: Any) -> tuple[str, str]:
    if isinstance(entry, tree_util.SequenceKey):
        return "sequence", str(entry.idx)
    if isinstance(entry, tree_util.GetAttrKey):
        return "attribute", entry.name
    key = getattr(entry, "key", entry)
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise CheckpointError(f"a key of the tree is {key!r}: only strings and integers can be saved")
    return "dict", str(key)


def chunk_shape(shape: tuple[int, ...], shard: tuple[int, ...], itemsize: int, limit: int = CHUNK_BYTES) -> tuple[int, ...]:
    """How an array of `shape` is cut whose shards have shape `shard`: into shards, and those along one axis (along more where one isn't enough) until
    a chunk has `limit` bytes at most. No chunk belongs to two shards."""
    chunk = tuple(max(1, n) for n in shard)
    while 0 not in shard and math.prod(chunk) * itemsize > limit and max(chunk) > 1:
        size = math.prod(chunk) * itemsize

        def cut(axis: int, chunk: tuple[int, ...] = chunk, size: int = size) -> int:
            n, row = chunk[axis], size // chunk[axis]
            most = max(1, limit // row)
            if shape[axis] == shard[axis]:
                return math.ceil(n / math.ceil(n / most))
            return max(d for d in range(1, min(n, most) + 1) if n % d == 0)

        steps = [cut(axis) if n > 1 else n for axis, n in enumerate(chunk)]
        # The axis along which fewest chunks are small enough; without one, that which makes them smallest.
        rank = [(max(limit, size // n * s), math.ceil(n / s), axis) for axis, (n, s) in enumerate(zip(chunk, steps, strict=True)) if n > 1]
        axis = min(rank)[2]
        chunk = (*chunk[:axis], steps[axis], *chunk[axis + 1 :])
    return chunk


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)


def is_distributed(value: Any) -> bool:
    """Whether processes hold different parts of it."""
    return isinstance(value, jax.Array) and not value.is_fully_addressable


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


def pieces_of(path: str, leaf: TreeLeaf, array: Any) -> Iterator[Piece]:
    """The chunks of a leaf that this process writes: of the shards that it holds first copies of, or, where each process has the whole leaf, all of
    them in process 0 and none elsewhere."""
    if not is_distributed(array) and jax.process_index():
        return
    whole = tuple(slice(0, n) for n in leaf.shape)
    shards = [(whole, array)] if isinstance(array, np.ndarray) else [(s.index, s.data) for s in array.addressable_shards if s.replica_id == 0]
    for index, source in shards:
        starts = [s.start or 0 for s in index]
        spans = [range(a, a + n, c) for a, n, c in zip(starts, source.shape, leaf.chunk, strict=True)]
        for corner in itertools.product(*spans):
            stops = [min(at + c, a + n) for at, c, a, n in zip(corner, leaf.chunk, starts, source.shape, strict=True)]
            region = tuple(slice(at, stop) for at, stop in zip(corner, stops, strict=True))
            inner = tuple(slice(at - a, stop - a) for at, stop, a in zip(corner, stops, starts, strict=True))
            nbytes = math.prod(s.stop - s.start for s in region) * dtype_of(leaf.dtype).itemsize
            yield Piece(path, _chunk_key(corner, leaf.chunk), region, source, inner, nbytes)


def _chunk_key(corner: Sequence[int], chunk: tuple[int, ...]) -> str:
    return ".".join(str(at // c) for at, c in zip(corner, chunk, strict=True)) or "0"


def chunk_keys(leaf: TreeLeaf) -> Iterator[tuple[str, Region]]:
    """The chunks of a leaf, each as (name of its file, region)."""
    for corner in itertools.product(*(range(0, n, c) for n, c in zip(leaf.shape, leaf.chunk, strict=True))):
        ends = zip(corner, leaf.chunk, leaf.shape, strict=True)
        yield _chunk_key(corner, leaf.chunk), tuple(slice(at, min(at + c, n)) for at, c, n in ends)


def on_host(source: Any) -> np.ndarray:
    """A piece's source as a numpy array; on a CPU it stays where it is, and as long as it is looked at it can't be donated (jax copies instead)."""
    # Of another array object over the same buffer: jax keeps the host's copy, or the view, as long as the object lives.
    return source if isinstance(source, np.ndarray) else np.asarray(own_view(source))


def own_view(source: jax.Array) -> jax.Array:
    """Another array object over the buffer of a jax array on one device."""
    return jax.make_array_from_single_device_arrays(source.shape, source.sharding, [source])


def crc32(data: np.ndarray) -> str:
    """Of the values in C order, in hexadecimal."""
    return f"{zlib.crc32(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data):08x}"


class TreeWriter:
    """One process's part in the writing of one folder: `begin`, `write` for each of `pieces`, `finish`; `abort` where something failed.

    Args:
        folder: is made; may not be there.
        tree: arrays; those on devices must stay as they are until their pieces are copied.
        step, metadata: kept with it; metadata is JSON.
        token: the same in all processes, and for no other save.
        timeout: seconds that processes wait for each other.

    Raises:
        CheckpointError: the tree or the metadata can't be saved.
    """

    def __init__(self, folder: Path, tree: Any, step: int, metadata: Any, token: str, chunk_bytes: int = CHUNK_BYTES, timeout: float = 600.0):
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise CheckpointError(f"step {step!r} must be a whole number, 0 or more")
        try:
            self._metadata = json.loads(json.dumps(metadata, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"the metadata of step {step} isn't JSON: {error}") from error
        self.folder, self.partial, self._step, self._token, self._timeout = folder, commit.partial_of(folder), step, token, timeout
        self.leaves, arrays = describe(tree, chunk_bytes)
        self._empty = empty_nodes(tree)
        self.pieces = [piece for path, array in arrays.items() for piece in pieces_of(path, self.leaves[path], array)]
        self._crc32: dict[str, dict[str, str]] = {}
        self._open = functools.lru_cache(maxsize=1)(self._array)

    def begin(self) -> None:
        """Makes the unfinished folder and its empty arrays (process 0), or waits for them."""
        if jax.process_index():
            self._await(self.partial / _BEGUN)
            return
        with commit.writing(self.partial):
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            for path in self.leaves:
                self._array(path)
            write_text(self.partial / _BEGUN, json.dumps({"token": self._token}))

    def write(self, piece: Piece, data: np.ndarray) -> None:
        """Writes one chunk, and returns when its bytes are no longer needed."""
        data = np.asarray(data, order="C").view(dtype_of(self.leaves[piece.path].stored))
        try:
            done = store.write_chunk(self._open(piece.path), piece.region, data)
            self._crc32.setdefault(piece.path, {})[piece.key] = crc32(data)  # while it is being written
            done.result()
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self.partial}: leaf {piece.path}: writing failed: {store.one_line(error)}") from error

    def finish(self) -> None:
        """Publishes the folder when all processes have written their parts (process 0), or waits for that."""
        if jax.process_index():
            _sync(self.partial)
            self._report({"crc32": self._crc32})
            self._await(self.folder / TREE)
            return
        with commit.writing(self.partial):
            leaves = self._gather()
            for name in (_BEGUN, *(_PART.format(p) for p in range(jax.process_count()))):
                (self.partial / name).unlink(missing_ok=True)
            info = TreeInfo(self._step, self._metadata, leaves, self._empty, self._token)
            _write_orbax_metadata(self.partial, info)
            _write_tree(self.partial, info)
            _publish(self.partial, self.folder)

    def abort(self, error: BaseException) -> None:
        """Tells the other processes that this one failed, and removes the unfinished folder (alone)."""
        if jax.process_count() == 1:
            shutil.rmtree(self.partial, ignore_errors=True)
        elif self.partial.is_dir():
            try:
                self._report({"failed": store.one_line(error)})  # type: ignore[arg-type]
            except OSError:
                pass  # the others will wait for as long as they do

    def _array(self, path: str) -> ts.TensorStore:
        leaf = self.leaves[path]
        try:
            return store.create_array(self.partial, path, Leaf(leaf.shape, dtype_of(leaf.stored), (None,) * len(leaf.shape)), leaf.chunk)
        except ValueError as error:
            raise CheckpointError(f"{self.partial}: leaf {path} can't be written: {store.one_line(error)}") from error

    def _gather(self) -> dict[str, TreeLeaf]:
        parts = [self._crc32, *(self._await(self.partial / _PART.format(p))["crc32"] for p in range(1, jax.process_count()))]
        leaves = {}
        for path, leaf in self.leaves.items():
            found = {key: crc for part in parts for key, crc in part.get(path, {}).items()}
            absent = [key for key, _ in chunk_keys(leaf) if key not in found]
            if absent:
                raise CheckpointError(f"{self.partial}: leaf {path}: no process wrote chunk {absent[0]}: do all of them save the same tree?")
            leaves[path] = dataclasses.replace(leaf, crc32=found)
        return leaves

    def _report(self, data: dict[str, Any]) -> None:
        write_text(self.partial / _PART.format(jax.process_index()), json.dumps({"token": self._token, **data}))

    def _await(self, path: Path) -> dict[str, Any]:
        """Another process's file of this save, when it is there."""
        end = time.monotonic() + self._timeout
        while time.monotonic() < end:
            for process in range(jax.process_count()):
                failed = _read_json(self.partial / _PART.format(process))
                if failed.get("token") == self._token and "failed" in failed:
                    raise CheckpointError(f"{self.folder}: process {process} failed: {failed['failed']}")
            data = _read_json(path)
            if data.get("token") == self._token:
                return data
            time.sleep(_POLL_SECONDS)
        raise CheckpointError(f"{self.folder}: waited {self._timeout:g} s for {path.name} of another process")


def _read_json(path: Path) -> dict[str, Any]:
    """A file that other processes replace, or nothing."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _publish(partial: Path, out: Path) -> None:
    _sync(partial)
    os.replace(partial, out)
    commit.sync(out.absolute().parent)


def _sync(folder: Path) -> None:
    try:
        commit.sync_tree(folder)
    except RuntimeError:  # the interpreter is ending, and starts no threads any more
        for root, _, names in os.walk(folder):
            for name in (*names, "."):
                commit.sync(os.path.join(root, name))


def _write_tree(folder: Path, info: TreeInfo) -> None:
    data = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(info)}
    data["sha256"] = content_sha256(data)
    leaves = data.pop("leaves")
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()]
    rows = ",\n".join(f"    {json.dumps(path)}: {json.dumps(record)}" for path, record in leaves.items())
    write_text(folder / TREE, "{\n" + ",\n".join([*lines, f'  "leaves": {{\n{rows}\n  }}']) + "\n}\n")


def _write_orbax_metadata(folder: Path, info: TreeInfo) -> None:
    """As `store.write_orbax_metadata`, for trees that also have sequences and empty nodes."""
    values: list[tuple[Keys, dict[str, Any]]] = [
        (leaf.keys, {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": list(leaf.shape)}) for leaf in info.leaves.values()
    ]
    values += [(keys, {"value_type": kind, "skip_deserialize": True}) for keys, kind in info.empty]
    kinds = {"sequence": 1, "dict": 2, "attribute": 2}
    tree = {
        str(tuple(text for _, text in keys)): {
            "key_metadata": [{"key": text, "key_type": kinds[kind]} for kind, text in keys],
            "value_metadata": value,
        }
        for keys, value in values
    }
    data = {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": True, "store_array_data_equal_to_fill_value": True, "custom_metadata": None}
    write_text(folder / store.ORBAX_METADATA, json.dumps(data))


def save_tree(
    folder: str | os.PathLike, tree: Any, step: int = 0, metadata: Any = None, chunk_bytes: int = CHUNK_BYTES, timeout: float = 600.0
) -> TreeInfo:
    """Saves a pytree of arrays; returns when it is on the disk. All processes call it, with the same folder.

    Args:
        folder: is made; may not be there.
        tree: jax or numpy arrays and numbers, of any sharding, in dicts, lists, tuples and registered dataclasses.
        step, metadata: kept with it; metadata is anything JSON can say.
        chunk_bytes: most bytes in a chunk.
        timeout: seconds that processes wait for each other.

    Raises:
        CheckpointError: a leaf can't be saved (it's named), the folder is there, or writing fails; nothing is left then.
    """
    out = Path(folder)
    writer = TreeWriter(out, tree, step, metadata, shared_token(), chunk_bytes, timeout)
    if out.exists():
        raise CheckpointError(f"{out}: is there already")
    try:
        writer.begin()
        for _, shard in itertools.groupby(writer.pieces, lambda piece: id(piece.source)):
            pieces = list(shard)
            whole = on_host(pieces[0].source)  # on accelerators: one shard at a time comes to the host
            for piece in pieces:
                writer.write(piece, whole[piece.inner])
        writer.finish()
    except BaseException as error:
        writer.abort(error)
        raise
    return read_tree(out)


def shared_token() -> str:
    """A random name that all processes agree on (a collective)."""
    words = np.frombuffer(secrets.token_bytes(8), np.uint32)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        words = np.asarray(multihost_utils.broadcast_one_to_all(words), np.uint32)
    return words.tobytes().hex()


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
        leaves = {name: _leaf_of(record) for name, record in data["leaves"].items()}
        empty = tuple((_keys_of(keys), str(kind)) for keys, kind in data["empty"])
        unknown = [kind for _, kind in empty if kind not in _EMPTY]
        if unknown:
            raise ValueError(f"a node is {unknown[0]!r}")
        return TreeInfo(data["step"], data["metadata"], leaves, empty, data["token"])
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error


def _keys_of(keys: list) -> Keys:
    return tuple((str(kind), str(text)) for kind, text in keys)


def _leaf_of(record: dict[str, Any]) -> TreeLeaf:
    shape, chunk = tuple(record["shape"]), tuple(record["chunk"])
    return TreeLeaf(_keys_of(record["keys"]), shape, record["dtype"], record["stored"], chunk, dict(record["crc32"]))


class _LeafReader:
    """Reads slices of one leaf; each chunk that they touch is read once, whole, and checked."""

    def __init__(self, folder: Path, path: str, leaf: TreeLeaf):
        self._folder, self._path, self._leaf = folder, path, leaf
        record = LeafRecord(leaf.shape, leaf.dtype, leaf.stored, (None,) * len(leaf.shape), leaf.chunk, "", (), (), 0)
        self._array = store.open_array(folder, path, record)

    def chunk(self, key: str, region: Region) -> np.ndarray:
        data = store.read_array(self._folder, self._path, self._array, region)
        found, expected = crc32(data), self._leaf.crc32.get(key)
        if found != expected:
            raise CheckpointError(f"{self._folder}: leaf {self._path}, chunk {key}, has checksum {found}, {TREE} says {expected}")
        return data.view(dtype_of(self._leaf.dtype))

    def read(self, slices: Sequence[Region]) -> list[np.ndarray]:
        boxes = [[s.indices(n)[:2] for s, n in zip(index, self._leaf.shape, strict=True)] for index in slices]
        outs = [np.empty([b - a for a, b in box], dtype_of(self._leaf.dtype)) for box in boxes]
        for key, region in chunk_keys(self._leaf):
            shared = [[(max(r.start, a), min(r.stop, b)) for r, (a, b) in zip(region, box, strict=True)] for box in boxes]
            wanted = [i for i, box in enumerate(shared) if all(lo < hi for lo, hi in box)]
            data = self.chunk(key, region) if wanted else None
            for i in wanted:
                target = tuple(slice(lo - a, hi - a) for (lo, hi), (a, _) in zip(shared[i], boxes[i], strict=True))
                outs[i][target] = data[tuple(slice(lo - r.start, hi - r.start) for (lo, hi), r in zip(shared[i], region, strict=True))]  # type: ignore
        return outs


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
        return _nested([*found, *((keys, _EMPTY[kind]()) for keys, kind in info.empty)])
    wanted = named_leaves(like)
    check_fit(str(folder), {path: (leaf.shape, leaf.dtype) for path, leaf in info.leaves.items()}, like)
    values = [_restore_leaf(folder, path, info.leaves[path], value, sharding) for path, (_, value) in wanted.items()]
    return tree_util.tree_unflatten(tree_util.tree_structure(like), values)


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


def _restore_leaf(folder: Path, path: str, leaf: TreeLeaf, like: Any, sharding: Placement) -> Any:
    reader = _LeafReader(folder, path, leaf)
    if (like is None and sharding is None) or is_host_leaf(like):
        return as_like(like, reader.read([tuple(slice(0, n) for n in leaf.shape)])[0])
    return place(path, leaf.shape, dtype_of(leaf.dtype), like, sharding, reader.read)


def is_host_leaf(like: Any) -> bool:
    """Whether a leaf that stands for a wanted one asks for a numpy array or a number, rather than a jax array."""
    return isinstance(like, np.ndarray | np.generic | bool | int | float | complex)


def as_like(like: Any, value: np.ndarray) -> Any:
    """A restored value as what stands for it: a numpy array (also where nothing does), a numpy scalar, or a number."""
    return value if isinstance(like, np.ndarray | None) else value[()] if isinstance(like, np.generic) else value.item()


Read = Callable[[Sequence[Region]], list[np.ndarray]]


def place(path: str, shape: tuple[int, ...], dtype: np.dtype, like: Any, sharding: Placement, read: Read) -> jax.Array:
    """A jax array of what `read` gives for the slices of this process's devices, in `sharding`, or else as `like` is, or else on the first device."""
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise CheckpointError(f"leaf {path} has dtype {dtype.name}, which jax holds with jax_enable_x64 only: ask for numpy arrays")
    target = sharding(path, jax.ShapeDtypeStruct(shape, dtype)) if callable(sharding) else sharding
    target = target or getattr(like, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        indices = {str(index): index for index in target.addressable_devices_indices_map(shape).values()}
    except ValueError as error:
        raise CheckpointError(f"leaf {path} with shape {list(shape)} can't be placed: {store.one_line(error)}") from error
    slices = dict(zip(indices, read([index or () for index in indices.values()]), strict=True))
    return jax.make_array_from_callback(shape, target, lambda index: slices[str(index)])


def verify_tree(folder: str | os.PathLike) -> TreeInfo:
    """Reads every chunk of a saved tree and compares it with its checksum.

    Raises:
        CheckpointError: the first leaf that is missing, damaged or altered.
    """
    folder, info = Path(folder), read_tree(folder)
    for path, leaf in info.leaves.items():
        reader = _LeafReader(folder, path, leaf)
        for key, region in chunk_keys(leaf):
            reader.chunk(key, region)
    return info


def is_complete(folder: Path) -> bool:
    """Whether a folder is a saved tree all of whose files are there and of full length; their content isn't read."""
    try:
        info = read_tree(folder)
        return all(
            (folder / path / "zarr.json").is_file()
            and all(store.chunk_intact(folder, path, leaf.chunk, dtype_of(leaf.stored).itemsize, _index(key)) for key, _ in chunk_keys(leaf))
            for path, leaf in info.leaves.items()
        )
    except (CheckpointError, OSError, TypeError):
        return False


def _index(key: str) -> tuple[int, ...]:
    return tuple(map(int, key.split(".")))
