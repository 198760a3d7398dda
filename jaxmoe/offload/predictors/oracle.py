"""The oracle: it has read the trace that it predicts. A bound on what a predictor is worth; an accuracy below 1 makes it a dial up to that bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxmoe.offload.predictors.interface import Predictor, State, common_sizes, nothing
from jaxmoe.offload.trace import Trace, used_steps

HORIZON = 16
"""The most steps ahead that it says."""


def fit(traces: Sequence[Trace], seed: int = 0, *, horizon: int = 1, accuracy: float = 1.0) -> dict[str, Any]:
    """Reads the future.

    Args:
        traces: the one that will be run, from its first step to its last.
        seed: of the mistakes.
        horizon: steps ahead of the current one, 0 to `HORIZON`.
        accuracy: each true expert is known with this probability, and replaced by a random wrong one otherwise. A mistake is made once: it stays the
            same however often the step is asked about.

    Raises:
        ValueError: not one trace, a horizon or an accuracy out of range.
    """
    sizes = common_sizes(traces)
    if len(traces) != 1:
        raise ValueError(f"the oracle reads one trace, the one that will be run, not {len(traces)}")
    if not 0 <= horizon <= HORIZON:
        raise ValueError(f"the oracle looks 0 to {HORIZON} steps ahead, not {horizon}")
    if not 0 <= accuracy <= 1:
        raise ValueError(f"the oracle's accuracy is from 0 to 1, not {accuracy}")
    used, _ = used_steps(traces[0])
    return {"sizes": sizes, "horizon": horizon, "future": used if accuracy == 1 else mistaken(used, accuracy, np.random.default_rng(seed))}


def mistaken(used: Bool[np.ndarray, "S L E"], accuracy: float, rng: np.random.Generator) -> Bool[np.ndarray, "S L E"]:
    """The same, each true expert replaced with probability `1 - accuracy` by a wrong one, no two by the same, as far as there are enough."""
    known = used & (rng.random(used.shape, np.float32) < accuracy)
    wrong = (used & ~known).sum(-1, keepdims=True)
    rank = np.argsort(np.argsort(np.where(used, 2.0, rng.random(used.shape, np.float32)), axis=-1), axis=-1)
    return known | (~used & (rank < wrong))


def init(params: dict, rows: int) -> State:
    """Before the first step."""
    return {"step": 0}


def before_each(params: dict, state: State, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """This step's experts and the next ones', zeros past the end; the same for each row, for a step is known as a whole."""
    out = nothing(params["sizes"], params["horizon"] + 1)
    ahead = params["future"][state["step"] : state["step"] + len(out)]
    out[: len(ahead)] = ahead
    return np.repeat(out[None], len(rows), 0)


def at_each(params: dict, state: State, layer: int, rows: np.ndarray, ids: np.ndarray, gates: np.ndarray | None = None) -> np.ndarray:
    """This step's experts of the later layers."""
    out = nothing(params["sizes"])
    if state["step"] < len(params["future"]):
        out[layer + 1 :] = params["future"][state["step"], layer + 1 :]
    return np.repeat(out[None], len(rows), 0)


def after(params: dict, state: State, rows: np.ndarray, tokens: np.ndarray, ids: np.ndarray) -> State:
    """A step on."""
    return {"step": state["step"] + 1}


def reset(params: dict, state: State, rows: np.ndarray) -> State:
    """Rows mean nothing to it: the trace goes on."""
    return state


ORACLE = Predictor("oracle", fit, init, before_each, at_each, after, reset, ahead=True, within=True, shared=True)
