"""What a host-driven step expects of its next layers: a predictor of routing, fed as the step goes on, and its scores handed to prefetching.

A *foresight* is any object with `before`, `at` and `after` as `Foresight` has them; `reset`, `restart`, `learns` and `wants_gates` may be left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.cache.batch import Batch
from jaxmoe.offload.predictors.interface import Predictor, unchanged
from jaxmoe.offload.prefetch import Switch
from jaxmoe.offload.staging import Staging


class Foresight:
    """A predictor with its parameters and its state.

    Attributes:
        wants_gates: how many layers ahead routers are to be evaluated for it (`jaxmoe.routing.ahead.gate_scores`); 0 for none.
        learns: whether it has to be told of every step, those in which nobody asks it included.
    """

    def __init__(self, predictor: Predictor, params: Any, rows: int, wants_gates: int = 0):
        """
        Args:
            predictor, params: of `jaxmoe.offload.predictors`, fitted to the model's traces.
            rows: cache rows of the engine.
            wants_gates: as above.
        """
        self.wants_gates = wants_gates
        self.learns = predictor.after is not unchanged
        self._predictor, self._params, self._rows = predictor, params, rows
        self._state = predictor.init(params, rows)

    def restart(self) -> None:
        """Forgets all that was learned from what has run."""
        self._state = self._predictor.init(self._params, self._rows)

    def before(self, rows: Int[np.ndarray, "B"], tokens: Int[np.ndarray, "B"]) -> Float[np.ndarray, "M1 L E"] | None:
        """Probabilities of use in this step and the next M ones, before its first MoE layer; None if it has nothing to say then."""
        return np.asarray(self._predictor.before(self._params, self._state, rows, tokens)) if self._predictor.ahead else None

    def at(
        self, layer: int, rows: Int[np.ndarray, "B"], ids: Int[np.ndarray, "B A"], gates: Float[np.ndarray, "K E"] | None
    ) -> Float[np.ndarray, "L E"] | None:
        """Those of this step's layers after `layer`, whose true routing is `ids`; None if it has nothing to say then."""
        return np.asarray(self._predictor.at(self._params, self._state, layer, rows, ids, gates)) if self._predictor.within else None

    def after(self, rows: Int[np.ndarray, "B"], tokens: Int[np.ndarray, "B"], ids: Int[np.ndarray, "B L A"]) -> None:
        """A step's true routing."""
        self._state = self._predictor.after(self._params, self._state, rows, tokens, ids)

    def reset(self, rows: Int[np.ndarray, "B"]) -> None:
        """Other sequences begin in these rows."""
        self._state = self._predictor.reset(self._params, self._state, rows)


class Known:
    """An oracle for runs that have been made before: it is told every call's true routing, prompt tokens one by one. A bound, and for tests."""

    wants_gates = 0

    def __init__(self, calls: Sequence[Int[np.ndarray, "B L A"]], experts: int):
        """
        Args:
            calls: the experts of every call of `after` that is to come, in order; -1 is none.
            experts: of a layer (E).
        """
        self._used = np.stack([_used(ids, experts) for ids in calls]) if len(calls) else np.zeros((0, 0, experts), np.float32)
        self._call = 0

    def before(self, rows, tokens) -> Float[np.ndarray, "two L E"] | None:
        """This step and the next one, as they will be; None past the last."""
        ahead = self._used[self._call : self._call + 2]
        return None if len(ahead) == 0 else np.concatenate([ahead, np.zeros_like(ahead[:1])])[:2]

    def at(self, layer: int, rows, ids, gates) -> None:
        """Nothing new."""
        return None

    def after(self, rows, tokens, ids) -> None:
        """A call on."""
        self._call += 1

    def restart(self) -> None:
        """The run begins again."""
        self._call = 0


def _used(ids: Int[np.ndarray, "B L A"], experts: int) -> Float[np.ndarray, "L E"]:
    return (np.asarray(ids)[..., None] == np.arange(experts)).any((0, 2)).astype(np.float32)


def _read(arrays: Sequence[Array]) -> list[np.ndarray]:
    """Arrays on the host. On an accelerator all copies are begun before one is waited for; on the CPU there are none, and beginning takes longer."""
    return jax.device_get(list(arrays)) if jax.default_backend() != "cpu" else [np.asarray(x) for x in arrays]


LATER = 64
"""Steps that may wait to be learned from. Read one by one as they end, each takes the host several times as long as among many."""


