"""How a folder gets its name: it is made as `OUT.partial` under a lock, brought to the disk whole, and renamed.

A folder of that name is therefore always complete, whenever the process was killed or the power went. This file knows nothing of what is inside.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from checkpoints.errors import CheckpointError

LOCK = "_lock"
"""An empty file in an unfinished folder that is locked by the process which works on it."""

_SYNCING = 16

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def partial_of(out: Path) -> Path:
    """The folder in which `out` is being made: beside what `out` really is, where it is a link, '.' or ends in '..'."""
    real = Path(os.path.realpath(out))
    return real.with_name(real.name + ".partial") if real.name else real / ".partial"


def check_place(out: Path) -> None:
    """Makes sure that a finished folder could be given the name `out`.

    Raises:
        CheckpointError: a disk is mounted there, over which nothing can be renamed.
    """
    if os.path.ismount(os.path.realpath(out)):
        raise CheckpointError(f"{out}: a disk is mounted there, which can't become a checkpoint as a whole: choose a folder on it")


@contextlib.contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Makes an unfinished folder where there is none, and keeps other processes out of it.

    Raises:
        CheckpointError: another process works on it, or it can't be made or written.
    """
    with writing(partial):
        partial.mkdir(parents=True, exist_ok=True)
        fd = os.open(partial / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{partial}: another process is writing into it") from None
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turns the errors of a folder that can't be written into one that a user can do something about.

    Raises:
        CheckpointError: instead of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise failure(place, error) from error


def failure(place: Path, error: Exception, then: str = "") -> CheckpointError:
    """What to say of an error of the disk, Python's or tensorstore's, while `place` was written; `then` says how to go on."""
    number, name = errno_of(error), getattr(error, "filename", None)
    text = os.strerror(number) if number else " ".join(str(error).split(" [")[0].split())
    what = f" ({name}: {text})" if name else f" ({text})"
    if number in (errno.EACCES, errno.EPERM):
        return CheckpointError(f"{place}: no permission to write there{what}{then}")
    if number == errno.EROFS:
        return CheckpointError(f"{place}: is on a read-only disk{what}{then}")
    if number in DISK_FULL:
        return CheckpointError(f"{place}: the disk is full{what}{then or ': free some room and run again'}")
    return CheckpointError(f"{place}: writing failed{what}{then}")


def errno_of(error: Exception) -> int | None:
    """The system's number of an error of Python's or tensorstore's, where it has one."""
    found = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's
    return int(found[1]) if found else getattr(error, "errno", None)


def free_bytes(place: Path) -> int:
    """Bytes that the disk has free on which `place` is, or will be."""
    return shutil.disk_usage(existing(place)).free


def existing(place: Path) -> Path:
    """A path, or the nearest folder above it that is there."""
    return next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())


def publish(partial: Path, out: Path, leave: tuple[str, ...] = (LOCK,)) -> None:
    """Gives an unfinished folder its name: afterwards `out` is complete, even if the power goes at once.

    Args:
        partial: the folder; everything in it is written.
        out: not there, or an empty folder.
        leave: files that only the unfinished folder needs; they keep other processes out until the rename, and go after it.

    Raises:
        CheckpointError: it can't be done: `partial` is as it was; or the disk failed after the rename, and `out` is there.
    """
    real = Path(os.path.realpath(out))  # once: '.' means nothing any more when it has been replaced
    with writing(partial):
        sync_tree(partial)
        os.replace(partial, real)
        sync(real.parent)
        tidy(real, leave)


def tidy(out: Path, leave: tuple[str, ...] = (LOCK,)) -> None:
    """Removes from a finished folder what a process that was killed right after the rename has left."""
    for name in leave:
        if (out / name).exists():  # a read-only disk refuses to remove even what isn't there
            (out / name).unlink(missing_ok=True)


class Syncing:
    """Brings files to the disk while others are still being written, so that little is left to wait for at the end.

    Args:
        forget: the system needn't keep in its memory what has been brought there.

    Raises:
        OSError: a file could not be brought there; at a later call, or at the end.
    """

    def __init__(self, forget: bool = False):
        self._forget = forget

    def __enter__(self) -> Syncing:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._pending: deque[Future] = deque()
        return self

    def begin(self, paths: list[str]) -> None:
        """Files that are written."""
        self._pending.append(self._pool.submit(_sync_all, paths, self._forget))
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def __exit__(self, kind, *_) -> None:
        try:
            while self._pending and kind is None:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _sync_all(paths: list[str], forget: bool) -> None:
    for path in paths:
        sync(path, forget)


def sync_tree(folder: Path) -> None:
    """Waits until every file and folder below is on the disk.

    Many at once: the disk then joins what would be thousands of small waits.
    """
    paths = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in (*names, ".")]
    try:
        with ThreadPoolExecutor(_SYNCING) as pool:
            list(pool.map(sync, paths))  # raises what a thread raised
    except RuntimeError:  # no threads are begun any more while the interpreter ends
        for path in paths:
            sync(path)


def sync(path: str | os.PathLike, forget: bool = False) -> None:
    """Waits until a file, or a folder's list of names, is on the disk; `forget`: then the system needn't keep it in its memory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        if forget:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
