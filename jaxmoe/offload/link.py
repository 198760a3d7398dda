"""The link between host and device: what crosses it, in what order, how long that takes, and an emulated one where both are the same memory.

On a CPU an expert's "transfer" is nothing. An emulated link takes the time that a link of a given speed would take: transfers go one after another,
each occupying the link for its bytes over the speed, while the caller goes on; whoever needs what was sent waits until it has arrived.

There are two classes. *Demand* is what somebody waits for: it goes in the order in which it was sent, and before any prefetch. A *prefetch* is
queued, and starts when the link is free of demand, the one of the lowest priority number first. Until it has started it can be overtaken, cancelled,
or promoted to demand; a transfer that has started can't be taken back.

Nothing runs in the background: an emulated queue is brought up to date by the clock whenever somebody touches the link, which gives the same as if it
had been watched all the time, because what is queued changes by a touch alone. Over a real link a prefetch starts when it is queued, or as soon after
as fewer than `ahead` are on their way.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

SPIN_SECONDS = 2e-4
"""The end of a wait is spent in a loop: an operating system wakes a sleeper up later than it asked for."""

AHEAD = 4
"""Prefetches on their way at a time over a real link: those behind them can still be cancelled."""


def _at_once() -> Any:
    return None


@dataclasses.dataclass(eq=False)
class Transfer:
    """A prefetch, or what was one.

    Attributes:
        bytes: to be sent.
        priority: the lowest goes first, then the one that was queued first; it may be changed while the transfer is queued.
        start: called when it starts; gives what is under way, which has `is_ready()` where that is known (a `jax.Array`).
        ready: whether `start` could begin without waiting (a record that is still being read from a disk could not).
        queued_at: by the link's clock.
        demand: whether somebody waits for it.
        arrives: when it will have arrived by the link's clock, 0 over a real link; None until it starts.
        sent: what `start` gave.
    """

    bytes: int
    priority: Any = 0.0
    start: Callable[[], Any] = _at_once
    ready: Callable[[], bool] | None = None
    queued_at: float = 0.0
    demand: bool = False
    arrives: float | None = None
    sent: Any = None

    @property
    def started(self) -> bool:
        """Whether it has, as far as the link was brought up to date."""
        return self.arrives is not None


class Link:
    """Counts what is sent, and paces it where a speed is given.

    Attributes:
        gbps: emulated speed in 10^9 bytes per second; None where the link is a real one, or none. It may be changed; what has started keeps its time.
        bytes: sent so far: demand when it is sent, prefetches when they start.
        stalled: seconds spent in waiting for what was sent.
    """

    def __init__(
        self, gbps: float | None = None, clock: Callable[[], float] = time.perf_counter, sleep: Callable[[float], None] = time.sleep,
        ahead: int = AHEAD,
    ):  # fmt: skip
        """
        Args:
            gbps: as above.
            clock, sleep: for tests.
            ahead: prefetches on their way at a time, where the link is a real one.

        Raises:
            ValueError: a speed that is not positive, or not finite.
        """
        if gbps is not None and not gbps > 0:
            raise ValueError(f"a link of {gbps} GB/s: its speed has to be positive")
        if gbps == math.inf:
            raise ValueError(f"a link of {gbps} GB/s: its speed has to be finite")
        self.gbps, self.bytes, self.stalled = gbps, 0, 0.0
        self._clock, self._sleep, self._ahead = clock, sleep, ahead
        self._free_at, self._taken = 0.0, 0.0
        self._queue: list[Transfer] = []
        self._under_way: list[Transfer] = []

    def seconds(self, count: int) -> float | None:
        """How long so many bytes occupy the link; None where the link is a real one."""
        return None if self.gbps is None else count / (self.gbps * 1e9)

    @property
    def busy(self) -> float:
        """Seconds that an emulated link was occupied until now; 0 for a real one, which is not watched."""
        self.settle()
        return self._taken - max(0.0, self._free_at - self._clock())

    @property
    def queued(self) -> int:
        """Prefetches that have not started."""
        self.settle()
        return len(self._queue)

    def send(self, count: int) -> float:
        """Sends so many bytes that somebody waits for; returns when they will have arrived, by the clock. Does not wait."""
        now = self.settle()
        return self._occupy(count, now)

    def queue(
        self, count: int, priority: Any = 0.0, start: Callable[[], Any] = _at_once, ready: Callable[[], bool] | None = None
    ) -> Transfer:
        """Queues a prefetch; see `Transfer` for the arguments. Does not wait."""
        transfer = Transfer(count, priority, start, ready, self.settle())
        self._queue.append(transfer)
        self.settle()
        return transfer

    def cancel(self, transfer: Transfer) -> bool:
        """Takes a prefetch out of the queue; False if it has started, and stays under way."""
        self.settle()
        if transfer in self._queue:
            self._queue.remove(transfer)
            return True
        return False

    def promote(self, transfer: Transfer) -> bool:
        """Makes demand of a queued prefetch, behind what is demanded already; False if it had started as a prefetch."""
        now = self.settle()
        if transfer not in self._queue:
            return False
        self._queue.remove(transfer)
        transfer.demand = True
        self._start(transfer, now)
        return True

    def has_arrived(self, transfer: Transfer, now: float | None = None) -> bool:
        """Whether it is there, so that `wait` would not wait for it. Over a real link: as far as `sent` says so.

        Args:
            transfer: see above.
            now: what `settle` has just given.
        """
        now = self.settle() if now is None else now
        if transfer.arrives is None:
            return False
        return now >= transfer.arrives if self.gbps is not None else _is_ready(transfer.sent)

    def wait(self, arrival: float | Transfer) -> None:
        """Waits until what `send` gave this time for has arrived, or a transfer that has started.

        Raises:
            ValueError: a transfer that is only queued: promote it first, for nobody knows when it would start.
        """
        if isinstance(arrival, Transfer):
            self.settle()
            if arrival.arrives is None:
                raise ValueError("a prefetch that has not started can't be waited for: promote it first")
            arrival = arrival.arrives
        began = now = self._clock()
        if now >= arrival:
            return
        if arrival - now > SPIN_SECONDS:
            self._sleep(arrival - now - SPIN_SECONDS)
        while now < arrival:
            now = self._clock()
        self.stalled += now - began

    def settle(self) -> float:
        """Starts what has started by now; returns the time."""
        now = self._clock()
        if self._queue:
            if self.gbps is None:
                self._fill_up(now)
            else:
                self._catch_up(now)
        return now

    def _catch_up(self, now: float) -> None:
        """The emulated link: each queued prefetch began when the link was free, if that was before now."""
        while self._queue:
            first = min(self._queue, key=lambda t: t.priority)
            begins = max(self._free_at, first.queued_at)
            if begins > now:
                return
            self._queue.remove(first)
            self._start(first, begins)

    def _fill_up(self, now: float) -> None:
        """The real link: as many as may be on their way."""
        self._under_way = [t for t in self._under_way if not _is_ready(t.sent)]
        for transfer in sorted(self._queue, key=lambda t: t.priority):
            if len(self._under_way) >= self._ahead:
                return
            if transfer.ready is None or transfer.ready():
                self._queue.remove(transfer)
                self._start(transfer, now)
                self._under_way.append(transfer)

    def _start(self, transfer: Transfer, at: float) -> None:
        transfer.arrives = self._occupy(transfer.bytes, at)
        transfer.sent = transfer.start()

    def _occupy(self, count: int, at: float) -> float:
        """Takes the link for so many bytes, from `at` or when it is free; returns when they will have arrived."""
        self.bytes += count
        seconds = self.seconds(count)
        if seconds is None:
            return 0.0
        self._taken += seconds
        self._free_at = max(self._free_at, at) + seconds
        return self._free_at


def _is_ready(sent: Any) -> bool:
    return sent is None or not hasattr(sent, "is_ready") or sent.is_ready()
