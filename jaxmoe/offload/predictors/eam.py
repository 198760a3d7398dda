"""MoE-Infinity's activation matrices (2401.14361): what the stored sequence that is most like this one did in the layers that are still to come.

An expert activation matrix counts a sequence's uses [L, E]. Departures: rows of the running sequence before `layer` are those of its earlier tokens,
for a predictor is told of a step's routing only by `after`; and before the first layer the whole running matrix is matched, which the original leaves
undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.cluster.vq
from jaxtyping import Float32, Int

from jaxmoe.offload.predictors.interface import Predictor, State, common_sizes, nothing, one_hot, sequences
from jaxmoe.offload.trace import Trace

MOST = 256
"""Patterns that are kept."""


def fit(traces: Sequence[Trace], seed: int = 0, *, most: int = MOST) -> dict[str, Any]:
    """Stores the activation matrices of the traces' sequences.

    Args:
        traces: at least one.
        seed: where k-means begins.
        most: patterns kept. Of more sequences, k-means on the normalised rows makes so many groups, and the member nearest each centre stays.

    Returns:
        `patterns` float32 [N, L, E], every row summing to one (or zero), `norms` float32 [N, L], the squared norms of the rows up to each, and sizes.

    Raises:
        ValueError: no trace, or traces of different models.
    """
    found = common_sizes(traces)
    if not traces:
        raise ValueError("activation matrices need a trace to take them from")
    counts = [one_hot(trace.ids[places], found.experts).sum(0) for trace in traces for places in sequences(trace)]
    patterns = np.stack(counts).astype(np.float32)
    patterns /= np.maximum(patterns.sum(-1, keepdims=True), 1)
    if len(patterns) > most:
        patterns = patterns[_representatives(patterns.reshape(len(patterns), -1), most, seed)]
    return {"sizes": found, "patterns": patterns, "norms": np.square(patterns).sum(-1).cumsum(-1)}


def _representatives(points: Float32[np.ndarray, "N P"], most: int, seed: int) -> np.ndarray:
    """Which points stand for all: the nearest to each centre, in order."""
    points = points / np.linalg.norm(points, axis=1, keepdims=True).clip(1e-12)
    centres, group = scipy.cluster.vq.kmeans2(points, most, minit="points", seed=np.random.default_rng(seed), missing="warn")
    far = np.square(points - centres[group]).sum(1)
    order = np.lexsort((far, group))
    return np.sort(order[np.unique(group[order], return_index=True)[1]])


def init(params: dict, rows: int) -> State:
    """No uses yet. `dots` are the products of a row's counts with every pattern's, by layer."""
    sizes, patterns = params["sizes"], params["patterns"]
    return {
        "counts": np.zeros((rows, sizes.layers, sizes.experts), np.float32),
        "dots": np.zeros((rows, len(patterns), sizes.layers), np.float32),
    }


def nearest(params: dict, counts: Float32[np.ndarray, "B l E"], dots: Float32[np.ndarray, "B N l"]) -> Int[np.ndarray, "B"]:
    """The pattern with the largest cosine on these rows of layers, each normalised; of equals the first."""
    sums = np.maximum(counts.sum(2), 1)
    norms = np.sqrt(np.maximum(params["norms"][:, counts.shape[1] - 1], 1e-12))  # the running matrix's own norm is the same for all
    return np.argmax(np.einsum("bnl,bl->bn", dots, 1 / sums) / norms, axis=1)


def before_each(params: dict, state: State, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The pattern nearest what each row used so far; nothing for a row that is new."""
    counts = state["counts"][rows]
    p = _expected(params, counts, state["dots"][rows])
    return np.repeat(p[:, None], 2, 1)


def _expected(params: dict, counts: Float32[np.ndarray, "B l E"], dots: Float32[np.ndarray, "B N l"]) -> Float32[np.ndarray, "B L E"]:
    """How likely a token of the nearest pattern uses each expert; zeros without any counts."""
    patterns = params["patterns"][nearest(params, counts, dots)]
    return np.minimum(params["sizes"].active * patterns, 1) * np.asarray(counts.any((1, 2)))[:, None, None]


def at_each(params: dict, state: State, layer: int, rows: np.ndarray, ids: np.ndarray, gates: np.ndarray | None = None) -> np.ndarray:
    """The rest of the nearest pattern, each layer's weight falling with its distance: `1 - (x - layer) / (L + 1)` (MoE-Infinity's source)."""
    sizes, patterns = params["sizes"], params["patterns"]
    fade = 1 - np.arange(1, sizes.layers - layer, dtype=np.float32)[:, None] / (sizes.layers + 1)
    used = one_hot(ids, sizes.experts).astype(np.float32)
    counts, dots = state["counts"][rows, : layer + 1], state["dots"][rows, :, : layer + 1]
    counts[:, layer] += used
    dots[:, :, layer] += used @ patterns[:, layer].T
    out = nothing(sizes, len(rows))
    out[:, layer + 1 :] = _expected(params, counts, dots)[:, layer + 1 :] * fade
    return out


def after(params: dict, state: State, rows: np.ndarray, tokens: np.ndarray, ids: np.ndarray) -> State:
    """Counts the step's tokens."""
    patterns = params["patterns"]
    for row, own in zip(rows, ids, strict=True):
        layer, slot = np.nonzero(own >= 0)
        expert = own[layer, slot]
        state["counts"][row, layer, expert] += 1
        np.add.at(state["dots"][row].T, layer, patterns[:, layer, expert].T)
    return state


def reset(params: dict, state: State, rows: np.ndarray) -> State:
    """The rows without uses."""
    state["counts"][rows] = 0
    state["dots"][rows] = 0
    return state


EAM = Predictor("eam", fit, init, before_each, at_each, after, reset, ahead=True, within=True)
