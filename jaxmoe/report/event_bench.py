"""What prefetching would bring, by `jaxmoe.offload.event_model`: over link speeds, for predictors of a given recall and for real ones.

Times are in units of a layer's own time, all its experts being there; x is the time of one expert's copy in that unit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxmoe.offload import event_model
from jaxmoe.offload.predictors import PREDICTORS
from jaxmoe.offload.predictors.interface import Params
from jaxmoe.offload.replay_many import Sequences, foresee_each, residents_many, sequences_of
from jaxmoe.offload.sequences import by_sequence
from jaxmoe.offload.trace import Trace
from jaxmoe.report import intervals
from jaxmoe.report.policy_bench import Tell
from jaxmoe.residency import find_policy

XS = (0.1, 0.25, 0.5, 1.0, 2.0)
RECALLS = (0.6, 0.8, 0.95, 1.0)
WIDTHS = (1, 2, 4)
"""Records sent ahead for a layer, at most; the best is taken at each x."""

STEPS = 32
"""Decode steps of a long trace that are run."""

SAMPLE = 8
"""Sequences that are run with real predictors."""

FRONT = 0.5
"""The front's share of a layer's time."""


def costs(x: float, active: int) -> event_model.Costs:
    """A layer of time 1 whose experts take half of it, whether they were there or came."""
    return event_model.Costs(front=FRONT, copy=x, hit=(1 - FRONT) / active, land=(1 - FRONT) / active)


def settings() -> list[event_model.Setting]:
    """What is tried."""
    return [event_model.Setting(width, 2 * width) for width in WIDTHS]


def by_recall(trace: Trace, ratios: Sequence[int] = (2, 4), policy: str = "lfu", tell: Tell = lambda what: None) -> list[dict[str, Any]]:
    """Speed-up of decoding over x, for predictors that name as many experts as are used, a share `recall` of them rightly.

    Returns:
        Rows of `slots`, `x`, `recall`, `gain` (seconds without over seconds with), the `width` that was best, and `loads` a layer.
    """
    seen = sequences_of([trace])
    out = []
    for ratio in ratios:
        slots = ratio * seen.active
        resident = residents_many(seen, np.full(trace.layers, slots), policy)[0, seen.counted][:STEPS]
        used = seen.used[0, seen.counted][:STEPS]
        loads = float((used & ~resident).sum() / used.shape[0] / used.shape[1])
        for recall in RECALLS:
            guesses = event_model.synthetic(used, recall)
            for x in XS:
                tell(f"events, {slots} slots, recall {recall:g}, x = {x:g}")
                gain, setting, _ = event_model.gain(used, resident, costs(x, seen.active), guesses, settings())
                out.append({"slots": slots, "x": x, "recall": recall, "gain": round(gain, 4), "width": setting.width, "loads": round(loads, 3)})
    return out


def by_predictor(
    traces: Sequence[Trace], params: dict[str, Params], slots: int, sample: int = SAMPLE, tell: Tell = lambda what: None, seed: int = 0
) -> list[dict[str, Any]]:
    """Speed of decoding with real predictors, under LFU and under Fate's cache of as many slots in all.

    Args:
        traces: with gates, of text that predictors were not fitted to.
        params: of predictors, by name.
        slots: a layer.
        sample: sequences that are run, drawn evenly.
        tell: is told what is done next.
        seed: of the bootstrap over sequences.

    Returns:
        Rows of `policy`, `x`, `predictor`, `width`, and the `speed` over LFU without prefetching, with limits.
    """
    every = [own for trace in traces for own in by_sequence(trace)]
    chosen = [every[i] for i in np.linspace(0, len(every) - 1, min(sample, len(every))).round().astype(int)]
    seen = sequences_of(chosen)
    resident = {policy: _resident(seen, policy, slots) for policy in ("lfu", "fate")}
    guesses = {name: _guesses(chosen, seen, name, own) for name, own in params.items()}
    counts = intervals.resample(len(chosen), seed)
    used = seen.used[:, seen.counted]
    out = []
    for x in XS:
        base = np.zeros(0)
        for policy, there in resident.items():
            for name in ("none", *guesses):
                tell(f"events, {policy}, {name}, x = {x:g}")
                runs = [(s.width, _seconds(used, there, x, seen.active, guesses[name], s)) for s in settings()] if name != "none" else [
                    (0, _seconds(used, there, x, seen.active, None, event_model.Setting()))
                ]  # fmt: skip
                width, seconds = min(runs, key=lambda run: float(run[1].sum()))
                base = seconds if (policy, name) == ("lfu", "none") else base
                speed = intervals.share(base, seconds, counts)
                row = {"policy": policy, "predictor": name, "slots": slots, "x": x, "width": width}
                numbers = {"speed": speed.value, "low": speed.low, "high": speed.high}
                out.append(row | {key: round(value, 4) for key, value in numbers.items()})
    return out


def _resident(seen: Sequences, policy: str, slots: int) -> Bool[np.ndarray, "N S L E"]:
    layers, experts = seen.used.shape[2:]
    allocate = find_policy(policy).allocate
    slots_L = np.full(layers, slots) if allocate is None else np.asarray(allocate(slots * layers, layers, experts, min(seen.active, slots)))
    return residents_many(seen, slots_L, policy)[:, seen.counted]


def _seconds(used, resident, x: float, active: int, guesses, setting: event_model.Setting) -> np.ndarray:
    """Of each sequence."""
    found = [
        event_model.run(u, r, costs(x, active), None if guesses is None else guesses[i], setting).seconds_S.sum()
        for i, (u, r) in enumerate(zip(used, resident, strict=True))
    ]
    return np.array(found)


def _guesses(chosen: Sequence[Trace], seen: Sequences, name: str, params: Params) -> list[event_model.Candidates]:
    """What each sequence's predictor would send, from one layer for the next."""
    steps, layers = int(seen.counted.sum()), seen.used.shape[2]
    if name == "oracle":
        scores = seen.used[:, seen.counted].astype(np.float32)
    elif name != "gate":
        scores = foresee_each(PREDICTORS[name], params, seen)[:, seen.counted, 0].astype(np.float32)
    else:
        return [_gated(own.gates[seen.counted]) for own in chosen]  # type: ignore[index]
    most = max(WIDTHS) * 2
    return [event_model.ranked(functools.partial(_at, said), steps, layers, most=most) for said in scores]


def _at(said: np.ndarray, step: int, layer: int) -> np.ndarray:
    return said[step]


def _gated(gates: np.ndarray) -> list[list[list[tuple[int, int]]]]:
    """The next layer's experts as the gates rank them."""
    layers = gates.shape[1]
    return [[[(layer + 1, int(e)) for e in own[layer, 0] if e >= 0] if layer + 1 < layers else [] for layer in range(layers)] for own in gates]
