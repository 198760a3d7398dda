"""The model of a step's time finds the machine that steps came from, and what is derived from it keeps what it promises. About 2 seconds."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.engine.serving.cost import (
    Bounds,
    Online,
    Step,
    StepModel,
    chunk_for,
    chunked,
    distinct_experts,
    errors,
    fit,
    groups_for,
    held_out,
    layered,
    observe,
    swap_or_recompute,
)

MACHINE = StepModel(fix=0.004, base=0.002, token=2e-5, context=3e-9, byte=1 / 25e9, overlapped=True)
SERIAL = StepModel(fix=0.006, base=0.0, token=2e-5, context=3e-9, byte=1 / 25e9, overlapped=False)


def measured(machine: StepModel, n: int, noise: float = 0.0, seed: int = 0, link: float = 1.0) -> list[Step]:
    """Steps of all kinds: decoding alone, chunks of several sizes, with few or many bytes to bring."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        tokens = int(rng.integers(1, 32) if rng.random() < 0.6 else rng.integers(64, 2048))
        context = int(tokens * rng.integers(100, 8000))
        size = int(rng.integers(0, 2_000_000_000) * link) if rng.random() < 0.7 else 0
        out.append(Step(tokens, context, size, machine.seconds(tokens, context, size) * float(np.exp(noise * rng.normal()))))
    return out


@pytest.mark.parametrize("machine", [MACHINE, SERIAL], ids=["overlapped", "serial"])
def test_the_machine_is_found_from_exact_steps(machine):
    found = fit(measured(machine, 200))
    assert found.overlapped == machine.overlapped
    for name, value in dataclasses.asdict(machine).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6, abs=1e-15), name


@pytest.mark.parametrize("machine", [MACHINE, SERIAL], ids=["overlapped", "serial"])
def test_error_on_steps_left_out_is_that_of_the_noise(machine):
    model, error = held_out(measured(machine, 400, noise=0.1))
    assert model.overlapped == machine.overlapped
    # A perfect model misses log-normal noise of 0.1 by 0.08 on average.
    assert 0.05 < error < 0.1
    wrong, worse = held_out(measured(machine, 400, noise=0.1), overlapped=not machine.overlapped)
    assert wrong.overlapped != machine.overlapped and worse > error


def test_steps_of_one_kind_are_enough_for_that_kind():
    alone = [Step(8, 8000, 0, 0.010)] * 3
    assert fit(alone).seconds(8, 8000, 0) == pytest.approx(0.010)
    # Never a byte copied: nothing is said about the link.
    assert fit(alone).byte == 0


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_numbers_are_never_negative_and_never_worse_than_a_constant(seed, n):
    rng = np.random.default_rng(seed)
    steps = [Step(*map(int, rng.integers(0, 1000, 3)), float(rng.uniform(0.001, 1))) for _ in range(n)]
    model = fit(steps)
    assert min(model.fix, model.base, model.token, model.context, model.byte) >= 0
    seconds = np.array([s.seconds for s in steps])
    constant = (1 / seconds).sum() / (1 / seconds**2).sum()
    assert (errors(model, steps) ** 2).sum() <= ((constant / seconds - 1) ** 2).sum() + 1e-9


def test_online_error_is_of_steps_not_seen_and_follows_a_change():
    state = Online(window=128, every=16)
    assert state.error is None
    for step in measured(MACHINE, 128, noise=0.02):
        state = observe(state, step)
    assert state.error is not None and state.error < 0.1 and len(state.steps) == 128
    slower = dataclasses.replace(MACHINE, byte=MACHINE.byte * 4)
    for step in measured(slower, 256, noise=0.02, seed=1):
        state = observe(state, step)
    assert state.model is not None and state.model.byte == pytest.approx(slower.byte, rel=0.05)
    assert state.seen == 384 and len(state.steps) == len(state.missed) == 128
    assert state.error < 0.1


def test_bad_steps_are_named():
    with pytest.raises(ValueError, match="at least one step"):
        fit([])
    with pytest.raises(ValueError, match="seconds=0.0"):
        fit([Step(1, 1, 1, 0.0)])
    with pytest.raises(ValueError, match="tokens=-1"):
        fit([Step(-1, 1, 1, 1.0)])
    with pytest.raises(ValueError, match="3 steps, every 5-th left out"):
        held_out([Step(1, 1, 1, 1.0)] * 3)


# --- What follows

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


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(1, 64), st.integers(1, 40), st.floats(0, 0.2))
def test_the_largest_chunk_that_keeps_the_gap(run, runs, slo):
    chunk = chunk_for(slo, lambda n: MACHINE.seconds(n + 8, 8000, 1e6 * n), run, runs * run)
    kept = [n for n in range(run, runs * run + 1, run) if MACHINE.seconds(n + 8, 8000, 1e6 * n) <= slo]
    assert chunk == max(kept, default=0)


def test_swapping_beats_recomputing_where_experts_are_streamed():
    # 2,048 tokens of 98 KB each there and back: 16 ms. Computed again: 2.3 s of experts.
    assert swap_or_recompute(2048, 98_304, 25e9, 2.3) == "swap"
    assert swap_or_recompute(2048, 98_304, 25e9, 0.010) == "recompute"
    assert swap_or_recompute(2048, 98_304, 25e9, 0.010, host_tokens=2048) == "swap"


def test_distinct_experts_of_uniform_routing():
    table = {(8, 2): [2, 3.5, 4.6, 6.1, 7.4], (64, 6): [6, 11.4, 16.4, 24.9, 37.6], (128, 8): [8, 15.5, 22.5, 35.3, 56.4]}
    for (experts, active), expected in table.items():
        assert [round(distinct_experts(n, experts, active), 1) for n in (1, 2, 3, 5, 9)] == expected
    rng = np.random.default_rng(0)
    drawn = np.mean([len(np.unique([rng.permutation(64)[:6] for _ in range(9)])) for _ in range(300)])
    assert drawn == pytest.approx(distinct_experts(9, 64, 6), rel=0.02)
    grown = 8.0
    for _ in range(4):
        grown += 0.55 * 8 * (1 - grown / 128)
    assert distinct_experts(5, 128, 8, reuse=0.45) == pytest.approx(grown)
    assert distinct_experts(0, 8, 2) == 0 and distinct_experts(9, 8, 2, reuse=1.0) == 2


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
        (lambda: chunk_for(1.0, float, 32, 100), "chunks of up to 100 tokens in runs of 32"),
        (lambda: swap_or_recompute(5, 1, 1, 1, host_tokens=6), "6 tokens on the host of a sequence of 5"),
        (lambda: layered(-1, 1, 1, 0), "-1 bytes"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
