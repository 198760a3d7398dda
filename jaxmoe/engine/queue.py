"""Many requests through few cache rows, where each round's batch is chosen for the experts it asks for.

Up to `rows` requests hold rows of the cache of keys and values; a round decodes `batch` of them for `every` steps, the others wait with their rows
where they are: a batch is a list of row numbers, so regrouping moves nothing (ExpertFlow merges and reindexes its caches). A row is given on as soon
as its request ends. Tokens don't depend on what is beside them, so every request gives what it gives alone.

Rounds of one step are the default: the next token is known then, and it says more about the next experts than all that a request did before. They run
the compiled program for CHUNK steps with a budget of `every`; on the CPU it stops there, and the host-driven mode goes step by step anyway, but the
fused step of an accelerator has a loop of fixed length, where anything below CHUNK wastes the rest.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxmoe.engine import steps
from jaxmoe.engine.generate import Engine, Request, RequestError, Result, Row, check_requests
from jaxmoe.engine.text import Tokenizer
from jaxmoe.offload.predictors.interface import one_hot
from jaxmoe.offload.regroup import check_bound, find_group_policy, greedy_union
from jaxmoe.offload.request_paths import PathSource


@dataclasses.dataclass(frozen=True)
class Grouping:
    """How batches are put together.

    Attributes:
        batch: requests that decode together.
        policy: of `jaxmoe.offload.regroup.POLICIES`.
        bound: rounds running that a request which holds a row may be passed over; None for no bound.
        every: steps of a round, 1 to `steps.CHUNK`.
        held_cost: what an expert counts for that is on the device when a batch is chosen, of one that is not; for 'greedy'. 1 looks for few distinct
            experts; less for few loads, which is the same where little fits on the device.
    """

    batch: int
    policy: str = "greedy"
    bound: int | None = 16
    every: int = 1
    held_cost: float = 1.0


def check_grouping(grouping: Grouping, rows: int) -> None:
    """Raises ValueError for a policy that there isn't, rounds that no program runs, or a bound that `rows` requests can't have."""
    find_group_policy(grouping.policy)
    check_bound(rows, grouping.batch, grouping.bound)
    if not 1 <= grouping.every <= steps.CHUNK:
        raise ValueError(f"rounds of {grouping.every} steps: give 1 to {steps.CHUNK}")
    if not 0 <= grouping.held_cost <= 1:
        raise ValueError(f"a cost of {grouping.held_cost} of an expert that is on the device: give 0 to 1")
    if grouping.held_cost < 1 and grouping.policy != "greedy":
        raise ValueError(f"a cost of {grouping.held_cost} of an expert that is on the device is for the grouping 'greedy', not {grouping.policy!r}")


@dataclasses.dataclass(frozen=True)
class Pool:
    """The requests that hold rows, in order of arrival. Attributes: `numbers` theirs; `waited` rounds since each last ran, or came."""

    numbers: tuple[int, ...] = ()
    waited: tuple[int, ...] = ()

    def admit(self, numbers: Iterable[int]) -> Pool:
        """With these at the end."""
        new = tuple(numbers)
        return Pool(self.numbers + new, self.waited + (0,) * len(new))

    def choose(self, paths: np.ndarray, grouping: Grouping, held: np.ndarray | None = None) -> tuple[int, ...]:
        """The numbers of those that run next; `paths` [R, ...] in the pool's order, `held` bool [L, E] the experts on the device."""
        if len(self.numbers) <= grouping.batch:
            return self.numbers
        if held is not None and grouping.held_cost < 1:
            cost = np.where(held, np.float32(grouping.held_cost), np.float32(1))
            picked = greedy_union(paths, self.waited, grouping.batch, grouping.bound, cost)
        else:
            picked = find_group_policy(grouping.policy)(paths, self.waited, grouping.batch, grouping.bound)
        return tuple(self.numbers[i] for i in picked)

    def commit(self, picked: Iterable[int], ended: Iterable[int]) -> Pool:
        """After a round in which these ran and those of them ended."""
        ran, gone = set(picked), set(ended)
        left = [(n, 0 if n in ran else w + 1) for n, w in zip(self.numbers, self.waited, strict=True) if n not in gone]
        return Pool(tuple(n for n, _ in left), tuple(w for _, w in left))


