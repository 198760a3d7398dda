"""What prefetching has under way: carries out the decisions of `jaxmoe.offload.prefetch` over a link, and counts what became of every record.

Records that were sent ahead are *staged*: they lie on the device, outside of the slots, until the true routing asks for them, and are then landed in
the slot of whoever missed them. Nothing here takes a slot away from anybody. What was sent and not used is kept while there is room, since the next
token may ask for it.

A layer's turn comes once a step. Turns are numbered on from step to step, so that "nearest first" needs no step.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from jaxmoe.offload import prefetch
from jaxmoe.offload.link import Link, Transfer
from jaxmoe.offload.prefetch import Prefetch, Switch

RECENT = 8
"""Steps whose times and misses count."""

UNKNOWN = 0.5
"""The probability asked for while the times of layers and records are not known."""


@dataclasses.dataclass
class Counters:
    """Bytes since the start; none is counted twice.

    Attributes:
        useful: sent ahead, asked for, and there before the host came to wait for it.
        late: sent ahead and asked for, but the host still had to wait.
        wasted: sent ahead and dropped unused, or not to be used for a fault in reading.
        cancelled: queued and never sent.
        demand: sent when it was asked for, those included that were queued then and had not started.
    """

    useful: int = 0
    late: int = 0
    wasted: int = 0
    cancelled: int = 0
    demand: int = 0


@dataclasses.dataclass(eq=False)
class Staged:
    """A record that was queued, is on its way, or is there.

    Attributes:
        layer, expert: which.
        first: the layer's turn that it was queued for.
        turn: the layer's turn that it was last found likely for.
        score, worth: predicted probability of use, and that times the expert's value.
        give: what `ask` of the source returned.
        transfer: on the link.
        record: on the device; None until it was put there.
        failed: what went wrong in reading it.
        asked: the layer asked for it and has not landed it yet.
    """

    layer: int
    expert: int
    first: int
    turn: int
    score: float
    worth: float
    give: Callable[[], Any]
    transfer: Transfer | None = None
    record: Any = None
    failed: Exception | None = None
    asked: bool = False


class Staging:
    """The controller: its state, and what it does at each point of a step.

    Attributes:
        counters: what became of records.
        switch: whether it is on.
        depth: layers ahead at present.
    """

    def __init__(self, settings: Prefetch, link: Link, source: Any, layers: int, experts: int, put: Callable[[Any], Any]):
        """
        Args:
            settings: as above.
            link: what records cross.
            source: `ask(layer, expert) -> give`, `record_bytes`. A `give` that has a `ready()` is not called before that says so.
            layers, experts: of the model.
            put: a record to the device, without waiting.
        """
        self.settings, self.counters, self.switch = settings, Counters(), Switch()
        self.depth = settings.depth or 1
        self._link, self._source, self._put = link, source, put
        self._layers, self._bytes = layers, source.record_bytes
        self._held: dict[tuple[int, int], Staged] = {}
        self._taken = np.zeros((layers, experts), bool)
        self._step, self._now = 0, -1
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._misses: deque[int] = deque(maxlen=RECENT)
        self._at_begin = (0, 0, 0, 0)
        self._measured = settings.depth is not None

    # --- What the rest of the step asks

    @property
    def on(self) -> bool:
        """Whether this step prefetches."""
        return self.switch.on or not self.settings.switching

    def staged(self, layer: int) -> Bool[np.ndarray, "E"]:
        """The layer's experts that are there or on their way."""
        self._link.settle()
        out = np.zeros(self._taken.shape[1], bool)
        for held in self._held.values():
            if held.layer == layer and _started(held):
                out[held.expert] = True
        return out

    def held_bytes(self) -> int:
        """Bytes that were sent ahead and neither used nor dropped yet."""
        self._link.settle()
        return self._bytes * sum(map(_started, self._held.values()))

    def clear(self) -> None:
        """Drops everything, and begins to count and to measure anew."""
        for held in list(self._held.values()):
            self._drop(held)
        self.counters = Counters()
        self._seconds.clear()
        self._misses.clear()
        self.depth, self._measured = self.settings.depth or 1, self.settings.depth is not None

    def begin(self) -> None:
        """A step begins. What a step that failed had asked for is staged like everything else; while it is off, what is queued is cancelled."""
        self._step += 1
        self._now = self._turn(-1)
        self._link.settle()
        for held in list(self._held.values()):
            held.asked = False
            if held.failed is not None or not (self.on or _started(held)):
                self._drop(held)
        self._at_begin = self._totals()

    def ask(self, layer: int, experts: Sequence[int]) -> tuple[dict[int, Staged], int]:
        """A layer's routing is known: what it misses of what is staged, by expert, and how many records of that have become demand just now.

        Queued records that it asks for become demand; queued ones that it does not ask for are cancelled (ExpertFlow's correction, arXiv 2410.17954:
        missing ones to high priority, mispredicted ones to low). What could not be read is forgotten, for the layer to read it itself.
        """
        self._link.settle()
        self._now = self._turn(layer)
        missing, found, promoted = set(experts), {}, 0
        for held in [h for h in self._held.values() if h.layer == layer]:
            if held.failed is not None:
                self._drop(held)
            elif held.expert in missing:
                if self._link.promote(held.transfer):  # type: ignore[arg-type]
                    self.demanded()
                    promoted += 1
                held.asked = True
                found[held.expert] = held
            elif not _started(held):
                self._drop(held)
        return found, promoted

    def demanded(self) -> None:
        """A record was sent because a layer asked for it."""
        self.counters.demand += self._bytes

    def land(self, held: Staged) -> Any:
        """Waits until a record is there, and hands it over.

        Raises:
            Exception: what went wrong in reading it.
        """
        transfer = held.transfer
        assert transfer is not None
        late = held.record is None or not self._link.has_arrived(transfer)
        record = held.record if held.record is not None else self._put(held.give())
        self._link.wait(transfer)
        if not transfer.demand:
            if late:
                self.counters.late += self._bytes
            else:
                self.counters.useful += self._bytes
        self._forget(held)
        return record

    def end(self, seconds: float | None = None, kind: int = 0) -> None:
        """A step has ended.

        Args:
            seconds: that it took; None for a step whose times say nothing, such as a prompt.
            kind: of the step, see `Switch.after`.
        """
        if seconds is None:
            return
        useful, late, wasted, demand = (a - b for a, b in zip(self._totals(), self._at_begin, strict=True))
        self._seconds.append(seconds)
        self._misses.append(demand // self._bytes)
        if self.settings.switching:
            self.switch = self.switch.after(seconds, kind, (useful + late + demand) // self._bytes)
        if self.settings.depth is not None:
            return
        copy = self._copy_seconds()
        if not self._measured and copy is not None:
            self.depth = prefetch.first_horizon(self._layer_misses(), copy, self._layer_seconds(), self.settings.most_depth)
            self._measured = True
        else:
            self.depth = prefetch.next_horizon(self.depth, late > 0, wasted > 0, self.settings.most_depth)

    # --- Queueing

    def foresee(
        self, layer: int, scores_LE: Float[np.ndarray, "L E"], resident_LE: Bool[np.ndarray, "L E"], next_LE: Float[np.ndarray, "L E"] | None = None
    ) -> None:
        """Queues what the next layers are likely to miss. Never waits.

        Args:
            layer: whose routing is known; -1 for none.
            scores_LE: probability of use in this step; a layer of zeros is one that nothing is known of.
            resident_LE: experts that are in slots.
            next_LE: probability of use in the next step, for layers beyond this step's last; None where that is not known.
        """
        if not self.on:
            return
        self._link.settle()
        self._now = self._turn(layer)
        count, least = self._limits()
        for ahead in range(layer + 1, layer + 1 + self.depth):
            source = scores_LE if ahead < self._layers else next_LE
            if source is None or ahead >= 2 * self._layers:
                return
            target = ahead % self._layers
            if source[target].any():
                self._plan(target, self._turn(ahead), source[target], resident_LE[target], count, least)

    def _plan(self, layer: int, turn: int, score_E: np.ndarray, resident_E: np.ndarray, count: int, least: float) -> None:
        """One layer's: what is held gets its new scores, what is queued and no longer likely is cancelled, what is likely is queued."""
        value_E = None if self.settings.value is None else self.settings.value[layer]
        for held in [h for h in self._held.values() if h.layer == layer]:
            score = float(score_E[held.expert])
            if score >= least:
                held.turn, held.score, held.worth = turn, score, score if value_E is None else score * float(value_E[held.expert])
                held.transfer.priority = prefetch.priority(turn, held.worth)  # type: ignore[union-attr]
            elif not _started(held):
                self._drop(held)
        count -= sum(h.first == turn for h in self._held.values() if h.layer == layer)  # what was there before takes none of the link's time
        if count <= 0:
            return
        for expert in prefetch.choose(score_E, self._taken[layer] | resident_E, count, least, value_E):
            score = float(score_E[expert])
            worth = score if value_E is None else score * float(value_E[expert])
            if not self._room(worth) or not self._queue(layer, expert, turn, score, worth):
                return

    def _queue(self, layer: int, expert: int, turn: int, score: float, worth: float) -> bool:
        try:
            give = self._source.ask(layer, expert)
        except Exception:  # whoever needs it will hear of it
            return False
        held = Staged(layer, expert, turn, turn, score, worth, give)
        self._held[layer, expert] = held
        self._taken[layer, expert] = True
        ready = getattr(give, "ready", None)
        held.transfer = self._link.queue(self._bytes, prefetch.priority(turn, worth), lambda: self._start(held), ready)
        return True

    def _start(self, held: Staged) -> Any:
        """The record goes to the device, unless it would have to be waited for: then whoever lands it puts it there."""
        if getattr(held.give, "ready", lambda: True)():
            try:
                held.record = self._put(held.give())
            except Exception as error:
                held.failed = error
        return held.record

    def _room(self, worth: float) -> bool:
        """Makes room for a record: drops one whose turn has passed, the oldest first, or one for a coming turn that is worth less.

        What is on its way can't be dropped, nor what a layer asked for.
        """
        if len(self._held) < self.settings.staging:
            return True
        now = self._link.settle()
        loose = [h for h in self._held.values() if not h.asked and (not _started(h) or self._link.has_arrived(h.transfer, now))]  # type: ignore[arg-type]
        passed = [h for h in loose if h.turn <= self._now]
        less = [h for h in loose if h.worth < worth]
        if not passed and not less:
            return False
        self._drop(min(passed, key=lambda h: (h.turn, h.worth)) if passed else min(less, key=lambda h: h.worth))
        return True

    def _drop(self, held: Staged) -> None:
        if self._link.cancel(held.transfer):  # type: ignore[arg-type]
            self.counters.cancelled += self._bytes
        elif not held.transfer.demand:  # type: ignore[union-attr]
            self.counters.wasted += self._bytes
        self._forget(held)

    def _forget(self, held: Staged) -> None:
        del self._held[held.layer, held.expert]
        self._taken[held.layer, held.expert] = False

    def _turn(self, layer: int) -> int:
        return self._step * self._layers + layer

    def _totals(self) -> tuple[int, int, int, int]:
        return self.counters.useful, self.counters.late, self.counters.wasted, self.counters.demand

    def _layer_seconds(self) -> float:
        """The median, which a step that compiled does not move."""
        return statistics.median(self._seconds) / self._layers

    def _layer_misses(self) -> float:
        return sum(self._misses) / len(self._misses) / self._layers

    def _copy_seconds(self) -> float | None:
        found = self._link.seconds(self._bytes)
        return self.settings.copy_seconds if found is None else found

    def _limits(self) -> tuple[int, float]:
        """The most records for one turn, and the lowest probability."""
        s, copy = self.settings, self._copy_seconds()
        if s.width is not None:
            return s.width, s.least
        if copy is None or not self._seconds:
            return 1, max(UNKNOWN, s.least)
        records = prefetch.slack(self._layer_seconds(), copy, self._layer_misses())
        return prefetch.width(records, s.most_width), prefetch.threshold(records, s.least)


def _started(held: Staged) -> bool:
    return held.transfer is not None and held.transfer.started
