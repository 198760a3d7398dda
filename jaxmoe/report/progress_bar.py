"""A progress bar for work that is counted in bytes: how much is done, how fast, how long it will take; and the speed, for afterwards.

Nothing is drawn where standard error is no terminal.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn


class Meter:
    """What a bar was told; call it with (bytes done, bytes in all, name of what is being done).

    Attributes:
        first, last: bytes done at the first and at the latest call; None and 0 before any. What was done before the first doesn't count as work.
        seconds: that the work took, once it has ended.
    """

    def __init__(self, bar: Progress, task: TaskID):
        self._bar, self._task, self._start = bar, task, time.perf_counter()
        self.first: int | None = None
        self.last = 0
        self.seconds = 0.0

    def __call__(self, done: int, total: int, _: str = "") -> None:
        if self.first is None:
            self.first = done
        self.last = done
        self._bar.update(self._task, completed=done, total=total)

    def stop(self) -> None:
        """Says that the work has ended."""
        self.seconds = time.perf_counter() - self._start

    @property
    def nbytes(self) -> int:
        """Bytes done since the first call."""
        return self.last - (self.first or 0)

    @property
    def rate(self) -> str:
        """Seconds and speed in words: '1.5 s, 320 MB/s'."""
        return f"{self.seconds:.1f} s, {self.nbytes / max(self.seconds, 1e-9) / 1e6:,.0f} MB/s"


@contextlib.contextmanager
def bytes_bar(label: str, screen: Console | None = None) -> Iterator[Meter]:
    """Shows a bar while its block runs.

    Args:
        label: what is being done, one word.
        screen: where it is drawn; standard error if not given.
    """
    screen = screen or Console(stderr=True)
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        meter = Meter(bar, bar.add_task(label, total=None))
        try:
            yield meter
        finally:
            meter.stop()