class Lookout:
    """Feeds a foresight through the steps of a host-driven run, and has prefetching queue what it expects.

    Attributes:
        staging: what is under way; None where a foresight feeds a policy alone.
        depth: for how many layers ahead routers are to be evaluated.
        decoding: whether the running step is one of single tokens, the only ones that look ahead: a prompt asks for most experts, which the link has
            its hands full with.
        looking: whether the running step looks ahead. While prefetching is off, steps are those of an engine without it: what a policy alone goes by
            is said before a step's first layer, and its routing is read when it has ended.
    """

    def __init__(self, staging: Staging | None, foresight: Any, feeds: bool = False):
        """
        Args:
            staging, foresight: see above.
            feeds: a policy goes by the foresight too.
        """
        self.staging, self._foresight, self._feeds = staging, foresight, feeds or staging is None
        self._learns = getattr(foresight, "learns", True)
        self.looking = False
        self.depth: int = getattr(foresight, "wants_gates", 0)
        self.decoding = False
        self._resident: np.ndarray | None = None
        self._scores: np.ndarray | None = None
        self._next: np.ndarray | None = None
        self._rows = self._tokens = np.zeros(0, np.int32)
        self._valid = np.zeros(0, bool)
        self._ids: list[np.ndarray] = []
        self._batch: Batch | None = None
        self._unread: list[tuple[Batch, Sequence[Array]]] = []

    def restart(self) -> None:
        """The foresight forgets what has run, and what is staged is dropped."""
        self._unread = []
        if hasattr(self._foresight, "restart"):
            self._foresight.restart()
        if self.staging is not None:
            self.staging.clear()
            self.staging.switch = Switch()

    @property
    def on(self) -> bool:
        """Whether this step prefetches."""
        return self.staging is not None and self.staging.on

    @property
    def _feeding(self) -> bool:
        """Whether the policy goes by what is said before this step."""
        return self.decoding and self._feeds

    def staged(self, layer: int) -> Bool[np.ndarray, "E"] | None:
        """The layer's experts that were sent ahead; None where nothing is."""
        return None if self.staging is None else self.staging.staged(layer)

    def begin(self, batch: Batch) -> None:
        """A step begins."""
        if self.staging is not None:
            self.staging.begin()
        self.decoding = batch.run == 1
        self.looking = self.decoding and self.on
        self._scores = self._next = None
        self._ids, self._batch = [], batch
        if not (self.looking or self._feeding):
            return
        self._catch_up()
        self._see(batch)

    def _see(self, batch: Batch) -> None:
        """Whose tokens a step reads; sequences that begin are told to the foresight."""
        segments, tokens, positions = _read((batch.segments, batch.tokens, batch.positions))
        self._valid = segments >= 0
        self._rows, self._tokens = segments[self._valid], tokens[self._valid]
        new = np.unique(self._rows[positions[self._valid] == 0])
        if len(new) and hasattr(self._foresight, "reset"):
            self._foresight.reset(new)

    def _catch_up(self) -> None:
        """Learns from the steps that nobody asked about."""
        for batch, chosen in self._unread:
            self._see(batch)
            ids = np.stack(_read(chosen), axis=1)[self._valid]
            if batch.run == 1:
                self._foresight.after(self._rows, self._tokens, ids)
                continue
            for i in range(len(ids)):  # one after another, as if they had been decoded
                self._foresight.after(self._rows[i : i + 1], self._tokens[i : i + 1], ids[i : i + 1])
        self._unread = []

    def before(self) -> Float[np.ndarray, "M1 L E"] | None:
        """The foresight's scores before the first layer, for those that go by them; queues what the first layers are expected to miss."""
        if not (self.looking or self._feeding):
            return None
        scores = self._foresight.before(self._rows, self._tokens)
        if scores is None:
            return None
        self._scores, self._next = scores[0], scores[1] if len(scores) > 1 else None
        if self.looking and self._resident is not None and self.staging is not None:
            self.staging.foresee(-1, self._scores, self._resident, self._next)
        return scores

    def routed(
        self, layer: int, ids: Int[np.ndarray, "T A"], resident: Bool[np.ndarray, "L E"], gates: Float[np.ndarray, "K E"] | None
    ) -> None:
        """A layer's routing is known: queues what the layers after it are expected to miss."""
        self._resident = resident
        self._ids.append(ids[self._valid])
        assert self.staging is not None
        found = self._foresight.at(layer, self._rows, self._ids[-1], gates)
        if found is not None:
            old = np.zeros_like(found) if self._scores is None else self._scores
            self._scores = np.where(found.any(1, keepdims=True), found, old)
        if self._scores is not None:
            self.staging.foresee(layer, self._scores, resident, self._next)

    def end(self, chosen: Sequence[Array]) -> None:
        """A step has been computed. Args: chosen: every MoE layer's ids [T, A], which a step that did not look has not read."""
        if self.looking:
            if self._learns:
                self._foresight.after(self._rows, self._tokens, np.stack(self._ids, axis=1))
            return
        self._resident = None
        if not self._learns:
            return
        if self._feeding:  # asked again before the next step, so that it learns now, while the device ends this one
            self._foresight.after(self._rows, self._tokens, np.stack(_read(chosen), axis=1)[self._valid])
            return
        assert self._batch is not None
        self._unread.append((self._batch, chosen))
        if len(self._unread) >= LATER:
            self._catch_up()
