"""What a predictor of routing is: a frozen record of pure functions, and the small sums that several of them share. It knows no model and no link.

A *row* is a place of the batch that holds one sequence, as in the cache. Steps see rows in any order and number; a row is forgotten (`reset`) before
another sequence takes it. Scores are probabilities of use, or rank as they would, from 0 to 1; a batch's are combined as `1 - prod(1 - p)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int

from jaxmoe.offload.trace import Trace
from jaxmoe.spec import ModelSpec

Params = Any
"""What `fit` learned: numpy or jax arrays, and sizes."""

State = dict[str, Any]
"""Numpy arrays, most with a leading row axis."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Attributes: `layers` that have experts, `experts` of a layer, `active` of them a token."""

    layers: int
    experts: int
    active: int


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A predictor of which experts will be asked for.

    `after` and `reset` may take over the arrays of the state that they are given, as a donated argument: go on with what they return.

    Attributes:
        name: what the command line calls it.
        fit: `(traces, seed, **settings) -> params`. Settings differ; each predictor's `fit` names its own.
        init: `(params, rows) -> state` of that many empty rows.
        before_each: `(params, state, rows [B], tokens [B]) -> scores float32 [B, M + 1, L, E]`: `before` of every row by itself.
        at_each: `(params, state, layer, rows [B], ids [B, A], gates [B, K, E] or None) -> scores float32 [B, L, E]`: `at` of every row by itself.
        after: `(params, state, rows [B], tokens [B], ids [B, L, A]) -> state`, called with the step's true routing.
        reset: `(params, state, rows [B]) -> state` whose rows are as `init` made them.
        ahead: whether `before` says anything (else zeros).
        within: whether `at` says anything (else zeros).
        shared: whether rows share what they learn, or stand for one trace together: what is said of one then depends on the others.
    """

    name: str
    fit: Callable[..., Params]
    init: Callable[[Params, int], State]
    before_each: Callable[..., Float32[np.ndarray, "B M1 L E"]]
    at_each: Callable[..., Float32[np.ndarray, "B L E"]]
    after: Callable[..., State]
    reset: Callable[[Params, State, np.ndarray], State]
    ahead: bool
    within: bool
    shared: bool = False

    def before(self, params: Params, state: State, rows: Int[np.ndarray, "B"], tokens: Int[np.ndarray, "B"]) -> Float32[np.ndarray, "M1 L E"]:
        """What is expected before a step's first MoE layer.

        Args:
            rows: of the step.
            tokens: that the step reads, one a row; -1 where not known.

        Returns:
            Index 0 is this step, the others are the next M steps.
        """
        return any_of(self.before_each(params, state, rows, tokens))

    def at(
        self,
        params: Params,
        state: State,
        layer: int,
        rows: Int[np.ndarray, "B"],
        ids: Int[np.ndarray, "B A"],
        gates: Float32[np.ndarray, "K E"] | None = None,
    ) -> Float32[np.ndarray, "L E"]:
        """What is expected of this step's later layers, once a layer's true routing is known.

        Args:
            layer: that has been routed.
            rows: of the step.
            ids: the experts that it chose; -1 is none.
            gates: scores of layers `layer + 1` to `layer + K`, of the batch.

        Returns:
            Zeros up to `layer`.
        """
        return any_of(self.at_each(params, state, layer, rows, ids, None if gates is None else gates[None]))


def sizes_of(source: Trace | ModelSpec) -> Sizes:
    """The sizes that a trace or a model has."""
    if isinstance(source, Trace):
        return Sizes(source.layers, source.experts, source.ids.shape[2])
    router, _ = source.moe
    return Sizes(len(source.moe_layers), router.experts, router.active)


def common_sizes(traces: Sequence[Trace], sizes: Sizes | None = None) -> Sizes:
    """The sizes that all traces have.

    Raises:
        ValueError: there is neither a trace nor sizes, or they differ.
    """
    found = [sizes_of(trace) for trace in traces] + ([] if sizes is None else [sizes])
    if not found:
        raise ValueError("a predictor needs a trace, or sizes, to know how many layers and experts there are")
    for other in found[1:]:
        if other != found[0]:
            raise ValueError(f"traces of different models can't be fitted together: {found[0]} and {other}")
    return found[0]


def one_hot(ids: Int[np.ndarray, "*N A"], experts: int) -> Bool[np.ndarray, "*N E"]:
    """The set of experts that each list of ids names; -1 is none."""
    used = np.zeros((*ids.shape[:-1], experts + 1), bool)
    np.put_along_axis(used, np.where(ids < 0, experts, ids).astype(np.int64), True, -1)
    return used[..., :-1]


def any_of(p_BLE: Float32[np.ndarray, "B *N"]) -> Float32[np.ndarray, "*N"]:
    """The probability that any of a batch uses each expert: `1 - prod(1 - p)`."""
    return p_BLE[0] if len(p_BLE) == 1 else 1 - np.prod(1 - p_BLE, axis=0)


def nothing(sizes: Sizes, *before: int) -> np.ndarray:
    """Zeros [*before, L, E]."""
    return np.zeros((*before, sizes.layers, sizes.experts), np.float32)


def sequences(trace: Trace) -> list[np.ndarray]:
    """The places of each sequence's tokens, in order; sequences in order of their numbers."""
    order = np.argsort(trace.sequence, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(trace.sequence[order])) + 1)


def silent_before(params: Any, state: State, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """`before_each` of a predictor that has nothing to say before the first layer."""
    return nothing(params["sizes"], len(rows), 2)


def silent_at(params: Any, state: State, layer: int, rows: np.ndarray, ids: np.ndarray, gates: np.ndarray | None = None) -> np.ndarray:
    """`at_each` of a predictor that layers tell nothing new."""
    return nothing(params["sizes"], len(rows))


def no_state(params: Any, rows: int) -> State:
    """`init` of a predictor that remembers nothing."""
    return {}


def unchanged(params: Any, state: State, *_: Any) -> State:
    """`after` and `reset` of a predictor that remembers nothing."""
    return state
