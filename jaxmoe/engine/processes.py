"""Several processes that run one model together, by `jax.distributed`: joining, and what is said when one of them is lost.

Every process runs the same program on the same requests, and has the devices of its machine; the first one prints. All else is jax's.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax

HEARTBEAT_SECONDS = 10
"""A process that hasn't been heard of for so long is lost."""

JOIN_SECONDS = 120
"""How long the first processes wait for the last one."""


class LostProcess(ValueError):
    """Another process of the run has ended, or can't be reached; one line."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Attributes: `coordinator` HOST:PORT of process 0, 'auto' for what the cluster says; `count` processes, of which this is `index`."""

    coordinator: str
    count: int | None = None
    index: int | None = None

    def __post_init__(self):
        if self.coordinator == "auto":
            if self.count is not None or self.index is not None:
                raise ValueError("coordinator 'auto' asks the cluster for the number of processes: leave out --processes and --process")
            return
        host, colon, port = self.coordinator.rpartition(":")
        if not (host and colon and port.isdigit()):
            raise ValueError(f"coordinator {self.coordinator!r}: give HOST:PORT of process 0, or auto")
        if self.count is None or self.index is None:
            raise ValueError(f"coordinator {self.coordinator!r} needs the number of processes and which of them this is: --processes N --process I")
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ValueError(f"process {self.index} of {self.count}: they count from 0 to {self.count - 1}")


def join(group: Group) -> None:
    """Joins the other processes; call it before anything asks jax for a device.

    Raises:
        LostProcess: not all of them came within `JOIN_SECONDS`.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of the CPU alone; accelerators have their own
    auto = group.coordinator == "auto"
    try:
        jax.distributed.initialize(
            None if auto else group.coordinator, group.count, group.index,
            initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=JOIN_SECONDS,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        what = "the cluster's processes" if auto else f"the {group.count} processes at {group.coordinator}"
        raise LostProcess(f"{what} could not join: {_first_line(error)}") from error


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around what several processes do together: a device that fails because another process is gone is said to.

    Raises:
        LostProcess: so.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise LostProcess(f"process {jax.process_index()} of {jax.process_count()} has lost another one: {_first_line(error)}") from error


def is_first() -> bool:
    """Whether this process is the one that prints."""
    return jax.process_index() == 0


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
