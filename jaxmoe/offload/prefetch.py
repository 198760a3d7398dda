"""Which experts to send before they are asked for: pure decisions. `jaxmoe.offload.staging` carries them out; nothing here knows a link or a model.

    how many a layer   the records that fit into the time in which the link would be idle (`slack`, `width`)
    which              those likely enough that sending one is expected to gain more than it can delay (`threshold`), likeliest first (`choose`)
    how far ahead      a controller that goes further after waits and comes back after records sent in vain (`first_horizon`, `next_horizon`)
    whether at all     the measured seconds of steps with and without it (`Switch`)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


@dataclasses.dataclass(frozen=True)
class Prefetch:
    """What a user may set.

    Attributes:
        staging: records held on the device, at most, beside the slots: those queued, on their way, and there.
        depth: how many layers ahead; None for the controller, up to `most_depth`.
        width: the most records for one turn of a layer; None for the rule, up to `most_width`.
        most_depth, most_width: see above.
        least: predicted probability below which nothing is sent. The rule of `threshold` may ask for more; with a fixed `width` it does not.
        value: [L, E] what an expert is worth beside others of the same probability; None for all the same.
        copy_seconds: of one record over a link without an emulated speed; None if not known.
        switching: turn it off where measured steps are not faster with it, see `Switch`; False to leave it on.

    Raises:
        ValueError: a number that is too small.
    """

    staging: int = 4
    depth: int | None = None
    width: int | None = None
    most_depth: int = 4
    most_width: int = 4
    least: float = 0.05
    value: Float[np.ndarray, "L E"] | None = None
    copy_seconds: float | None = None
    switching: bool = True

    def __post_init__(self):
        for name in ("staging", "depth", "width", "most_depth", "most_width"):
            found = getattr(self, name)
            if found is not None and found < 1:
                raise ValueError(f"{name} = {found} of prefetching: give at least 1, or switch prefetching off")
        if not 0 < self.least <= 1:
            raise ValueError(f"least = {self.least} of prefetching: give a probability above 0 and up to 1")


# --- How many, and which


def slack(layer_seconds: float, copy_seconds: float, misses: float) -> float:
    """Records that could cross while the link waits for the next layer's demand: T_window / T_copy - E[misses].

    Args:
        layer_seconds: from one layer to the next as measured, waiting included (T_window).
        copy_seconds: one record's time on the link (T_copy).
        misses: records that a layer demands, beside those that prefetching brought.

    Returns:
        A number that is not rounded, at least 0. Source: Fate (arXiv 2502.12224), its I/O budget for widening, which rounds T_window / T_copy down.
    """
    return max(0.0, layer_seconds / copy_seconds - misses)


def width(slack_records: float, most: int) -> int:
    """Records to send for one layer: clip(floor(slack), 0, most) as Fate has it, though at least one.

    Fate's rule sends nothing where less than a whole record fits into the gap. What begins in the gap arrives earlier all the same; whether that is
    worth its risk is for `threshold` to say.
    """
    return min(max(1, math.floor(slack_records)), most)


def threshold(slack_records: float, least: float) -> float:
    """The probability from which sending a record is expected not to lose.

    With a gap of g seconds and a copy of c, a record sent when the gap begins saves min(g, c) of waiting if it is asked for, and otherwise keeps
    demand back for max(0, c - g): p min(g, c) >= (1 - p) max(0, c - g). With less than a record of slack that is p >= 1 - g / c, else any p.
    """
    return max(least, 1.0 - slack_records)


def choose(score_E: Float[np.ndarray, "E"], taken_E: Bool[np.ndarray, "E"], count: int, least: float, value_E=None) -> list[int]:
    """The experts of a layer to send, best first.

    Args:
        score_E: predicted probability of use.
        taken_E: experts that are resident, staged, queued or on their way.
        count: how many at most.
        least: the lowest score.
        value_E: what each is worth beside its probability; None for all the same.

    Returns:
        Ids by falling `score * value`, of equals the lowest id first.
    """
    fit = np.flatnonzero(~taken_E & (score_E >= least))
    worth = score_E[fit] if value_E is None else score_E[fit] * value_E[fit]
    return fit[np.argsort(-worth, kind="stable")[:count]].tolist()


def priority(turn: int, worth: float) -> tuple[int, float]:
    """The order on the link: the nearest turn of a layer first, then the highest `score * value`. The lowest goes first."""
    return turn, -worth


# --- How far ahead


def first_horizon(misses: float, copy_seconds: float, layer_seconds: float, most: int) -> int:
    """Layers ahead at which what a layer misses can have crossed: N_e E_s / (C_s T_l), rounded up, 1 to `most`.

    Source: ExpertFlow (arXiv 2510.26730), the start of its adaptive horizon S; N_e experts of E_s bytes over C_s bytes a second, T_l seconds a layer.
    """
    return min(max(1, math.ceil(misses * copy_seconds / layer_seconds)), most)


def next_horizon(horizon: int, stalled: bool, overfetched: bool, most: int) -> int:
    """One layer further after a step that waited for a record sent ahead, one nearer after one that threw a record away; 1 to `most`.

    Source: ExpertFlow (arXiv 2510.26730): stall S + 1, over-fetch S - 1.
    """
    return min(max(1, horizon + int(stalled) - int(overfetched)), most)


# --- Whether at all

SPAN = 4
"""Steps of a span. The first of each is not counted: it runs with what the span before has left."""

SPANS = 6
"""Spans of a trial, with and without in turn."""

CLEARLY = 0.95
"""A trial ends early, after as many spans with as without, where steps with prefetching are clearly the slower ones."""

HOLD = 64
"""Steps for which the first verdict holds."""

LONGEST_HOLD = 4096


class Timed(NamedTuple):
    """A step: its seconds, and what it missed."""

    seconds: float
    misses: int


def level(*groups: Sequence[Timed]) -> list[float]:
    """Each group's median seconds, as if all steps had missed as much as they do on the average.

    What a miss costs is the median of the slopes between any two steps of the same group (Theil and Sen), or nothing if that is negative: some steps
    that something else disturbed don't move it.
    """
    slopes = [
        (a.seconds - b.seconds) / (a.misses - b.misses) for group in groups for a, b in itertools.combinations(group, 2) if a.misses != b.misses
    ]
    each = max(0.0, statistics.median(slopes)) if slopes else 0.0
    typical = statistics.mean(step.misses for group in groups for step in group)
    return [statistics.median(step.seconds - each * (step.misses - typical) for step in group) for group in groups]


@dataclasses.dataclass(frozen=True)
class Switch:
    """Says whether prefetching is on, by the measured times alone.

    A trial of up to `SPANS` spans runs with prefetching and without in turn. It is on afterwards if the median of steps without it is longer than
    that of steps with it, else off, for `HOLD` steps. After another trial with the same verdict the verdict holds twice as long, up to
    `LONGEST_HOLD`, and `HOLD` again after one that changed it. Medians, since a step that another program disturbed is not to decide; both kinds of
    spans in turn, since the sequence gets longer and routing changes. What a step misses varies by more than prefetching brings: every time is first
    taken to the same number of misses, by what one more of them costs in these very steps (`level`).

    Attributes:
        trial: whether a trial is going on.
        position: steps since the trial or the hold began.
        length: steps of the present hold, or of the last one.
        verdict: of the last trial; None before the first has ended.
        off, on_: seconds and misses of the trial's steps that count, without and with prefetching.
        gain: the last trial's median without over its median with, at the same number of misses.
        kind: what kind of steps these are; times of different kinds (batch sizes) aren't compared.
    """

    trial: bool = True
    position: int = 0
    length: int = 0
    verdict: bool | None = None
    off: tuple[Timed, ...] = ()
    on_: tuple[Timed, ...] = ()
    gain: float | None = None
    kind: int = 0

    @property
    def on(self) -> bool:
        """Whether the next step prefetches."""
        return (self.position // SPAN) % 2 == 0 if self.trial else bool(self.verdict)

    def after(self, seconds: float, kind: int = 0, misses: int = 0) -> Switch:
        """The switch after a step that took so long.

        Args:
            seconds: of the step, which ran as `on` said.
            kind: of the step; another one than before begins a trial anew, or if there was a verdict holds it for `HOLD` steps before.
            misses: experts that it asked for and that were in no slot, sent ahead or not.
        """
        if kind != self.kind:
            length = self.length if self.verdict is None else HOLD
            return dataclasses.replace(self, trial=self.verdict is None, position=0, length=length, off=(), on_=(), kind=kind)
        if not self.trial:
            ended = self.position + 1 >= self.length
            return dataclasses.replace(self, trial=ended, position=0 if ended else self.position + 1)
        if self.position % SPAN == 0:
            return dataclasses.replace(self, position=self.position + 1)
        step = Timed(seconds, misses)
        on, off = (*self.on_, *([step] if self.on else [])), (*self.off, *([] if self.on else [step]))
        found = dataclasses.replace(self, position=self.position + 1, on_=on, off=off)
        ended = found.position >= SPAN * SPANS or (found.position % (2 * SPAN) == 0 and found._gain() < CLEARLY)
        return found._judged() if ended else found

    def _gain(self) -> float:
        off, on = level(self.off, self.on_)
        return off / max(on, 1e-12)

    def _judged(self) -> Switch:
        gain = self._gain()
        length = min(2 * self.length, LONGEST_HOLD) if self.verdict is (gain > 1) else HOLD
        return Switch(False, 0, length, gain > 1, gain=gain, kind=self.kind)


OFF = Switch(trial=False, length=HOLD, verdict=False)
"""As after a trial that was lost."""
