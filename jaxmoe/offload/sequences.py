"""Traces taken apart by sequence, and put together as batches: sequences that were recorded alone, as if they had decoded side by side.

What a token asks for depends on its own sequence alone (`Engine`'s bits don't depend on the batch), so that batches of any make-up can be judged
from one recording.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxmoe.offload.trace import DECODE, PROMPT, Trace, concatenate


def by_sequence(trace: Trace) -> list[Trace]:
    """Each sequence alone, token by token.

    Args:
        trace: of any batches.

    Returns:
        Traces in the order of their sequences' numbers, which they keep; every token has a step of its own, counted from 0, and keeps its phase.
    """
    out = []
    for sequence in np.unique(trace.sequence):
        own = np.flatnonzero(trace.sequence == sequence)
        out.append(trace.take(own, step=np.arange(len(own), dtype=np.int32)))
    return out


def batched(traces: Sequence[Trace], groups: Sequence[Sequence[int]]) -> Trace:
    """Batches of sequences, one after another: first the prompts of a group, then its t-th other tokens together in step t.

    Args:
        traces: single sequences (`by_sequence`).
        groups: which of them decode side by side; a sequence may be in several groups.

    Returns:
        A trace in which `sequence` counts the members of all groups. Prompt tokens have a step each, as recorders give them; all others are `DECODE`,
        whose batch shrinks as its shorter sequences end.

    Raises:
        ValueError: no or empty groups, one that names no trace, a trace of several sequences, or traces of different models.
    """
    if not groups or not all(len(group) for group in groups):
        raise ValueError(f"{len(groups)} groups, of {[len(group) for group in groups]} sequences: each needs at least one")
    for group in groups:
        for i in group:
            if not 0 <= i < len(traces):
                raise ValueError(f"a group names sequence {i}: there are {len(traces)}")
            if (traces[i].sequence != traces[i].sequence[0]).any():
                raise ValueError(f"trace {i} holds {len(np.unique(traces[i].sequence))} sequences: take them apart by by_sequence")
    return concatenate([_side_by_side([traces[i] for i in group]) for group in groups])


def _side_by_side(members: list[Trace]) -> Trace:
    """One group's batch."""
    joined = concatenate(members)
    number = np.repeat(np.arange(len(members), dtype=np.int32), [len(member.ids) for member in members])
    prompt = joined.phase == PROMPT
    turn = np.concatenate([np.cumsum(member.phase != PROMPT) - 1 for member in members])  # which of its sequence's other tokens a token is
    others = np.flatnonzero(~prompt)
    order = np.concatenate([np.flatnonzero(prompt), others[np.argsort(turn[others], kind="stable")]])
    prompts = int(prompt.sum())
    step = np.concatenate([np.arange(prompts), prompts + np.sort(turn[others])]).astype(np.int32)
    phase = np.where(prompt[order], PROMPT, DECODE).astype(np.uint8)
    return joined.take(order, step=step, phase=phase, sequence=number[order])
