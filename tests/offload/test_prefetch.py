"""What is sent ahead, how much, how far and whether at all; and what becomes of every record, on a link with a clock of its own."""

import dataclasses
import types

import numpy as np
import pytest

from jaxmoe.offload import prefetch
from jaxmoe.offload.link import Link
from jaxmoe.offload.prefetch import HOLD, LONGEST_HOLD, SPAN, SPANS, Prefetch, Switch
from jaxmoe.offload.staging import Staging

# --- pure decisions


def test_the_rules_say_what_their_sources_say():
    """By hand: 10 ms a layer, 2 ms a record, 1.5 misses leave room for 3.5 records."""
    assert prefetch.slack(10, 2, 1.5) == 3.5 and prefetch.slack(10, 20, 1.5) == 0
    assert [prefetch.width(s, 4) for s in (0, 0.4, 1.9, 3.5, 9)] == [1, 1, 1, 3, 4]
    assert prefetch.first_horizon(3, 2, 10, 4) == 1 and prefetch.first_horizon(3, 10, 10, 4) == 3 and prefetch.first_horizon(9, 10, 10, 4) == 4
    moves = [prefetch.next_horizon(2, *why, 3) for why in ((True, False), (False, True), (True, True), (False, False))]
    assert moves == [3, 1, 2, 2] and prefetch.next_horizon(3, True, False, 3) == 3 and prefetch.next_horizon(1, False, True, 3) == 1


@pytest.mark.parametrize("gap", [0.1, 0.5, 0.9, 3.0])
def test_a_record_is_sent_from_the_chance_at_which_it_does_not_lose(gap):
    """Against both outcomes weighed by hand."""
    least = prefetch.threshold(gap, 1e-9)

    def expected(p: float) -> float:
        return p * min(gap, 1) - (1 - p) * max(0, 1 - gap)

    assert expected(least + 1e-6) >= 0 and (least <= 1e-9 or expected(least - 1e-6) < 0)


def test_the_likeliest_that_are_not_there_are_chosen():
    score = np.array([0.5, 0.9, 0.1, 0.9, 0.04, 0.6])
    taken = np.array([0, 0, 0, 1, 0, 0], bool)
    assert prefetch.choose(score, taken, 3, 0.05) == [1, 5, 0] and prefetch.choose(score, taken, 9, 0.05) == [1, 5, 0, 2]
    assert prefetch.choose(score, taken, 2, 0.05, np.array([4, 1, 10, 9, 9, 1])) == [0, 2]
    assert prefetch.priority(3, 0.1) < prefetch.priority(4, 0.9) < prefetch.priority(4, 0.1)


@pytest.mark.parametrize("wrong", [{"staging": 0}, {"depth": 0}, {"width": -1}, {"least": 0.0}, {"least": 1.5}])
def test_settings_that_make_no_sense_are_refused(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"{name} = {value} of prefetching"):
        Prefetch(**wrong)


# --- the switch


def drive(switch: Switch, seconds, steps: int, kind: int = 0) -> tuple[Switch, list[bool]]:
    """Some steps of `seconds(on, step)`; whether each was on."""
    seen = []
    for step in range(steps):
        seen.append(switch.on)
        switch = switch.after(seconds(switch.on, step), kind)
    return switch, seen


TRIAL = SPAN * SPANS


