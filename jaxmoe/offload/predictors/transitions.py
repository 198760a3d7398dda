"""Transitions between layers: which experts of layer l + d a token uses after those of layer l.

EdgeMoE (2308.14352) keys a dictionary by the experts of two layers, which has far too many keys where many small experts are active. Here every
expert votes by itself: the log-odds of an expert's use, plus what each of the token's experts adds to them (naive Bayes), the sum of these scaled
down because the votes agree with each other more than independent ones would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from jaxmoe.offload.predictors.interface import Predictor, Sizes, State, common_sizes, nothing, one_hot, silent_before, unchanged
from jaxmoe.offload.trace import Trace

DISTANCES = 4
"""How many layers ahead it looks."""

BLOCK = 4096
"""Tokens that are counted at a time."""

SHRINK = 4.0
"""Uses of an expert that its layer's frequencies are worth beside what was seen after it."""

SCALE = 0.7
"""Of the votes. Between 0.6 and 1 recall differs by under two points on the traces tried; probabilities are overconfident from 0.8 on."""

LEAST = 1e-4
"""Probabilities are kept so far from 0 and 1."""


def fit(
    traces: Sequence[Trace], seed: int = 0, *, sizes: Sizes | None = None, distances: int = DISTANCES, online: bool = True
) -> dict[str, Any]:
    """Counts how often each expert follows each.

    Args:
        traces: may be none, if `sizes` are given and it learns online.
        seed: not used.
        sizes: of the model.
        distances: layers ahead, at most.
        online: go on counting while it runs, over all rows together.

    Returns:
        `counts`: `pairs` float32 [distances, L, E, E] of (layer, its expert, expert of the layer so much later), `uses` float32 [L, E], and `tokens`
        float32 [L], those that used the layer; and settings.

    Raises:
        ValueError: neither traces nor sizes, or traces of different models.
    """
    found = common_sizes(traces, sizes)
    L, E = found.layers, found.experts
    reach = min(distances, max(L - 1, 1))
    pairs, uses, tokens = np.zeros((reach, L, E, E), np.float32), np.zeros((L, E), np.float32), np.zeros(L, np.float32)
    for trace in traces:
        for at in range(0, len(trace.ids), BLOCK):
            used = one_hot(trace.ids[at : at + BLOCK], E).astype(np.float32).swapaxes(0, 1)
            uses += used.sum(1)
            tokens += used.any(2).sum(1)
            for d in range(1, reach + 1):
                pairs[d - 1, : L - d] += used[: L - d].swapaxes(1, 2) @ used[d:]
    return {"sizes": found, "online": online, "counts": {"pairs": pairs, "uses": uses, "tokens": tokens}}


def init(params: dict, rows: int) -> State:
    """The counts to go on from; rows share them."""
    return {name: count.copy() for name, count in params["counts"].items()} if params["online"] else {}


def _log_odds(p: Float32[np.ndarray, "*N"]) -> Float32[np.ndarray, "*N"]:
    p = p.clip(LEAST, 1 - LEAST)
    return np.log(p / (1 - p))


def at_each(params: dict, state: State, layer: int, rows: np.ndarray, ids: np.ndarray, gates: np.ndarray | None = None) -> np.ndarray:
    """What the token's experts say together.

    f(e') = (uses(e') + 1) / (tokens + E / A), and P(e' | e) = (pairs(e, e') + SHRINK f(e')) / (uses(e) + SHRINK).
    """
    sizes, counts = params["sizes"], state if params["online"] else params["counts"]
    out = nothing(sizes, len(ids))
    reach = min(len(counts["pairs"]), sizes.layers - 1 - layer)
    if reach <= 0:
        return out
    later = slice(layer + 1, layer + 1 + reach)
    f = (counts["uses"][later] + 1) / (counts["tokens"][later, None] + np.float32(sizes.experts / sizes.active))
    after_e = (counts["pairs"][:reach, layer, ids] + SHRINK * f[:, None, None]) / (counts["uses"][layer, ids] + SHRINK)[..., None]
    base = _log_odds(f)
    there = ids >= 0
    votes = (_log_odds(after_e) - base[:, None, None]) * there[..., None]
    p = 1 / (1 + np.exp(-base[:, None] - SCALE * votes.sum(2)))
    out[:, later] = np.where(np.asarray(there.any(1))[:, None, None], p.swapaxes(0, 1), 0)
    return out


def after(params: dict, state: State, rows: np.ndarray, tokens: np.ndarray, ids: np.ndarray) -> State:
    """Counts the step's tokens, if it learns online."""
    if not params["online"]:
        return state
    L, E = state["uses"].shape
    for own in ids:
        place = np.arange(L)[:, None] * E + own  # of an expert in [L, E]
        there = own >= 0
        state["uses"].reshape(-1)[place[there]] += 1
        state["tokens"] += there.any(1)
        for d in range(1, len(state["pairs"]) + 1):
            both = there[: L - d, :, None] & there[d:, None]
            pair = place[: L - d, :, None] * E + own[d:, None]
            state["pairs"][d - 1].reshape(-1)[pair[both]] += 1
    return state


TRANSITIONS = Predictor("transitions", fit, init, silent_before, at_each, after, unchanged, ahead=False, within=True, shared=True)
