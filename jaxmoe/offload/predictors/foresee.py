"""A predictor run over a trace: what it would have told the policies at every step, and prefetching at every layer. Only the past is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float16, Float32

from jaxmoe.offload.predictors.gate import ranked_scores
from jaxmoe.offload.predictors.interface import Params, Predictor, any_of
from jaxmoe.offload.trace import Trace

UNKNOWN = -1
"""A score of what a predictor says nothing about: policies go by recent rates there."""


def foresee(predictor: Predictor, params: Params, trace: Trace, horizon: int = 1) -> Float16[np.ndarray, "S M1 L E"]:
    """What a predictor says before every step of a trace; every sequence has a row of its own.

    Args:
        predictor, params: as fitted, to other text unless it is the oracle.
        trace: steps are those of `used_steps`.
        horizon: steps ahead of the current one (M).

    Returns:
        Scores from 0 to 1; `UNKNOWN` at steps further ahead than it looks, and all over if it says nothing before a step.

    Raises:
        ValueError: the horizon is negative, or the predictor reads tokens and the trace has none.
    """
    if horizon < 0:
        raise ValueError(f"a horizon of {horizon} steps: give 0 or more")
    walk = list(_steps(trace))
    out = np.full((len(walk), horizon + 1, trace.layers, trace.experts), UNKNOWN, np.float16)
    if not predictor.ahead:
        return out
    state = predictor.init(params, walk[-1][2])
    for s, (places, rows, _) in enumerate(walk):
        said = predictor.before(params, state, rows, trace.tokens[places])[: horizon + 1]
        out[s, : len(said)] = said
        state = predictor.after(params, state, rows, trace.tokens[places], trace.ids[places])
    return out


def foresee_layers(predictor: Predictor, params: Params, trace: Trace, start: bool = False) -> Iterator[tuple[int, int, Float32[np.ndarray, "L E"]]]:
    """What a predictor says of a step's later layers whenever a layer has been routed.

    Args:
        predictor, params, trace: as for `foresee`.
        start: yield what it says before the first layer too, as layer -1.

    Yields:
        `(step, layer, scores)`, scores 0 up to `layer`. Where layers tell a predictor nothing new, what it said before the step.

    Raises:
        ValueError: the predictor lacks what it reads: tokens, or the trace's gates.
    """
    walk = list(_steps(trace))
    state = predictor.init(params, walk[-1][2])
    for s, (places, rows, _) in enumerate(walk):
        tokens, ids = trace.tokens[places], trace.ids[places]
        said = predictor.before(params, state, rows, tokens)[0]
        if start:
            yield s, -1, said
        for layer in range(trace.layers):
            later = said
            if predictor.within:
                found = predictor.at(params, state, layer, rows, ids[:, layer], layer_gates(trace, places, layer))
                said = later = np.where(found.any(1, keepdims=True), found, said)
            yield s, layer, later_layers(later, layer)
        state = predictor.after(params, state, rows, tokens, ids)


def later_layers(scores: Float32[np.ndarray, "L E"], layer: int) -> Float32[np.ndarray, "L E"]:
    """The same without layers up to this one."""
    out = scores.copy()
    out[: layer + 1] = 0
    return out


def layer_gates(trace: Trace, places: np.ndarray | slice, layer: int) -> Float32[np.ndarray, "K E"] | None:
    """Scores as a layer's gates rank the next layers' experts for a batch of tokens; None if the trace has no gates."""
    gates: Any = trace.gates
    return None if gates is None else any_of(ranked_scores(gates[places, layer], trace.experts))


def _steps(trace: Trace) -> Iterator[tuple[slice, np.ndarray, int]]:
    """For every step: the places of its tokens, their rows, and the number of rows so far."""
    _, row = np.unique(trace.sequence, return_inverse=True)
    _, first = np.unique(trace.step, return_index=True)
    count = int(row.max()) + 1
    for start, stop in zip(first, [*first[1:], len(row)], strict=True):
        yield slice(int(start), int(stop)), row[start:stop], count
