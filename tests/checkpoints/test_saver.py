"""Saving beside the work: what comes back is what was there at `save`, whatever is donated, changed, damaged or killed meanwhile."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from checkpoints import trees
from checkpoints.errors import CheckpointError
from checkpoints.saver import AsyncSaver, latest, step_folder, steps
from checkpoints.trees import host
from tests.checkpoints.saver_process import tree_of

PROCESS = Path(__file__).with_name("saver_process.py")
plus_one = jax.jit(lambda x: x + 1, donate_argnums=0)


def array(n=1 << 14, start=0.0):
    return jnp.arange(n, dtype=jnp.float32) + start


def sharded(shape=(64, 256)):
    value = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return jax.device_put(value, NamedSharding(jax.make_mesh((2, 4), ("x", "y")), PartitionSpec("x", "y")))


class Gate:
    """Stops the saver's thread in a method of the writer until it is opened."""

    def __init__(self, monkeypatch, method):
        self.reached, self._open = threading.Event(), threading.Event()
        real = getattr(trees.TreeWriter, method)

        def gated(*args):
            self.reached.set()
            assert self._open.wait(20)
            return real(*args)

        monkeypatch.setattr(trees.TreeWriter, method, gated)

    def open(self):
        self._open.set()


def test_steps_come_and_old_ones_go(tmp_path, assert_trees_equal):
    tree = {"w": sharded(), "b": [array(5), None], "n": 3}
    with AsyncSaver(tmp_path / "deep" / "root", keep=2) as saver:
        assert latest(saver.root) is None and steps(saver.root) == []
        for step in range(4):
            assert saver.save(step, tree, {"loss": step})
            saver.wait()
            assert steps(saver.root) == list(range(max(0, step - 1), step + 1))
    folder = latest(saver.root, verify=True)
    assert folder == step_folder(saver.root, 3) and folder.name == "step_00000003"
    assert trees.read_tree(folder).metadata == {"loss": 3} and trees.read_tree(folder).step == 3
    assert_trees_equal(trees.restore_tree(folder, tree), tree)
    assert sorted(p.name for p in saver.root.iterdir()) == [".lock", "step_00000002", "step_00000003"]


def test_donated_after_asking(tmp_path, monkeypatch):
    begin, write = Gate(monkeypatch, "begin"), Gate(monkeypatch, "write")
    x = array()
    before = np.array(x)
    with AsyncSaver(tmp_path) as saver:
        saver.save(1, {"x": x, "large": array(1 << 23)})
        asking = threading.Thread(target=saver.before_donation)
        asking.start()
        asking.join(0.1)
        assert asking.is_alive()
        begin.open()
        asking.join(20)  # returns while nothing is written yet
        y = plus_one(x)
        assert x.is_deleted()  # so nothing held on to it
        write.open()
    np.testing.assert_array_equal(trees.restore_tree(latest(tmp_path, True))["x"], before)
    np.testing.assert_array_equal(y, before + 1)


def test_donated_in_the_middle_of_writing(tmp_path, monkeypatch):
    gate = Gate(monkeypatch, "write")
    x, y = array(), array(start=5)
    before = np.array(y)
    with AsyncSaver(tmp_path) as saver:
        saver.save(1, {"x": x, "y": y})
        assert gate.reached.wait(20)  # x is being written, from where it is
        asking = threading.Thread(target=saver.before_donation)
        asking.start()
        gate.open()
        asking.join(20)
        plus_one(x), plus_one(y)
        assert x.is_deleted() and y.is_deleted()
    np.testing.assert_array_equal(trees.restore_tree(latest(tmp_path, True))["y"], before)


def test_nothing_is_held_after_a_save(tmp_path):
    x = array()
    with AsyncSaver(tmp_path) as saver:
        saver.save(1, {"x": x})
        saver.wait()
        plus_one(x)
        assert x.is_deleted()


def test_donated_right_after_a_copy(tmp_path, monkeypatch):
    gate = Gate(monkeypatch, "begin")
    x = sharded()
    before = np.array(jnp.copy(x))
    with AsyncSaver(tmp_path) as saver:
        saver.save(1, {"x": x}, copy=True)
        plus_one(x).block_until_ready()
        assert x.is_deleted()
        gate.open()
    np.testing.assert_array_equal(trees.restore_tree(latest(tmp_path, True))["x"], before)


def test_before_donation_waits_while_the_bound_holds_copies_back(tmp_path, monkeypatch):
    gate = Gate(monkeypatch, "write")
    with AsyncSaver(tmp_path, host_bytes=1 << 16) as saver:
        saver.save(1, {"x": array(1 << 16)})  # four times the bound
        saver._pending.copies.hurry.set()
        assert gate.reached.wait(20)
        waiting = threading.Thread(target=saver.before_donation)
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        gate.open()
        waiting.join(20)
        assert not waiting.is_alive()


