"""Running frequency and the last token: what a row used lately, it uses again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmoe.offload.predictors.interface import Predictor, Sizes, State, common_sizes, one_hot, silent_at
from jaxmoe.offload.trace import Trace

DECAY = 0.95
"""What a frequency keeps of itself from token to token."""


def fit(
    traces: Sequence[Trace], seed: int = 0, *, sizes: Sizes | None = None, decay: float = DECAY, prior: bool = True
) -> dict[str, Any]:
    """An exponentially weighted frequency, which a new row begins with as the traces have it.

    Args:
        traces: may be none, if `sizes` are given.
        seed: not used.
        sizes: of the model.
        decay: 0 to 1; `f <- decay * f + (1 - decay) * used`. At 0 it is the last token.
        prior: begin with the traces' frequency; otherwise, or without traces, with zeros.

    Raises:
        ValueError: neither traces nor sizes, or a decay outside 0 to 1.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"a running frequency needs a decay from 0 to below 1, not {decay}")
    found = common_sizes(traces, sizes)
    start = np.zeros((found.layers, found.experts), np.float32)
    tokens = sum(len(trace.ids) for trace in traces)
    if prior and tokens:
        start = (sum(one_hot(trace.ids, found.experts).sum(0) for trace in traces) / tokens).astype(np.float32)
    return {"sizes": found, "decay": np.float32(decay), "start": start}


def init(params: dict, rows: int) -> State:
    """Every row at the start."""
    return {"frequency": np.repeat(params["start"][None], rows, 0)}


def before_each(params: dict, state: State, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The row's frequencies, for this step and the next alike."""
    return np.repeat(state["frequency"][rows][:, None], 2, 1)


def after(params: dict, state: State, rows: np.ndarray, tokens: np.ndarray, ids: np.ndarray) -> State:
    """Every row a token on."""
    frequency = state["frequency"]
    used = one_hot(ids, params["sizes"].experts)
    frequency[rows] += (1 - params["decay"]) * (used - frequency[rows])
    return state


def reset(params: dict, state: State, rows: np.ndarray) -> State:
    """The rows at the start again."""
    state["frequency"][rows] = params["start"]
    return state


def _fit_previous(traces: Sequence[Trace], seed: int = 0, *, sizes: Sizes | None = None) -> dict[str, Any]:
    """The last token alone: a frequency that keeps nothing and begins with nothing."""
    return fit(traces, seed, sizes=sizes, decay=0.0, prior=False)


FREQUENCY = Predictor("frequency", fit, init, before_each, silent_at, after, reset, ahead=True, within=False)
PREVIOUS = Predictor("previous", _fit_previous, init, before_each, silent_at, after, reset, ahead=True, within=False)
