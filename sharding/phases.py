"""The steps of a workload, and how much attention has to look at in each."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

from jaxmoe.spec.types import AttentionSpec
from sharding.split import Layout
from sharding.workload import TOKEN_BUCKETS, Workload

Count = Literal["needed", "whole", "compiled"]
"""What is counted. 'needed': what masks leave of attention, each position being read once a step. 'whole': attention over whole cache rows, run by
run, as it goes without a kernel of its own. 'compiled': like 'whole', but the bodies of loops once (over a segment's repeats, over runs), as XLA's
`cost_analysis()` counts them: to be compared with its `optimal_seconds`, and for nothing else."""
RUN = 64
"""Tokens of a run of a prefill step (`jaxmoe.engine.steps.run_length`); attention without a kernel of its own reads a cache row once a run."""
LOGIT_ROWS = 8
"""Prompts that can end in a prefill step, and so rows of logits (`jaxmoe.engine.steps.LOGIT_ROWS`)."""
KEY_BLOCK = 128
"""A cache row is a multiple of so many positions (`jaxmoe.cache.contiguous.KEY_BLOCK`)."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """Some equal steps of a group of devices that share their sequences.

    Attributes:
        kind: prompts are read, or a token of each sequence is made.
        tokens: of a step, the mean of all such steps.
        steps: of these there are.
        rows: sequences in a step; of a prefill, as many prompts as its tokens would fill.
        length: of each prompt; positions that a decoded token sees, its own included.
        positions: that a cache row has room for.
        chunk: of a prompt, the most tokens that go in a step.
        room: tokens that a step of a prefill computes, padding included; 0 for no padding.
    """

    kind: Literal["prefill", "decode"]
    tokens: float
    steps: int
    rows: float
    length: float
    positions: int
    chunk: int = 1
    room: float = 0

    @property
    def computed(self) -> float:
        """Tokens of a step, padding included."""
        return self.room or self.tokens

    @property
    def logits(self) -> float:
        """Rows of logits in a step."""
        return LOGIT_ROWS if self.kind == "prefill" else self.tokens

    def attended(self, a: AttentionSpec, count: Count) -> tuple[float, float]:
        """Pairs of a query and a key in a step, and positions whose keys are read."""
        if count != "needed":
            room = -(-(self.positions + RUN) // KEY_BLOCK) * KEY_BLOCK
            run = 1 if self.kind == "decode" else min(RUN, math.ceil(self.computed))
            runs = 1 if count == "compiled" else math.ceil(self.computed / run)
            return runs * run * room, runs * room
        if self.kind == "decode":
            return self.rows * visible(a, self.length), self.rows * visible(a, self.length)
        prompt = int(self.length)
        return self.rows * causal_pairs(prompt, a.window, a.chunk), self.rows * causal_reads(prompt, self.chunk, a.window, a.chunk)


def visible(a: AttentionSpec, length: float) -> float:
    """Positions that the last of `length` tokens sees, its own included."""
    if a.chunk is not None:
        length = (length - 1) % a.chunk + 1
    return length if a.window is None else min(length, a.window)


@functools.lru_cache(maxsize=4096)
def causal_pairs(prompt: int, window: int | None, chunk: int | None) -> float:
    """Pairs of a query and a key that it sees, in a whole prompt: n (n + 1) / 2, less what lies before a window or in other chunks."""
    if chunk is not None:
        full, rest = divmod(prompt, chunk)
        return full * causal_pairs(chunk, window, None) + causal_pairs(rest, window, None)
    inside = prompt if window is None else min(prompt, window)
    return inside * (inside + 1) / 2 + (prompt - inside) * inside


@functools.lru_cache(maxsize=4096)
def causal_reads(prompt: int, step: int, window: int | None, chunk: int | None) -> float:
    """Positions whose keys are read where a prompt goes in steps of `step` tokens, and each step reads what any of its tokens sees once."""
    total = 0
    for start in range(0, prompt, step):
        first = 0 if window is None else max(0, start + 1 - window)
        if chunk is not None:
            first = max(first, start // chunk * chunk)
        total += min(start + step, prompt) - first
    return total


def run_length(tokens: int) -> int:
    """Tokens in a run of a prefill step (`jaxmoe.engine.steps.run_length`)."""
    return min(tokens, RUN if tokens > 128 else RUN // 2)


def token_bucket(tokens: int) -> int:
    """Tokens that a prefill step for so many computes."""
    size = next((b for b in TOKEN_BUCKETS if tokens <= b), TOKEN_BUCKETS[-1])
    while size < tokens:
        size *= 2
    return size


@functools.lru_cache(maxsize=4096)
def prefill_steps(rows: int, prompt: int, most: int) -> dict[int, tuple[int, int]]:
    """The prefill steps of equal prompts as the engine packs them: in order, each in runs of its own, at most `LOGIT_ROWS` of which end in a step.

    Args:
        rows: prompts.
        prompt: tokens of each.
        most: tokens of a step.

    Returns:
        By tokens that a step computes: how many such steps there are, and prompts' tokens in all of them together.
    """
    found: dict[int, tuple[int, int]] = {}
    left = rows * prompt
    while left:
        first = (left - 1) % prompt + 1  # what is left of the prompt at the front
        room = token_bucket(min(left, first + (LOGIT_ROWS - 1) * prompt, most))
        run = run_length(room)
        # Steps that the front prompt fills alone are taken at once.
        times, taken = max(1, (first - 1) // room), min(first, room)
        free, ended = room // run - -(-taken // run), int(taken == first)
        while free and ended and ended < LOGIT_ROWS and taken < left:
            more = min(prompt, free * run)
            free, taken, ended = free - -(-more // run), taken + more, ended + 1
        steps, tokens = found.get(room, (0, 0))
        found[room] = steps + times, tokens + times * taken
        left -= times * taken
    return found


def prefill_phases(workload: Workload, layout: Layout, rows: int | None = None) -> tuple[Phase, ...]:
    """The prefill of a group's sequences, or of so many `rows`: its largest steps first."""
    rows, prompt = workload.local_rows(layout) if rows is None else rows, workload.prompt
    found = prefill_steps(rows, prompt, workload.prefill_tokens)
    return tuple(
        Phase("prefill", tokens / steps, steps, tokens / steps / prompt, prompt, workload.positions, min(prompt, room), room)
        for room, (steps, tokens) in sorted(found.items(), reverse=True)
    )


def decode_phase(workload: Workload, layout: Layout, context: float | None = None) -> Phase:
    """The decode steps of a group's sequences, at `context` positions each; if not given, at the mean of those that they pass through."""
    rows = workload.local_rows(layout)
    mean = workload.prompt + (workload.new_tokens + 1) / 2
    return Phase("decode", rows, workload.new_tokens, rows, mean if context is None else context, workload.positions)