def test_donated_without_asking(tmp_path, monkeypatch):
    gate = Gate(monkeypatch, "begin")
    with AsyncSaver(tmp_path) as saver:
        x = array()
        saver.save(1, {"p": {"x": x}})
        plus_one(x)
        gate.open()
        with pytest.raises(CheckpointError, match="leaf p.x was donated while it was being saved: call before_donation"):
            saver.wait()
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock"]
        with pytest.raises(CheckpointError, match="leaf x is deleted"):
            saver.save(1, {"x": x})
        assert saver.save(1, {"x": array()})
    assert steps(tmp_path) == [1]


def test_numpy_arrays_may_change(tmp_path, monkeypatch):
    gate = Gate(monkeypatch, "begin")
    x = np.arange(10)
    with AsyncSaver(tmp_path) as saver:
        saver.save(1, {"x": x})
        x[:] = 0
        gate.open()
    np.testing.assert_array_equal(trees.restore_tree(latest(tmp_path))["x"], np.arange(10))


def test_one_at_a_time(tmp_path, monkeypatch):
    gate = Gate(monkeypatch, "begin")
    with AsyncSaver(tmp_path) as saver:
        assert saver.save(1, {"x": array()}, skip_if_busy=True)
        assert not saver.save(2, {"x": array()}, skip_if_busy=True)
        waiting = threading.Thread(target=saver.save, args=(3, {"x": array()}))
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        gate.open()
        waiting.join(20)
    assert steps(tmp_path) == [1, 3]


def test_errors_are_raised_once_and_leave_it_usable(tmp_path, monkeypatch):
    real = trees.TreeWriter.write
    with AsyncSaver(tmp_path) as saver:
        saver.save(1, {"x": array()})
        saver.wait()
        monkeypatch.setattr(trees.TreeWriter, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        saver.save(2, {"x": array()})
        with pytest.raises(CheckpointError, match="step_00000002: saving failed: .*No space left"):
            saver.save(3, {"x": array()})
        saver.before_donation()
        saver.save(4, {"x": array()})
        with pytest.raises(CheckpointError, match="step_00000004: saving failed"):
            saver.wait()
        saver.wait()
        assert steps(tmp_path) == [1] and sorted(p.name for p in tmp_path.iterdir()) == [".lock", "step_00000001"]
        monkeypatch.setattr(trees.TreeWriter, "write", real)
        saver.save(5, {"x": array()})
    assert steps(tmp_path) == [1, 5]


@pytest.mark.parametrize("on_accelerator", [False, True])
def test_the_host_holds_no_more_than_it_may(tmp_path, monkeypatch, assert_trees_equal, on_accelerator):
    """Also the way of accelerators: shards that fit come whole, others in slices that are cut on the device."""
    if on_accelerator:
        monkeypatch.setattr(host, "is_on_host", lambda source: isinstance(source, np.ndarray))
    small = [array(100, i) for i in range(9)]
    tree = {"large": array(1 << 18), "shards": sharded((256, 512)), "small": small, "host": np.arange(4), "none": array(0)}
    with AsyncSaver(tmp_path, host_bytes=1 << 18) as saver:
        saver.save(1, tree)
        saver.before_donation()
        saver.wait()
        assert 1 << 16 < saver.peak_bytes <= saver._host_bytes < 1 << 18
    assert max(np.prod(leaf.chunk) * 4 for leaf in trees.read_tree(latest(tmp_path)).leaves.values()) <= 1 << 15
    assert_trees_equal(trees.restore_tree(latest(tmp_path, True), tree), tree)


def damage(folder, how):
    chunk = next(p for p in sorted((folder / "x").iterdir()) if p.name != "zarr.json")
    if how == "missing":
        chunk.unlink()
    elif how == "short":
        chunk.write_bytes(chunk.read_bytes()[:-1])
    elif how == "json":
        (folder / trees.TREE).write_text("{")
    elif how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    else:
        data = bytearray(chunk.read_bytes())
        data[0] ^= 255
        chunk.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "short", "json", "empty"])
