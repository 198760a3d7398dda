"""Folders of any pytree: bit for bit there and back, in any sharding, in stock Orbax too; everything wrong is named."""

import json
import math
import shutil
import threading

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from checkpoints import store, trees
from checkpoints.errors import CheckpointError
from checkpoints.manifest import content_sha256
from checkpoints.reading import Target


@flax.struct.dataclass
class Adapter:
    a: jax.Array
    rank: int


DTYPES = ("bool", "int4", "int8", "uint16", "int32", "float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2", "complex64", "uint4")


def random_array(dtype, shape=(6, 10), seed=0):
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, 8)).astype(np.uint8)
    kind = trees.dtype_of(dtype)
    if kind.itemsize == 1:
        small = dtype in ("int4", "uint4", "bool")
        return raw[..., 0].astype(np.float32).clip(0, 7).astype(kind) if small else raw[..., 0].view(kind)
    return np.ascontiguousarray(raw[..., : kind.itemsize]).view(kind)[..., 0]


def mesh(*shape):
    return jax.make_mesh(shape, ("x", "y")[: len(shape)])


def put(value, mesh_, *axes):
    return jax.device_put(value, NamedSharding(mesh_, PartitionSpec(*axes)))


def a_tree():
    params = {"w": jnp.asarray(random_array("bfloat16")), "b": jnp.asarray(random_array("float32", (5,)))}
    return {
        "params": params,
        "opt": optax.adamw(1e-3).init(params),
        "list": [np.arange(3), (jnp.float32(2.5), None), {}],
        "adapter": Adapter(jnp.ones((2, 2), jnp.int8), 3),
        "nothing": np.zeros((0, 3), np.float32),
        "rate": 0.5,
    }


def test_into_a_like_tree(tmp_path, assert_trees_equal):
    tree = a_tree()
    info = trees.save_tree(tmp_path / "t", tree, 7, {"loss": [1, 2.5, None]})
    got = trees.restore_tree(tmp_path / "t", tree)
    assert_trees_equal(got, tree)
    assert (info.step, info.metadata) == (7, {"loss": [1, 2.5, None]}) and trees.read_tree(tmp_path / "t") == info
    assert isinstance(got["params"]["w"], jax.Array) and isinstance(got["list"][0], np.ndarray) and type(got["rate"]) is float
    assert isinstance(got["adapter"], Adapter) and got["adapter"].rank == 3
    assert trees.verify_tree(tmp_path / "t") == info and trees.is_complete(tmp_path / "t")
    assert not (tmp_path / "t.partial").exists()


def test_as_nested_dicts(tmp_path):
    trees.save_tree(tmp_path / "t", a_tree())
    got = trees.restore_tree(tmp_path / "t")
    assert got["params"]["w"].dtype == ml_dtypes.bfloat16 and isinstance(got["params"]["w"], np.ndarray)
    np.testing.assert_array_equal(got["list"]["0"], np.arange(3))
    assert got["list"]["1"]["1"] is None and got["list"]["2"] == {} and got["adapter"]["rank"] == 3 and got["opt"]["0"]["count"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_keeps_its_bits(tmp_path, dtype):
    value = random_array(dtype)
    trees.save_tree(tmp_path / "t", {"host": value, "device": jnp.asarray(value)}, chunk_bytes=32)
    got = trees.restore_tree(tmp_path / "t", {"host": value, "device": jax.ShapeDtypeStruct(value.shape, value.dtype)})
    for leaf in got.values():
        assert leaf.dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(leaf).view(np.uint8), value.view(np.uint8))
    on_disk = trees.read_tree(tmp_path / "t").leaves["host"]
    assert on_disk.dtype == dtype and (on_disk.stored == dtype or dtype in ("bool", "complex64", "uint4"))


