"""Where the predicted paths of waiting requests come from (`jaxmoe.offload.regroup`): their own routing, profiles, tokens, or any predictor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmoe.offload.predictors.interface import one_hot
from jaxmoe.offload.regroup import top_paths
from jaxmoe.offload.trace import Trace


@dataclasses.dataclass(frozen=True)
class PathSource:
    """Functions that foretell the path of the request in each row; go on with the state that they return, the one given may be used up.

    Attributes:
        name: for tables.
        init: `(rows) -> state`.
        begin: `(state, row, request number) -> state`: another request takes the row.
        after: `(state, row, tokens [T], ids [T, L, A]) -> state`: what its model read, and the true routing; ids of -1 are none.
        paths: `(state, rows [R], tokens [R]) -> float32 or bool [R, ...]`: of requests whose next tokens to be read are these.
        routed: whether `after` has to be called: without it nobody need read the routing back.
    """

    name: str
    init: Callable[[int], Any]
    begin: Callable[[Any, int, int], Any]
    after: Callable[[Any, int, np.ndarray, np.ndarray], Any]
    paths: Callable[[Any, np.ndarray, np.ndarray], np.ndarray]
    routed: bool = True


def _put(state: np.ndarray, row: int, value: Any) -> np.ndarray:
    state[row] = value
    return state


def _unchanged(state: Any, row: int, *args: Any) -> Any:
    return state


def recent(prior: Float[np.ndarray, "L E"], decay: float = 0.98) -> PathSource:
    """Each request's own routing: how often it used each expert, its last tokens weighing most; learned while it runs.

    Args:
        prior: where a request begins: a profile, or A / E everywhere.
        decay: weight of what is one token older.
    """
    experts = prior.shape[1]

    start = np.asarray(prior, np.float32)

    def after(state, row, tokens, ids):
        weight_T = (1 - decay) * decay ** np.arange(len(ids) - 1, -1, -1, dtype=np.float32)
        return _put(state, row, decay ** len(ids) * state[row] + np.tensordot(weight_T, one_hot(ids, experts).astype(np.float32), 1))

    return PathSource(
        "recent", lambda rows: np.tile(start, (rows, 1, 1)), lambda state, row, number: _put(state, row, start), after,
        lambda state, rows, tokens: np.clip(state[rows], 0, 1),
    )  # fmt: skip


def by_profile(profiles: Float[np.ndarray, "N L E"]) -> PathSource:
    """Paths that are known of each request from the start, as those of its domain are; N requests."""
    return PathSource("profile", lambda rows: np.zeros(rows, int), _put, _unchanged, lambda state, rows, tokens: profiles[state[rows]], False)


def by_token(traces: Sequence[Trace], weight: float = 1.0) -> PathSource:
    """The experts that the token to be read next used elsewhere: routing follows the token more than the text it is in.

    Serves one step: what comes after the next token is not known yet.

    Args:
        traces: of other text; at least one token. A table of [distinct tokens + 1, L, E] float32 is made of them.
        weight: tokens' worth of the average that each entry is drawn towards; a token that was never seen has the average.
    """
    experts, tokens = traces[0].experts, np.concatenate([t.tokens for t in traces])
    seen, row_T = np.unique(tokens, return_inverse=True)
    sums = np.zeros((len(seen) + 1, traces[0].layers, experts), np.float32)
    np.add.at(sums, row_T, np.concatenate([one_hot(t.ids, experts) for t in traces]))
    mean = sums.sum(0) / len(tokens)
    counts = np.append(np.bincount(row_T), 0).astype(np.float32)[:, None, None]
    table = (sums + weight * mean) / (counts + weight)

    def paths(state, rows, tokens):
        at = np.minimum(np.searchsorted(seen, tokens), len(seen) - 1)
        return table[np.where(seen[at] == tokens, at, len(seen))]

    return PathSource("token", lambda rows: None, _unchanged, _unchanged, paths, False)


def by_predictor(predictor: Any, params: Any) -> PathSource:
    """What a predictor of `jaxmoe.offload.predictors` expects of this step, of each row by itself; such as ExpertFlow's path predictor.

    Args:
        predictor: its `name`, `init`, `reset`, `before_each` and `after` are used.
        params: what its `fit` gave.
    """

    def after(state, row, tokens, ids):
        for token, chosen in zip(tokens, ids, strict=True):
            state = predictor.after(params, state, np.asarray([row]), np.asarray([token], np.int32), chosen[None])
        return state

    def paths(state, rows, tokens):
        return np.clip(np.asarray(predictor.before_each(params, state, rows, tokens), np.float32)[:, 0], 0, 1)

    def begin(state, row, number):
        return predictor.reset(params, state, np.asarray([row]))

    return PathSource(predictor.name, lambda rows: predictor.init(params, rows), begin, after, paths)


def as_sets(source: PathSource, active: int) -> PathSource:
    """The same paths as sets of the `active` best experts a layer."""
    return dataclasses.replace(source, name=f"{source.name}, sets", paths=lambda *args: top_paths(source.paths(*args), active))
