"""Putting sequences aside when pages run out: to host memory, or to be computed again."""

from __future__ import annotations

import math

from jaxmoe.engine.serving.admission import Admission
from jaxmoe.engine.serving.drafting import Step
from jaxmoe.engine.serving.state import changed
from jaxmoe.engine.serving.types import Move, Phase, Seq


def make_room(step: Step, pages: int, seq: Seq) -> bool:
    """Puts sequences aside, the lowest by the objective first, until `pages` are available for a running one; itself, if there is none below it.

    Sequences of the wave stay: what is carried between their groups of layers is in no page.

    Returns:
        Whether the sequence is still running.
    """
    wave = set() if step.wave is None else {piece.id for piece in step.wave.pieces}
    below: list[Seq] | None = None
    while step.pool.available < pages:
        if below is None:
            below = step.ranked(i for i in step.running if i not in wave)
        lowest = below.pop()
        preempt(step, step.seqs[lowest.id])
        if lowest.id == seq.id:
            return False
    return True


def make_way(step: Step) -> None:
    """At most one running sequence is put aside for one that waits and is ahead of it by more than the policy's margin.

    Not during a wave, which nobody could join, nor for an answer that only waits for another's prompt. Who is put aside comes back when there is
    room; it would need the margin to come back before.
    """
    if step.policy.margin == math.inf or step.wave is not None or not step.running or len(step.running) == len(step.seqs):
        return
    admission = Admission(step)
    first = next((s for s in admission.queue() if not admission.forks(s) and not admission.deferred(s)), None)
    if first is None or step.slots and step.spec.pages_for(first.known) + len(step.running) <= step.pool.available:
        return
    lowest = step.ranked(step.running)[-1]
    if step.ahead(first, lowest):
        preempt(step, lowest)
        step.preempted, step.made_way = False, lowest.id


def preempt(step: Step, seq: Seq) -> None:
    """A running sequence gives back its slot and pages: swapped if the policy says so and host memory has room, else it waits with nothing computed.

    Pages are free at once; `Move` tells the runner to read them before anything overwrites them.
    """
    step.preempted = True
    step.count(preemptions=1)
    moved = _to_host(step, seq) if step.policy.preemption == "swap" and seq.computed else None
    step.take_off(seq)
    put_aside = changed(seq, slot=-1, pages=(), preempted=seq.preempted + 1, waited=0)
    if moved is not None:
        step.set(changed(put_aside, phase=Phase.SWAPPED, host=moved, host_tokens=seq.computed))
        step.swapped.append(seq.id)
        step.count(swaps=1)
        return
    if seq.host:
        step.host.drop(seq.host)
    step.set(changed(put_aside, phase=Phase.WAITING, computed=0, host=(), host_tokens=0, lost=seq.lost + seq.computed))


def _to_host(step: Step, seq: Seq) -> tuple[int, ...] | None:
    """Pages in host memory of all computed tokens. Only what host memory lacks is sent: full pages never change (FastSwitch, arXiv 2411.18424).

    Returns:
        Host pages in the order of the sequence's tokens, one reference each, or None, with nothing changed, where there is no room.
    """
    spec, host = step.spec, list(seq.host)
    if seq.host_tokens == seq.computed:
        step.out.append(Move(seq.id, (), (), seq.slot))  # what the slot holds, for layers that have no pages
        return seq.host
    first, total, full = seq.host_tokens // spec.page, spec.pages_for(seq.computed), seq.computed // spec.page
    send = list(range(first, len(host)))  # the page that was there in part
    missing = range(len(host), total)
    found = {i: at[0] for i in missing if i < min(full, len(seq.keys)) and (at := step.host.match([seq.keys[i]]))} if spec.sharing else {}
    step.host.hold(list(found.values()))
    new = step.take_host(total - len(host) - len(found), seq.id)
    if new is None:
        step.host.drop(list(found.values()))
        return None
    fresh = iter(new)
    host += [found[i] if i in found else next(fresh) for i in missing]
    send += [i for i in missing if i not in found]
    for i in send:
        if spec.sharing and i < min(full, len(seq.keys)):
            step.host.register(host[i], seq.keys[i])
    step.out.append(Move(seq.id, tuple(seq.pages[i] for i in send), tuple(host[i] for i in send), seq.slot))
    step.count(out_pages=len(send))
    return tuple(host)
