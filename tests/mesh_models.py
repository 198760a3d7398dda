"""Models of tests on a mesh of virtual devices, and logits of theirs."""

import dataclasses

import numpy as np

from jaxmoe.cache.batch import join_batches, make_batch
from jaxmoe.cache.layers import init_layers
from jaxmoe.engine import steps
from jaxmoe.engine.mesh import devices_for, first_state, place_bank, place_params
from jaxmoe.engine.model import Model
from sharding.split import parse_split


def on_split(model: Model, split: str) -> Model:
    """The model on the first devices that a split takes."""
    on = devices_for(model.spec, parse_split(split))
    return dataclasses.replace(model, params=place_params(model.spec, on, model.params), bank=place_bank(on, model.bank), on=on)


def mesh_logits(model: Model, requests: list[list[int]], decoded: int = 0, positions: int = 256) -> list[np.ndarray]:
    """float32 logits [len(ids), V] of each request: all but the last `decoded` tokens in one step, then those one by one."""
    layout, shards = model.on.layout, model.on.layout.shards
    groups = [list(range(group, len(requests), shards)) for group in range(shards)]
    most = max(map(len, groups))
    run = 32

    def cache(spec):
        return init_layers(spec, most, positions, steps.run_length(steps.TOKEN_BUCKETS[-1]))

    state = first_state(model.spec, model.on, cache, model.bank.init_state, steps.EngineState)()
    step = steps.logits_step(model.spec, model.kernels, model.on)
    out = [np.full((len(ids), model.spec.vocab), np.nan, np.float32) for ids in requests]
    assert not layout.sequence, "prompts aren't dealt out here"

    def feed(state, starts: list[int], stops: list[int], run: int, tokens: int):
        batches = []
        for group in groups:
            pieces = [(row, starts[i], requests[i][starts[i] : stops[i]]) for row, i in enumerate(group)]
            batches.append(make_batch([p for p in pieces if p[2]], run, tokens, list(range(tokens))))
        logits, state = step(model.params, model.bank, state, join_batches(batches, over_devices=True))
        for group, batch, own in zip(groups, batches, np.split(np.asarray(logits), shards), strict=True):
            for token in np.flatnonzero(batch.segments >= 0):
                out[group[batch.segments[token]]][batch.positions[token]] = own[token]
        return state

    lengths = [len(ids) - decoded for ids in requests]
    tokens = run * max(sum(-(-lengths[i] // run) for i in group) for group in groups)
    state = feed(state, [0] * len(requests), lengths, run, tokens)
    for n in range(decoded):
        state = feed(state, [length + n for length in lengths], [length + n + 1 for length in lengths], 1, most)
    return out
