"""The event model against sums by hand, against the real link and staging on a clock of their own, and against the trends that were published."""

import types

import numpy as np
import pytest

from jaxmoe.offload.event_model import Costs, Measured, Setting, fit_costs, gain, ranked, run, synthetic
from jaxmoe.offload.link import SPIN_SECONDS, Link
from jaxmoe.offload.prefetch import Prefetch
from jaxmoe.offload.staging import Staging
from jaxmoe.offload.trace import PROMPT, used_steps
from tests.offload import traces

S, L, E, A = 12, 6, 16, 4


def routing(seed: int = 0) -> np.ndarray:
    """[S, L, E] with A experts used in each layer."""
    return np.argsort(np.random.default_rng(seed).random((S, L, E)), axis=2) < A


NONE, ALL = np.zeros((S, L, E), bool), np.ones((S, L, E), bool)


def test_without_misses_a_step_is_its_computing():
    costs = Costs(front=2.0, copy=99.0, hits=1.0, hit=0.25, host=0.5, rest=7.0)
    found = run(routing(), ALL, costs)
    assert found.seconds == pytest.approx(L * (2 + 0.5 + 1 + A * 0.25) + 7) and found.demand == 0 and found.link_share == 0


@pytest.mark.parametrize(("copy", "layer"), [(0.1, 3 + 4 * 0.5), (5.0, 2 + 4 * 5 + 0.5)])
def test_with_misses_alone_a_layer_waits_for_the_link_or_computes(copy, layer):
    """Over a fast link all are landed after the hits' second, over a slow one the last when it has come."""
    found = run(routing(), NONE, Costs(front=2.0, copy=copy, hits=1.0, land=0.5))
    assert found.seconds == pytest.approx(L * layer) and found.demand == S * L * A
    assert found.link_share == pytest.approx(A * copy / layer)


@pytest.mark.parametrize("copy", [0.2, 0.7, 1.0, 2.0])
def test_who_knows_all_is_bound_by_computing_or_by_the_link(copy):
    """With room for everything, every layer after a step's first takes the longer of the two, once what the first one missed is made up for."""
    found = run(routing(), NONE, Costs(front=1.5, copy=copy, hits=1.5), synthetic(routing(), 1.0, depth=L), Setting(E, L * E))
    bound = max(3.0, A * copy)
    assert bound * L <= found.seconds + 1e-9 <= bound * L + 3.0 + A * copy
    assert found.wasted == found.cancelled == 0 and found.demand >= A * S


def test_wrong_predictions_cost_the_link():
    """Over a slow link a wrong one holds demand back; over a fast one it costs nothing."""
    wrong = synthetic(routing(), 0.0)
    slow, fast = (gain(routing(), NONE, Costs(1.0, copy, 1.0), wrong)[0] for copy in (4.0, 0.05))
    assert slow < 0.95 and fast == pytest.approx(1.0)


def test_synthetic_candidates_are_right_as_often_as_they_should_be():
    used = np.concatenate([routing(seed) for seed in range(10)])
    for recall in (0.0, 0.6, 1.0):
        for frequent in (False, True):
            ahead = synthetic(used, recall, frequent=frequent)
            right = np.mean([used[s, target, e] for s in range(len(used)) for layer in range(L) for target, e in ahead[s][layer]])
            assert right == pytest.approx(recall, abs=0.03)
    assert {len(ahead[0][layer]) for layer in range(L - 1)} == {A} and ahead[0][L - 1] == []


def test_scores_become_candidates():
    scores = np.zeros((3, 4), np.float32)
    scores[1], scores[2] = (0.2, 0.9, 0, 0.5), (0, 0, 0.1, 0)
    found = ranked(lambda s, layer: scores if (s, layer) == (0, 0) else None, 2, 3, depth=2, most=2)
    assert found == [[[(1, 1), (1, 3), (2, 2)], [], []], [[], [], []]]


