"""Benchmarks of routing predictors on recorded routing: recall at equal width, by distance in layers, on domains that they were not fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from jaxmoe.offload.predictors import PREDICTORS, Predictor, foresee_layers, sizes_of
from jaxmoe.offload.predictors.interface import Params
from jaxmoe.offload.recall import DISTANCES, TIMES, among_first, recall
from jaxmoe.offload.trace import PROMPT, Trace, concatenate, used_steps
from jaxmoe.report import intervals
from jaxmoe.report.policy_bench import Fold, Tell

ONLINE = ("frequency", "previous", "transitions")
"""Predictors that can do without other text."""

Counts = tuple[Int64[np.ndarray, "U D W"], Int64[np.ndarray, "U D"]]
"""By what is resampled: experts found among the first k, 2k, 3k from each distance, and experts asked for."""


def on_domains(folds: Sequence[Fold], params: Sequence[Mapping[str, Params]], tell: Tell = lambda what: None) -> list[dict[str, Any]]:
    """Every predictor on the half of the domains that it was not fitted to.

    Args:
        folds: see `jaxmoe.report.policy_bench.folds`.
        params: of each fold, by predictor.
        tell: is told what is done next.

    Returns:
        Rows of `rows`, resampled over prompts.
    """
    found: dict[str, list] = {}
    for fold, fitted in zip(folds, params, strict=True):
        joined = concatenate(list(fold.judged.values()))
        for name, own in fitted.items():
            tell(f"recall of {name}, half {fold.number + 1}")
            if PREDICTORS[name].within and PREDICTORS[name].name == "gate" and joined.gates is None:
                continue
            got = recall(PREDICTORS[name], own, joined)
            far = np.arange(joined.layers)[:, None] >= np.arange(1, DISTANCES + 1)  # the same layers for those that speak of the first ones too
            found.setdefault(name, []).append(((got.found * far[..., None]).sum(1), (got.asked * far).sum(1)))
    return rows({name: (np.concatenate([f for f, _ in got]), np.concatenate([a for _, a in got])) for name, got in found.items()})


def on_one(trace: Trace) -> list[dict[str, Any]]:
    """Predictors that learn as they go, on the steps of one run, in blocks."""
    found = {}
    for name in ONLINE:
        params = PREDICTORS[name].fit([], sizes=sizes_of(trace))
        found[name] = by_step(PREDICTORS[name], params, trace)
    return rows(found, intervals.BLOCK)


def by_step(predictor: Predictor, params: Params, trace: Trace) -> Counts:
    """What a predictor found, step by step; steps of the prompt don't count."""
    used, phase = used_steps(trace)
    steps, layers, experts = used.shape
    widths = np.minimum(np.arange(1, TIMES + 1) * trace.ids.shape[2], experts)
    found, asked = np.zeros((steps, DISTANCES, TIMES), np.int64), np.zeros((steps, DISTANCES), np.int64)
    for s, layer, scores in foresee_layers(predictor, params, trace):
        if phase[s] == PROMPT:
            continue
        later = slice(layer + 1, min(layer + 1 + DISTANCES, layers))
        n = later.stop - later.start
        if n > 0:
            found[s, :n] += among_first(scores[later], used[s, later], widths)
            asked[s, :n] += used[s, later].sum(-1)
    return found[phase != PROMPT], asked[phase != PROMPT]


def rows(found: Mapping[str, Counts], block: int = 1, seed: int = 0, versus: Sequence[str] = ("frequency", "previous")) -> list[dict[str, Any]]:
    """A row a predictor and distance: `k`, `2k`, `3k`, each `[recall, low, high]`; `over_NAME`, how much more that is than NAME's, by width."""
    out = []
    for name, (hits, asked) in found.items():
        counts = intervals.resample(len(asked), seed, block)
        for d in range(DISTANCES):
            if not asked[:, d].any():
                continue
            row: dict[str, Any] = {"predictor": name, "distance": d + 1}
            row |= {label: _triple(intervals.share(hits[:, d, w], asked[:, d], counts)) for w, label in enumerate(("k", "2k", "3k"))}
            for other in (o for o in versus if o in found and o != name):
                over = [intervals.difference(hits[:, d, w], found[other][0][:, d, w], asked[:, d], counts) for w in range(TIMES)]
                row[f"over_{other}"] = [_triple(i) for i in over]
            out.append(row)
    return out


def _triple(found: intervals.Interval) -> list[float]:
    return [round(value, 5) for value in (found.value, found.low, found.high)]
