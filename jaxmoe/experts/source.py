"""Where the host-driven mode gets experts from: host memory, and behind it, where that is short, a reader such as a disk's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxmoe.experts.host_store import ExpertReader, pack_record, record_bytes
from jaxmoe.experts.lossy import STORED
from jaxmoe.experts.planes import BASE, PlaneFormat, build_planes
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

        result.ready = future.done  # type: ignore[attr-defined]  # whoever must not wait asks first
        return result

    def _load(self, moe_layer: int, expert: int) -> np.ndarray:
        return pack_record(self._spec, self._read(moe_layer, expert), layout=self._layout)


class LadderSource:
    """Records at any precision: as they are stored, from another source, or at 2 to 8 bits, from planes in host memory.

    Attributes:
        record_bytes: of one expert as it is stored.
        host_bytes: of host memory that records and planes take.
        reads: see `ExpertSource`.
        fmt: how to unpack what `ask` gives at fewer bits (`jaxmoe.experts.planes.unpack_planes`).
    """

    def __init__(self, stored: ExpertSource | DiskSource, fmt: PlaneFormat, planes: np.ndarray, experts: int):
        """
        Args:
            stored: where records come from that are wanted as they are stored.
            fmt: the planes' format.
            planes: uint8 [L * E, bytes] of `build_planes`, up to the most bits that will be asked for.
            experts: E.
        """
        self.fmt, self.record_bytes, self.host_bytes = fmt, stored.record_bytes, stored.host_bytes + planes.nbytes
        self._stored, self._experts = stored, experts
        ends = [end for end in fmt.starts if end <= planes.shape[1]]
        self.most = BASE + len(ends) - 2
        self._chunks = _pinned_chunks(planes, ends)

    @classmethod
    def from_records(
        cls, spec: ModelSpec, records: np.ndarray, fmt: PlaneFormat, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> LadderSource:
        """A source of records in host memory, whose planes are made here; `progress` is called with experts done and experts in all."""
        return cls(ExpertSource(spec, records), fmt, build_planes(fmt, records, progress=progress), spec.moe[0].experts)

    @property
    def reads(self) -> int:
        """See `ExpertSource`."""
        return self._stored.reads

    def bytes_at(self, bits: int) -> int:
        """Bytes that cross the link for an expert at `bits`; `STORED` for one as it is stored."""
        return self.record_bytes if bits == STORED else self.fmt.bytes(bits)

    def ask(self, moe_layer: int, expert: int, bits: int = STORED) -> Callable[[], Any]:
        """Asks for an expert at `bits`; the result gives its record, or at fewer bits than it is stored with a tuple of the chunks of its planes.

        Raises:
            ValueError: more bits than there are planes for.
        """
        if bits == STORED:
            return self._stored.ask(moe_layer, expert)
        if not BASE <= bits <= self.most:
            raise ValueError(f"{bits} bits: the planes in host memory are those of {BASE} to {self.most} bits")
        chunks = self._chunks[moe_layer * self._experts + expert][: bits - BASE + 1]
        return lambda: chunks


def _pinned_chunks(planes: np.ndarray, ends: list[int]) -> list[tuple]:
    """Each expert's chunks, as `_pinned_one_by_one` has records."""
    parts = [[row[start:end] for start, end in zip(ends, ends[1:], strict=False)] for row in planes]
    return [tuple(_pinned_one_by_one(of_expert)) for of_expert in parts]  # type: ignore[arg-type]
