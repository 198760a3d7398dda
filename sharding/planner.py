"""Which split of a model over a machine is best: of all that can be and fit, the one whose predicted times are best.

Bytes come from a callable (`sharding.memory.device_bytes`), times from `sharding.time_model`. Every plan that is returned fits by those bytes; that
its programs compile is proved elsewhere.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from jaxmoe.spec import ModelSpec
from sharding.choices import Arm, Search, Slo, arms, layouts, score, why_none
from sharding.fitting import Change, DeviceBytes, Fits, does_not_fit, fewer_rows, more_devices, sequences
from sharding.hardware import Machine
from sharding.plan import Objective
from sharding.routing_load import Routing
from sharding.split import Layout, Split
from sharding.time_model import TERMS, Known, Times, predict
from sharding.workload import Workload

KEPT = 5
"""Plans that are named behind the best."""

CHANGES = 3
"""Of each kind, so many are tried to keep limits."""


class MissesSlo(ValueError):
    """What fits is too slow for what was asked; says how close it comes, and what takes the time."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layout for a workload, its predicted times, its score (the lower the better), and the bytes of a device."""

    layout: Layout
    workload: Workload
    times: Times
    score: float
    nbytes: Any = None

    @property
    def split(self) -> Split:
        """The mesh."""
        return self.layout.split


