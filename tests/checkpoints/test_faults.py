"""Disks that fill up, fail or can't be written: one clear line, nothing lost, and the next run goes on."""

import errno
import os
import re
import shutil
from pathlib import Path

import pytest

from checkpoints.convert import partial_of
from checkpoints.errors import CheckpointError
from checkpoints.journal import PROGRESS
from checkpoints.load import open_checkpoint
from checkpoints.manifest import MANIFEST, SPEC
from tests.checkpoints import faults, hf_folders
from tests.checkpoints.faults import Fault

CONVERT = "checkpoints.convert:convert"
FILLING = ("write", "open", "mkdir", "truncate")
"""Calls that a full disk refuses."""


def tree_bytes(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def server():
    with faults.Server("checkpoints.convert") as server:
        yield server


@pytest.fixture(scope="module")
def straight(server, tmp_path_factory):
    """A source, the files of its converted folder, and the calls that made them."""
    folder = tmp_path_factory.mktemp("straight")
    hf = hf_folders.tiny(folder / "hf", "olmoe", "bfloat16", num_hidden_layers=1, num_experts=2)
    run = server.run(CONVERT, [hf, folder / "out"], below=folder)
    assert run.outcome == "returned", run.output
    return hf, tree_bytes(folder / "out"), run.calls


def count(calls, *kinds: str) -> int:
    return sum(call.kind in kinds for call in calls)


def fails_and_goes_on(server, straight, folder: Path, fault: Fault, expected: str | None = None) -> str:
    """A run in which a call fails: it ends, says one line with `expected`, and loses nothing. Gives the line."""
    hf, files, _ = straight
    folder.mkdir()
    out = folder / "out"
    run = server.run(CONVERT, [hf, out], below=folder, fault=fault, timeout=20)
    where = f"{fault} {run.calls[-1:]}: {run.outcome} {run.error} {run.message}"
    assert run.fired, where
    assert (run.outcome, run.error) == ("raised", "CheckpointError"), f"{where}\n{run.output}"
    assert "\n" not in run.message and str(folder) in run.message and "driver" not in run.message, where
    assert expected is None or expected in run.message, where
    if out.exists():  # it failed after the rename
        open_checkpoint(out).verify()
    elif partial_of(out).exists():
        with pytest.raises(CheckpointError):
            open_checkpoint(partial_of(out))
    again = server.run(CONVERT, [hf, out], below=folder, timeout=20)
    assert again.outcome == "returned", f"{where}\n{again.output}"
    assert tree_bytes(out) == files, where
    assert not partial_of(out).exists(), where
    shutil.rmtree(folder)
    return run.message


@pytest.mark.parametrize("forever", [True, False], ids=["forever", "once"])
def test_full_disk(server, straight, tmp_path, forever, exhaustive):
    total = count(straight[2], *FILLING)
    many = {1, 2, 3, 4, 5, 6, *range(7, total - 16, total // 8), *range(total - 16, total + 1, 2 if forever else 3), total}
    for n in sorted(many if exhaustive else {1, 2, 5, total // 3, total * 2 // 3, *range(total - 12, total + 1, 4)}):
        fault = Fault(n, "ENOSPC", forever, FILLING)
        message = fails_and_goes_on(server, straight, tmp_path / str(n), fault, "the disk is full")
        assert "run again" in message, (n, message)


@pytest.mark.parametrize("name", [SPEC, "_METADATA", "config.json", MANIFEST])
def test_full_disk_at_a_small_file(server, straight, tmp_path, name):
    for kind in ("open", "write", "sync", "rename"):
        if kind != "sync" or name != "config.json":
            fault = Fault(1, "ENOSPC", True, (kind,), f"/{name}(.tmp)?$")
            fails_and_goes_on(server, straight, tmp_path / kind, fault, "the disk is full")


@pytest.mark.parametrize("forever", [True, False], ids=["forever", "once"])
def test_full_disk_at_the_journal(server, straight, tmp_path, forever):
    """Whose line is tried again when the file is closed."""
    for n in (1, 2, 9):
        fails_and_goes_on(server, straight, tmp_path / str(n), Fault(n, "ENOSPC", forever, ("write",), f"/{PROGRESS}$"), "the disk is full")


@pytest.mark.parametrize("forever", [True, False], ids=["forever", "once"])
@pytest.mark.parametrize("kind", ["open", "write", "rename", "sync", "mkdir"])
def test_failing_disk(server, straight, tmp_path, kind, forever, exhaustive):
    pattern = r"\.partial/(?!config)" if kind == "write" and not forever else ""  # shutil.copyfile tries twice
    total = sum(call.kind == kind and any(re.search(pattern, path) for path in call.paths) for call in straight[2])
    for n in sorted({1, 2, total // 3, total - 5, total - 2, total - 1, total} if exhaustive else {1, total // 3, total - 1, total}):
        fault = Fault(n, "EIO", forever, (kind,), pattern)
        message = fails_and_goes_on(server, straight, tmp_path / str(n), fault, "writing failed")
        assert os.strerror(errno.EIO) in message, (n, message)


@pytest.mark.parametrize(("error", "expected"), [("EROFS", "read-only"), ("EACCES", "no permission"), ("EPERM", "no permission")])
def test_folder_that_cannot_be_written(server, straight, tmp_path, error, expected):
    for i, fault in enumerate([Fault(1, error, True), Fault(1, error, True, ("open",)), Fault(1, error, True, ("mkdir",), r"/params\.")]):
        folder = tmp_path / str(i)
        message = fails_and_goes_on(server, straight, folder, fault, expected)
        assert message.startswith(str(folder / "out")), message


def test_disk_that_turns_read_only_on_the_way(server, straight, tmp_path):
    """As Linux does to one that failed."""
    total = len(straight[2])
    for n in (5, total // 2, total - 3):
        fails_and_goes_on(server, straight, tmp_path / str(n), Fault(n, "EROFS", True), "read-only")


@pytest.mark.parametrize("error", ["EDQUOT", "EFBIG"])
def test_limits_of_the_user(server, straight, tmp_path, error):
    expected = {"EDQUOT": "the disk is full", "EFBIG": os.strerror(errno.EFBIG)}[error]
    for n in (2, 30):
        fails_and_goes_on(server, straight, tmp_path / str(n), Fault(n, error, True, ("write",)), expected)


def test_rename_that_fails_leaves_the_work(server, straight, tmp_path):
    """Nothing but the last rename is left to do then."""
    hf, _, calls = straight
    out = tmp_path / "out"
    run = server.run(CONVERT, [hf, out], below=tmp_path, fault=Fault(count(calls, "rename"), "EIO", kinds=("rename",)))
    assert run.error == "CheckpointError" and not out.exists()
    before = tree_bytes(partial_of(out))
    run = server.run(CONVERT, [hf, out], below=tmp_path)
    assert run.outcome == "returned" and tree_bytes(out).items() <= before.items()
    arrays = [path for call in run.calls if call.kind == "write" for path in call.paths if "/params." in path or "/experts." in path]
    assert arrays == []
