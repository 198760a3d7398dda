"""What policies are told beforehand, from a trace: profiles, the future, activation patterns, and which uses matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxmoe.offload.trace import PROMPT, Trace, used_steps
from jaxmoe.residency import Knowledge, Policy
from jaxmoe.residency.distance import HIGH

PATTERNS = 256
"""The most activation matrices that are kept: each decision compares the running text with all of them."""


def knowledge(trace: Trace, policy: Policy, horizon: int = 1, pinned: np.ndarray | None = None) -> Knowledge:
    """What this policy can use of a trace."""
    given: dict[str, Any] = {name: _MADE[name](trace) for name in policy.needs}
    return Knowledge(**given, horizon=horizon, pinned=None if pinned is None else jnp.asarray(pinned, bool))


def profile_of(trace: Trace) -> Float[np.ndarray, "L E"]:
    """How often each expert is asked for: in the trace's prompts, or in all of it where it has none."""
    used_SLE, phase_S = used_steps(trace)
    profile = used_SLE[phase_S == PROMPT].sum(0)
    return (profile if profile.any() else used_SLE.sum(0)).astype(np.float32)


def patterns_of(trace: Trace, most: int = PATTERNS) -> Float[np.ndarray, "N L E"]:
    """How often each sequence used each expert; of more than `most` sequences, evenly spaced ones."""
    numbers = np.unique(trace.sequence)
    chosen = numbers if len(numbers) <= most else numbers[np.linspace(0, len(numbers) - 1, most).round().astype(int)]
    out = np.zeros((len(chosen), trace.layers, trace.experts), np.float32)
    for row, number in zip(out, chosen, strict=True):
        t, layer, slot = np.nonzero((trace.sequence == number)[:, None, None] & (trace.ids >= 0))
        np.add.at(row, (layer, trace.ids[t, layer, slot]), 1.0)
    return out


def high_steps(trace: Trace) -> Bool[np.ndarray, "S L E"]:
    """Uses that matter (`HIGH`), by step as `used_steps` counts them."""
    weights = np.where(trace.ids >= 0, trace.weights.astype(np.float32), 0.0)
    share = weights / np.maximum(weights.sum(2, keepdims=True), 1e-9)
    stronger = np.where(share[:, :, None, :] > share[:, :, :, None], share[:, :, None, :], 0.0).sum(3)
    _, index_T = np.unique(trace.step, return_inverse=True)
    out = np.zeros((index_T.max() + 1, trace.layers, trace.experts), bool)
    t, layer, slot = np.nonzero((trace.ids >= 0) & (stronger <= HIGH))
    out[index_T[t], layer, trace.ids[t, layer, slot]] = True
    return out


def new_texts(trace: Trace) -> Bool[np.ndarray, "S"]:
    """Steps all of whose sequences are other ones than those of the step before."""
    steps, index_T = np.unique(trace.step, return_inverse=True)
    low, high = np.full(len(steps), np.iinfo(np.int64).max), np.full(len(steps), -1)
    np.minimum.at(low, index_T, trace.sequence)
    np.maximum.at(high, index_T, trace.sequence)
    out = np.ones(len(steps), bool)
    out[1:] = (low[1:] > high[:-1]) | (high[1:] < low[:-1])
    return out


_MADE: dict[str, Callable[[Trace], Any]] = {
    "profile": lambda trace: jnp.asarray(profile_of(trace)),
    "future": lambda trace: used_steps(trace)[0],
    "patterns": lambda trace: jnp.asarray(patterns_of(trace)),
}
