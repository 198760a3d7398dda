"""Two predictors as one: what the first says before a step, corrected by what the second says as its layers are routed.

ExpertFlow (2410.17954) foretells a step's whole path from its tokens, and Fate (2502.12224) the next layers from a layer's own input. The first one
knows the first layer and the next step, the second one is right more often about the next layers: `path+gate` has both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxmoe.offload.predictors.interface import Predictor, State

JOINS = "+"
"""Between the two names."""


def params_of(name: str, of_one: Callable[[str], Any]) -> Any:
    """A predictor's parameters, where `of_one` gives those of a single one by its name."""
    if JOINS not in name:
        return of_one(name)
    first, second = map(of_one, name.split(JOINS))
    return _joined(first, second)


def _joined(first: Any, second: Any) -> dict[str, Any]:
    return {"sizes": first["sizes"], "first": first, "second": second}


def corrected(first: Predictor, second: Predictor) -> Predictor:
    """The predictor that both make; its parameters are those of `params_of`.

    Raises:
        ValueError: the first says nothing before a step, or the second nothing within.
    """
    name = f"{first.name}{JOINS}{second.name}"
    if not first.ahead or not second.within:
        silent = f"{first.name!r} says nothing before a step" if not first.ahead else f"{second.name!r} says nothing as layers are routed"
        raise ValueError(f"the predictor {name!r}: {silent}")

    def fit(traces, seed: int = 0, **settings: Any) -> dict[str, Any]:
        return _joined(first.fit(traces, seed, **settings), second.fit(traces, seed, **settings))

    def init(params: dict, rows: int) -> State:
        return {"first": first.init(params["first"], rows), "second": second.init(params["second"], rows)}

    def before_each(params: dict, state: State, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return first.before_each(params["first"], state["first"], rows, tokens)

    def at_each(params: dict, state: State, layer: int, rows: np.ndarray, ids: np.ndarray, gates: np.ndarray | None = None) -> np.ndarray:
        return second.at_each(params["second"], state["second"], layer, rows, ids, gates)

    def after(params: dict, state: State, rows: np.ndarray, tokens: np.ndarray, ids: np.ndarray) -> State:
        said = rows, tokens, ids
        return {"first": first.after(params["first"], state["first"], *said), "second": second.after(params["second"], state["second"], *said)}

    def reset(params: dict, state: State, rows: np.ndarray) -> State:
        return {"first": first.reset(params["first"], state["first"], rows), "second": second.reset(params["second"], state["second"], rows)}

    shared = first.shared or second.shared
    return Predictor(name, fit, init, before_each, at_each, after, reset, ahead=True, within=True, shared=shared)