class Clock:
    """A clock in seconds that goes on when it is told to, and hardly when it is read. It sleeps until what would be spent in a loop is over, too."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-9
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds + SPIN_SECONDS


def by_the_real_ones(used_SLE: np.ndarray, resident_SLE: np.ndarray, costs: Costs, ahead, setting: Setting) -> tuple[np.ndarray, dict]:
    """Seconds of each step, and counts, with the engine's own link and staging in the order in which a step calls them."""
    clock = Clock()
    link = Link(1e-3 / costs.copy, clock, clock.sleep)
    source = types.SimpleNamespace(record_bytes=1_000_000, ask=lambda layer, expert: lambda: True)
    settings = Prefetch(setting.staging, 1, setting.width, least=1e-6, switching=False)
    staging = Staging(settings, link, source, *used_SLE.shape[1:], put=lambda record: record)
    seconds = []
    for s, used_LE in enumerate(used_SLE):
        began = clock.now
        staging.begin()
        for layer, used_E in enumerate(used_LE):
            clock.now += costs.front
            missing = np.flatnonzero(used_E & ~resident_SLE[s, layer]).tolist()
            held, _ = staging.ask(layer, missing)
            arrivals = []
            for _ in set(missing) - set(held):
                arrivals.append(link.send(source.record_bytes))
                staging.demanded()
            scores = np.zeros(used_LE.shape, np.float32)
            for rank, key in enumerate(ahead[s][layer]):
                scores[key] = 1 - rank / 100
            staging.foresee(layer, scores, resident_SLE[s])
            clock.now += costs.hits
            for record in sorted(held.values(), key=lambda h: (h.transfer.demand, h.transfer.arrives)):
                staging.land(record)
                clock.now += costs.land
            for arrival in arrivals:
                link.wait(arrival)
                clock.now += costs.land
        seconds.append(clock.now - began)
    counts = {name: getattr(staging.counters, name) // source.record_bytes for name in ("useful", "late", "wasted", "cancelled", "demand")}
    return np.array(seconds), counts


@pytest.mark.parametrize("copy", [0.15, 0.6, 1.7])
@pytest.mark.parametrize("recall", [0.3, 0.9])
@pytest.mark.parametrize("width", [1, 3])
def test_the_engine_s_link_and_staging_do_what_the_model_says(copy, recall, width):
    """With room for all: two programs, one clock each."""
    used, resident = routing(), np.random.default_rng(1).random((S, L, E)) < 0.4
    costs, ahead = Costs(front=1.0, copy=copy, hits=0.77, land=0.21), synthetic(used, recall, 3)
    setting = Setting(width, L * E)
    found = run(used, resident, costs, ahead, setting)
    seconds, counts = by_the_real_ones(used, resident, costs, ahead, setting)
    np.testing.assert_allclose(found.seconds_S, seconds, rtol=1e-5)
    assert counts == {name: getattr(found, name) for name in counts}


def recent(used_SLE: np.ndarray, slots: int) -> np.ndarray:
    """What LRU holds before every step."""
    last, out = np.full(used_SLE.shape[1:], -1), np.zeros(used_SLE.shape, bool)
    for s, used_LE in enumerate(used_SLE):
        rank = np.argsort(np.argsort(-last, axis=1, kind="stable"), axis=1)
        out[s] = (rank < slots) & (last >= 0)
        last[used_LE] = s
    return out


def test_the_published_trend():
    """Qwen3-30B-A3B at two times its active experts, by LRU: gains fall with slower links and rise with better predictions.

    Published for r = 1 at 0.3, 0.65, 1.3 and 3 copies a layer: 1.44, 1.34, 1.19, 1.08.
    """
    used, phase = used_steps(traces.real(traces.QWEN))
    kept = np.flatnonzero(phase != PROMPT)[40:60]
    used, resident = used[kept], recent(used, 12)[kept]
    found = {}
    for recall in (0.6, 1.0):
        ahead = synthetic(used, recall)
        for copy in (0.3, 0.65, 1.3, 3.0):
            settings = [Setting(width, 2 * width) for width in ((2, 4) if copy < 1 else (1,))]
            found[recall, copy] = gain(used, resident, Costs(0.5, copy, hit=1 / 12, land=1 / 12), ahead, settings)[0]
    perfect = [found[1.0, copy] for copy in (0.3, 0.65, 1.3, 3.0)]
    assert perfect == sorted(perfect, reverse=True) and perfect == pytest.approx([1.44, 1.34, 1.19, 1.08], rel=0.12)
    assert all(found[0.6, copy] < found[1.0, copy] - 0.02 for copy in (0.3, 0.65, 1.3, 3.0)) and found[0.6, 3.0] < 1 < found[0.6, 0.3]


def test_costs_are_found_again():
    """From the times that known costs give over two links and with all experts there, and another link's time is foretold."""
    used, resident = routing(), np.random.default_rng(1).random((S, L, E)) < 0.4
    true = Costs(front=0.8, copy=0.0, hits=0.5, land=0.1)

    def seconds(copy: float, there: np.ndarray = resident) -> float:
        return run(used, there, Costs(0.8, copy, 0.5, land=0.1)).seconds

    for fast in (0.0, 0.3):
        found = fit_costs(Measured(seconds(fast), fast), Measured(seconds(1.0), 1.0), used, resident, seconds(0.0, ALL))
        assert (found.front, found.hits, found.land, found.copy) == pytest.approx((true.front, true.hits, true.land, 1.0), rel=0.02)
    with pytest.raises(ValueError, match="tell nothing apart: give a slower one"):
        fit_costs(Measured(1.0, 0.3), Measured(1.0, 0.3), used, resident)