def test_damaged_steps_are_passed_over_and_never_counted(tmp_path, how):
    with AsyncSaver(tmp_path, keep=1) as saver:
        saver.save(1, {"x": array(start=1)})
    shutil.copytree(step_folder(tmp_path, 1), step_folder(tmp_path, 2))  # a folder that says that it is another step
    with AsyncSaver(tmp_path, keep=2) as saver:
        saver.save(3, {"x": array(start=3)})
    damage(step_folder(tmp_path, 3), how)
    assert latest(tmp_path) == step_folder(tmp_path, 1) and steps(tmp_path) == [1]
    with AsyncSaver(tmp_path, keep=2) as saver:
        saver.save(3, {"x": array(start=4)})  # in place of the damaged one
    assert steps(tmp_path) == [1, 3]  # of `keep` whole ones none is lost
    assert trees.restore_tree(latest(tmp_path, verify=True))["x"][0] == 4
    with AsyncSaver(tmp_path, keep=1) as saver:
        saver.save(5, {"x": array(start=5)})
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "step_00000005"]


def test_altered_bytes_are_found_where_asked(tmp_path):
    with AsyncSaver(tmp_path) as saver:
        saver.save(1, {"x": array()})
        saver.save(2, {"x": array()})
    damage(step_folder(tmp_path, 2), "altered")
    assert latest(tmp_path) == step_folder(tmp_path, 2) and latest(tmp_path, verify=True) == step_folder(tmp_path, 1)


def test_what_a_killed_run_left_goes_at_the_next_start(tmp_path):
    (tmp_path / "step_00000007.partial" / "x").mkdir(parents=True)
    (tmp_path / "other.partial").mkdir()
    with AsyncSaver(tmp_path) as saver:
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "other.partial"]
        with pytest.raises(CheckpointError, match="another saver is at work there"):
            AsyncSaver(tmp_path)
        saver.save(7, {"x": array()})
    assert steps(tmp_path) == [7]
    AsyncSaver(tmp_path).close()


def test_wrong_use_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="keep = 0"):
        AsyncSaver(tmp_path, keep=0)
    with pytest.raises(CheckpointError, match="host_bytes = 10 is too little"):
        AsyncSaver(tmp_path, host_bytes=10)
    with AsyncSaver(tmp_path) as saver:
        saver.save(5, {"x": array()})
        with pytest.raises(CheckpointError, match="step 5 isn't after step 5, which is saved there"):
            saver.save(5, {"x": array()})
        with pytest.raises(CheckpointError, match="isn't JSON"):
            saver.save(6, {"x": array()}, metadata=object())
    with pytest.raises(CheckpointError, match="the saver is closed"):
        saver.save(7, {"x": array()})
    assert steps(tmp_path) == [5]


def test_an_error_beside_it_is_not_hidden(tmp_path, monkeypatch):
    with pytest.raises(KeyError) as caught, AsyncSaver(tmp_path) as saver:
        monkeypatch.setattr(trees.TreeWriter, "finish", lambda _: (_ for _ in ()).throw(CheckpointError("no room")))
        saver.save(1, {"x": array()})
        raise KeyError("mine")
    assert caught.value.__notes__ == ["saving had failed as well: no room"]


def environment():
    return {**os.environ, "PYTHONPATH": str(PROCESS.parents[2]), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


@pytest.mark.slow
def test_killed_at_any_moment_the_last_one_loads(tmp_path, assert_trees_equal):
    """Twenty times; the run goes on from what it finds."""
    command = [sys.executable, str(PROCESS), "kills", str(tmp_path), "20"]
    kills, saved, cut_short = 0, 0, 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdin is not None and process.stdout is not None
        for line in process.stdout:
            kills, known = kills + 1, int(line.split()[1])
            cut_short += bool(list(tmp_path.glob("*.partial")))
            folder = latest(tmp_path, verify=True)
            step = -1 if folder is None else trees.read_tree(folder).step
            assert step >= known and step >= saved - 1 and latest(tmp_path) == folder
            if folder is not None:
                assert_trees_equal(trees.restore_tree(folder), tree_of(step))
            saved = step + 1
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0 and kills == 20
    assert saved >= 10 and cut_short >= 1  # some were killed in the middle of a save


def test_interrupted_process_finishes_its_save_and_its_memory_was_bounded(tmp_path):
    done = subprocess.run([sys.executable, str(PROCESS), "exit", str(tmp_path)], capture_output=True, text=True, env=environment(), timeout=120)
    grown, peak = map(int, done.stdout.split())
    assert done.returncode != 0 and done.stderr.rstrip().endswith("KeyboardInterrupt")
    assert steps(tmp_path) == [1, 2] and not list(tmp_path.glob("*.partial"))
    assert trees.restore_tree(latest(tmp_path, verify=True))["leaf_3"][-1] == 3
    assert peak <= 16 << 20
    assert grown <= 48 << 20, f"a save of 128 MB took {grown >> 20} MB more memory, 16 MB were allowed"
