"""After a step that failed: nothing that it touched is to be believed, on the device or in host memory, and requests go on."""

from __future__ import annotations

from jaxmoe.engine.serving.pages import HostPages, PagePool
from jaxmoe.engine.serving.state import Draft, SchedulerState, changed
from jaxmoe.engine.serving.types import Phase


def lost(state: SchedulerState) -> SchedulerState:
    """The state after all pages are gone: every sequence waits, to be computed again.

    Host memory too: a plan registers pages there before they have arrived, and a copy under way may be what failed.
    """
    draft = Draft(state)
    for id in list(draft.running):
        draft.take_off(draft.seqs[id])
    for seq in list(draft.seqs.values()):
        if seq.phase is not Phase.WAITING or seq.host:
            draft.set(changed(seq, phase=Phase.WAITING, slot=-1, pages=(), computed=0, host=(), host_tokens=0, waited=0))
    draft.swapped.clear()
    draft.wave = None
    draft.pool, draft.host = PagePool(state.spec.pages, state.spec.move), HostPages(state.spec.host_pages)
    return draft.state()