@dataclasses.dataclass
class QueueStats:
    """What one `serve` did.

    Attributes:
        rounds, decode_steps, decode_tokens: decode counts tokens after each request's first.
        waited: int [N], most rounds running that each request was passed over while it held a row.
        distinct: int64 [L], distinct experts that decode steps asked for, summed over steps; None where the engine does not record.
        loads: int [L], experts that decoding brought to the device; None where they are all there.
        scheduler_seconds: of paths, choosing, and reading the routing for them.
        prefill_seconds, decode_seconds, stall_seconds: the scheduler's are in neither; stalls are of decoding's.
    """

    waited: Int[np.ndarray, "N"]
    distinct: Int[np.ndarray, "L"] | None
    rounds: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0
    loads: Int[np.ndarray, "L"] | None = None
    scheduler_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    stall_seconds: float = 0.0

    @property
    def distinct_per_step(self) -> Float[np.ndarray, "L"] | None:
        """Distinct experts of each layer in a decode step, on average."""
        return None if self.distinct is None else self.distinct / max(1, self.decode_steps)


class QueueEngine(Engine):
    """An `Engine` whose rows are taken in turn by any number of requests."""

    def serve(
        self, requests: Sequence[Request], grouping: Grouping, source: PathSource | None = None, tokenizer: Tokenizer | None = None,
        on_text: Callable[[int, str], None] = lambda i, text: None,
    ) -> tuple[list[Result], QueueStats]:  # fmt: skip
        """Runs requests to their ends, admitted in their order.

        Args:
            requests: any number, each within `positions`.
            grouping: how batches are chosen.
            source: of paths; may be None for policies that read none (arrival, random).
            tokenizer, on_text: as for `generate`.

        Returns:
            Results in the order of the requests, and counts.

        Raises:
            RequestError: a request that can't be run.
            ValueError: a grouping that can't be kept, or that lacks its paths.
        """
        if self.model.on.mesh is not None:
            raise ValueError(f"a queue is for a model on one device: leave out the split {self.model.on.layout.split}")
        self._check(requests, tokenizer)
        check_grouping(grouping, min(self.rows, len(requests)))
        if source is None and grouping.policy not in ("arrival", "random"):
            raise ValueError(f"the grouping {grouping.policy!r} reads paths: give a source of them")
        if source is not None and source.routed and self._recorder is None:
            raise ValueError(f"the paths {source.name!r} are learned from the routing: make the engine with record=True")
        run = _Serving(self, requests, grouping, source, tokenizer, on_text)
        while run.pool.numbers or run.queue:
            run.refill()
            if run.pool.numbers:
                run.round()
        return run.finish()

    def _check(self, requests: Sequence[Request], tokenizer: Tokenizer | None) -> None:
        check_requests(self.model.spec, requests)
        for i, r in enumerate(requests):
            if (needed := len(r.prompt_ids) + r.max_new_tokens) > self.positions:
                raise RequestError(f"request {i} needs {needed} positions, the engine has {self.positions}")
            if r.stop and tokenizer is None:
                raise RequestError(f"request {i} has stop strings {r.stop}, but without a tokenizer there is no text to find them in")
            if self.greedy and r.sampling.temperature > 0:
                raise RequestError(f"request {i} has temperature {r.sampling.temperature}, but this engine was made greedy")


