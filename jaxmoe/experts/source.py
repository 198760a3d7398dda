"""Where the host-driven mode gets experts from: host memory, and behind it, where that is short, a reader such as a disk's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from jaxmoe.experts.host_store import ExpertReader, pack_record, record_bytes
from jaxmoe.formats import ExpertLayout
from jaxmoe.spec import ModelSpec

READERS = 4
"""Threads that read experts from behind host memory."""


def least_host_memory(spec: ModelSpec) -> int:
    """Bytes of two layers' active experts: with less, records would be dropped again before they are used."""
    return 2 * spec.moe[0].active * record_bytes(spec)


class ExpertSource:
    """Records by (MoE layer, expert), every one held in host memory.

    Attributes:
        record_bytes: of one expert.
        host_bytes: of host memory that records take.
        reads: records that had to be read from behind host memory.
    """

    def __init__(self, spec: ModelSpec, records: np.ndarray):
        """Args: spec: the model. records: [L * E, rows, columns], of `host_store.read_records`."""
        self.record_bytes, self.host_bytes, self.reads = record_bytes(spec), records.nbytes, 0
        self._experts = spec.moe[0].experts
        self._records = _pinned_one_by_one(records)

    def ask(self, moe_layer: int, expert: int) -> Callable[[], np.ndarray | jax.Array]:
        """Asks for a record, without waiting; the result gives it, and raises what went wrong in reading it."""
        record = self._records[moe_layer * self._experts + expert]
        return lambda: record


def _pinned_one_by_one(records: np.ndarray):
    """Records that a device can read at the link's full speed: arrays in pinned memory, or on the CPU the records as they are."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return records
    sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    return [jax.device_put(record, sharding) for record in records]


def check_host_memory(spec: ModelSpec, given: int) -> None:
    """Raises ValueError for less than `least_host_memory`."""
    least = least_host_memory(spec)
    if given < least:
        raise ValueError(f"{given:,} bytes of host memory are too few for experts: at least {least:,} are needed, two layers' active ones")


class DiskSource:
    """Records of which host memory holds as many as it is given room for, the most recently asked for; others are read when they are asked for.

    Attributes: see `ExpertSource`.
    """

    def __init__(self, spec: ModelSpec, read: ExpertReader, host_memory: int, layout: ExpertLayout = "d2f"):
        """
        Args:
            spec: the model.
            read: reads one expert and raises where it is damaged; called from several threads.
            host_memory: bytes for records.
            layout: the order of axes in records.

        Raises:
            ValueError: less than `least_host_memory`.
        """
        self.record_bytes, self.reads = record_bytes(spec), 0
        check_host_memory(spec, host_memory)
        self.host_bytes = host_memory
        self._spec, self._read, self._layout = spec, read, layout
        self._room = host_memory // self.record_bytes
        self._held: OrderedDict[tuple[int, int], Future] = OrderedDict()
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="expert-reader")

    def ask(self, moe_layer: int, expert: int) -> Callable[[], np.ndarray]:
        """See `ExpertSource.ask`; a read begins at once."""
        key = (moe_layer, expert)
        if key not in self._held:
            self.reads += 1
            self._held[key] = self._pool.submit(self._load, moe_layer, expert)
            while len(self._held) > self._room:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        future = self._held[key]

        def result() -> np.ndarray:
            try:
                return future.result()
            except Exception:
                self._held.pop(key, None)  # asked for again, it is read again
                raise

        return result

    def _load(self, moe_layer: int, expert: int) -> np.ndarray:
        return pack_record(self._spec, self._read(moe_layer, expert), layout=self._layout)
