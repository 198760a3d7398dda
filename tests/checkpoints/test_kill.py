"""A conversion that is killed at any system call leaves a folder that the next run finishes, with the same bytes."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from checkpoints.convert import partial_of
from checkpoints.errors import CheckpointError
from checkpoints.journal import PROGRESS
from checkpoints.load import open_checkpoint
from checkpoints.manifest import MANIFEST, SPEC, read_manifest
from tests.checkpoints import faults, hf_folders
from tests.checkpoints.faults import Fault
from tests.more import mostly

CONVERT = "checkpoints.convert:convert"
RANGES = 6  # of which two are always tried
SPREAD = 14  # points between the first and the last calls


def write_one(folder: str) -> str:
    """What the harness is tried on: every call is known."""
    path = Path(folder) / "sub" / "file"
    path.parent.mkdir()
    print("this is no file of the folder")
    with open(path.with_name("file.tmp"), "wb", buffering=0) as file:
        file.write(b"0123456789")
        os.fsync(file.fileno())
    os.replace(path.with_name("file.tmp"), path)
    os.pipe()
    path.read_bytes()
    return str(path)


def write_in_others(folder: str) -> None:
    thread = threading.Thread(target=os.mkdir, args=(f"{folder}/thread",))
    thread.start()
    thread.join()
    subprocess.run([sys.executable, "-S", "-c", f"import os; os.mkdir({folder!r} + '/process')"], check=True)


def tree_bytes(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@dataclasses.dataclass(frozen=True)
class Straight:
    """A source, and what a conversion of it that nothing disturbs makes, by which calls."""

    hf: Path
    source: dict[str, bytes]
    files: dict[str, bytes]
    calls: tuple[faults.Call, ...]


@pytest.fixture(scope="module")
def server():
    with faults.Server("checkpoints.convert", "tests.checkpoints.test_kill") as server:
        yield server


@pytest.fixture(scope="module")
def straight(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    hf = hf_folders.tiny(folder / "hf", "qwen3_moe", "bfloat16", shards=2, num_hidden_layers=2, num_experts=2)
    source = tree_bytes(hf)
    run = server.run(CONVERT, [hf, folder / "out"], below=folder)
    assert run.outcome == "returned", run.output
    return Straight(hf, source, tree_bytes(folder / "out"), run.calls)


def points_of(straight: Straight) -> list[int]:
    """Where to kill: the first calls, the whole commit but most of its many syncs, and points in between."""
    calls = straight.calls
    total = len(calls)
    commit = next(i for i, call in enumerate(calls, 1) if f"/{SPEC}" in call.paths[0])
    small = [i for i in range(commit, total + 1) if calls[i - 1].kind != "sync"]
    spread = [9 + (commit - 9) * i // SPREAD for i in range(SPREAD)]
    return sorted({*range(1, 9), *spread, *small, *range(total - 23, total + 1)})


def unsynced(calls) -> set[str]:
    """Files whose content, and folders whose names, have changed since they were synced last; by their names at the end."""
    dirty: set[str] = set()
    for call in calls:
        if call.kind == "sync":
            dirty -= set(call.paths)
            continue
        if call.kind == "rename":
            dirty = {call.paths[1] if path == call.paths[0] else path for path in dirty}
        if call.kind == "unlink":
            dirty -= set(call.paths)
        if call.kind in ("write", "truncate", "open"):
            dirty |= set(call.paths)
        if call.kind in ("open", "rename", "unlink", "mkdir"):
            dirty |= {os.path.dirname(path) for path in call.paths}
    return dirty


def check_killed(folder: Path, where: str) -> None:
    """What must hold at any moment: there is no output, or a whole one."""
    out = folder / "out"
    if out.exists():
        open_checkpoint(out).verify()
    with pytest.raises(CheckpointError):
        open_checkpoint(partial_of(out))
        pytest.fail(f"{where}: an unfinished folder was opened")


def check_finished(folder: Path, straight: Straight, where: str) -> None:
    out = folder / "out"
    files = tree_bytes(out)
    assert files.keys() == straight.files.keys(), where
    assert [name for name in files if files[name] != straight.files[name]] == [], where
    assert not partial_of(out).exists(), where
    assert tree_bytes(straight.hf) == straight.source, f"{where}: the source was changed"


def kill_and_go_on(server, straight: Straight, folder: Path, kills: list[Fault]) -> faults.Run:
    """Kills a run at each of the points, one run after the other, and lets the next one finish."""
    folder.mkdir()
    where = ""
    for kill in kills:
        run = server.run(CONVERT, [straight.hf, folder / "out"], below=folder, fault=kill)
        where += f"{kill.how} at call {kill.at} {run.calls[-1:]}; "
        assert run.outcome == "killed", f"{where}{run.outcome} {run.message}"
        check_killed(folder, where)
    run = server.run(CONVERT, [straight.hf, folder / "out"], below=folder)
    assert run.outcome == "returned", f"{where}{run.output}"
    check_finished(folder, straight, where)
    shutil.rmtree(folder)
    return run


# --- the harness ------------------------------------------------------------------------------------------------------


def test_every_call_of_a_known_function_is_seen(server, tmp_path):
    run = server.run("tests.checkpoints.test_kill:write_one", [tmp_path], below=tmp_path)
    sub = str(tmp_path / "sub")
    temporary, path = f"{sub}/file.tmp", f"{sub}/file"
    expected = [("mkdir", (sub,)), ("open", (temporary,)), ("write", (temporary,)), ("sync", (temporary,)), ("rename", (temporary, path))]
    assert [(call.kind, call.paths) for call in run.calls] == expected
    assert (run.outcome, run.value, run.fired) == ("returned", path, 0)
    assert "no file of the folder" in run.output and Path(path).read_bytes() == b"0123456789"


@pytest.mark.parametrize(
    ("fault", "left"),
    [
        (Fault(1), None),
        (Fault(2), {}),
        (Fault(3), {"file.tmp": b""}),
        (Fault(3, "kill torn"), {"file.tmp": b"01234"}),
        (Fault(3, "kill after"), {"file.tmp": b"0123456789"}),
        (Fault(5), {"file.tmp": b"0123456789"}),
        (Fault(1, kinds=("rename",)), {"file.tmp": b"0123456789"}),
        (Fault(1, "kill after", pattern="/file$"), {"file": b"0123456789"}),
    ],
    ids=str,
)
def test_a_kill_leaves_what_was_done_until_then(server, tmp_path, fault, left):
    run = server.run("tests.checkpoints.test_kill:write_one", [tmp_path], below=tmp_path, fault=fault)
    assert (run.outcome, run.fired) == ("killed", 1)
    sub = tmp_path / "sub"
    assert (tree_bytes(sub) if sub.exists() else None) == left


def test_a_call_that_fails_is_not_made(server, tmp_path):
    run = server.run("tests.checkpoints.test_kill:write_one", [tmp_path], below=tmp_path, fault=Fault(2, "EACCES"))
    assert (run.outcome, run.error, run.fired) == ("raised", "PermissionError", 1)
    assert [call.kind for call in run.calls] == ["mkdir", "open"] and tree_bytes(tmp_path) == {}


def test_threads_and_child_processes_count_and_a_hang_ends(server, tmp_path):
    run = server.run("tests.checkpoints.test_kill:write_in_others", [tmp_path], below=tmp_path)
    assert run.outcome == "returned", run.output
    assert [(call.kind, os.path.basename(call.paths[0])) for call in run.calls] == [("mkdir", "thread"), ("mkdir", "process")]
    run = server.run("time:sleep", [100], below=tmp_path, timeout=0.2)
    assert run.outcome == "hung" and run.seconds < 20


def test_every_file_of_a_conversion_is_seen(straight):
    """Nothing is written in a way that the harness doesn't notice (through mmap, for one)."""
    named = {os.path.relpath(call.paths[1], call.paths[0].split("/out")[0]) for call in straight.calls if call.kind == "rename"}
    assert {f"out.partial/{name}" for name in straight.files} <= named
    written = [call for call in straight.calls if call.kind == "write"]
    assert len(written) >= len(straight.files) > 80


