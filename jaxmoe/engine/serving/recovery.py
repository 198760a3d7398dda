"""After a step that failed: nothing on the device is to be believed, and everything else goes on."""

from __future__ import annotations

from jaxmoe.engine.serving.pages import PagePool
from jaxmoe.engine.serving.state import Draft, SchedulerState, changed
from jaxmoe.engine.serving.types import Phase


def lost(state: SchedulerState) -> SchedulerState:
    """The state after the device's pages are gone: running sequences wait, to be computed again; those in host memory stay as they are.

    Sequences that the failed step was about have to be cancelled first: what it moved to or from host memory may not be there.
    """
    draft = Draft(state)
    for id in list(draft.running):
        seq = draft.seqs[id]
        draft.take_off(seq)
        if seq.host:
            draft.host.drop(seq.host)
        draft.set(changed(seq, phase=Phase.WAITING, slot=-1, pages=(), computed=0, host=(), host_tokens=0, waited=0))
    draft.wave = None
    draft.pool = PagePool(state.spec.pages, state.spec.move)
    return draft.state()
