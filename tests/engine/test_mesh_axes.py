"""Stages and divided positions: prompts in several steps, sequences side by side, and decoding give what they give on one device."""

import numpy as np
import pytest

from jaxmoe.cache.batch import Batch, join_batches, make_batch
from jaxmoe.cache.deal import deal_batch
from jaxmoe.cache.layers import init_layers
from jaxmoe.engine import steps
from jaxmoe.engine.generate import Engine, Request
from jaxmoe.engine.mesh import first_state
from tests.mesh_models import on_split
from tests.models import prefill_logits, random_model
from tests.quick import QuickKernels

LENGTHS = (75, 9, 40)
"""With a window of 40: the longest prompt takes two steps, and its end doesn't see its beginning."""
STEP, DECODED, NEW, POSITIONS = 64, 3, 20, 256
ROUNDING, TIE = 3e-5, 1e-4


@pytest.fixture(scope="module")
def model():
    return random_model("mixtral", kernels=QuickKernels("cpu"), unroll=False)


@pytest.fixture(scope="module")
def prompts(model) -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [list(map(int, rng.integers(0, model.spec.vocab, size=n))) for n in LENGTHS]


def alone(model, texts: list[list[int]]) -> list[np.ndarray]:
    """Logits of one device, all in one step."""
    return prefill_logits(model, texts, [[(i, 0, len(text)) for i, text in enumerate(texts)]], 256, positions=POSITIONS)


def cuts(requests: list[list[int]], group: list[int]) -> list[list[tuple[int, int, int, list[int]]]]:
    """Steps of pieces (request, row, start, ids): the prompts of a group of devices, as many runs a step as it has room for."""
    run, out, used = steps.run_length(STEP), [[]], 0
    for row, i in enumerate(group):
        ids = requests[i][: len(requests[i]) - DECODED]
        at = 0
        while at < len(ids):
            if used == STEP // run:
                out, used = [*out, []], 0
            piece = ids[at : at + run * (STEP // run - used)]
            out[-1].append((i, row, at, piece))
            at, used = at + len(piece), used + -(-len(piece) // run)
    return out


def mesh_logits(model, requests: list[list[int]]) -> list[np.ndarray]:
    """float32 logits [len(ids), V] of each request: prompts in steps of `STEP` tokens, then `DECODED` tokens one by one."""
    layout = model.on.layout
    shards, parts = layout.shards, layout.size(layout.sequence)
    groups = [list(range(group, len(requests), shards)) for group in range(shards)]
    rows = len(groups[0])

    def cache(spec):
        return init_layers(spec, rows, POSITIONS, steps.run_length(steps.TOKEN_BUCKETS[-1]), parts)

    state = first_state(model.spec, model.on, cache, model.bank.init_state, steps.EngineState)()
    step = steps.logits_step(model.spec, model.kernels, model.on)
    out = [np.full((len(ids), model.spec.vocab), np.nan, np.float32) for ids in requests]

    def feed(state, batches: list[Batch], dealt: list[list[Batch]]):
        logits, state = step(model.params, model.bank, state, join_batches(sum(dealt, []), over_devices=True))
        for group, batch, own in zip(groups, batches, np.split(np.asarray(logits), shards), strict=True):
            for token in np.flatnonzero(batch.segments >= 0):
                out[group[batch.segments[token]]][batch.positions[token]] = own[token]
        return state

    plans = [cuts(requests, group) for group in groups]
    for n in range(max(map(len, plans))):
        pieces = [[(row, at, ids) for _, row, at, ids in plan[n]] if n < len(plan) else [] for plan in plans]
        batches = [make_batch(p, steps.run_length(STEP), STEP, list(range(STEP))) for p in pieces]
        state = feed(state, batches, [deal_batch(b, parts) if parts > 1 else [b] for b in batches])
    for n in range(DECODED):
        at = [len(ids) - DECODED + n for ids in requests]
        pieces = [[(row, at[i], [requests[i][at[i]]]) for row, i in enumerate(group)] for group in groups]
        batches = [make_batch(p, 1, rows, list(range(rows))) for p in pieces]
        state = feed(state, batches, [[b] * parts for b in batches])
    return out


@pytest.mark.parametrize("split", ["stage=2,expert=2", "data=2,sequence=2", "sequence=4"])
def test_the_same_logits(model, prompts, split):
    got = mesh_logits(on_split(model, split), prompts)
    assert max(float(np.abs(a - b).max()) for a, b in zip(got, alone(model, prompts), strict=True)) < ROUNDING


@pytest.mark.parametrize("split", ["stage=2", "sequence=2"])
def test_the_same_tokens(model, prompts, split):
    """By the engine, which packs the prompts' steps, and beyond a chunk of decoding: each token is what one device holds likeliest, or as likely."""
    engine = Engine(on_split(model, split), len(prompts), 100, True, prefill_tokens=32)
    made, timings = engine.generate([Request(tuple(p), NEW) for p in prompts])
    assert timings.decode_tokens == (NEW - 1) * len(prompts) and NEW - 1 > steps.CHUNK
    logits = alone(model, [[*p, *r.ids] for p, r in zip(prompts, made, strict=True)])
    for prompt, result, found in zip(prompts, made, logits, strict=True):
        before = found[len(prompt) - 1 : -1]
        assert len(set(result.ids)) > 3, "no text that a broken cache would give too"
        assert (before.max(1) - before[np.arange(NEW), result.ids] < TIE).all()
