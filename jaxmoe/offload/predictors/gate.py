"""Fate's cross-layer gate (2502.12224): the routers of the next layers, asked with this layer's input. It only hands on what the step computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int16

from jaxmoe.offload.predictors.interface import Predictor, Sizes, State, common_sizes, no_state, nothing, silent_before, unchanged
from jaxmoe.offload.trace import Trace


def fit(traces: Sequence[Trace], seed: int = 0, *, sizes: Sizes | None = None) -> dict[str, Any]:
    """Nothing to learn: the routers are the model's.

    Raises:
        ValueError: neither traces nor sizes.
    """
    return {"sizes": common_sizes(traces, sizes)}


def at_each(params: dict, state: State, layer: int, rows: np.ndarray, ids: np.ndarray, gates: np.ndarray | None = None) -> np.ndarray:
    """The scores of `gates` [B, K, E], as layers `layer + 1` to `layer + K` have them.

    Raises:
        ValueError: there are no gates.
    """
    if gates is None:
        raise ValueError("the gate predictor needs the scores of the next layers' routers, and was given none: record the trace with gates")
    out = nothing(params["sizes"], len(gates))
    reach = min(gates.shape[1], out.shape[1] - 1 - layer)
    out[:, layer + 1 : layer + 1 + reach] = gates[:, :reach]
    return out


def ranked_scores(gates: Int16[np.ndarray, "B K W"], experts: int) -> Float32[np.ndarray, "B K E"]:
    """Scores that rank as a trace's lists of ids do: the w-th of W ids gets `(W - w) / W`, others nothing."""
    B, K, W = gates.shape
    scores = np.zeros((B, K, experts + 1), np.float32)
    np.put_along_axis(scores, np.where(gates < 0, experts, gates).astype(np.int64), (np.arange(W, 0, -1) / W).astype(np.float32)[None, None], -1)
    return scores[..., :-1]


GATE = Predictor("gate", fit, no_state, silent_before, at_each, unchanged, unchanged, ahead=False, within=True)
