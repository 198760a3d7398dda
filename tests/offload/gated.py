"""Traces with random gates."""

import dataclasses

import numpy as np

from jaxmoe.offload.trace import AHEAD, WIDTH, Trace


def with_gates(trace: Trace, seed: int = 0) -> Trace:
    """The trace with gates that foretell at random."""
    tokens, layers, active = trace.ids.shape
    rng, count = np.random.default_rng(seed), min(WIDTH * active, trace.experts)
    gates = np.full((tokens, layers, AHEAD, WIDTH * active), -1, np.int16)
    order = np.argsort(rng.random((tokens, layers, AHEAD, trace.experts)), axis=-1)
    gates[..., :count] = order[..., :count]
    for layer in range(layers):
        gates[:, layer, layers - 1 - layer :] = -1
    return dataclasses.replace(trace, gates=gates)