def test_stock_orbax_restores(tmp_path, assert_trees_equal):
    params = {"w": jnp.asarray(random_array("bfloat16")), "q": jnp.ones((4, 4), jnp.int4)}
    tree = {"params": params, "opt": optax.adamw(1e-3).init({"w": jnp.ones(3)})}
    trees.save_tree(tmp_path / "t", tree, chunk_bytes=64)
    with ocp.PyTreeCheckpointer() as checkpointer:
        plain = checkpointer.restore(tmp_path / "t")
    assert_trees_equal(plain["params"], tree["params"])
    assert plain["opt"][1:] == [None, None]
    with ocp.StandardCheckpointer() as checkpointer:
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(jax.devices()[1])), tree)
        got = checkpointer.restore(tmp_path / "t", target)
    assert_trees_equal(got, tree)
    assert got["params"]["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("shape", "shard", "limit"),
    [((64, 64), (32, 16), 1 << 20), ((64, 64), (32, 16), 512), ((97, 64), (97, 16), 1000), ((2, 100), (2, 100), 64), ((7, 6), (7, 3), 8), ((), (), 8),
     ((5, 5, 5), (5, 5, 5), 4), ((0, 4), (0, 4), 8), ((4096,), (512,), 1024)],
)  # fmt: skip
def test_chunks_fit_into_shards_and_limit(shape, shard, limit):
    chunk = trees.chunk_shape(shape, shard, 4, limit)
    assert all(1 <= c <= max(1, s) for c, s in zip(chunk, shard, strict=True))
    assert all(s % c == 0 or s == n for c, s, n in zip(chunk, shard, shape, strict=True))  # none belongs to two shards
    assert math.prod(chunk) * 4 <= max(limit, 4) or 0 in shape
    if 4 * math.prod(shard) <= limit:
        assert chunk == tuple(max(1, n) for n in shard)
    elif 4 * math.prod(shard) > 4 * limit:
        assert math.prod(chunk) * 4 > limit // 16  # and they aren't crumbs


def test_shards_become_chunks_and_any_sharding_comes_back(tmp_path, assert_trees_equal, monkeypatch):
    value = random_array("float32", (32, 64))
    tree = {"m": put(value, mesh(2, 4), "x", "y"), "rows": put(value, mesh(8), "x"), "all": put(value, mesh(8))}
    info = trees.save_tree(tmp_path / "t", tree)
    assert [info.leaves[name].chunk for name in ("m", "rows", "all")] == [(16, 16), (4, 64), (32, 64)]
    read = []
    real = store.read_array
    monkeypatch.setattr(store, "read_array", lambda *args: read.append(real(*args)) or read[-1])
    for to in ((mesh(8), None, "x"), (mesh(4, 2), "y", "x"), (mesh(2, 4), ("x", "y"))):
        got = trees.restore_tree(tmp_path / "t", sharding=NamedSharding(to[0], PartitionSpec(*to[1:])))
        assert_trees_equal(got, {name: value for name in tree})
        assert got["m"].sharding.spec == PartitionSpec(*to[1:])
        assert sum(data.nbytes for data in read) == 3 * value.nbytes  # each chunk once, whatever the slices
        read.clear()
    one = trees.restore_tree(tmp_path / "t", tree)
    assert one["rows"].sharding == tree["rows"].sharding
    one_row = Target(((4, 8), (0, 64)), np.empty((4, 64), np.float32))
    read.clear()
    trees.LeafReader(tmp_path / "t", "rows", info.leaves["rows"]).fill([one_row])
    np.testing.assert_array_equal(one_row.out, value[4:8])
    assert sum(data.nbytes for data in read) == value.nbytes // 8  # a device's slice by itself


def test_sharding_by_leaf(tmp_path):
    trees.save_tree(tmp_path / "t", {"a": np.ones((8, 2), np.float32), "b": np.ones(3, np.float32)})
    got = trees.restore_tree(tmp_path / "t", sharding=lambda path, leaf: NamedSharding(mesh(8), PartitionSpec("x" if leaf.shape[0] == 8 else None)))
    assert got["a"].addressable_shards[0].data.shape == (1, 2) and got["b"].addressable_shards[0].data.shape == (3,)


def test_a_sharding_that_does_not_divide(tmp_path):
    trees.save_tree(tmp_path / "t", {"a": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"leaf a with shape \[3\] can't be placed"):
        trees.restore_tree(tmp_path / "t", sharding=NamedSharding(mesh(8), PartitionSpec("x")))


def edit_json(folder, change, sign=True):
    data = json.loads((folder / trees.TREE).read_text())
    change(data)
    data["sha256"] = content_sha256(data) if sign else data["sha256"]
    (folder / trees.TREE).write_text(json.dumps(data))


def flip(folder):
    path = folder / "a" / "1.0"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)


def swap_chunks(folder):
    shutil.copy(folder / "a" / "0.0", folder / "a" / "1.0")  # its own CRC-32C is right


