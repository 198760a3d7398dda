"""Which parts of which prompts a step computes, in each of the four modes. Decoding rows are there already and are never taken away for a prompt.

Every piece begins at a multiple of the run and takes whole runs of the step's buffer, so that what counts against a step's size are whole runs; only
the last piece of a prompt has fewer tokens than it takes. Sources: Sarathi-Serve (arXiv 2403.02310), Dynamic SplitFuse (arXiv 2401.08671), layered
prefill (arXiv 2510.08055).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from jaxmoe.engine.serving.admission import Admission
from jaxmoe.engine.serving.drafting import Step
from jaxmoe.engine.serving.state import Wave
from jaxmoe.engine.serving.types import GroupStep, Piece, Seq

LOOK = 32
"""Prompts that are looked at for one whose end fits what is left of a step."""


def chunked(step: Step, admission: Admission) -> tuple[Piece, ...]:
    """What decoding leaves of `spec.chunk`: prompts that have begun, then new ones; the last is cut."""
    spec = step.spec
    left = _whole_runs(step, spec.chunk - len(step.decode))
    pieces: list[Piece] = []
    for seq in _prompts(step, admission):
        if seq.left == 1:
            step.has_row(seq)
            left = min(left, _whole_runs(step, spec.chunk - len(step.decode)) - _taken(step, pieces))
        else:
            pieces.append(piece := _piece(seq, _cut(step, seq, left, left)))
            left -= _runs(step, piece.count)
        if left < spec.run:
            break
    return tuple(pieces)


def splitfuse(step: Step, admission: Admission) -> tuple[Piece, ...]:
    """As many tokens as `spec.chunk`, decoding included, wherever there is that much work.

    What is not a multiple of the run can only be filled by the end of a prompt; so of the first that wait, one goes first whose end fits the gap.
    """
    pieces: list[Piece] = []
    for seq in _composed(step, admission, pieces):
        if seq.left == 1:
            step.has_row(seq)
        elif count := _cut(step, seq, *_room(step, pieces)):
            pieces.append(_piece(seq, count))
        if _room(step, pieces)[0] <= 0:
            break
    return tuple(pieces)


def whole(step: Step, admission: Admission) -> tuple[Piece, ...]:
    """One prompt, all of it, whatever that takes: the control that the others are measured against."""
    for seq in _prompts(step, admission):
        if seq.left > 1:
            return (_piece(seq, seq.left),)
        step.has_row(seq)
    return ()


def layered(step: Step, admission: Admission) -> GroupStep | None:
    """The next group of layers for the wave under way, or the first for a new one: prompts until its size, slots or pages are full."""
    if step.wave is None:
        step.wave = _wave(step, admission)
    else:
        admission.ready()
    if (wave := step.wave) is None:
        return None
    return GroupStep(wave.pieces, wave.places, wave.tokens, wave.group, wave.group == step.spec.groups - 1)


def _wave(step: Step, admission: Admission) -> Wave | None:
    left = step.spec.wave
    pieces: list[Piece] = []
    places: list[int] = []
    for seq in _prompts(step, admission):
        if seq.left == 1:
            step.has_row(seq)
            continue
        places.append(step.spec.wave - left)
        pieces.append(piece := _piece(seq, _cut(step, seq, left, left)))
        left -= _runs(step, piece.count)
        if left < step.spec.run:
            break
    return Wave(tuple(pieces), tuple(places), step.spec.wave - left) if pieces else None


# --- Who comes next


def _begun(step: Step) -> list[Seq]:
    """Sequences on the device whose prompt has begun."""
    begun = [i for i in step.running if step.seqs[i].left > 1]
    return step.ranked(begun) if len(begun) > 1 else [step.seqs[i] for i in begun]


def _prompts(step: Step, admission: Admission) -> Iterator[Seq]:
    """Prompts that have begun, then sequences that come in, which are admitted as they are asked for. Each best first."""
    yield from _begun(step)
    if admission.closed:
        return
    for seq in admission.queue():
        if admission.deferred(seq):
            continue
        if (came := admission.admit(seq)) is None:
            return
        yield came
        if admission.closed:
            return


def _composed(step: Step, admission: Admission, pieces: list[Piece]) -> Iterator[Seq]:
    """As `_prompts`, but of the first `LOOK` that wait the one comes next whose end fits what `pieces` leave, or else the first with any room."""
    yield from _begun(step)
    if admission.closed:
        return
    queue = (seq for seq in admission.queue() if not admission.deferred(seq))
    ahead = list(itertools.islice(queue, LOOK))
    while (fits := [seq for seq in ahead if _count(step, pieces, seq)]) and not admission.closed:
        room, run = _room(step, pieces)[0], step.spec.run
        chosen = next((seq for seq in fits if room % run and (left := _left(step, seq)) <= room and left % run == room % run), fits[0])
        if (came := admission.admit(chosen)) is None:
            return
        yield came
        ahead.remove(chosen)
        ahead += itertools.islice(queue, 1)


def _left(step: Step, seq: Seq) -> int:
    """Tokens that a sequence which waits would have to compute, as far as the device knows."""
    return seq.known - step.cached(seq)


def _count(step: Step, pieces: list[Piece], seq: Seq) -> int:
    """Tokens that a sequence which waits would get of this step."""
    left = _left(step, seq)
    return 1 if left == 1 else _cut_to(left, *_room(step, pieces), step.spec.run)


# --- Sizes


def _room(step: Step, pieces: list[Piece]) -> tuple[int, int]:
    """Tokens that a step of fixed size still takes, and tokens that its buffer has in whole runs."""
    spec = step.spec
    real = spec.chunk - len(step.decode) - sum(piece.count for piece in pieces)
    return real, _whole_runs(step, spec.chunk) - _taken(step, pieces)


def _whole_runs(step: Step, tokens: int) -> int:
    return tokens // step.spec.run * step.spec.run


def _runs(step: Step, tokens: int) -> int:
    return -(-tokens // step.spec.run) * step.spec.run


def _taken(step: Step, pieces: list[Piece]) -> int:
    return sum(_runs(step, piece.count) for piece in pieces)


def _cut_to(left: int, real: int, runs: int, run: int) -> int:
    """All that is left of a prompt if it fits, else as many whole runs as fit."""
    return left if left <= real and -(-left // run) * run <= runs else min(real, runs) // run * run


def _cut(step: Step, seq: Seq, real: int, runs: int) -> int:
    return _cut_to(seq.left, real, runs, step.spec.run)


def _piece(seq: Seq, count: int) -> Piece:
    return Piece(seq.id, seq.slot, seq.computed, count, count == seq.left)
