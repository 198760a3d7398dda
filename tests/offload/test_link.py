"""The emulated link: that it takes the time it should, by a clock of its own and by the machine's, and counts what crosses it."""

import random
import time

import pytest

from jaxmoe.offload.link import SPIN_SECONDS, Link


class Clock:
    """A clock that goes on only when it is slept by, and a little whenever it is read."""

    def __init__(self):
        self.now, self.slept = 100.0, []

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def link_of(gbps: float | None, clock: Clock) -> Link:
    return Link(gbps, clock, clock.sleep)


def test_a_transfer_takes_its_bytes_over_the_speed(clock):
    link = link_of(2.0, clock)
    began = clock.now
    link.wait(link.send(1_000_000_000))
    assert clock.now - began == pytest.approx(0.5, abs=1e-4)
    assert link.bytes == 1_000_000_000 and link.stalled == pytest.approx(0.5, abs=1e-4)
    assert clock.slept == [pytest.approx(0.5 - SPIN_SECONDS, abs=1e-4)]  # the rest is spent in a loop


def test_transfers_go_one_after_another(clock):
    link = link_of(1.0, clock)
    began = clock.now
    arrivals = [link.send(100_000_000) for _ in range(4)]
    assert clock.now - began < 1e-4  # sending does not wait
    assert [a - began for a in arrivals] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=1e-4)


def test_computing_hides_a_transfer(clock):
    """What is computed while records are under way is not waited for again, and a link that was idle does not catch up."""
    link = link_of(1.0, clock)
    began = clock.now
    first, second = link.send(100_000_000), link.send(100_000_000)
    clock.sleep(0.15)
    link.wait(first)
    assert link.stalled == 0
    link.wait(second)
    assert clock.now - began == pytest.approx(0.2, abs=1e-4) and link.stalled == pytest.approx(0.05, abs=1e-4)
    clock.sleep(1.0)
    began = clock.now
    link.wait(link.send(100_000_000))
    assert clock.now - began == pytest.approx(0.1, abs=1e-4) and link.stalled == pytest.approx(0.15, abs=1e-4)


def test_a_short_wait_does_not_sleep(clock):
    link = link_of(1.0, clock)
    link.wait(link.send(100_000))
    assert clock.slept == [] and link.stalled == pytest.approx(1e-4, abs=1e-5)


def test_a_real_link_is_counted_and_not_paced(clock):
    link = link_of(None, clock)
    began = clock.now
    for _ in range(3):
        link.wait(link.send(7))
    assert link.gbps is None and link.bytes == 21 and link.stalled == 0
    assert clock.now - began < 1e-4 and clock.slept == []


@pytest.mark.parametrize("gbps", [0, 0.0, -1, float("nan"), float("-inf")])
def test_a_speed_that_is_not_positive_is_refused(gbps):
    with pytest.raises(ValueError, match="its speed has to be positive"):
        Link(gbps)


RECORDS, SIZE, GBPS = 20, 25_000_000, 1.0


def by_the_machine_s_clock(ahead: int) -> float:
    """Seconds that it takes to send records with nothing to compute, `ahead` of them under way at a time."""
    link, under_way = Link(GBPS), []
    began = time.perf_counter()
    for _ in range(RECORDS):
        under_way.append(link.send(SIZE))
        if len(under_way) == ahead:
            link.wait(under_way.pop(0))
    for arrival in under_way:
        link.wait(arrival)
    return time.perf_counter() - began


@pytest.mark.parametrize("ahead", [1, 4])
def test_an_empty_run_moves_what_it_should(ahead):
    """Within 2 %. A machine that is busy may be late, though never early: the best of some attempts counts."""
    should = RECORDS * SIZE / GBPS / 1e9
    assert should == pytest.approx(0.5)
    times = []
    while len(times) < 5 and not (times and min(times) < 1.02 * should):
        times.append(by_the_machine_s_clock(ahead))
    assert should <= min(times) < 1.02 * should


# --- demand and prefetch


