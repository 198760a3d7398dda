"""What ways to compute a prompt come to: the published numbers, and groups that keep the gap they promise."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.engine.serving.cost import Bounds, chunked, groups_for, layered

STREAM = 48 * 128 * 3 * 2048 * 768 * 2 / 2
"""Half of Qwen3-30B-A3B's experts in bfloat16."""


def test_published_toy_numbers():
    """An 8,192 token prompt at 25 GB/s and 36 ms a decoding step, half of the experts on the device."""
    whole, by_256, by_1024 = (chunked(STREAM, 25e9, n, 0.0) for n in (1, 32, 8))
    assert (round(whole.first, 1), round(by_256.first), round(by_1024.first, 1)) == (1.2, 37, 9.3)
    eight = layered(STREAM, 25e9, 8, 0.036)
    assert round(eight.first, 2) == 1.45 and round(eight.gap, 2) == 0.18
    assert by_256.bytes == 32 * eight.bytes


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.floats(1e6, 1e11), st.floats(1e8, 1e11), st.floats(0.001, 0.1), st.floats(0.001, 1))
def test_groups_keep_the_gap_and_one_fewer_does_not(stream, bandwidth, t_dec, more):
    groups = groups_for(stream, bandwidth, t_dec + more, t_dec)
    assert layered(stream, bandwidth, groups, t_dec).gap <= (t_dec + more) * (1 + 1e-6)
    assert groups == 1 or layered(stream, bandwidth, groups - 1, t_dec).gap > t_dec + more


def test_computing_hides_copies_or_is_hidden():
    assert layered(25e9, 25e9, 4, 0.1, compute=3.0) == Bounds(pytest.approx(3.4), pytest.approx(0.85), 25e9)
    assert chunked(25e9, 25e9, 2, 0.1, compute=3.0).gap == pytest.approx(1.6)
    assert layered(25e9, 25e9, 4, 0.1, compute=3.0, overlapped=False).first == pytest.approx(4.4)
    assert chunked(25e9, 25e9, 2, 0.1, compute=3.0, overlapped=False).gap == pytest.approx(2.6)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: groups_for(1e9, 1e9, 0.1, 0.1), "a gap of 0.1 s leaves nothing"),
        (lambda: groups_for(1e9, 0, 1, 0.1), "a link of 0 bytes"),
        (lambda: layered(-1, 1, 1, 0), "-1 bytes"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
