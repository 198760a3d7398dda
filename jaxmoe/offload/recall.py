"""How much of a token's routing a predictor finds among its first k, 2k and 3k experts, by layer and distance, on text that it was not fitted to.

Every sequence is judged by itself, token by token, as at batch size one. Fitting and training are elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int64

from jaxmoe.offload.predictors.gate import ranked_scores
from jaxmoe.offload.predictors.interface import Params, Predictor, State, one_hot, sequences
from jaxmoe.offload.trace import PROMPT, Trace

DISTANCES = 4
"""Layers from where a prediction is made to the layer that it is about, at most."""

TIMES = 3
"""Widths are 1 to so many times the experts of a token."""

TOGETHER = 256
"""Sequences that are judged side by side."""


@dataclasses.dataclass(frozen=True)
class Recall:
    """What a predictor found, in counts, so that callers can sum and resample over sequences (N).

    Attributes:
        predictor: its name.
        sequence: the sequences' numbers.
        found: experts asked for that were among the first k, 2k and 3k, by the layer they were asked of and the distance 1 to 4 from which that was
            said. Of a predictor that speaks only before the first layer the same at every distance.
        asked: experts asked for.
    """

    predictor: str
    sequence: Int64[np.ndarray, "N"]
    found: Int64[np.ndarray, "N L D W"]
    asked: Int64[np.ndarray, "N L D"]

    def share(self, distance: int = 1, chosen: np.ndarray | slice = slice(None)) -> Float[np.ndarray, "W"]:
        """Recall at k, 2k, 3k over all layers that a prediction from this distance is about.

        Args:
            distance: in layers.
            chosen: which of the sequences, an index; a resample's may name one twice.
        """
        d = distance - 1
        return self.found[chosen, :, d].sum((0, 1)) / max(int(self.asked[chosen, :, d].sum()), 1)

    def by_layer(self, distance: int = 1) -> Float[np.ndarray, "L W"]:
        """The same for each layer; NaN where no layer is so far before."""
        d = distance - 1
        asked = self.asked[:, :, d].sum(0)[:, None]
        return np.where(asked > 0, self.found[:, :, d].sum(0) / np.maximum(asked, 1), np.nan)


def recall(
    predictor: Predictor, params: Params | Callable[[Trace], Params], trace: Trace, prompt: bool = False, distances: int = DISTANCES
) -> Recall:
    """Judges a predictor on a trace.

    Args:
        predictor: what to judge.
        params: as fitted; or a function of one sequence's trace, for the oracle.
        trace: of any sequences and phases; every token runs through the predictor.
        prompt: count prompt tokens as well.
        distances: the most layers between a prediction and its layer.

    Raises:
        ValueError: there is no token to count, or the predictor lacks what it reads: tokens, or the trace's gates.
    """
    counted = np.ones(len(trace.ids), bool) if prompt else trace.phase != PROMPT
    if not counted.any():
        raise ValueError("the trace holds nothing but prompts: give prompt=True to count them")
    places = sequences(trace)
    stateless = not callable(params) and not predictor.init(params, 1)
    group = 1 if predictor.shared and not stateless else TOGETHER
    shape = (len(places), trace.layers, distances)
    found, asked = np.zeros((*shape, TIMES), np.int64), np.zeros(shape, np.int64)
    for at in range(0, len(places), group):
        members = places[at : at + group]
        own = params(_alone(trace, members[0])) if callable(params) else params
        _judge(predictor, own, trace, members, counted, found[at : at + group], asked[at : at + group])
    return Recall(predictor.name, np.array([trace.sequence[own[0]] for own in places], np.int64), found, asked)


def _alone(trace: Trace, places: np.ndarray) -> Trace:
    """One sequence, a step a token."""
    return trace.take(places, step=np.arange(len(places), dtype=np.int32))


def _judge(
    predictor: Predictor, params: Params, trace: Trace, members: Sequence[np.ndarray], counted: Bool[np.ndarray, "T"], found, asked
) -> None:
    """Runs sequences side by side, each in its row, and adds what was found."""
    state = predictor.init(params, len(members))
    lengths = np.array([len(own) for own in members])
    for t in range(int(lengths.max())):
        rows = np.flatnonzero(lengths > t)
        at = np.array([members[row][t] for row in rows.tolist()])
        _count(predictor, params, state, trace, rows, at, counted[at], found, asked)
        state = predictor.after(params, state, rows, trace.tokens[at], trace.ids[at])


def _count(predictor: Predictor, params: Params, state: State, trace: Trace, rows, at, counted, found, asked) -> None:
    """Adds one token of each row."""
    if not counted.any():
        return
    ids, L, distances = trace.ids[at], trace.layers, asked.shape[2]
    used = one_hot(ids, trace.experts) & counted[:, None, None]
    widths = np.minimum(np.arange(1, TIMES + 1) * ids.shape[2], trace.experts)
    if not predictor.within:
        scores = predictor.before_each(params, state, rows, trace.tokens[at])[:, 0]
        found[rows] += among_first(scores, used, widths)[:, :, None]
        asked[rows] += used.sum(-1)[:, :, None]
        return
    for layer in range(L - 1):
        gates = None if trace.gates is None else ranked_scores(trace.gates[at, layer], trace.experts)
        reach = min(distances, L - 1 - layer)
        later = slice(layer + 1, layer + 1 + reach)
        scores = predictor.at_each(params, state, layer, rows, ids[:, layer], gates)[:, later]
        target, distance = np.arange(layer + 1, layer + 1 + reach), np.arange(reach)
        found[rows[:, None], target, distance] += among_first(scores, used[:, later], widths)
        asked[rows[:, None], target, distance] += used[:, later].sum(-1)


def among_first(scores: Float[np.ndarray, "*N E"], used: Bool[np.ndarray, "*N E"], widths: np.ndarray) -> Int64[np.ndarray, "*N W"]:
    """How many used experts are among the first of each width, by falling score; of equals the lowest id comes first."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., : widths[-1]]
    return np.cumsum(np.take_along_axis(used, order, -1), axis=-1, dtype=np.int64)[..., widths - 1]


def domains_split(traces: Mapping[str, Trace], seed: int = 0, judged: float = 1 / 3) -> tuple[dict[str, Trace], dict[str, Trace]]:
    """Domains of text to fit predictors to, and other ones to judge them on.

    Args:
        traces: by domain.
        seed: which go where.
        judged: the share of the domains to judge on, rounded, at least one and not all.

    Returns:
        Those to fit to, those to judge on, each in the order given.

    Raises:
        ValueError: there is only one domain.
    """
    names = list(traces)
    if len(names) < 2:
        raise ValueError(f"{len(names)} domain of text: predictors are fitted and judged on different ones, so two are needed")
    count = min(max(round(judged * len(names)), 1), len(names) - 1)
    chosen = set(np.random.default_rng(seed).permutation(len(names))[:count].tolist())
    fit = {name: traces[name] for i, name in enumerate(names) if i not in chosen}
    return fit, {name: traces[name] for i, name in enumerate(names) if i in chosen}
