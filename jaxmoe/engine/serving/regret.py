"""What the best policy would have loaded: beside what decoding loads, as it goes.

A window is a run of decode steps that no prompt comes between. Of it are known what was on the device when it began and what each step asked for; so
Belady's choice, from the same contents, can be counted when it is over. It knows the future to the window's end alone, which makes it look better
than any real policy: what is counted as regret is at least what there is to regret within windows, and nothing across them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jaxmoe.engine.serving.routing import Routed
from jaxmoe.experts import SlotBank
from jaxmoe.offload.replay import opt_hits
from jaxmoe.residency import find_policy

WINDOW = 64
"""Steps, at least, after which a window ends, prompt or not; what choosing for it takes grows with it."""


class Regret:
    """Attributes: `requests`, `hits`, `best_hits`, `loads`, `best_loads`, `steps` of the windows that are over."""

    def __init__(self, bank: SlotBank, window: int = WINDOW):
        """
        Args:
            bank: whose layers have slots of their own.
            window: steps.

        Raises:
            ValueError: all layers share one pool, for which choosing the best takes too long to do beside serving.
        """
        if find_policy(bank.policy).shared:
            raise ValueError(f"the best policy of slots that all layers share, as with {bank.policy}, takes too long to find beside serving")
        self._slots, self._experts, self._window = np.asarray(bank.slots), bank.experts, window
        self.requests = self.hits = self.best_hits = self.loads = self.steps = 0
        self._before: list[Int[np.ndarray, "L"]] | None = None
        self._used: list[Bool[np.ndarray, "L E"]] = []

    @property
    def best_loads(self) -> int:
        """Of the best policy: it brings what it does not have."""
        return self.requests - self.best_hits

    def before(self, state: Any) -> None:
        """A decode call comes.

        Args:
            state: the bank's, before it.
        """
        if self._before is None:
            self._before, self._used = _counters(state), [np.asarray(state.slot_of_expert) >= 0]

    def after(self, call: Routed, state: Any) -> None:
        """A decode call has been.

        Args:
            call: its routing, of one step or several.
            state: the bank's, after it.
        """
        if self._before is None:
            return
        experts = np.asarray(call.experts)
        layers = experts.shape[-2]
        for chosen, ids in zip(experts, call.ids.reshape(len(experts), -1), strict=True):
            if (ids >= 0).any():
                used = np.zeros((layers, self._experts), bool)
                used[np.arange(layers)[None, :, None], chosen[ids >= 0]] = True
                self._used.append(used)
        if len(self._used) > self._window:
            self.close(state)

    def close(self, state: Any) -> None:
        """Something else than decoding comes: the window is over.

        Args:
            state: the bank's, as decoding left it.
        """
        if self._before is None:
            return
        # int32 counters may have gone round since: their difference has not.
        requests, hits, loads = ((now - then).sum(dtype=np.int64).item() for now, then in zip(_counters(state), self._before, strict=True))
        used = np.stack(self._used)
        self.requests, self.hits, self.loads, self.steps = self.requests + requests, self.hits + hits, self.loads + loads, self.steps + len(used) - 1
        self.best_hits += int(opt_hits(used, self._slots)[1:].sum())  # the first step asks for what is there, which brings it there
        self.drop()

    def drop(self) -> None:
        """Forgets the window."""
        self._before, self._used = None, []


def _counters(state: Any) -> list[Int[np.ndarray, "L"]]:
    """Requests, hits and loads of each layer so far."""
    return [np.array(getattr(state, name)) for name in ("requests", "hits", "loads")]  # copies: steps write over what they are given
