"""Serving in virtual time: requests arrive, the real scheduler plans, the simulated runner does it, and all is counted. Exact and repeatable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxmoe.engine.serving.scheduler import Paths, Policy, SchedulerState, cancel, check_policy, commit, fresh, plan, submit
from jaxmoe.engine.serving.types import Phase, Results, Seq, ServeSpec, StepPlan
from jaxmoe.engine.serving.virtual import Cost, Live, Routing, SimulatedRunner, StepLog, new_live

__all__ = ["Cost", "Routing", "SimRequest", "SimResult", "SimulatedRunner", "simulate"]


@dataclasses.dataclass(frozen=True)
class SimRequest:
    """What arrives.

    Attributes:
        prompt: tokens.
        new: tokens to give, at most.
        arrived: seconds.
        seed, vocab: decide with the context what its tokens are; see `virtual.next_token`.
        n: answers; the k-th has the seed `seed + k`.
        eos: a token that ends it, or None.
        priority, user, expected, stepwise: as of `types.Seq`.
    """

    prompt: tuple[int, ...]
    new: int
    arrived: float = 0.0
    seed: int = 0
    vocab: tuple[int, int] = (0, 1000)
    n: int = 1
    eos: int | None = None
    priority: int = 0
    user: str = ""
    expected: int = 0
    stepwise: bool = False


@dataclasses.dataclass
class SimResult:
    """What came of it. Sequences are numbered as they arrive, answers to one prompt in a row.

    Attributes:
        tokens: new ones of every sequence that ran to its end.
        of: numbers of each request's sequences; none of one that was cancelled before it arrived.
        times: when each sequence was given tokens, one time for each.
        arrived: when each sequence did.
        cancelled: sequences.
        stalls: times that a sequence was ready to decode, stayed on the device, and got no token in a step.
        log: of the steps.
        state: of the scheduler at the end, counters included.
        clock: seconds at the end.
        cost: that was used.
    """

    tokens: dict[int, tuple[int, ...]]
    of: list[tuple[int, ...]]
    times: dict[int, list[float]]
    arrived: dict[int, float]
    cancelled: set[int]
    stalls: int
    log: list[StepLog]
    state: SchedulerState
    clock: float
    cost: Cost

    def first_token(self, id: int) -> float:
        """Seconds from a sequence's arrival to its first token."""
        return self.times[id][0] - self.arrived[id]

    def gaps(self, id: int) -> list[float]:
        """Seconds between a sequence's tokens."""
        return np.diff(self.times[id]).tolist()

    def waited(self, id: int) -> float:
        """Longest time without a token, since the last one or since arrival."""
        return max(np.diff([self.arrived[id], *self.times[id]]).tolist())

    @property
    def expert_bytes(self) -> int:
        """That were brought to the device."""
        return sum(step.decode_missed + step.prompt_missed for step in self.log) * self.cost.expert_bytes

    @property
    def page_bytes(self) -> int:
        """Of pages moved between device and host."""
        return sum(step.moved for step in self.log) * self.cost.page_bytes


def simulate(
    requests: Sequence[SimRequest], spec: ServeSpec, policy: Policy, cost: Cost | None = None, routing: Routing | None = None,
    cancels: Iterable[tuple[float, int]] = (), watch: Callable[[SchedulerState, StepPlan], None] | None = None, verify: bool = True,
) -> SimResult:  # fmt: skip
    """Serves requests to their ends in virtual time.

    Args:
        requests: in any order of arrival.
        spec, policy: of the scheduler.
        cost: of steps, page moves and experts; steps of 1 ms and 10 us a token, no experts, if not given.
        routing: which experts a token asks for; policies that go by paths are told the truth of it.
        cancels: (seconds, which request).
        watch: called with the state that a plan gave and the plan, before it is done.
        verify: check every read and the state's invariants at every step.

    Returns:
        Tokens, times and counts.

    Raises:
        AssertionError: a read found something else than its sequence's tokens, a plan did nothing while there was work, or an invariant is broken.
    """
    check_policy(spec, policy)
    run = _Simulation(requests, spec, policy, cost or Cost(), routing, sorted(cancels), verify)
    while run.deliver():
        run.step(watch)
    return run.result()


