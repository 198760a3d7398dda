"""Bootstrap intervals against plain loops and known coverage."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmoe.report import intervals


def test_blocks_are_neighbours_round_the_end_and_every_draw_has_as_many_units():
    counts = intervals.resample(10, seed=3, block=4, draws=200)
    assert (counts.sum(1) == 10).all()
    single = intervals.resample(10, seed=3, block=10, draws=50)
    assert (single == 1).all()  # one block of all units is all units, wherever it begins
    rng = np.random.default_rng(3)
    starts = rng.integers(0, 10, (200, 3))
    for draw in (0, 17):
        places = [(start + i) % 10 for start in starts[draw] for i in range(4)][:10]
        np.testing.assert_array_equal(counts[draw], np.bincount(places, minlength=10))


def test_a_share_is_the_ratio_of_sums_and_its_limits_are_those_of_a_loop():
    parts, wholes = np.array([1, 4, 2, 9]), np.array([2, 5, 8, 10])
    counts = intervals.resample(4, seed=1, draws=300)
    found = intervals.share(parts, wholes, counts)
    drawn = [sum(n * p for n, p in zip(draw, parts, strict=True)) / sum(n * w for n, w in zip(draw, wholes, strict=True)) for draw in counts]
    assert found.value == pytest.approx(16 / 25)
    np.testing.assert_allclose([found.low, found.high], np.quantile(drawn, [0.025, 0.975]))
    assert found.sure


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    easy = rng.integers(10, 90, 60)
    wholes = np.full(60, 100)
    counts = intervals.resample(60)
    apart = [intervals.share(easy + extra, wholes, counts) for extra in (0, 2)]
    assert apart[1].low < apart[0].high  # the units differ by far more than the two
    found = intervals.difference(easy + 2, easy, wholes, counts)
    assert (found.value, found.low, found.high) == pytest.approx((0.02, 0.02, 0.02))
    assert not intervals.difference(easy, easy, wholes, counts).sure


def test_blocks_widen_the_interval_of_dependent_steps():
    steps = np.repeat(np.random.default_rng(5).random(16), 16)
    wide, narrow = (intervals.share(steps, np.ones(256), intervals.resample(256, block=block)) for block in (16, 1))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_coverage_is_near_the_level():
    rng, held = np.random.default_rng(7), 0
    for trial in range(200):
        hits = rng.binomial(20, 0.3, 40)
        found = intervals.share(hits, np.full(40, 20), intervals.resample(40, trial, draws=200))
        held += found.low <= 0.3 <= found.high
    assert 178 <= held <= 199  # 95 % of 200, give or take what 200 trials and 200 draws leave open


@pytest.mark.parametrize(("units", "block"), [(0, 1), (4, 0)])
def test_nothing_to_draw_from_is_an_error(units, block):
    with pytest.raises(ValueError, match=f"{units} units in blocks of {block}"):
        intervals.resample(units, block=block)
