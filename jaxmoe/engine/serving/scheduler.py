"""What each step does: `plan` decides it, a runner does it, `commit` advances. Pure: both give a new state and leave the given one as it is.

In this order: the sequences that decode, with the pages for it, for which others may be put aside; prompts by the policy's mode, for which sequences
come in or come back as the objective ranks them. No decoding is put off for a prompt. A sequence that joins does so at any step and one that ends
leaves at once, so that all fuse into one loop (continuous batching; temporal fusion in Flover's words, arXiv 2305.13484).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jaxmoe.engine.serving.admission import Admission
from jaxmoe.engine.serving.decoding import decode_rows
from jaxmoe.engine.serving.drafting import Step
from jaxmoe.engine.serving.objective import OBJECTIVES, Objective, Paths, Policy, check_policy
from jaxmoe.engine.serving.preemption import make_way
from jaxmoe.engine.serving.prefill import chunked, layered, splitfuse, whole
from jaxmoe.engine.serving.state import Counters, Draft, SchedulerState, Wave, cancel, changed, fresh, submit
from jaxmoe.engine.serving.types import GroupStep, Piece, Results, Seq, StepPlan

__all__ = [
    "OBJECTIVES", "Counters", "Objective", "Paths", "Policy", "SchedulerState", "Wave", "cancel", "check_policy", "commit", "fresh", "plan", "submit",
]  # fmt: skip

CHUNKS = {"chunked": chunked, "splitfuse": splitfuse, "whole": whole}


def plan(
    state: SchedulerState, policy: Policy, now: float, paths: Paths | None = None, held: np.ndarray | None = None
) -> tuple[StepPlan, SchedulerState]:
    """Decides what a step does.

    Args:
        state: not changed.
        policy: see there; one that `check_policy` lets pass.
        now: by the engine's clock, seconds.
        paths: what sequences are expected to ask for, [L, E] each, where the policy goes by that.
        held: bool [L, E], experts on the device.

    Returns:
        The plan, and the state to be committed once it is done. A plan that does nothing says why.
    """
    step = Step(state, policy, now, paths, held)
    make_way(step)
    decode_rows(step)
    admission = Admission(step)
    chunk: tuple[Piece, ...] = ()
    group: GroupStep | None = None
    if policy.prefill == "layered":
        group = layered(step, admission)
    else:
        chunk = CHUNKS[policy.prefill](step, admission)
    tables = {(s := step.seqs[i]).slot: s.pages for i in step.running}
    made = StepPlan(tuple(step.copies), tuple(step.out), tuple(step.into), tuple(step.decode), chunk, group, tables)
    if made.empty:
        reason = "there are no sequences" if not step.seqs else f"{len(step.seqs)} sequences wait, and no pages are free for the first of them"
        made = changed(made, reason=reason)
    else:
        step.count(steps=1)
    return made, step.state()


def commit(state: SchedulerState, plan: StepPlan, results: Results, now: float) -> SchedulerState:
    """Advances by what a step gave.

    Args:
        state: that `plan` came with; sequences may have been cancelled since.
        plan: which was done.
        results: of every sequence that decoded, and of every one whose prompt ended.
        now: after the step, by the engine's clock, seconds.

    Returns:
        The new state. Sequences that ended are gone, their pages and slots free for the next step.

    Raises:
        ValueError: results that the plan can't have given.
    """
    draft = Draft(state)
    if len(draft.running) > len(plan.decode):
        _pass_over(draft, plan)
    for row in plan.decode:
        if (seq := draft.seqs.get(row.id)) is not None:
            _advance(draft, seq, seq.known - 1, results, row.count, now)
    _prompts_done(draft, plan.chunk, results, now)
    if plan.group is not None and draft.wave is not None:
        if plan.group.last:
            pieces, draft.wave = draft.wave.pieces, None
            _prompts_done(draft, pieces, results, now)
        else:
            draft.wave = changed(draft.wave, group=draft.wave.group + 1)
    return draft.state()


def _pass_over(draft: Draft, plan: StepPlan) -> None:
    rows = {row.id for row in plan.decode}
    for i in draft.running:
        seq = draft.seqs[i]
        if seq.left == 1 and i not in rows:
            draft.set(changed(seq, waited=seq.waited + 1))


def _prompts_done(draft: Draft, pieces: Iterable[Piece], results: Results, now: float) -> None:
    run = draft.spec.run
    for piece in pieces:
        if (seq := draft.seqs.get(piece.id)) is None:
            continue
        draft.count(prompt=piece.count, padded=-piece.count % run)
        draft.service[seq.user] = draft.service.get(seq.user, 0.0) + piece.count
        _advance(draft, seq, piece.at + piece.count, results, 1 if piece.ends else 0, now)


def _advance(draft: Draft, seq: Seq, computed: int, results: Results, most: int, now: float) -> None:
    """A sequence after its tokens up to `computed` were, and new ones, `most` at most, were drawn."""
    id, new = seq.id, results.tokens.get(seq.id, 0)
    ended = id in results.ended
    if new > most or new < min(most, 1) and not ended:
        raise ValueError(f"sequence {id} was given {new} tokens by a step that gives it {min(most, 1)} to {most}")
    known = seq.known + new
    if known > seq.limit or known == seq.limit and not ended:
        raise ValueError(f"sequence {id} has {known} tokens and a limit of {seq.limit}: it has ended")
    before = seq.computed
    computed = max(computed, known - 1) if new else computed
    more = results.keys.get(id)
    keys = seq.keys + more if more else seq.keys
    page = draft.spec.page
    if draft.spec.sharing:
        for i in range(before // page, min(computed // page, len(keys))):
            draft.pool.register(seq.pages[i], keys[i])
    if new:
        draft.count(decode=new)
        draft.service[seq.user] = draft.service.get(seq.user, 0.0) + 2 * new
    if ended:
        draft.remove(id)
        return
    fields = {"known": known, "computed": computed, "keys": keys, "waited": 0}
    draft.set(changed(seq, ran=now, **fields) if new else changed(seq, **fields))