class _Simulation:
    def __init__(self, requests: Sequence[SimRequest], spec: ServeSpec, policy: Policy, cost: Cost, routing: Routing | None, cancels, verify: bool):
        self.requests, self.spec, self.policy, self.routing, self.verify = requests, spec, policy, routing, verify
        self.runner, self.state = SimulatedRunner(spec, cost, routing, verify), fresh(spec)
        self.order = sorted(range(len(requests)), key=lambda i: requests[i].arrived)
        self.cancels = list(cancels)
        self.live: dict[int, Live] = {}
        self.request_of: dict[int, SimRequest] = {}
        self.of: list[tuple[int, ...]] = [()] * len(requests)
        self.never: set[int] = set()
        self.tokens: dict[int, tuple[int, ...]] = {}
        self.times: dict[int, list[float]] = {}
        self.cancelled: set[int] = set()
        self.stalls = 0

    def deliver(self) -> bool:
        """What arrives and is cancelled by now; an idle engine waits for the next arrival. False when everything is done."""
        if self.state.idle and self.order:
            self.runner.clock = max(self.runner.clock, self.requests[self.order[0]].arrived)
        now = self.runner.clock
        while self.order and self.requests[self.order[0]].arrived <= now:
            self._arrive(self.order.pop(0))
        while self.cancels and self.cancels[0][0] <= now:
            self._cancel(self.cancels.pop(0)[1])
        return not self.state.idle or bool(self.order)

    def _arrive(self, i: int) -> None:
        if i in self.never:
            return
        r, first = self.requests[i], len(self.request_of)
        self.of[i] = tuple(range(first, first + r.n))
        limit = len(r.prompt) + r.new
        for k, id in enumerate(self.of[i]):
            self.request_of[id] = r
            self.live[id] = new_live(r.prompt, limit, r.seed + k, r.vocab)
            self.times[id] = []
            seq = Seq(
                id, len(r.prompt), len(r.prompt), limit, r.arrived, keys=self._keys(id, 0), priority=r.priority, user=r.user, expected=r.expected,
                stepwise=r.stepwise, parent=first if k else None, ran=r.arrived,
            )  # fmt: skip
            self.state = submit(self.state, seq)

    def _keys(self, id: int, have: int) -> tuple[bytes, ...]:
        """Keys of the full pages of known tokens after the first `have`."""
        live, page = self.live[id], self.spec.page
        if not self.spec.sharing:
            return ()
        return tuple(live.hashes[(i + 1) * page - 1].tobytes() for i in range(have, len(live.ids) // page))

    def _cancel(self, i: int) -> None:
        self.never.add(i)
        gone = [id for id in self.of[i] if id in self.state.seqs]
        self.cancelled |= set(gone)
        self.state = cancel(self.state, gone)

    def step(self, watch: Callable[[SchedulerState, StepPlan], None] | None) -> None:
        if self.state.idle:
            return
        before = self.state
        made, self.state = plan(before, self.policy, self.runner.clock, self._paths(), self.runner.cache.held if self.routing else None)
        assert not made.empty, f"nothing is done while there is work: {made.reason}"
        if self.verify:
            self.state.check(pools=False)
        if watch is not None:
            watch(self.state, made)
        rows = {row.id for row in made.decode}
        ready = [i for i in before.running if before.seqs[i].decodes and i not in rows]
        self.stalls += sum(self.state.seqs[i].phase is Phase.RUNNING for i in ready)
        given = self.runner.run(made, self.live)
        self.state = commit(self.state, made, self._results(given), self.runner.clock)
        if self.verify:
            self.state.check()

    def _paths(self) -> Paths | None:
        """What every sequence's next token asks for, or its prompt's last."""
        cost = self.runner.cost
        if self.routing is None or not (self.policy.group or self.policy.weights.experts):
            return None
        ids = list(self.state.seqs)
        routed = self.routing(np.asarray([self.live[i].ids[-1] for i in ids]))
        paths = np.zeros((len(ids), cost.layers, cost.experts), bool)
        np.put_along_axis(paths, routed, True, axis=2)
        return dict(zip(ids, paths, strict=True))

    def _results(self, given: dict[int, tuple[int, ...]]) -> Results:
        counts, ended, keys = {}, set(), {}
        for id, new in given.items():
            live, r = self.live[id], self.request_of[id]
            if r.eos is not None and r.eos in new:
                new = new[: new.index(r.eos) + 1]
            have = len(live.ids) // self.spec.page
            for token in new:
                live.push(token)
            counts[id], keys[id] = len(new), self._keys(id, have)
            self.times[id] += [self.runner.clock] * len(new)
            if len(live.ids) == len(r.prompt) + r.new or new[-1] == r.eos:
                ended.add(id)
                assert id not in self.tokens, f"sequence {id} ended twice"
                self.tokens[id] = tuple(live.ids[len(r.prompt) :])
        return Results(counts, frozenset(ended), keys)

    def result(self) -> SimResult:
        arrived = {id: r.arrived for id, r in self.request_of.items()}
        return SimResult(
            self.tokens, self.of, self.times, arrived, self.cancelled, self.stalls, self.runner.log, self.state, self.runner.clock, self.runner.cost
        )
