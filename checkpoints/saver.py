"""Saving beside the work: `AsyncSaver.save` returns at once, and a thread copies the arrays off their devices and writes them.

jax arrays can't be changed, so a snapshot is a reference; donation is what changes them, and `before_donation` and `copy=True` are the two ways to
live with it. A step's folder has its name only when it is whole, and older ones go only after that. This file knows nothing of what is in a tree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, Protocol

import jax

from checkpoints import commit, trees
from checkpoints.errors import CheckpointError
from checkpoints.trees import TreeWriter
from checkpoints.trees.host import HostCopies, snapshot

HOST_BYTES = 256 << 20
_LOCK = ".lock"
_STEP = re.compile(r"step_(\d{8,})")
_CPU_SHARE = 0.05
_NICE = 10


def step_folder(root: str | os.PathLike, step: int) -> Path:
    """Where a step is saved."""
    return Path(root) / f"step_{step:08d}"


def _all_steps(root: Path) -> list[int]:
    """Steps that have a folder, good or not, oldest first."""
    names = os.listdir(root) if root.is_dir() else []
    found = [int(match[1]) for match in map(_STEP.fullmatch, names) if match]
    return sorted(step for step in found if step_folder(root, step).is_dir())


def _is_good(root: Path, step: int) -> bool:
    folder = step_folder(root, step)
    return trees.is_complete(folder) and trees.read_tree(folder).step == step


def steps(root: str | os.PathLike) -> list[int]:
    """The steps that are saved whole, oldest first: their files are there and of full length; what is in them isn't read."""
    return [step for step in _all_steps(Path(root)) if _is_good(Path(root), step)]


def latest(root: str | os.PathLike, verify: bool = False) -> Path | None:
    """The folder of the newest step that is saved whole, or None.

    Args:
        root: what `AsyncSaver` was given.
        verify: reads it as well, and passes it over where a checksum is wrong.
    """
    for step in reversed(steps(root)):
        folder = step_folder(root, step)
        try:
            if verify:
                trees.verify_tree(folder)
            return folder
        except CheckpointError:
            continue
    return None


class Companion(Protocol):
    """What is told of each save, in the calling thread, before it begins: `neighbour.NeighbourCopy` is one."""

    def keep(self, generation: int, tree: Any) -> None: ...


@dataclasses.dataclass
class _Pending:
    """A save that is under way."""

    step: int
    copies: HostCopies
    thread: threading.Thread | None = None
    error: BaseException | None = None
    awaited: threading.Event = dataclasses.field(default_factory=threading.Event)  # somebody stands still until it is done

    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