class _Serving:
    """One `serve` on its way: who waits, who holds which row, and what the source of paths has seen."""

    def __init__(self, engine: QueueEngine, requests, grouping: Grouping, source: PathSource | None, tokenizer, on_text):
        self.engine, self.requests, self.grouping, self.source, self.on_text = engine, requests, grouping, source, on_text
        self.texts = [Row(r, tokenizer, engine.eos) for r in requests]
        self.queue, self.pool = list(range(len(requests))), Pool()
        self.free, self.row_of = list(range(engine.rows)), np.zeros(len(requests), np.int32)
        self.seen = None if source is None else source.init(engine.rows)
        self.state = engine.start()
        self.other_loads = self._loads()
        self.first, engine._sequence = engine._sequence, engine._sequence + len(requests)
        recorded = engine._recorder is not None
        self.experts = engine.model.spec.moe[0].experts if recorded else 0
        layers = len(engine.model.spec.moe_layers) if recorded else 0
        self.stats = QueueStats(np.zeros(len(requests), np.int64), np.zeros(layers, np.int64) if recorded else None)

    def refill(self) -> None:
        """Prompts of the next in the queue, into the rows that are free."""
        count = min(len(self.free), len(self.queue))
        if not count:
            return
        began, engine, loaded = time.perf_counter(), self.engine, self._loads()
        new, self.queue = self.queue[:count], self.queue[count:]
        rows, self.free = np.asarray(self.free[:count], np.int32), self.free[count:]
        self.row_of[new] = rows
        if self.source is not None:
            for i, row in zip(new, rows, strict=True):
                self.seen = self.source.begin(self.seen, int(row), i)
        group, learning = [self.requests[i] for i in new], 0.0
        for _, batch, (ended,) in engine._prefill_batches(group):
            sampling = engine._sampling([[group[i] for i in ended]], steps.LOGIT_ROWS)
            at = steps.pad_to([len(group[i].prompt_ids) for i in ended], steps.LOGIT_ROWS)
            tokens, self.state, routed = engine._prefill(self.state, _in_rows(batch, rows), sampling, at)
            engine._record_prompt(self.first + new[0], batch, routed)
            for i, token in zip(ended, tokens, strict=False):
                self.on_text(new[i], self.texts[new[i]].push(int(token)))
            learning += self._learn_prompts(batch, new, routed)
        self.other_loads = self.other_loads + self._loads() - loaded
        going = [i for i in new if self._going(i)]
        self.free += [int(self.row_of[i]) for i in new if not self._going(i)]
        self.pool = self.pool.admit(going)
        self.stats.scheduler_seconds += learning
        self.stats.prefill_seconds += time.perf_counter() - began - learning

    def _loads(self) -> np.ndarray:
        return self.engine.model.bank.counters(self.state.bank).get("loads", np.zeros(0, np.int64)).astype(np.int64)

    def _going(self, i: int) -> bool:
        return self.texts[i].result.finish_reason is None

    def round(self) -> None:
        """Chooses a batch and decodes it for `every` steps."""
        began, stalled = time.perf_counter(), self.engine.programs.stalled
        picked = self.pool.choose(self._paths(), self.grouping, self._held())
        chosen = time.perf_counter()
        last, out, routed = self._decode(picked)
        decoded = time.perf_counter()
        self.engine._record_decode(self.first, list(picked), list(range(len(picked))), last, out, routed)
        self._learn(picked, last, out, routed)
        learned = time.perf_counter()
        self._push(picked, out)
        ended = [i for i in picked if not self._going(i)]
        self.free += [int(self.row_of[i]) for i in ended]
        self.pool = self.pool.commit(picked, ended)
        numbers = list(self.pool.numbers)
        self.stats.waited[numbers] = np.maximum(self.stats.waited[numbers], self.pool.waited)
        self.stats.rounds += 1
        self.stats.scheduler_seconds += chosen - began + learned - decoded
        self.stats.decode_seconds += decoded - chosen + time.perf_counter() - learned
        self.stats.stall_seconds += self.engine.programs.stalled - stalled

    def _paths(self) -> Any:
        numbers = self.pool.numbers
        if self.source is None or len(numbers) <= self.grouping.batch:
            return np.zeros((len(numbers), 0), np.float32)
        next_tokens = np.asarray([self.texts[i].result.ids[-1] for i in numbers], np.int32)
        return self.source.paths(self.seen, self.row_of[list(numbers)], next_tokens)

    def _held(self) -> np.ndarray | None:
        """Which experts are on the device; None where all are, or where it does not matter."""
        table = getattr(self.state.bank, "slot_of_expert", None) if self.grouping.held_cost < 1 else None
        return None if table is None else np.asarray(table) >= 0

    def _decode(self, picked: Sequence[int]) -> tuple[np.ndarray, np.ndarray, Any]:
        engine, n = self.engine, steps.bucket(len(picked), steps.ROW_BUCKETS)
        results = [self.texts[i].result for i in picked]
        last = steps.pad_to([r.ids[-1] for r in results], n)
        positions = steps.pad_to([len(r.prompt_ids) + len(r.ids) - 1 for r in results], n)
        left = [self.requests[i].max_new_tokens - len(r.ids) for i, r in zip(picked, results, strict=True)]
        budget = steps.pad_to(np.minimum(left, self.grouping.every), n)
        sampling = engine._sampling([[self.requests[i] for i in picked]], n)
        rows = steps.pad_to(self.row_of[list(picked)], n)
        out, self.state, routed = engine._decode(self.state, rows, last, positions, budget, sampling)
        return last, np.asarray(out), routed

    def _push(self, picked: Sequence[int], out: np.ndarray) -> None:
        for tokens in out[: self.grouping.every, : len(picked)]:
            self.stats.decode_steps += bool((tokens >= 0).any())
            for i, token in zip(picked, tokens, strict=True):
                if token >= 0 and self._going(i):
                    self.stats.decode_tokens += 1
                    self.on_text(i, self.texts[i].push(int(token)))

    def _learn(self, picked: Sequence[int], last: np.ndarray, out: np.ndarray, routed) -> None:
        """Counts distinct experts, and tells the source what was routed where."""
        if self.stats.distinct is None:
            return
        n, every = len(picked), self.grouping.every
        ids, new = np.asarray(routed[0])[:every, :n], out[:every, :n]
        live = new >= 0
        used = one_hot(np.where(live[..., None, None], ids, -1), self.experts)
        self.stats.distinct += used.any(1).sum((0, 2))
        if self.source is None or not self.source.routed:
            return
        read = np.concatenate([last[None, :n], new[:-1]])
        for k, i in enumerate(picked):
            self.seen = self.source.after(self.seen, int(self.row_of[i]), read[live[:, k], k], ids[live[:, k], k])

    def _learn_prompts(self, batch, new: Sequence[int], routed) -> float:
        """The same of prompts; seconds."""
        if self.source is None or not self.source.routed:
            return 0.0
        began, ids = time.perf_counter(), np.asarray(routed[0])
        for k in np.unique(batch.segments[batch.segments >= 0]):
            mine = batch.segments == k
            self.seen = self.source.after(self.seen, int(self.row_of[new[k]]), batch.tokens[mine], ids[mine])
        return time.perf_counter() - began

    def finish(self) -> tuple[list[Result], QueueStats]:
        """Leaves the experts to the engine's next call."""
        self.stats.loads = self._loads() - self.other_loads if len(self.other_loads) else None
        self.engine._moving = self.state.bank
        return [row.result for row in self.texts], self.stats


def _in_rows(batch, rows: np.ndarray):
    """A prefill batch whose sequence k lies in row `rows[k]` of the cache."""
    real = np.arange(len(batch.run_segments)) < batch.n_runs
    segments = np.where(batch.segments >= 0, rows[batch.segments], batch.segments).astype(np.int32)
    return dataclasses.replace(batch, segments=segments, run_segments=np.where(real, rows[batch.run_segments], 0).astype(np.int32))
