"""What foretells the experts of serving's sequences: a source of `jaxmoe.offload.request_paths`, with a row of its state for each sequence.

The scheduler's expert-aware orders ask for it: which of more sequences than a step takes decode together, and who is admitted. A sequence keeps its
row while it is put aside, so that what was learned of it is not lost, and is told no token twice when it is computed again.

Routing is learned from what the runner records: decoding and chunks. The groups of a wave do not give theirs, and tokens that were found in pages are
not routed at all; of those a source may be told the tokens alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from jaxmoe.engine.serving.objective import Paths, Policy
from jaxmoe.engine.serving.runner import Given, Live, Runner
from jaxmoe.engine.serving.state import SchedulerState
from jaxmoe.engine.serving.types import Phase, Seq, StepPlan
from jaxmoe.offload.predictors.interface import one_hot
from jaxmoe.offload.request_paths import PathSource

BLIND = (None, "arrival", "random")
"""Ways to group that read no paths."""


class RequestPaths:
    """In the place of `ServingEngine`'s `paths`. Attributes: `source`; `known`, sequences that hold a row of its state."""

    def __init__(
        self, source: PathSource, runner: Runner, policy: Policy, unrouted: int | None = 0, number: Callable[[int, Any], int] = lambda id, live: id,
        look: int = 64,
    ):  # fmt: skip
        """
        Args:
            source: of paths.
            runner: that the engine has; its spec says how many sequences there can be.
            policy: of the engine; it says what is asked for, and when.
            unrouted: of tokens whose routing nobody recorded, the last so many are told to the source, with ids of -1; None for all. 0 suits sources
                that look at routing alone, the window of a network suits one that reads tokens, and all an oracle that counts them.
            number: `(id, live) -> number` that the source knows a request by.
            look: sequences without a row whose path is asked for while they wait, the oldest; the others count as the mean of those.

        Raises:
            ValueError: the source learns from the routing, and the runner does not record it.
        """
        if source.routed and not runner.record:
            raise ValueError(f"paths by {source.name!r} are learned from the routing: make the runner with record = True, or choose another source")
        self.source, self.policy = source, policy
        router, _ = runner.model.spec.moe
        self._nowhere = (len(runner.model.spec.moe_layers), router.active)
        self._unrouted, self._number, self._look = unrouted, number, look
        rows = 2 * runner.spec.slots  # as many put aside as there are on the device: more than that begin anew
        self._free, self._spare = list(range(rows)), rows
        self._state = source.init(rows + 1)
        self._rows: dict[int, int] = {}  # by id, who was looked at last at the end
        self._seen: dict[int, int] = {}
        self._waiting: dict[int, np.ndarray] = {}

    @property
    def known(self) -> int:
        """Sequences that hold a row."""
        return len(self._rows)

    def warm_up(self) -> None:
        """Asks for as many paths as there may be, by powers of two, for sources that compile programs by that."""
        n = 1
        while n < 2 * self._spare:
            rows = np.arange(min(n, self._spare))
            self.source.paths(self._state, rows, np.zeros(len(rows), np.int32))
            n *= 2

    # --- Before a step

    def of(self, state: SchedulerState, live: Mapping[int, Live], runner: Runner) -> tuple[Paths | None, Bool[np.ndarray, "L E"] | None]:
        """What `scheduler.plan` is to be told.

        Args:
            state: the scheduler's.
            live: all its sequences.
            runner: for the experts on the device.

        Returns:
            Paths of the sequences that matter, by id, and which experts are on the device; None where the policy does not go by that in this step.
        """
        self._release(state.seqs)
        ready = [s for i in state.running if (s := state.seqs[i]).left == 1]
        admitting = bool(self.policy.weights.experts) and len(state.seqs) > len(state.running)
        if not admitting and (self.policy.group in BLIND or len(ready) <= state.spec.batch):
            return None, None
        paths = self._of_rows([state.seqs[i] for i in state.running] if admitting else ready, live)
        if admitting:
            away = [s for s in state.seqs.values() if s.phase is not Phase.RUNNING]
            paths |= self._of_rows([s for s in away if s.id in self._rows], live)
            paths |= self._of_others([s for s in away if s.id not in self._rows], live)
        return paths, self._held(runner)

    def _held(self, runner: Runner) -> np.ndarray | None:
        table = getattr(runner.state.bank, "slot_of_expert", None) if self.policy.held_cost < 1 else None
        return None if table is None else np.asarray(table) >= 0

    def _of_rows(self, seqs: Iterable[Seq], live: Mapping[int, Live]) -> dict[int, np.ndarray]:
        """Paths of sequences that have a row, or are given one."""
        seqs = list(seqs)
        if not seqs:
            return {}
        rows = [self._row(s.id, live) for s in seqs]
        for s in seqs:
            self._catch_up(s.id, s.computed, live)
        return dict(zip((s.id for s in seqs), self._ask(rows, [live[s.id].ids[s.known - 1] for s in seqs]), strict=True))

    def _of_others(self, seqs: list[Seq], live: Mapping[int, Live]) -> dict[int, np.ndarray]:
        """Paths of sequences that wait, from their tokens alone: asked for once, as nothing is learned of them meanwhile."""
        seqs = sorted(seqs, key=lambda s: s.arrived)
        for s in seqs[: self._look]:
            if s.id not in self._waiting:
                self._state = self.source.begin(self._state, self._spare, self._number(s.id, live[s.id]))
                self._tell_tokens(self._spare, live[s.id].ids[: s.known - 1])
                self._waiting[s.id] = self._ask([self._spare], [live[s.id].ids[s.known - 1]])[0].copy()
        found = {s.id: self._waiting[s.id] for s in seqs[: self._look]}
        if len(seqs) > len(found):
            mean = np.asarray(np.mean(list(found.values()), axis=0, dtype=np.float32))
            found |= {s.id: mean for s in seqs[self._look :]}
        return found

    def _ask(self, rows: list[int], tokens: list[int]) -> np.ndarray:
        return np.asarray(self.source.paths(self._state, np.asarray(rows), np.asarray(tokens, np.int32)))

    # --- After a step

    def learn(self, plan: StepPlan, given: Mapping[int, Given], live: Mapping[int, Live], runner: Runner) -> None:
        """Tells the source what the runner recorded of a step.

        Args:
            plan, given: of the step; new tokens are not in `live` yet.
            live: all sequences.
            runner: that did it.
        """
        for call in runner.routed if self.source.routed else ():
            for id, at, tokens, experts in call.by_sequence():
                row = self._row(id, live)
                self._catch_up(id, at, live)
                new = self._seen[id] - at  # tokens that were computed before, and given up since, are not told again
                if new < len(tokens):
                    self._state = self.source.after(self._state, row, tokens[new:], experts[new:])
                    self._seen[id] = at + len(tokens)

    def _catch_up(self, id: int, at: int, live: Mapping[int, Live]) -> None:
        """What came before position `at`, of which there is no routing."""
        if (seen := self._seen[id]) < at:
            self._tell_tokens(self._rows[id], live[id].ids[seen:at])
            self._seen[id] = at

    def _tell_tokens(self, row: int, tokens: list[int]) -> None:
        tokens = tokens if self._unrouted is None else tokens[len(tokens) - min(self._unrouted, len(tokens)) :]
        if tokens and self.source.routed:
            unknown = np.full((len(tokens), *self._nowhere), -1, np.int16)
            self._state = self.source.after(self._state, row, np.asarray(tokens, np.int32), unknown)

    # --- Rows

    def _row(self, id: int, live: Mapping[int, Live]) -> int:
        """A sequence's row; a new one, or that of who was not looked at for longest, if it has none."""
        if (row := self._rows.pop(id, None)) is None:
            if not self._free:
                self._drop(next(iter(self._rows)))
            row = self._free.pop()
            self._state, self._seen[id] = self.source.begin(self._state, row, self._number(id, live[id])), 0
            self._waiting.pop(id, None)
        self._rows[id] = row
        return row

    def _drop(self, id: int) -> None:
        self._free.append(self._rows.pop(id))
        del self._seen[id]

    def _release(self, seqs: Mapping[int, Seq]) -> None:
        for id in [id for id in self._rows if id not in seqs]:
            self._drop(id)
        for id in [id for id in self._waiting if id not in seqs]:
            del self._waiting[id]