@dataclasses.dataclass(frozen=True)
class Lost:
    """A split that wasn't chosen, and why, in words."""

    split: Split
    reason: str


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search gives.

    Attributes:
        best: the winner.
        runners_up: what comes next, best first; all of them fit.
        lost: why others aren't it: the runners-up, and all that would have been better but doesn't fit or misses a limit. A split is named once.
        refused: splits that the model, or the number of sequences, can't be divided by.
        worse: splits that couldn't have come among the runners-up, whatever they need.
    """

    best: Candidate
    runners_up: tuple[Candidate, ...]
    lost: tuple[Lost, ...]
    refused: int
    worse: int


@dataclasses.dataclass
class _Ranking:
    """What the search has found so far."""

    kept: list[Candidate] = dataclasses.field(default_factory=list)
    lost: dict[Split, str] = dataclasses.field(default_factory=dict)
    slow: list[Candidate] = dataclasses.field(default_factory=list)
    seen: int = 0

    def add(self, c: Candidate) -> None:
        """Keeps the best of each split, in order."""
        of_split = [k for k in (*self.kept, c) if k.split == c.split]
        others = [k for k in self.kept if k.split != c.split]
        self.kept = sorted((*others, min(of_split, key=_order)), key=_order)

    def full(self, bound: float) -> bool:
        """Whether nothing with a score of `bound` or above would be among those that are named."""
        return len(self.kept) > KEPT and bound > self.kept[KEPT].score


class _Search:
    """A search with its arguments."""

    def __init__(self, spec: ModelSpec, machine: Machine, search: Search, fits: Fits, routing: Routing | None):
        self.spec, self.machine, self.search, self.fits, self.routing = spec, machine, search, fits, routing
        self.known: Known = {}

    def candidate(self, layout: Layout, workload: Workload) -> Candidate:
        times = predict(self.spec, self.machine, layout, workload, routing=self.routing, known=self.known)
        return Candidate(layout, workload, times, score(self.search.objective, self.machine, layout.split, workload, times))

    def rank(self, all_arms: Sequence[Arm]) -> _Ranking:
        """Goes through the arms by the best that each could reach, with any number of its sequences, until none that is left could be named."""
        ranking = _Ranking()
        ways = [sorted((self.candidate(a.layout, a.asked(rows, a.slots[-1])) for rows in a.rows), key=_order) for a in all_arms]
        for at in sorted(range(len(ways)), key=lambda i: _order(ways[i][0])):
            if ranking.full(ways[at][0].score):
                break
            ranking.seen += 1
            self._try(all_arms[at], ways[at], ranking)
        return ranking

    def _try(self, arm: Arm, by_bound: Sequence[Candidate], ranking: _Ranking) -> None:
        """The best candidate of an arm that fits and keeps the limits, or why there is none. More slots are never worse."""
        layout, best, slow = arm.layout, None, []
        most = self.fits.most(layout, [arm.asked(rows, arm.slots[0]) for rows in arm.rows])
        if most is None:
            ranking.lost.setdefault(layout.split, self.fits.why_not(layout, arm.least))
            return
        for bound in (c for c in by_bound if c.workload.rows <= most.rows):
            if best is not None and bound.score >= best.score:
                break
            asked = self.fits.most(layout, [arm.asked(bound.workload.rows, slots) for slots in arm.slots])
            assert asked is not None, "the fewest slots fit so many sequences"
            c = bound if asked == bound.workload else self.candidate(layout, asked)
            if self.search.slo.missed(c.times):
                slow.append(c)
            elif best is None or _order(c) < _order(best):
                best = c
        if best is not None:
            ranking.add(dataclasses.replace(best, nbytes=self.fits.need(layout, best.workload)))
            return
        ranking.slow += slow
        ranking.lost.setdefault(layout.split, self.search.slo.missed(slow[-1].times) or "")


def _order(c: Candidate) -> tuple:
    """By score; of equals the one with the fewest devices and axes."""
    return (c.score, c.split.devices, sum(n > 1 for n in c.split.shape), c.split.shape[::-1], str(c.split), -(c.workload.slots or 0))


def search_plan(
    spec: ModelSpec, machine: Machine, workload: Workload, search: Search, device_bytes: DeviceBytes, routing: Routing | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Found:  # fmt: skip
    """The best split.

    Experts go into host memory only where no split that keeps all of them on the devices fits and keeps the limits.

    Args:
        spec: the model, in the precision of the workload.
        machine: what it runs on.
        workload: what it has to do.
        search: what may be chosen, and by what.
        device_bytes: bytes of one device.
        routing: which experts are asked for; evenly many if not given.
        progress: told what is done.

    Raises:
        DoesNotFit: nothing fits; says what would.
        MissesSlo: nothing that fits keeps the limits.
        SplitError: the model, or the number of sequences, can't be divided over the machine at all.
    """
    good, refused = layouts(spec, machine, search)
    fits = Fits(spec, machine, device_bytes)
    found, slow = _attempt(good, refused, workload, _Search(spec, machine, search, fits, routing), progress)
    if found is not None:
        return found
    if not slow:
        progress("what would fit")
        raise does_not_fit(fits, workload, search, good)
    progress("what would keep the limits")
    helps = []
    for kind in (() if search.any_rows else (fewer_rows,)) + (more_devices,):
        for change in itertools.islice(kind(spec, machine, workload), CHANGES):
            if _keeps(fits, change, search, routing):
                helps.append(change.text)
                break
    raise MissesSlo(_too_slow(search.slo, min(slow, key=lambda c: search.slo.excess(c.times)), helps))


def _attempt(
    good: Sequence[Layout], refused: int, workload: Workload, run: _Search, progress: Callable[[str], None]
) -> tuple[Found | None, list[Candidate]]:  # fmt: skip
    """What was found, and what fits but is too slow."""
    search, spec, slow = run.search, run.spec, list[Candidate]()
    may_stream = not search.resident and workload.slots is None and not workload.copies and bool(spec.moe_layers)
    for streamed in (False, True) if may_stream else (False,):
        ways = arms(spec, good, workload, search, streamed)
        if not ways and not streamed:
            raise why_none(spec, run.machine, good, workload, search)
        if not ways:
            continue
        progress(f"{len(ways)} ways{' with experts in host memory' if streamed else ''}")
        ranking = run.rank(ways)
        if ranking.kept:
            return _found(search.objective, ranking, refused + len(good) - len({arm.layout for arm in ways}), len(ways)), slow
        slow += ranking.slow
    return None, slow


def _keeps(fits: Fits, change: Change, search: Search, routing: Routing | None) -> bool:
    """Whether a search with this change finds something."""
    try:
        good, refused = layouts(fits.spec, change.machine, search)
        known = fits if change.machine == fits.machine else Fits(fits.spec, change.machine, fits.device_bytes)
        return _attempt(good, refused, change.workload, _Search(fits.spec, change.machine, search, known, routing), lambda what: None)[0] is not None
    except ValueError:
        return False


def _found(objective: Objective, ranking: _Ranking, refused: int, ways: int) -> Found:
    best, *others = ranking.kept[: KEPT + 1]
    reasons = {c.split: slower(c, best, objective) for c in others}
    reasons |= {s: why for s, why in ranking.lost.items() if s not in {c.split for c in ranking.kept}}
    return Found(best, tuple(others), tuple(Lost(s, why) for s, why in reasons.items()), refused, ways - ranking.seen)


def _too_slow(slo: Slo, closest: Candidate, helps: Sequence[str]) -> str:
    missed = slo.missed(closest.times) or ""
    takes = closest.times.prefill_step if "ttft" in missed else closest.times.decode
    advice = f"what would keep them: {', or '.join(helps)}" if helps else "no single change would keep them"
    at = f"{closest.split} with {sequences(closest.workload.rows)}"
    return f"nothing that fits keeps the limits: closest is {at}, whose {missed}, most of it {takes.longest}; {advice}"


def slower(c: Candidate, best: Candidate, objective: Objective = "latency") -> str:
    """Why a candidate is behind another: by how much, and which term of its steps grows most."""
    times = c.score / best.score
    if times < 1.0005:
        return "as good, with more devices or axes"
    tokens = {"decode": best.workload.new_tokens, "prefill_step": 1}

    def weighed(x: Candidate, part: str, name: str) -> float:
        """Seconds of a sequence, or device-seconds where those are what counts."""
        return getattr(getattr(x.times, part), name) / x.workload.rows * (x.split.devices if objective == "cost" else 1)

    longer = {(part, name): n * (weighed(c, part, name) - weighed(best, part, name)) for part, n in tokens.items() for name in TERMS}
    part, term = max(longer, key=lambda key: longer[key])
    phase = "decoding" if part == "decode" else "prefill"
    rows = "" if c.workload.rows == best.workload.rows else f", with {sequences(c.workload.rows)}"
    much = f"{100 * (times - 1):.2g} % more" if times < 1.1 else f"{times:.3g} times as much"
    return f"{much}: {phase} takes more {term}{rows}"
