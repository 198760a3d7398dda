"""A second copy with the neighbour: what one, or several that aren't neighbours, lose comes back bit for bit; otherwise it is said what is lost."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from checkpoints import trees
from checkpoints.errors import CheckpointError
from checkpoints.manifest import content_sha256
from checkpoints.neighbour import NeighbourCopy
from checkpoints.saver import latest
from tests.checkpoints.neighbour_process import values_of

PROCESS = Path(__file__).with_name("neighbour_process.py")
GROUPS = 4


def tree_of(seed):
    rng = np.random.default_rng(seed)
    mesh = jax.make_mesh((GROUPS, 2), ("x", "y"))

    def put(value, *axes):
        return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*axes)))

    return {
        "w": put(rng.normal(size=(32, 64)).astype(np.float32), "x", "y"),
        "half": put(jnp.asarray(rng.normal(size=(8, 24)), jnp.bfloat16), ("x", "y")),
        "norm": put(rng.normal(size=7).astype(np.float32)),
        "one": jax.device_put(rng.normal(size=(3, 5)).astype(np.float32), jax.devices()[5]),
        "host": [rng.integers(0, 9, 11), 2.5, None],
    }


@pytest.fixture
def neighbour(tmp_path):
    devices = jax.devices()
    return NeighbourCopy(tmp_path / "memory", [devices[2 * i : 2 * i + 2] for i in range(GROUPS)], block_bytes=1000)


def lose(neighbour, *groups):
    for group in groups:
        shutil.rmtree(neighbour.folder / f"group_{group}")


def generations(neighbour, group):
    return sorted(int(p.name[4:12]) for p in (neighbour.folder / f"group_{group}").iterdir())


@pytest.mark.parametrize("lost", [(), (0,), (1,), (3,), (0, 2), (1, 3)])
def test_what_is_lost_comes_back(neighbour, assert_trees_equal, lost):
    tree = tree_of(1)
    neighbour.keep(5, tree)
    lose(neighbour, *lost)
    for _ in range(2):  # the second time after others were lost: both copies were there again
        generation, got = neighbour.restore(tree)
        assert generation == 5
        assert_trees_equal(got, tree)
        assert got["w"].sharding == tree["w"].sharding and got["one"].sharding == tree["one"].sharding and type(got["host"][1]) is float
        lose(neighbour, *((group + 1) % GROUPS for group in lost))


def test_two_neighbours_lost(neighbour):
    tree = tree_of(1)
    neighbour.keep(5, tree)
    lose(neighbour, 1, 2)
    lost = r"process 1 and its neighbour 2 have both lost half\[2:3, 0:24\], .* and \d+ more"
    message = f"generation 5 can't be restored from memory: {lost}: load from disk$"
    with pytest.raises(CheckpointError, match=message):
        neighbour.restore(tree)
    lose(neighbour, 0, 3)
    with pytest.raises(CheckpointError, match="no generation of this tree, in this sharding, is in memory: load from disk"):
        neighbour.restore(tree)


def test_one_generation_stays(neighbour, assert_trees_equal):
    for generation in (3, 4, 8):
        neighbour.keep(generation, tree_of(generation))
    assert [generations(neighbour, group) for group in range(GROUPS)] == [[8]] * GROUPS
    assert_trees_equal(neighbour.restore(tree_of(8))[1], tree_of(8))
    neighbour.keep(5, tree_of(5))  # from an older state on
    generation, got = neighbour.restore(tree_of(5))
    assert generation == 5
    assert_trees_equal(got, tree_of(5))
    neighbour.clear()
    assert not list(neighbour.folder.iterdir())


def stash(neighbour, where):
    shutil.copytree(neighbour.folder, where)


def put_back(neighbour, where, group):
    shutil.copytree(where / f"group_{group}", neighbour.folder / f"group_{group}", dirs_exist_ok=True)


def test_stale_memory_is_not_mixed_in(neighbour, tmp_path, assert_trees_equal):
    """Group 1 comes back with what it had a generation ago; the others have both."""
    neighbour.keep(3, tree_of(3))
    stash(neighbour, tmp_path / "old")
    neighbour.keep(4, tree_of(4))
    lose(neighbour, 1)
    put_back(neighbour, tmp_path / "old", 1)
    generation, got = neighbour.restore(tree_of(4))
    assert generation == 4
    assert_trees_equal(got, tree_of(4))
    lose(neighbour, 1, 2)
    put_back(neighbour, tmp_path / "old", 1)
    put_back(neighbour, tmp_path / "old", 2)
    with pytest.raises(CheckpointError, match="generation 4 can't be restored from memory: process 1 and its neighbour 2 have both lost"):
        neighbour.restore(tree_of(4))


def test_killed_between_two_generations(neighbour, tmp_path, assert_trees_equal):
    """Some have the new one, all have the old one: the old one it is."""
    neighbour.keep(3, tree_of(3))
    stash(neighbour, tmp_path / "old")
    neighbour.keep(4, tree_of(4))
    for group in range(GROUPS):
        put_back(neighbour, tmp_path / "old", group)
    for group in (0, 1):
        shutil.rmtree(next((neighbour.folder / f"group_{group}").glob("gen_00000004-*")))
    generation, got = neighbour.restore(tree_of(3))
    assert generation == 3
    assert_trees_equal(got, tree_of(3))
    with pytest.raises(CheckpointError, match="generation 3 in memory is older than 4: load from disk"):
        neighbour.restore(tree_of(3), minimum=4)


def test_the_same_number_of_another_keep_is_another_generation(neighbour, tmp_path):
    neighbour.keep(3, tree_of(30))
    stash(neighbour, tmp_path / "old")
    neighbour.keep(3, tree_of(31))
    lose(neighbour, 1, 2)
    put_back(neighbour, tmp_path / "old", 1)
    put_back(neighbour, tmp_path / "old", 2)
    with pytest.raises(CheckpointError, match="generation 3 can't be restored"):
        neighbour.restore(tree_of(31))


def edit(path, **changes):
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({**data, "sha256": content_sha256(data)}))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [lambda f: flip(f / "own.bin"), lambda f: (f / "own.bin").write_bytes((f / "own.bin").read_bytes()[:-1]), lambda f: (f / "own.json").unlink(),
     lambda f: (f / "own.json").write_text("{}"), lambda f: (f / "own.json").write_text("[1]"), lambda f: edit(f / "own.json", generation=4),
     lambda f: edit(f / "own.json", group=2), lambda f: edit(f / "own.json", version=2)],
)  # fmt: skip
def test_damaged_memory_counts_as_lost(neighbour, assert_trees_equal, damage):
    tree = tree_of(1)
    neighbour.keep(5, tree)
    damage(next((neighbour.folder / "group_1").iterdir()))
    assert_trees_equal(neighbour.restore(tree)[1], tree)
    damage(next((neighbour.folder / "group_1").iterdir()))
    lose(neighbour, 2)
    with pytest.raises(CheckpointError, match="process 1 and its neighbour 2"):
        neighbour.restore(tree)


def test_another_tree_or_sharding_is_refused(neighbour):
    tree = tree_of(1)
    neighbour.keep(5, tree)
    other = jax.device_put(tree["w"], NamedSharding(tree["w"].sharding.mesh, PartitionSpec("y", "x")))
    for like in ({**tree, "w": other}, {**tree, "w": tree["w"].astype(jnp.int32)}, {"w": tree["w"]}):
        with pytest.raises(CheckpointError, match="no generation of this tree, in this sharding"):
            neighbour.restore(like)
    with pytest.raises(CheckpointError, match="leaf w has no sharding"):
        neighbour.restore({"w": jax.ShapeDtypeStruct((32, 64), np.float32)})


def test_no_room_is_said_before_anything_moves(neighbour, monkeypatch):
    tree = tree_of(1)
    neighbour.keep(5, tree)
    monkeypatch.setattr("checkpoints.commit.free_bytes", lambda _: 100)
    with pytest.raises(CheckpointError, match=r"\d+ bytes are needed and 100 are free: name another folder"):
        neighbour.keep(6, tree)
    monkeypatch.undo()
    assert neighbour.restore(tree)[0] == 5


def test_wrong_use_is_named(tmp_path, neighbour):
    with pytest.raises(CheckpointError, match="needs two processes, or two groups"):
        NeighbourCopy(tmp_path)
    with pytest.raises(CheckpointError, match="generation -1 must be"):
        neighbour.keep(-1, tree_of(1))
    small = NeighbourCopy(tmp_path / "small", [jax.devices()[:1], jax.devices()[1:2]])
    with pytest.raises(CheckpointError, match="leaf half is on .*, which is in no group"):
        small.keep(1, tree_of(1))


def start(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(PROCESS.parents[2])}
    return subprocess.Popen([sys.executable, str(PROCESS), *map(str, arguments)], stdout=subprocess.PIPE, text=True, env=environment)


def said(process):
    """Its first line, but for what its collectives say."""
    return next((line.strip() for line in process.stdout if not line.startswith("[Gloo]")), "nothing")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def memory_folders():
    """In memory, as it is meant, where that is there."""
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(os.environ.get("TMPDIR", "/tmp"))
    return [base / f"jaxmoe-test-{os.getpid()}-{process}" for process in range(2)]


@pytest.mark.slow
def test_two_processes_are_killed_and_one_machine_is_lost(tmp_path):
    """Both go on from memory, without the disk; what they saved to disk together is whole, too."""
    memory, running = memory_folders(), []
    try:
        port = free_port()
        running = [start("keep", process, port, memory[process], tmp_path / "disk") for process in range(2)]
        for process in running:  # in turn: when one has failed, the other waits for it
            assert said(process) == "kept"
        for process in running:
            process.kill()
            process.communicate()
        found = trees.restore_tree(latest(tmp_path / "disk", verify=True))
        for name, value in values_of(7).items():
            np.testing.assert_array_equal(found[name], value)
        assert trees.read_tree(latest(tmp_path / "disk")).leaves["sharded"].chunk == (4, 96)
        shutil.rmtree(tmp_path / "disk")
        shutil.rmtree(memory[1])
        port = free_port()
        running = [start("restore", process, port, memory[process]) for process in range(2)]
        for process in running:
            assert said(process) == "restored 7"
        assert [process.wait(60) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
        for folder in memory:
            shutil.rmtree(folder, ignore_errors=True)
