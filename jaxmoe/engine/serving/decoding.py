"""Which sequences decode in a step, how many tokens each may get, and the pages for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxmoe.engine.serving.drafting import Step
from jaxmoe.engine.serving.preemption import make_room
from jaxmoe.engine.serving.types import Row, Seq
from jaxmoe.offload.regroup import choose


def decode_rows(step: Step) -> None:
    """Rows for every running sequence that lacks one token only, up to `spec.batch`; where pages run out, those that rank lowest are put aside."""
    seqs, page = step.seqs, step.spec.page
    ready = [s for i in step.running if (s := seqs[i]).known - s.computed == 1]
    chosen = ready if len(ready) <= step.spec.batch else _choose(step, ready)
    counts = _bursts(step, chosen) if len(chosen) == len(step.seqs) else [1] * len(chosen)
    lacking = [(s, n) for s, count in zip(chosen, counts, strict=True) if (n := -(-(s.known + count - 1) // page) - len(s.pages)) > 0]
    if sum(n for _, n in lacking) > step.pool.available:
        chosen, counts = _with_pages(step, chosen, ready), [1] * len(chosen)
    else:
        for s, n in lacking:
            step.grow(s, n)
    step.decode += [Row(s.id, s.slot, s.known - 1, count) for s, count in zip(chosen, counts, strict=False)]


def _bursts(step: Step, rows: Sequence[Seq]) -> list[int]:
    """Tokens for each while nobody waits for anything: as many as its limit and the pool allow."""
    spec = step.spec
    if spec.burst == 1:
        return [1] * len(rows)
    counts = [1 if s.stepwise else min(spec.burst, s.limit - s.known) for s in rows]
    lacking = sum(max(0, spec.pages_for(s.known + n - 1) - len(s.pages)) for s, n in zip(rows, counts, strict=True))
    return counts if lacking <= step.pool.available else [1] * len(rows)


def _with_pages(step: Step, chosen: Sequence[Seq], ready: Sequence[Seq]) -> list[Seq]:
    """Rows when pages are short: those that rank higher get theirs first, and who is put aside leaves the place to others that are ready."""
    first = {s.id for s in chosen}
    rows: list[Seq] = []
    for s in (*step.ranked(first), *step.ranked(s.id for s in ready if s.id not in first)):
        if len(rows) == len(chosen):
            break
        if step.seqs[s.id].slot < 0:
            continue  # put aside for one above it
        n = step.spec.pages_for(s.known) - len(s.pages)
        if n <= 0 or make_room(step, n, s) and step.grow(s, n):
            rows.append(s)
    return [s for s in rows if step.seqs[s.id].slot >= 0]


def _choose(step: Step, ready: list[Seq]) -> list[Seq]:
    """A step's worth of those that are ready: by what they will ask for if that is known, else those whose last token is the longest ago."""
    policy, size = step.policy, step.spec.batch
    if policy.group is None:
        return sorted(ready, key=lambda s: (s.ran, s.id))[:size]
    ready = sorted(ready, key=lambda s: s.id)
    waited = [s.waited for s in ready]
    return [ready[i] for i in choose(policy.group, _paths(step, ready), waited, size, policy.bound, step.held, policy.held_cost)]


def _paths(step: Step, ready: Sequence[Seq]) -> np.ndarray:
    """[R, L, E]; of whom nothing is known, the others' mean."""
    known = {s.id: np.asarray(step.paths[s.id]) for s in ready if s.id in step.paths} if step.paths else {}
    if not known:
        return np.zeros((len(ready), 1, 1), np.float32)
    mean = np.mean(list(known.values()), axis=0, dtype=np.float32) if len(known) < len(ready) else np.zeros(0)
    return np.stack([known.get(s.id, mean) for s in ready])
