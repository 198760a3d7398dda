"""Who goes first: one linear objective over what is known of a sequence, and the policy of which it is a part.

The points of a sequence are

    points =  wait     * (now - arrived)              seconds; those who were put aside keep their place
            + priority * its priority                 levels
            - service  * its user's service           tokens, prompts once and new ones twice (virtual token counter, arXiv 2401.00588)
            + cached   * tokens found in pages        tokens of prompts that need not be computed
            + ratio    * expected / uncached          new tokens for each that has to be computed first (BatchLLM, arXiv 2412.03594)
            - short    * (uncached + expected)        tokens that are still to be worked for
            - experts  * growth                       experts it is expected to ask for and no running one does (ExpertFlow, arXiv 2410.17954)
            - idle     * (now - ran)                  seconds; of running ones only, to say who is put aside first

Weights are points for a unit, so that each says how many seconds of waiting something is worth where `wait` is 1. More points go first: they are
admitted and taken up again first, and put aside last. A sequence older than `Policy.longest` seconds stands above all points, the oldest first; so
nobody waits for longer than that and what those before it need. Of equals the first to arrive goes first. With a `Policy.margin` who is ahead by so
many points takes the place of one that runs, which is put aside.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import get_args

import numpy as np

from jaxmoe.engine.serving.state import Draft
from jaxmoe.engine.serving.types import Phase, Preemption, PrefillMode, Seq, ServeSpec
from jaxmoe.offload.regroup import check_bound, find_group_policy

Paths = Mapping[int, np.ndarray]
"""What each sequence is expected to ask for in its next steps, [L, E], sets or probabilities. Sequences may be missing."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights: see the formula above; points for a second, a level, a token or an expert."""

    wait: float = 1.0
    priority: float = 0.0
    service: float = 0.0
    cached: float = 0.0
    ratio: float = 0.0
    short: float = 0.0
    experts: float = 0.0
    idle: float = 0.0


OBJECTIVES: dict[str, Objective] = {
    "fcfs": Objective(),
    "priority": Objective(priority=1e3),
    "fair": Objective(wait=1e-3, priority=1e3, service=1.0),
    "throughput": Objective(wait=1e-3, cached=1e-3, ratio=1.0),
    "expert-aware": Objective(wait=1.0, priority=1e3, experts=0.25, cached=1e-2),
    "shortest": Objective(wait=1.0, priority=1e3, short=0.1),
}
"""By name; what a user can ask for. A level of priority outweighs 1,000 seconds."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """How steps are put together.

    Attributes:
        prefill: how prompts are computed beside decoding.
        preemption: what becomes of a sequence that is put aside.
        objective: its name or its weights.
        group: of `jaxmoe.offload.regroup.POLICIES`, which sequences decode together when more could than a step takes; None for taking turns.
        bound: steps running that such a sequence may be passed over; None for no bound.
        held_cost: what an expert counts for that is on the device, of one that is not, 0 to 1; for the group 'greedy' and for `Objective.experts`.
        longest: seconds after which a sequence goes before all others.
        defer: a prompt waits for a prefix that another is computing if that is at least this part of what it would have to compute itself; above 1
            it never waits.
        margin: points by which one that waits has to be ahead of one that runs to take its place when there is no other; infinite for never.
        keep: pages of prefixes are copied to host memory when the device gives them up, where there is room.
    """

    prefill: PrefillMode = "layered"
    preemption: Preemption = "swap"
    objective: str | Objective = "fcfs"
    group: str | None = None
    bound: int | None = 16
    held_cost: float = 1.0
    longest: float = 60.0
    defer: float = 0.5
    keep: bool = True
    margin: float = math.inf

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a name that there isn't, or a number out of range.
        """
        for name, value, known in (("prefill", self.prefill, get_args(PrefillMode)), ("preemption", self.preemption, get_args(Preemption))):
            if value not in known:
                raise ValueError(f"there is no {name} {value!r}: choose one of {', '.join(known)}")
        if isinstance(self.objective, str) and self.objective not in OBJECTIVES:
            raise ValueError(f"there is no objective {self.objective!r}: choose one of {', '.join(OBJECTIVES)}")
        if self.group is not None:
            find_group_policy(self.group)
        if not 0 <= self.held_cost <= 1:
            raise ValueError(f"a cost of {self.held_cost} of an expert that is on the device: give 0 to 1")
        if self.longest < 0 or self.defer < 0 or self.margin < 0:
            raise ValueError(f"a longest wait of {self.longest} s, a part of {self.defer}, a margin of {self.margin}: give numbers of at least 0")

    @property
    def weights(self) -> Objective:
        """The objective's weights."""
        return OBJECTIVES[self.objective] if isinstance(self.objective, str) else self.objective