DAMAGE = {
    "missing_chunk": (lambda f: (f / "a" / "1.0").unlink(), "leaf a is damaged"),
    "flipped_bit": (flip, "leaf a is damaged"),
    "short_chunk": (lambda f: (f / "a" / "1.0").write_bytes(b"1234"), "leaf a is damaged"),
    "another_chunk": (swap_chunks, "leaf a, chunk 1.0, has checksum .*, tree.json says "),
    "missing_leaf": (lambda f: shutil.rmtree(f / "a"), "leaf a is missing"),
    "no_json": (lambda f: (f / trees.TREE).unlink(), "not a saved tree: tree.json is missing"),
    "cut_json": (lambda f: (f / trees.TREE).write_text((f / trees.TREE).read_text()[:200]), "tree.json: damaged: not JSON"),
    "altered_json": (lambda f: edit_json(f, lambda d: d.update(step=9), sign=False), "doesn't have the checksum that it names"),
    "newer": (lambda f: edit_json(f, lambda d: d.update(version=2)), "version 2 was written by a newer jaxmoe, this one reads up to 1"),
    "another_format": (lambda f: edit_json(f, lambda d: d.update(format="x")), "not the description of a jaxmoe-tree"),
    "another_shape": (lambda f: edit_json(f, lambda d: d["leaves"]["a"].update(shape=[3, 4])), "leaf a is damaged"),
    "odd_json": (lambda f: edit_json(f, lambda d: d.pop("leaves")), "tree.json: damaged"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named(tmp_path, damage, message):
    trees.save_tree(tmp_path / "t", {"a": np.arange(24, dtype=np.float32).reshape(4, 6), "b": np.ones(2)}, chunk_bytes=48)
    trees.verify_tree(tmp_path / "t")
    damage(tmp_path / "t")
    for act in (trees.restore_tree, trees.verify_tree):
        with pytest.raises(CheckpointError, match=message) as caught:
            act(tmp_path / "t")
        assert "\n" not in str(caught.value)


def test_like_trees_that_do_not_fit(tmp_path):
    trees.save_tree(tmp_path / "t", {"a": {"w": jnp.ones((4, 6), jnp.bfloat16)}, "b": np.ones(2)})
    for like, message in (
        ({"a": {"w": jnp.ones((4, 7), jnp.bfloat16)}, "b": np.ones(2)}, r"leaf a.w is bfloat16\[4, 6\], the tree asked for has bfloat16\[4, 7\]"),
        ({"a": {"w": jnp.ones((4, 6), jnp.uint16)}, "b": np.ones(2)}, r"leaf a.w is bfloat16\[4, 6\], the tree asked for has uint16\[4, 6\]"),
        ({"a": {"w": jnp.ones((4, 6), jnp.bfloat16)}}, "leaf b is in the saved tree, and not in the one asked for"),
        ({"a": {"w": 0, "v": 1}, "b": 1, "c": 2}, r"leaf a.v \(and 1 more\) isn't in the saved tree"),
    ):
        with pytest.raises(CheckpointError, match=message):
            trees.restore_tree(tmp_path / "t", like)


def test_wide_numbers_are_never_narrowed(tmp_path):
    trees.save_tree(tmp_path / "t", {"a": np.array([1 << 40])})
    assert trees.restore_tree(tmp_path / "t")["a"][0] == 1 << 40
    with pytest.raises(CheckpointError, match="leaf a has dtype int64, which jax holds with jax_enable_x64 only"):
        trees.restore_tree(tmp_path / "t", sharding=SingleDeviceSharding(jax.devices()[0]))


def deleted():
    x = jnp.ones(3)
    x.delete()
    return x


REFUSED = {
    "text": (lambda: {"a": {"b": "hello"}}, "leaf a.b is str of dtype"),
    "key": (lambda: {"k": jax.random.key(0)}, "leaf k is a random key: save jax.random.key_data"),
    "deleted": (lambda: {"p": [deleted()]}, r"leaf p.0 is deleted \(donated"),
    "bare": (lambda: jnp.ones(3), "one bare array: put it into a dict"),
    "empty": (lambda: {"a": None}, "the tree has no arrays"),
    "slash": (lambda: {"a/b": np.ones(1)}, "leaf 'a/b' can't be saved under that name"),
    "up": (lambda: {"..": np.ones(1)}, r"leaf '..' can't be saved under that name"),
    "taken": (lambda: {"tree": {"json": np.ones(1)}}, "leaf 'tree.json' can't be saved under that name"),
    "long": (lambda: {"x" * 300: np.ones(1)}, "can't be saved under that name"),
    "twice": (lambda: {"a.b": np.ones(1), "a": {"b": np.ones(1)}}, "two leaves of the tree are called 'a.b'"),
    "odd_key": (lambda: {1.5: np.ones(1)}, "a key of the tree is 1.5"),
    "unsorted": (lambda: {1: np.ones(1), "a": np.ones(1)}, "the tree isn't a pytree"),
    "wide": (lambda: {"a": np.ones(1, np.complex128)}, "leaf a has dtype complex128, which can't be saved"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_saved(tmp_path, make, message):
    with pytest.raises(CheckpointError, match=message):
        trees.save_tree(tmp_path / "t", make())
    assert not list(tmp_path.iterdir())


def test_arguments_that_cannot_be_saved(tmp_path):
    good = {"a": np.ones(1)}
    cases = ((-1, None, "step -1 must be"), (True, None, "step True must be"), (1, {"a": {1}}, "isn't JSON"), (1, math.nan, "isn't JSON"))
    for step, metadata, message in cases:
        with pytest.raises(CheckpointError, match=message):
            trees.save_tree(tmp_path / "t", good, step, metadata)
    trees.save_tree(tmp_path / "t", good)
    with pytest.raises(CheckpointError, match="t: is there already"):
        trees.save_tree(tmp_path / "t", good)
    assert trees.restore_tree(tmp_path / "t")["a"] == 1


def test_verifying_says_how_far_it_is(tmp_path):
    trees.save_tree(tmp_path / "t", {"a": np.ones((4, 6), np.float32), "b": jnp.ones(3, jnp.bfloat16), "c": 0.5}, chunk_bytes=48)
    seen = []
    info = trees.verify_tree(tmp_path / "t", lambda *of: seen.append(of))
    assert seen == [(48, 110, "a"), (96, 110, "a"), (102, 110, "b"), (110, 110, "c")] and info.nbytes == 110


def test_a_write_that_fails_says_where_and_why(tmp_path):
    """Once while chunks are written, and once when an array is opened."""
    writer = trees.TreeWriter(tmp_path / "t", {"a": np.ones((4, 6), np.float32), "b": np.ones(2)}, 0, None, "x", chunk_bytes=48)
    writer.begin()
    first, second, other = writer.pieces
    writer.write(first, np.ones((2, 6), np.float32))
    for name in ("a", "b"):
        shutil.rmtree(writer.partial / name)
        (writer.partial / name).touch()
    for piece, data in ((second, np.ones((2, 6), np.float32)), (other, np.ones(2))):
        with pytest.raises(CheckpointError, match=rf"t.partial/{piece.path}: writing failed \(.*Not a directory\)$"):
            writer.write(piece, data)


def test_processes_wait_for_each_other(tmp_path, monkeypatch):
    """Process 0, with a second process that is late, that fails, and that has done its part."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def begun(token, timeout):
        writer = trees.TreeWriter(tmp_path / "t", {"a": np.ones(3)}, 0, None, token, timeout=timeout)
        writer.begin()
        for piece in writer.pieces:
            writer.write(piece, trees.on_host(piece.source)[piece.inner])
        return writer

    def part(**data):
        (tmp_path / "t.partial" / "part.1.json").write_text(json.dumps(data))

    late = begun("one", 0.1)
    part(token="zero", crc32={})  # of an older save
    with pytest.raises(CheckpointError, match="waited 0.1 s for part.1.json of another process"):
        late.finish()
    failing = begun("two", 20)
    part(token="two", failed="the disk is full")
    with pytest.raises(CheckpointError, match="process 1 failed: the disk is full"):
        failing.finish()
    assert not (tmp_path / "t").exists()
    good = begun("three", 20)
    timer = threading.Timer(0.05, part, kwargs={"token": "three", "crc32": {}})
    timer.start()
    good.finish()
    timer.join()
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["_METADATA", "a", "tree.json"]
    trees.verify_tree(tmp_path / "t")


def test_a_chunk_that_nobody_wrote(tmp_path):
    writer = trees.TreeWriter(tmp_path / "t", {"a": np.ones(3), "b": np.ones(3)}, 0, None, "x")
    writer.begin()
    writer.write(writer.pieces[0], np.ones(3))
    with pytest.raises(CheckpointError, match="leaf b: no process wrote chunk 0"):
        writer.finish()
    assert not (tmp_path / "t").exists()
