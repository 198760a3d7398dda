"""The steps of a workload, and how much attention has to look at in each."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

from jaxmoe.spec.types import AttentionSpec
from sharding.split import Layout
from sharding.workload import Workload

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
        tokens: of a step.
        steps: of these there are.
        rows: sequences in a step; of a prefill, as many prompts as its tokens would fill.
        length: of each prompt; positions that a decoded token sees, its own included.
        positions: that a cache row has room for.
        chunk: of a prompt, the most tokens that go in a step.
    """

    kind: Literal["prefill", "decode"]
    tokens: int
    steps: int
    rows: float
    length: float
    positions: int
    chunk: int = 1

    @property
    def logits(self) -> int:
        """Rows of logits in a step."""
        return LOGIT_ROWS if self.kind == "prefill" else self.tokens

    def attended(self, a: AttentionSpec, count: Count) -> tuple[float, float]:
        """Pairs of a query and a key in a step, and positions whose keys are read."""
        if count != "needed":
            room = -(-(self.positions + RUN) // KEY_BLOCK) * KEY_BLOCK
            run = 1 if self.kind == "decode" else min(RUN, self.tokens)
            runs = 1 if count == "compiled" else math.ceil(self.tokens / run)
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


def prefill_phases(workload: Workload, layout: Layout, rows: int | None = None) -> tuple[Phase, ...]:
    """The prefill of a group's sequences, or of so many `rows`: full steps, then what is left."""
    rows = workload.local_rows(layout) if rows is None else rows
    total, chunk = rows * workload.prompt, min(workload.prompt, workload.prefill_tokens)
    full, rest = divmod(total, workload.prefill_tokens)
    sizes = [(workload.prefill_tokens, full), (rest, 1 if rest else 0)]
    return tuple(
        Phase("prefill", tokens, steps, tokens / workload.prompt, workload.prompt, workload.positions, chunk) for tokens, steps in sizes if steps
    )  # fmt: skip


def decode_phase(workload: Workload, layout: Layout, context: float | None = None) -> Phase:
    """The decode steps of a group's sequences, at `context` positions each; if not given, at the mean of those that they pass through."""
    rows = workload.local_rows(layout)
    mean = workload.prompt + (workload.new_tokens + 1) / 2
    return Phase("decode", rows, workload.new_tokens, rows, mean if context is None else context, workload.positions)