def test_a_trial_runs_with_and_without_in_turn():
    switch, seen = drive(Switch(), lambda on, step: 1.0, TRIAL)
    assert seen == ([True] * SPAN + [False] * SPAN) * (SPANS // 2)
    assert not switch.trial and switch.verdict is False and switch.gain == 1.0  # no gain: off


@pytest.mark.parametrize(("with_it", "verdict"), [(0.8, True), (1.2, False)])
def test_it_stays_on_where_steps_are_faster_and_off_where_they_are_not(with_it, verdict):
    """A few steps that something else disturbed, and the first of every span, don't count."""

    def seconds(on: bool, step: int) -> float:
        return 50.0 if step % SPAN == 0 or step in (2, 7) else with_it if on else 1.0

    switch, _ = drive(Switch(), seconds, TRIAL if verdict else 2 * SPAN)  # what clearly loses is not tried to the end
    assert not switch.trial and switch.verdict is verdict and switch.gain == pytest.approx(1 / with_it)
    _, seen = drive(switch, seconds, HOLD)
    assert seen == [verdict] * HOLD


@pytest.mark.parametrize(("gain", "verdict"), [(1.08, True), (0.93, False)])
def test_what_steps_happen_to_miss_does_not_decide(gain, verdict):
    """Steps miss 10 to 30 experts of a millisecond each, and those with prefetching more of them where it pays and fewer where it does not."""
    rng = np.random.default_rng(0)

    def run(told: bool) -> Switch:
        switch = Switch()
        while switch.trial:
            misses = int(rng.integers(10, 26)) + 5 * (switch.on == verdict)
            seconds = (5 + misses) / (gain if switch.on else 1)
            switch = switch.after(seconds, misses=misses if told else 0)
        return switch

    told = [run(True) for _ in range(50)]
    assert all(switch.verdict is verdict for switch in told)
    assert np.median([switch.gain for switch in told]) == pytest.approx(gain, rel=0.03)
    assert sum(run(False).verdict is not verdict for _ in range(50)) > 25  # the times alone say the opposite more often than not


def test_disturbed_steps_do_not_move_what_a_miss_costs():
    steps = [prefetch.Timed(2.0 + 0.5 * m, m) for m in (3, 9, 4, 8, 6)]
    other = [prefetch.Timed(1.0 + 0.5 * m, m) for m in (7, 2, 5, 6, 10)]
    disturbed = [*steps, prefetch.Timed(60.0, 4)]
    assert prefetch.level(steps, other) == pytest.approx([5.0, 4.0])
    typical = (sum(s.misses for s in (*disturbed, *other))) / 11
    assert prefetch.level(disturbed, other) == pytest.approx([2.0 + 0.5 * typical, 1.0 + 0.5 * typical])
    assert prefetch.level([prefetch.Timed(1.0, 3)], [prefetch.Timed(2.0, 9)]) == [1.0, 2.0]  # a slope needs two of a kind


def test_it_tries_again_ever_more_rarely_and_follows_a_change():
    switch, holds, faster = Switch(), [], False
    for _ in range(9):
        switch, _ = drive(switch, lambda on, step: 0.5 if on == faster else 1.0, 2 * SPAN)  # clearly slower with it: no longer a trial
        holds.append(switch.length)
        switch, seen = drive(switch, lambda on, step: 1.0, switch.length)
        assert switch.trial and set(seen) == {faster}
    assert holds == [min(HOLD << i, LONGEST_HOLD) for i in range(9)]
    faster = True
    switch, _ = drive(switch, lambda on, step: 0.5 if on else 1.0, TRIAL)
    assert switch.verdict is True and switch.length == HOLD


def test_times_of_different_batches_are_not_compared():
    switch, _ = drive(Switch(), lambda on, step: 1.0, TRIAL - 1)
    switch, _ = drive(switch, lambda on, step: 9.0, 1, kind=4)
    assert switch == Switch(kind=4)


# --- staging

SIZE, LAYERS, EXPERTS = 1_000_000, 4, 6


class Bench:
    """A staging over a link on which a record takes 1 ms, and a clock in ms."""

    def __init__(self, **settings):
        self.now, self.failing = 0.0, set()
        self.link = Link(1.0, self._tick, self._sleep)
        source = types.SimpleNamespace(record_bytes=SIZE, ask=self._ask)
        given = {"depth": 1, "width": 2, "switching": False} | settings
        self.staging = Staging(Prefetch(**given), self.link, source, LAYERS, EXPERTS, lambda record: record)
        self.resident = np.zeros((LAYERS, EXPERTS), bool)
        self.staging.begin()

    def _tick(self) -> float:
        self.now += 1e-4
        return self.now / 1e3

    def _sleep(self, seconds: float) -> None:
        self.now += 1e3 * seconds

    def _ask(self, layer: int, expert: int):
        def give():
            if (layer, expert) in self.failing:
                raise OSError("damaged")
            return layer, expert

        return give

    def foresee(self, layer: int, *wanted: tuple[int, int, float], following=None) -> None:
        scores = np.zeros((LAYERS, EXPERTS), np.float32)
        for target, expert, score in wanted:
            scores[target, expert] = score
        self.staging.foresee(layer, scores, self.resident, following)

    @property
    def held(self) -> set[tuple[int, int]]:
        return set(self.staging._held)

    def counts(self) -> dict[str, int]:
        """In records; those that are zero are left out."""
        return {k: v // SIZE for k, v in dataclasses.asdict(self.staging.counters).items() if v}


def test_what_is_resident_or_under_way_is_not_sent_again():
    b = Bench(width=3, staging=9)
    b.resident[1, 0] = True
    b.foresee(0, (1, 0, 0.9), (1, 1, 0.8), (1, 2, 0.7))
    assert b.held == {(1, 1), (1, 2)} and b.staging.staged(1).nonzero()[0].tolist() == [1]  # the other one is queued
    b.foresee(0, (1, 0, 0.9), (1, 1, 0.8), (1, 2, 0.7), (1, 3, 0.2), (1, 4, 0.1), (2, 0, 1.0))
    assert b.held == {(1, 1), (1, 2), (1, 3)}  # three at a turn, and one layer ahead


def test_the_nearest_layer_goes_first_then_the_likeliest():
    b = Bench(depth=3, staging=9)
    b.link.send(SIZE)
    b.foresee(-1, (2, 0, 1.0), (1, 0, 0.2), (1, 1, 0.3), (0, 5, 0.1))
    b.now = 10.0
    b.link.settle()
    arrivals = {key: held.transfer.arrives for key, held in b.staging._held.items()}
    assert sorted(arrivals, key=arrivals.get) == [(0, 5), (1, 1), (1, 0), (2, 0)]


def test_true_routing_corrects_what_is_queued():
    b = Bench(width=4, staging=9)
    b.foresee(0, (1, 0, 0.9), (1, 1, 0.8), (1, 2, 0.7), (1, 3, 0.6))
    found, promoted = b.staging.ask(1, [1, 3, 5])
    assert set(found) == {1, 3} and promoted == 2 and b.held == {(1, 0), (1, 1), (1, 3)}  # the first is on its way, and stays
    assert b.counts() == {"cancelled": 1, "demand": 2}
    assert [b.staging.land(found[e]) for e in (1, 3)] == [(1, 1), (1, 3)] and b.now == pytest.approx(3.0, abs=0.3)
    assert b.counts() == {"cancelled": 1, "demand": 2} and b.staging.held_bytes() == SIZE


def test_what_arrived_in_time_is_useful_and_what_did_not_is_late():
    b = Bench(staging=9)
    b.foresee(0, (1, 0, 0.9), (1, 1, 0.8))
    b.now = 1.5
    found, _ = b.staging.ask(1, [0, 1])
    for held in found.values():
        b.staging.land(held)
    assert b.counts() == {"useful": 1, "late": 1} and b.held == set() and b.now == pytest.approx(2.0, abs=0.3)


def test_what_was_not_used_stays_for_the_next_token_while_there_is_room():
    b = Bench(staging=2)
    b.foresee(0, (1, 0, 0.9), (1, 1, 0.8))
    b.now = 5.0
    b.staging.ask(1, [4])
    b.foresee(1, (2, 3, 0.1))
    assert b.held == {(1, 0), (2, 3)} and b.counts() == {"wasted": 1}  # of two whose turn has passed, the one that was worth less
    b.now = 9.0
    b.staging.begin()
    assert set(b.staging.ask(1, [0])[0]) == {0}


def test_something_better_takes_the_place_of_what_is_worth_less():
    b = Bench(depth=2, staging=2)
    b.foresee(0, (1, 0, 0.9), (2, 1, 0.3))
    b.foresee(0, (1, 0, 0.9), (1, 2, 0.2), (2, 1, 0.3))
    assert b.held == {(1, 0), (2, 1)}  # nothing that is needed goes for less
    b.foresee(0, (1, 0, 0.9), (1, 2, 0.5), (2, 1, 0.3))
    assert b.held == {(1, 0), (1, 2)} and b.counts() == {"cancelled": 1}
    b.foresee(0, (1, 0, 0.9), (1, 2, 0.5), (1, 3, 0.95), (2, 1, 1.0))
    assert b.held == {(1, 0), (2, 1)}  # what is on its way can't be dropped


def test_new_scores_cancel_what_is_no_longer_likely():
    b = Bench(depth=2, staging=9)
    b.foresee(0, (1, 0, 0.9), (2, 1, 0.3))
    b.foresee(1, (3, 0, 0.2))  # nothing is known of layer 2
    assert (2, 1) in b.held
    b.foresee(1, (2, 2, 0.2))
    assert (2, 1) not in b.held and b.counts() == {"cancelled": 1}


def test_the_next_step_is_part_of_what_lies_ahead():
    b = Bench(depth=2, staging=9)
    following = np.zeros((LAYERS, EXPERTS), np.float32)
    following[0, 2] = 0.5
    b.foresee(3)
    assert b.held == set()
    b.foresee(3, following=following)
    assert b.held == {(0, 2)}
    b.now = 5.0
    b.staging.begin()
    assert set(b.staging.ask(0, [2])[0]) == {2}


def test_a_record_that_can_not_be_read_is_left_to_demand():
    b = Bench(staging=9)
    b.failing.add((1, 0))
    b.foresee(0, (1, 0, 0.9), (1, 1, 0.8))
    b.now = 5.0
    assert set(b.staging.ask(1, [0, 1])[0]) == {1} and b.held == {(1, 1)} and b.counts() == {"wasted": 1}


def test_a_step_that_failed_leaves_its_records_staged():
    b = Bench(staging=9)
    b.foresee(0, (1, 0, 0.9), (1, 1, 0.8))
    b.staging.ask(1, [0, 1])  # and then something raises
    b.staging.begin()
    b.now = 5.0
    assert {b.staging.land(held) for held in b.staging.ask(1, [0, 1])[0].values()} == {(1, 0), (1, 1)} and b.held == set()


def test_width_and_chance_follow_the_measured_times():
    """A record takes 1 ms. Layers of 10 ms leave room for many, those of a record and less for likely ones alone."""
    for seconds, chance, expected in ((0.040, 0.06, 4), (0.0020, 0.4, 0), (0.0020, 0.6, 1)):
        b = Bench(depth=None, width=None, staging=9)
        b.staging.end(seconds)
        b.foresee(0, *((1, e, chance) for e in range(6)))
        assert len(b.held) == expected, (seconds, chance)


def test_the_horizon_follows_waits_and_waste():
    b = Bench(depth=None, staging=1)
    for _ in range(LAYERS * 2):
        b.staging.demanded()
    b.staging.end(LAYERS * 0.0009)
    assert b.staging.depth == 3  # two misses of 1 ms in 0.9 ms a layer
    b.staging.begin()
    b.foresee(0, (1, 0, 0.9))
    b.staging.land(b.staging.ask(1, [0])[0][0])
    b.staging.end(0.1)
    assert b.staging.depth == 4  # waited
    for expert in (0, 1):
        b.staging.begin()
        b.foresee(0, (1, expert, 0.9))
        b.now += 5.0
        b.staging.ask(1, [])
        b.staging.end(0.1)
    assert b.staging.depth == 3 and b.counts()["wasted"] == 1


def test_while_it_is_off_nothing_is_queued_and_what_is_there_is_used():
    b = Bench(switching=True, staging=9)
    b.foresee(0, (1, 0, 0.9), (1, 1, 0.8))
    for _ in range(SPAN):
        b.staging.end(1.0)
    b.staging.begin()
    assert not b.staging.on and b.held == {(1, 0)} and b.counts() == {"cancelled": 1}
    b.foresee(0, (1, 2, 0.9))
    assert b.held == {(1, 0)} and set(b.staging.ask(1, [0])[0]) == {0}
    b.staging.clear()
    assert b.held == set() and b.counts() == {}