@dataclasses.dataclass
class _Tokens:
    """Attributes: `place` of each token in `sums` [most + 1, L, E] and `counts`, of which the last stays 0; `total` [L, E] of `n` tokens."""

    place: dict[int, int]
    sums: Float[np.ndarray, "X L E"]
    counts: Float[np.ndarray, "X"]
    total: Float[np.ndarray, "L E"]
    n: int = 0


def by_token_seen(layers: int, experts: int, active: int, most: int = 4096, weight: float = 1.0) -> PathSource:
    """`request_paths.by_token` learned while serving, from all sequences together: nothing has to be recorded beforehand.

    Args:
        layers, experts, active: L, E and A of the model.
        most: distinct tokens that have an entry, the first to come; all others have the average. Memory is taken as they come.
        weight: as for `by_token`.
    """

    def init(rows: int) -> _Tokens:
        shape = (layers, experts)
        return _Tokens({}, np.zeros((most + 1, *shape), np.float32), np.zeros(most + 1, np.float32), np.zeros(shape, np.float32))

    def after(state: _Tokens, row: int, tokens: np.ndarray, ids: np.ndarray) -> _Tokens:
        there = (ids >= 0).any((1, 2))
        tokens, used = tokens[there].tolist(), one_hot(ids[there], experts)
        for token in tokens:
            if len(state.place) < most:
                state.place.setdefault(token, len(state.place))
        state.total += used.sum(0)
        state.n += len(tokens)
        for token, own in zip(tokens, used, strict=True):
            if (at := state.place.get(token)) is not None:
                state.sums[at] += own
                state.counts[at] += 1
        return state

    def paths(state: _Tokens, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        mean = state.total / state.n if state.n else np.full((layers, experts), active / experts, np.float32)
        at = np.asarray([state.place.get(int(token), most) for token in tokens])
        return (state.sums[at] + weight * mean) / (state.counts[at] + weight)[:, None, None]

    return PathSource("token, learned", init, lambda state, row, number: state, after, paths)
