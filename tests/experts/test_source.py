"""Where the host-driven mode gets experts from: all in host memory, or as many as there is room for and a reader behind them."""

import dataclasses
import threading
import time

import numpy as np
import pytest

from jaxmoe.experts import host_store
from jaxmoe.experts.source import READERS, DiskSource, ExpertSource, least_host_memory
from jaxmoe.spec import ModelSpec
from tests.experts.test_host_store import expert_of
from tests.models import CONFIGS

SPEC = ModelSpec.from_hf(CONFIGS["qwen3_moe"]).with_precision("bfloat16")
RECORD = host_store.record_bytes(SPEC)
ACTIVE = SPEC.moe[0].active
LEAST = 2 * ACTIVE


def packed(layer: int, expert: int) -> np.ndarray:
    return host_store.pack_record(SPEC, expert_of(SPEC, layer, expert))


@dataclasses.dataclass
class Disk:
    """A reader that writes down what it is asked, fails for experts in `broken`, and waits for `gate` if there is one."""

    broken: set = dataclasses.field(default_factory=set)
    gate: threading.Event | None = None
    read: list = dataclasses.field(default_factory=list)
    waiting: int = 0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def __call__(self, layer: int, expert: int) -> dict[str, np.ndarray]:
        with self.lock:
            self.read.append((layer, expert))
            self.waiting += 1
        if self.gate is not None:
            assert self.gate.wait(10)
        if (layer, expert) in self.broken:
            raise ValueError(f"expert {expert} of layer {layer} is damaged")
        return expert_of(SPEC, layer, expert)


def source_of(disk: Disk, records: int = LEAST) -> DiskSource:
    return DiskSource(SPEC, disk, records * RECORD)


def test_records_in_host_memory_are_handed_out_as_they_are():
    records = host_store.read_records(SPEC, lambda l, e: expert_of(SPEC, l, e))
    source = ExpertSource(SPEC, records)
    assert (source.record_bytes, source.host_bytes, source.reads) == (RECORD, records.nbytes, 0)
    for layer, expert in ((0, 0), (1, 0), (0, 7), (1, 3)):
        np.testing.assert_array_equal(source.ask(layer, expert)(), packed(layer, expert))


def test_a_record_is_read_once_while_there_is_room_for_it():
    disk = Disk()
    source = source_of(disk)
    for _ in range(3):
        for expert in range(LEAST):
            np.testing.assert_array_equal(source.ask(1, expert)(), packed(1, expert))
    assert sorted(disk.read) == [(1, expert) for expert in range(LEAST)] and source.reads == LEAST
    assert source.host_bytes == LEAST * RECORD and source.record_bytes == RECORD


def test_the_least_recently_asked_for_is_dropped():
    disk = Disk()
    source = source_of(disk)
    for expert in range(LEAST):
        source.ask(0, expert)()
    source.ask(0, 0)()  # the oldest is now 1
    source.ask(1, 0)()
    disk.read.clear()
    for expert in (0, *range(2, LEAST)):
        source.ask(0, expert)()
    assert disk.read == []
    np.testing.assert_array_equal(source.ask(0, 1)(), packed(0, 1))
    assert disk.read == [(0, 1)] and source.reads == LEAST + 2


def test_an_expert_of_another_layer_is_another_expert():
    source = source_of(Disk())
    one, other = source.ask(0, 5)(), source.ask(1, 5)()
    np.testing.assert_array_equal(one, packed(0, 5))
    np.testing.assert_array_equal(other, packed(1, 5))
    assert (one != other).any()


def test_a_record_that_was_dropped_while_it_was_read_still_comes():
    disk = Disk(gate=threading.Event())
    source = source_of(disk)
    gives = [source.ask(0, expert) for expert in range(8)] + [source.ask(1, expert) for expert in range(8)]
    disk.gate.set()
    for i, give in enumerate(gives):
        np.testing.assert_array_equal(give(), packed(i // 8, i % 8))


def test_asking_does_not_wait_and_reads_run_side_by_side():
    disk = Disk(gate=threading.Event())
    source = source_of(disk)
    gives = [source.ask(0, expert) for expert in range(READERS)]
    until = time.monotonic() + 10
    while disk.waiting < READERS and time.monotonic() < until:
        time.sleep(0.001)
    assert sorted(disk.read) == [(0, expert) for expert in range(READERS)]  # none has ended
    again = source.ask(0, 0)  # one that is being read is not read twice
    disk.gate.set()
    assert source.reads == READERS and again() is gives[0]()


def test_a_failed_read_is_heard_and_read_again():
    disk = Disk(broken={(0, 3)})
    source = source_of(disk)
    works = source.ask(0, 4)
    for _ in range(2):
        give = source.ask(0, 3)
        for _ in range(2):
            with pytest.raises(ValueError, match="expert 3 of layer 0 is damaged"):
                give()
    np.testing.assert_array_equal(works(), packed(0, 4))
    disk.broken.clear()
    for _ in range(2):
        np.testing.assert_array_equal(source.ask(0, 3)(), packed(0, 3))
    assert disk.read.count((0, 3)) == 3 and disk.read.count((0, 4)) == 1


def test_too_little_room_is_refused():
    assert least_host_memory(SPEC) == LEAST * RECORD
    with pytest.raises(ValueError, match=rf"^{LEAST * RECORD - 1:,} bytes of host memory are too few .* at least {LEAST * RECORD:,} are needed"):
        DiskSource(SPEC, Disk(), LEAST * RECORD - 1)


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_asking_gives_the_expert_asked_for(seed):
    rng, disk = np.random.default_rng(seed), Disk()
    source = source_of(disk)
    under_way = []
    for _ in range(300):
        layer, expert = int(rng.integers(2)), int(rng.integers(8))
        under_way.append((layer, expert, source.ask(layer, expert)))
        if len(under_way) > rng.integers(5):
            layer, expert, give = under_way.pop(int(rng.integers(len(under_way))))
            np.testing.assert_array_equal(give(), packed(layer, expert))
    for layer, expert, give in under_way:
        np.testing.assert_array_equal(give(), packed(layer, expert))
    assert source.reads == len(disk.read) < 300