class AsyncSaver:
    """Saves trees into `root/step_00000042` beside the work. Every process of a program makes one, and calls it alike.

    An error of the thread that writes is raised by the next `save`, `wait` or `close`, once; the saver can be used further. The interpreter's exit
    waits for a save that is under way.

    Args:
        root: is made; unfinished folders of a run that was killed are removed.
        keep: how many whole steps stay.
        host_bytes: most bytes of device arrays that are held on the host at a time, with what their encoding takes; the same in all processes. Numpy
            leaves come on top of it: they are copied in `save`.
        timeout: seconds that processes wait for each other.
        companion: is also given each tree.
        share: of the time that the writing thread may work while nobody waits for it; None: a twentieth where arrays lie on CPUs, which the steps
            need themselves, and all of it elsewhere.

    Raises:
        CheckpointError: another saver works in `root`, or it can't be written, or a number is out of range.
    """

    def __init__(
        self, root: str | os.PathLike, keep: int = 2, host_bytes: int = HOST_BYTES, timeout: float = 600.0, companion: Companion | None = None,
        share: float | None = None,
    ):  # fmt: skip
        if keep < 1:
            raise CheckpointError(f"keep = {keep} would keep nothing: 1 is the least")
        if host_bytes < 1 << 16:
            raise CheckpointError(f"host_bytes = {host_bytes} is too little: {1 << 16} is the least")
        if share is not None and not 0 < share <= 1:
            raise CheckpointError(f"share = {share} is no share of the time: more than 0, and 1 at most")
        self._share = share if share is not None else _CPU_SHARE if jax.default_backend() == "cpu" else 1.0
        self.root, self.peak_bytes = Path(root), 0
        self._keep, self._timeout, self._companion = keep, timeout, companion
        self._chunk_bytes = min(trees.CHUNK_BYTES, host_bytes // 8)
        self._host_bytes = host_bytes - 2 * self._chunk_bytes  # two chunks: one being encoded, one put in C order
        self._pending: _Pending | None = None
        self._lock: IO | None = self._locked() if jax.process_index() == 0 else None
        self._token, self._count, self._closed = trees.shared_token(), 0, False  # the others go on when the folder is clean
        self._newest = max(steps(self.root), default=-1)

    def save(self, step: int, tree: Any, metadata: Any = None, *, copy: bool = False, skip_if_busy: bool = False) -> bool:
        """Begins to save a tree, and returns. While another save is under way it waits for that first.

        Args:
            step: after all steps that are saved.
            tree: as for `trees.save_tree`. Its jax arrays may not be donated before `before_donation` returns.
            metadata: anything that JSON can say.
            copy: copies jax arrays on their devices first, so that they may be donated right after.
            skip_if_busy: does nothing while another save is under way (in programs of one process).

        Returns:
            Whether it is being saved.

        Raises:
            CheckpointError: a leaf can't be saved, is deleted, or the step isn't new; or the error of the save before.
        """
        if self._closed:
            raise CheckpointError(f"{self.root}: the saver is closed")
        self._count += 1  # whatever happens now: processes have to count alike
        if skip_if_busy:
            if jax.process_count() > 1:
                raise CheckpointError("skip_if_busy works in programs of one process only: several could decide differently")
            if self.busy:
                return False
        self.wait()
        self._check_new(step)
        held = snapshot(tree, copy)
        token = f"{self._token}-{self._count}"
        writer = TreeWriter(step_folder(self.root, step), held, step, metadata, token, self._chunk_bytes, self._timeout)
        if self._companion is not None:
            self._companion.keep(step, held)
        pending = _Pending(step, HostCopies(self._host_bytes))
        # Not a daemon: the interpreter's exit then waits for it. It ends with its save, so that it never stands in the way of the exit.
        pending.thread = threading.Thread(target=self._work, args=(writer, pending), name=f"save-{step}")
        self._pending = pending
        try:
            pending.thread.start()
        except RuntimeError as error:
            self._pending = None
            raise CheckpointError(f"{self.root}: step {step} can't be saved: {error}") from error
        return True

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._pending is not None and self._pending.busy()

    def before_donation(self) -> None:
        """Returns when no save needs the device arrays any more that it was given; they may be donated then. Writing may go on."""
        if self._pending is not None:
            self._pending.awaited.set()
            self._pending.copies.hurry.set()
            self._pending.copies.copied.wait()

    def wait(self) -> None:
        """Returns when nothing is being saved.

        Raises:
            CheckpointError: the save failed.
        """
        pending = self._pending
        if pending is None or pending.thread is None:
            return
        pending.awaited.set()
        pending.thread.join()
        self._pending = None
        if pending.error is None:
            self._newest = pending.step
        if isinstance(pending.error, CheckpointError):
            raise pending.error
        if pending.error is not None:
            raise CheckpointError(f"{step_folder(self.root, pending.step)}: saving failed: {pending.error!r}") from pending.error

    def close(self) -> None:
        """Waits as `wait` does, and lets go of the folder; raises what `wait` raises."""
        self._closed = True
        try:
            self.wait()
        finally:
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        try:
            self.close()
        except CheckpointError as ours:
            if error is None:
                raise
            error.add_note(f"saving had failed as well: {ours}")

    def _locked(self) -> IO:
        """Keeps other savers out of the root, and removes what killed ones left."""
        with commit.writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            lock = open(self.root / _LOCK, "w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise CheckpointError(f"{self.root}: another saver is at work there") from None
            for path in self.root.glob("step_*.partial"):
                shutil.rmtree(path, ignore_errors=True)
        return lock

    def _check_new(self, step: int) -> None:
        if isinstance(step, int) and step <= self._newest:
            raise CheckpointError(f"{self.root}: step {step} isn't after step {self._newest}, which is saved there: remove that, or save elsewhere")

    def _work(self, writer: TreeWriter, pending: _Pending) -> None:
        _step_back()
        try:
            self._write(writer, pending)
        except BaseException as error:
            pending.error = error
            writer.abort(error)
        finally:
            writer.pieces.clear()
            self.peak_bytes = max(self.peak_bytes, pending.copies.peak_bytes)
            pending.copies.copied.set()

    def _write(self, writer: TreeWriter, pending: _Pending) -> None:
        start = time.perf_counter()
        writer.begin()
        with contextlib.closing(pending.copies.run(writer.pieces)) as host:
            for piece, data in host:
                writer.write(piece, data)
                del data
                self._rest(time.perf_counter() - start, pending.awaited)
                start = time.perf_counter()
        if jax.process_index() == 0 and writer.folder.exists():
            shutil.rmtree(writer.folder)  # a damaged one: a whole one of this step was refused
        writer.finish()
        if jax.process_index() == 0:
            self._remove_old()

    def _rest(self, worked: float, awaited: threading.Event) -> None:
        """Leaves the processors to the steps, unless somebody waits, or the interpreter is ending."""
        end = time.perf_counter() + worked * (1 / self._share - 1)
        while (left := end - time.perf_counter()) > 0 and not awaited.is_set() and threading.main_thread().is_alive():
            awaited.wait(min(left, 0.1))

    def _remove_old(self) -> None:
        good = steps(self.root)
        for step in [step for step in _all_steps(self.root) if len(good) > self._keep and step < good[-self._keep]]:
            doomed = commit.partial_of(step_folder(self.root, step))
            os.replace(step_folder(self.root, step), doomed)  # so that it is never seen half removed
            shutil.rmtree(doomed, ignore_errors=True)


def _step_back() -> None:
    """Gives this thread what the step's threads leave over, where threads have priorities of their own."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