class Steady:
    """A clock that goes on when it is told to, and hardly at all when it is read: enough for who waits in a loop."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-4
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def steady(gbps: float | None = 1.0, ahead: int = 4) -> tuple[Link, Steady]:
    """A link on which a transfer of n million bytes takes n ms, and its clock in ms."""
    clock = Steady()
    return Link(gbps, lambda: clock() / 1e3, lambda s: clock.sleep(1e3 * s), ahead), clock


MB = 1_000_000


def test_demand_overtakes_what_is_queued_and_not_what_has_started():
    link, clock = steady()
    first, second = link.queue(10 * MB), link.queue(10 * MB)
    assert first.started and not second.started and link.queued == 1
    clock.now = 4.0
    assert link.send(5 * MB) == pytest.approx(0.015, abs=1e-5) and link.bytes == 15 * MB
    clock.now = 15.0
    link.settle()
    assert second.arrives == pytest.approx(0.025, abs=1e-5) and not link.has_arrived(second) and link.has_arrived(first)
    link.wait(second)
    assert clock.now == pytest.approx(25.0, abs=0.3) and link.stalled == pytest.approx(0.010, abs=3e-4)
    assert link.busy == pytest.approx(0.025, abs=1e-5)


def test_the_queue_is_as_if_it_had_been_watched():
    """What nobody looked at for long has started one after another, the lowest number first."""
    link, clock = steady()
    link.send(10 * MB)
    order = [link.queue(2 * MB, priority) for priority in (3, 1, 2, 1)]
    clock.now = 100.0
    assert link.queued == 0 and [t.arrives for t in order] == pytest.approx([0.018, 0.012, 0.016, 0.014], abs=1e-5)
    assert link.busy == pytest.approx(0.018, abs=1e-5)
    late = link.queue(2 * MB)
    assert late.arrives == pytest.approx(0.102, abs=1e-5)  # an idle link does not catch up


def test_what_is_queued_can_be_cancelled_or_promoted():
    link, clock = steady()
    sent, cancelled, promoted, left = (link.queue(10 * MB) for _ in range(4))
    clock.now = 1.0
    assert link.cancel(cancelled) and not link.cancel(cancelled) and not link.cancel(sent)
    assert link.promote(promoted) and not link.promote(promoted) and not link.promote(sent)
    assert (promoted.arrives, promoted.demand, sent.demand) == (pytest.approx(0.020, abs=1e-5), True, False)
    with pytest.raises(ValueError, match="promote it first"):
        link.wait(left)
    assert link.send(10 * MB) == pytest.approx(0.030, abs=1e-5)  # what was promoted is in front of it, what is left behind it
    clock.now = 31.0
    link.settle()
    assert left.arrives == pytest.approx(0.040, abs=1e-5) and cancelled.arrives is None and link.bytes == 40 * MB


class Arriving:
    """What is on its way over a real link."""

    def __init__(self):
        self.there = False

    def is_ready(self) -> bool:
        return self.there


def test_over_a_real_link_a_few_prefetches_are_on_their_way():
    link, _ = steady(None, 2)
    sent = [Arriving() for _ in range(4)]
    begun, ready = [], {3: False}

    def start(i: int):
        begun.append(i)
        return sent[i]

    transfers = [link.queue(MB, i == 0, lambda i=i: start(i), lambda i=i: ready.get(i, True)) for i in range(4)]
    assert begun == [0, 1] and link.queued == 2 and link.bytes == 2 * MB
    assert not link.has_arrived(transfers[0]) and not link.has_arrived(transfers[2])
    sent[0].there = sent[1].there = True
    assert link.queued == 1 and begun == [0, 1, 2] and link.has_arrived(transfers[0])  # the fourth is still read from somewhere
    assert link.promote(transfers[3]) and begun == [0, 1, 2, 3] and transfers[3].demand
    link.wait(transfers[3])
    assert link.stalled == 0 and link.busy == 0 and link.seconds(MB) is None


def by_ticks(events: list[tuple[int, str, int, int]], end: int) -> dict[int, int]:
    """Arrivals by number of a link that is watched at every tick; a reference written out."""
    by_time = {at: (what, n, length) for at, what, n, length in events}
    demand: list[tuple[int, int]] = []
    queue: list[tuple[int, int]] = []
    free, out = 0, {}
    for now in range(end):
        what, n, length = by_time.get(now, ("", 0, 0))
        if what in ("send", "queue"):
            (demand if what == "send" else queue).append((n, length))
        elif found := [q for q in queue if q[0] == n and what]:
            queue.remove(found[0])
            demand += found if what == "promote" else []
        if now >= free and (demand or queue):
            n, length = (demand or queue).pop(0)
            free = out[n] = now + length
    return out


@pytest.mark.parametrize("seed", range(8))
def test_random_events_go_as_on_a_link_that_is_watched(seed):
    """Lengths are multiples of 50 and no two events come at the same time modulo 50, so that none comes as a transfer ends."""
    rng = random.Random(seed)
    events, kinds = [], ("send", "queue", "queue", "cancel", "promote")
    for n, at in enumerate(sorted(rng.choices(range(0, 3000, 50), k=40))):
        what = rng.choice(kinds)
        events.append((at + n, what, rng.randrange(n + 1) if what in ("cancel", "promote") else n, rng.choice((50, 150, 300))))
    link, clock = steady()
    transfers, got = {}, {}
    for at, what, n, length in events:
        clock.now = float(at)
        if what == "send":
            got[n] = link.send(length * MB)
        elif what == "queue":
            transfers[n] = link.queue(length * MB)
        elif n in transfers:
            (link.cancel if what == "cancel" else link.promote)(transfers[n])
    clock.now = 9999.0
    link.settle()
    got |= {n: t.arrives for n, t in transfers.items() if t.started}
    expected = by_ticks(events, 9999)
    assert {n: round(1e3 * arrival) for n, arrival in got.items()} == expected and len(expected) > 10
