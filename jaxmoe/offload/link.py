"""The link between host and device: what crosses it, how long that takes, and an emulated one where host and device are the same memory.

On a CPU an expert's "transfer" is nothing. An emulated link takes the time that a link of a given speed would take: transfers go one after another,
each occupying the link for its bytes over the speed, while the caller goes on; whoever needs what was sent waits until it has arrived.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

SPIN_SECONDS = 2e-4
"""The end of a wait is spent in a loop: an operating system wakes a sleeper up later than it asked for."""


class Link:
    """Counts what is sent, and paces it where a speed is given.

    Attributes:
        gbps: emulated speed in 10^9 bytes per second; None where the link is a real one, or none.
        bytes: sent so far.
        stalled: seconds spent in waiting for what was sent.
    """

    def __init__(self, gbps: float | None = None, clock: Callable[[], float] = time.perf_counter, sleep: Callable[[float], None] = time.sleep):
        """
        Args:
            gbps: as above.
            clock, sleep: for tests.

        Raises:
            ValueError: a speed that is not positive, or not finite.
        """
        if gbps is not None and not gbps > 0:
            raise ValueError(f"a link of {gbps} GB/s: its speed has to be positive")
        if gbps == math.inf:
            raise ValueError(f"a link of {gbps} GB/s: its speed has to be finite")
        self.gbps, self.bytes, self.stalled = gbps, 0, 0.0
        self._clock, self._sleep = clock, sleep
        self._free_at = 0.0

    def send(self, count: int) -> float:
        """Sends so many bytes; returns when they will have arrived, by the clock. Does not wait."""
        self.bytes += count
        if self.gbps is None:
            return 0.0
        self._free_at = max(self._free_at, self._clock()) + count / (self.gbps * 1e9)
        return self._free_at

    def wait(self, arrival: float) -> None:
        """Waits until what `send` gave this time for has arrived."""
        began = now = self._clock()
        if now >= arrival:
            return
        if arrival - now > SPIN_SECONDS:
            self._sleep(arrival - now - SPIN_SECONDS)
        while now < arrival:
            now = self._clock()
        self.stalled += now - began