def check_policy(spec: ServeSpec, policy: Policy) -> None:
    """Refuses a policy that the sizes can't follow.

    Raises:
        ValueError: steps without room for prompts beside decoding, or a waiting bound that all sequences together can't have.
    """
    if policy.prefill in ("chunked", "splitfuse") and spec.chunk < spec.batch + spec.run:
        least = spec.batch + spec.run
        raise ValueError(f"a chunk of {spec.chunk} tokens has no room for a run of {spec.run} beside {spec.batch} that decode: give at least {least}")
    if policy.prefill == "layered" and spec.wave < spec.run:
        raise ValueError(f"waves of {spec.wave} tokens have no room for a run of {spec.run}: give a larger wave")
    if policy.group is not None:
        check_bound(spec.slots, spec.batch, policy.bound)


class Ranker:
    """Gives sequences their order in one step. What costs something to know is looked up only where it has a weight."""

    def __init__(self, draft: Draft, policy: Policy, now: float, paths: Paths | None, held: np.ndarray | None):
        self._draft, self._w, self._now, self._longest = draft, policy.weights, now, policy.longest
        self._margin = policy.margin
        self._paths = paths if self._w.experts and paths else None
        self._held, self._held_cost = held, policy.held_cost
        self._open: np.ndarray | None = None

    def ranked(self, seqs: Iterable[Seq]) -> list[Seq]:
        """Best first."""
        return sorted(seqs, key=self._key)

    def ahead(self, one: Seq, other: Seq) -> bool:
        """Whether one is ahead of another by more than the policy's margin, or is older than the longest wait and the other is not."""
        old, as_old = (self._now - s.arrived > self._longest for s in (one, other))
        return not as_old and (old or self.points(one) > self.points(other) + self._margin)

    def _key(self, s: Seq) -> tuple[bool, float, int]:
        if self._now - s.arrived > self._longest:
            return False, s.arrived, s.id
        return True, -self.points(s), s.id

    def points(self, s: Seq) -> float:
        """The formula at the top."""
        w, now = self._w, self._now
        out = w.wait * (now - s.arrived) + w.priority * s.priority
        if w.service:
            out -= w.service * self._draft.service.get(s.user, 0.0)
        if w.cached or w.ratio or w.short:
            cached = self.cached(s)
            expected = max(1, s.expected - (s.known - s.prompt)) if s.expected else s.limit - s.known
            out += w.cached * cached + w.ratio * expected / max(1, s.known - cached) - w.short * (s.known - cached + expected)
        if self._paths is not None and s.phase is not Phase.RUNNING and s.id in self._paths:
            out -= w.experts * self._growth(self._paths[s.id])
        if w.idle and s.phase is Phase.RUNNING:
            out -= w.idle * (now - s.ran)
        return out

    def cached(self, s: Seq) -> int:
        """Tokens that need not be computed: those that are, of who waits those found in pages of the device."""
        if s.phase is not Phase.WAITING or not self._draft.spec.sharing:
            return s.computed
        return self._draft.spec.page * len(self._draft.pool.match(s.keys[: (s.known - 1) // self._draft.spec.page]))

    def _growth(self, path: np.ndarray) -> float:
        """Expected experts that the running ones do not ask for; those on the device count as `held_cost`."""
        assert self._paths is not None
        if self._open is None:
            running = [self._paths[i] for i in self._draft.running if i in self._paths]
            away = np.ones(np.shape(path), np.float32)
            for other in running:
                away = away * (1 - np.asarray(other, np.float32))
            self._open = away if self._held is None else away * np.where(self._held, np.float32(self._held_cost), np.float32(1))
        return float(np.sum(np.asarray(path, np.float32) * self._open))