# --- conversions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", mostly(range(RANGES), range(0, RANGES, 3)))
def test_killed_at_any_call_it_goes_on_to_the_same_bytes(server, straight, tmp_path, part):
    points = points_of(straight)
    assert len(points) >= 48 and points[0] == 1 and points[-1] == len(straight.calls)
    for n in points[part::RANGES]:
        kill_and_go_on(server, straight, tmp_path / str(n), [Fault(n)])


@pytest.mark.parametrize("how", ["kill torn", "kill after"])
def test_killed_in_the_middle_of_a_write_or_right_after_a_rename(server, straight, tmp_path, how, exhaustive):
    kinds = ("write",) if how == "kill torn" else ("rename", "mkdir", "unlink")
    count = sum(call.kind in kinds for call in straight.calls)
    many = {1, 2, *range(3, count - 8, count // 6), *range(count - 5, count + 1)}
    for n in sorted(many if exhaustive else {1, 2, count // 2, *range(count - 3, count + 1)}):
        kill_and_go_on(server, straight, tmp_path / str(n), [Fault(n, how, kinds=kinds)])


def test_killed_again_while_it_goes_on(server, straight, tmp_path, exhaustive):
    total = len(straight.calls)
    for first in (1, 3, 6, total // 3, total // 2, total - 60) if exhaustive else (3, total // 2, total - 60):
        for again in (2, 20):
            kill_and_go_on(server, straight, tmp_path / f"{first}-{again}", [Fault(first), Fault(again), Fault(1)])


def test_what_was_done_is_not_done_again(server, straight, tmp_path):
    chunk = re.compile(r"/(params|experts)\.[^/]*/[\d.]+$")
    count = sum(bool(chunk.search(call.paths[-1])) for call in straight.calls if call.kind == "rename")
    for n in (count // 2, count - 5):
        fault = Fault(n, kinds=("rename",), pattern=chunk.pattern)
        run = kill_and_go_on(server, straight, tmp_path / str(n), [fault])
        again = sum(bool(chunk.search(call.paths[-1])) for call in run.calls if call.kind == "rename")
        assert count - n < again <= count - n + 8, n  # the unit that was under way, which is 8 chunks at most


@pytest.mark.parametrize("left", ["zeros", "nothing"])
def test_power_cut(server, straight, tmp_path, left):
    """What was written and not synced may be there by name only afterwards; the journal may say that it is done."""
    total = len(straight.calls)
    for n in (5, total // 4, total // 2, total * 3 // 4, total - 2):
        folder = tmp_path / str(n)
        folder.mkdir()
        run = server.run(CONVERT, [straight.hf, folder / "out"], below=folder, fault=Fault(n))
        assert run.outcome == "killed", n
        lost = set(filter(os.path.isfile, unsynced(run.calls))) - {str(partial_of(folder / "out") / PROGRESS)}
        for path in map(Path, lost):
            path.write_bytes(bytes(path.stat().st_size if left == "zeros" else 0))
        run = server.run(CONVERT, [straight.hf, folder / "out"], below=folder)
        assert run.outcome == "returned", f"{n}: {run.output}"
        check_finished(folder, straight, f"power cut at call {n}, {len(lost)} files lost")


def test_power_cut_that_takes_the_journal_too(server, straight, tmp_path):
    """Its first line is synced, so that an unfinished folder is always known for what it is."""
    out = tmp_path / "out"
    run = server.run(CONVERT, [straight.hf, out], below=tmp_path, fault=Fault(len(straight.calls) // 2))
    journal = partial_of(out) / PROGRESS
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) > 10
    first_chunk = next(i for i, call in enumerate(run.calls) if "/params." in call.paths[0])
    assert ("sync", (str(journal),)) in [(call.kind, call.paths) for call in run.calls[:first_chunk]]
    journal.write_bytes(lines[0] + bytes(sum(map(len, lines[1:]))))
    run = server.run(CONVERT, [straight.hf, out], below=tmp_path)
    assert run.outcome == "returned", run.output
    check_finished(tmp_path, straight, "the journal was lost")


def test_nothing_is_renamed_before_it_is_on_the_disk(straight):
    """Each file and folder is synced after it was last changed and before the folder gets its name; that name is synced after."""
    last = max(i for i, call in enumerate(straight.calls) if call.kind == "rename")
    partial, out = straight.calls[last].paths
    assert (partial, out) == (f"{out}.partial", str(straight.hf.with_name("out")))
    assert unsynced(straight.calls[:last]) - {os.path.dirname(partial)} <= {f"{partial}/{PROGRESS}"}
    assert ("sync", (os.path.dirname(out),)) in [(call.kind, call.paths) for call in straight.calls[last:]]


def test_the_manifest_comes_last(straight):
    """A folder with a manifest has everything else."""
    made = [call.paths[-1] for call in straight.calls if call.kind == "rename"]
    assert made[-2].endswith(f".partial/{MANIFEST}")


def test_checksums_are_those_of_the_straight_folder(server, straight, tmp_path):
    kill_point = len(straight.calls) // 2
    server.run(CONVERT, [straight.hf, tmp_path / "out"], below=tmp_path, fault=Fault(kill_point))
    server.run(CONVERT, [straight.hf, tmp_path / "out"], below=tmp_path)
    assert read_manifest(tmp_path / "out") == read_manifest(straight.hf.with_name("out"))
