"""Generation for a fixed set of requests: prefill all, then decode them together, streaming text as it comes."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxmoe.cache.batch import Batch, join_batches, make_batch
from jaxmoe.cache.deal import deal_batch, take_room
from jaxmoe.cache.layers import init_layers
from jaxmoe.cache.split_kv import local_places
from jaxmoe.decode.sampling import SamplingParams, sampling_params
from jaxmoe.engine import steps
from jaxmoe.engine.mesh import first_state
from jaxmoe.engine.model import Model
from jaxmoe.engine.text import StopStrings, StreamDecoder, Tokenizer
from jaxmoe.experts import SlotBank
from jaxmoe.offload.trace import DECODE, PROMPT, Trace, TraceBuilder, model_meta
from jaxmoe.spec import ModelSpec
from sharding.split import AXES, local_spec


class RequestError(ValueError):
    """A request that can't be run; the message names the value that is wrong."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. Noise depends on seed and position alone."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to continue."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()


@dataclasses.dataclass
class Result:
    """What came of a request: generated `ids` (the end-of-text id included), `text`, and why it ended ('stop' or 'length')."""

    prompt_ids: tuple[int, ...]
    ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None


@dataclasses.dataclass
class Timings:
    """Seconds and counts of one `generate` call. Decode counts tokens after each request's first.

    `prefill_experts` and `decode_experts` are a streaming bank's counters by layer: requests, hits, and loads, which are records read from the store.
    `decode_stall_seconds` were spent in waiting for an emulated link.
    """

    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    prompt_tokens: int = 0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_stall_seconds: float = 0.0
    prefill_experts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    decode_experts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Row:
    """The host's side of one sequence: its text so far and whether it has ended."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None, eos: Sequence[int]):
        self.request, self.result = request, Result(request.prompt_ids)
        self._eos = set(eos)
        self._decoder = StreamDecoder(tokenizer) if tokenizer is not None else None
        self._stops = StopStrings(request.stop)

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.matched

    def push(self, token: int) -> str:
        """Takes one token; returns the text that may be shown now."""
        r = self.result
        r.ids.append(token)
        if token in self._eos:
            return self._end("stop")
        shown, stopped = self._stops.push(self._decoder.push(token)) if self._decoder else ("", False)
        r.text += shown
        if stopped:
            r.finish_reason = "stop"
        elif len(r.ids) >= self.request.max_new_tokens:
            return shown + self._end("length")
        return shown

    def _end(self, reason: str) -> str:
        self.result.finish_reason = reason
        if self._decoder is None:
            return ""
        shown, stopped = self._stops.push(self._decoder.flush())
        if stopped:
            self.result.finish_reason = "stop"
        else:
            shown += self._stops.flush()
        self.result.text += shown
        return shown


def check_requests(spec: ModelSpec, requests: Sequence[Request]) -> None:
    """Raises RequestError for a prompt that is empty, too long for the model, or holds ids outside its vocabulary, and for impossible sampling."""
    if not requests:
        raise RequestError("no requests: give at least one")
    for i, r in enumerate(requests):
        if r.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens = {r.max_new_tokens} must be at least 1")
        check_ids(spec, r.prompt_ids, f"prompt {i}")
        total = len(r.prompt_ids) + r.max_new_tokens
        if total > spec.max_positions:
            raise RequestError(
                f"prompt {i} has {len(r.prompt_ids)} tokens and max_new_tokens is {r.max_new_tokens}: {total} positions, "
                f"but the model has {spec.max_positions}"
            )


    for sampling in {r.sampling for r in requests}:
        try:
            sampling_params(1, **dataclasses.asdict(sampling))
        except ValueError as error:
            raise RequestError(str(error)) from error


def check_ids(spec: ModelSpec, ids: Sequence[int], what: str) -> None:
    """Refuses no ids, and ids outside the vocabulary.

    Raises:
        RequestError: names `what` and the id.
    """
    if not ids:
        raise RequestError(f"{what} is empty: give at least one token")
    for id in ids:
        if not 0 <= id < spec.vocab:
            raise RequestError(f"{what} holds the id {id}, outside the vocabulary of {spec.vocab}")


def positions_bucket(n: int) -> int:
    """Cache lengths come in powers of two from 256, so that few programs are compiled."""
    return 256 << max(0, (n - 1).bit_length() - 8)


def cache_positions(spec: ModelSpec, positions: int) -> int:
    """Positions that an engine's cache has for sequences of up to `positions` tokens."""
    return min(positions_bucket(positions), positions_bucket(spec.max_positions))


class Engine:
    """Compiled `programs` and an empty cache for up to `rows` sequences of up to `positions` tokens. Every `generate` starts from an empty cache of
    keys and values. Experts that a bank has brought to the device stay there from call to call; they change how fast a call is, not what it gives.
    """

    def __init__(
        self, model: Model, rows: int, positions: int, greedy: bool, eos: Sequence[int] = (), record: bool = False, programs: Any = None,
        prefill_tokens: int | None = None, gates: bool = False, exact: bool = False,
    ):  # fmt: skip
        """
        Args:
            model: what to run.
            rows: sequences at a time, at most.
            positions: of the longest one, prompt and new tokens together.
            greedy: every request has temperature 0, for which a smaller program does.
            eos: ids that end a text.
            record: keep a trace of the routing, for `trace`.
            programs: what runs prefill and decode; the fused steps if not given (`steps.Fused`, `host_driven.HostDriven`).
            prefill_tokens: the most tokens in a prefill step; if not given, the largest bucket, or where experts are streamed a prompt of any length,
                so that each of them crosses the link once.
            gates: record what routers foretell as well (`Trace.gates`); of the fused steps alone.
            exact: caches have just `positions`, as a plan has counted them, instead of `cache_positions`.
        """
        self._parts = model.on.layout.size(model.on.layout.sequence)
        if record and (self._parts > 1 or model.on.layout.stage):
            raise ValueError("record = True: routing isn't recorded where positions or layers are divided: choose a split without sequence and stage")
        if gates and (programs is not None or not record):
            raise ValueError("gates = True needs record = True and the fused steps: leave out programs")
        if len(eos) > steps.EOS_SLOTS:
            raise RequestError(f"{len(eos)} end-of-text ids are more than the {steps.EOS_SLOTS} that a step can watch for")
        self.positions = positions if exact else cache_positions(model.spec, positions)
        self._shards = model.on.layout.shards
        self._own_rows = -(-rows // self._shards)
        self.model, self.rows, self.greedy = model.for_positions(self.positions), rows, greedy
        model = self.model
        self.eos = tuple(eos)
        self._eos = steps.pad_to(self.eos, steps.EOS_SLOTS, -2)
        self._moving: Any = None
        self._makers: dict[bool, Callable[[], Any]] = {}
        self._sequence = 0
        self.programs = programs or steps.Fused(model.spec, model.kernels, greedy, record, gates, model.on)
        self._unread: list[Callable[[TraceBuilder], None]] = []
        self._recorder = TraceBuilder(model_meta(model.spec, model.spec.family, "generation")) if record else None
        most = self.positions * self._own_rows if isinstance(model.bank, SlotBank) else steps.TOKEN_BUCKETS[-1]
        self._prefill_tokens = most if prefill_tokens is None else prefill_tokens

    def start(self) -> steps.EngineState:
        """A state with an empty cache of the size that the programs were compiled for, and the experts as the last call left them."""
        moving, self._moving = self._moving, None  # steps take the arrays: an error on the way leaves nothing to go on with
        bank, on = self.model.bank, self.model.on
        if on.mesh is not None:
            made = moving is not None  # then only caches are made: slots would take their memory a second time
            if made not in self._makers:
                own = (lambda: ()) if made else bank.init_state
                self._makers[made] = first_state(self.model.spec, on, self._empty_cache, own, steps.EngineState)
            state = self._makers[made]()
            return dataclasses.replace(state, bank=self._on_each(bank.new_text, moving)) if made else state
        return steps.committed(steps.EngineState(self._empty_cache(), bank.init_state() if moving is None else bank.new_text(moving)))

    def _on_each(self, change: Callable[[Any], Any], moving: Any) -> Any:
        """A bank's moving part changed, on each device its own."""
        on = self.model.on
        if on.mesh is None or not jax.tree.leaves(moving):
            return change(moving)
        # Where they were: arrays that the host makes are on no mesh, and steps that take them would be compiled again.
        return jax.tree.map(lambda x: jax.device_put(x, on.sharding(P(AXES))), jax.vmap(change)(moving))

    def _empty_cache(self, spec: ModelSpec | None = None):
        """One device's, for its own share of the model."""
        return init_layers(spec or self.model.spec, self._own_rows, self.positions, steps.run_length(steps.TOKEN_BUCKETS[-1]), self._parts)

    def _counters(self, state: steps.EngineState) -> dict[str, np.ndarray]:
        """The bank's counters, of all devices together; where layers are divided, those at the same place of each stage fall together."""
        moving, on = state.bank, self.model.on
        if on.spread and jax.tree.leaves(moving):
            moving = jax.jit(on.readable)(dataclasses.replace(moving, pools=()))
        counted = self.model.bank.counters(moving)
        return counted if self.model.on.mesh is None else {name: n.sum(0) for name, n in counted.items()}

    def kv_bytes(self) -> int:
        """Bytes of the cache of keys and values, on each device."""
        own = local_spec(self.model.spec, self.model.on.layout)
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda: self._empty_cache(own))))

    def token_buckets(self) -> tuple[int, ...]:
        """Prefill buckets that this engine's prompts can need."""
        most, sizes = min(self.positions * self._own_rows, self._prefill_tokens), list(steps.TOKEN_BUCKETS)
        while sizes[-1] < most:
            sizes.append(2 * sizes[-1])
        return tuple(b for i, b in enumerate(sizes) if i == 0 or sizes[i - 1] < most)

    def row_buckets(self) -> tuple[int, ...]:
        """Decode buckets that this engine can need, of each group of devices that has its own sequences."""
        top = steps.bucket(self._own_rows, steps.ROW_BUCKETS)
        return tuple(b for b in steps.ROW_BUCKETS if b <= top)

    def warm_up(self, progress: Callable[[str], None] = lambda name: None, requests: Sequence[Request] | None = None) -> float:
        """Compiles every program that `generate` can need, or only those that these requests need; returns the seconds it took."""
        began = time.perf_counter()
        shards = self._shards
        sizes = self.token_buckets() if requests is None else sorted({tokens for tokens, _, _ in self._prefill_batches(requests)})
        for tokens in sizes:
            progress(f"prefill of {tokens}")
            own = make_batch([(0, 0, [0])], steps.run_length(tokens), tokens, n_logits=steps.LOGIT_ROWS)
            batch = self._joined([own] * shards)
            ended = steps.LOGIT_ROWS * shards
            _, state, _ = self._prefill(self.start(), batch, sampling_params(ended), np.zeros(ended, np.int32))
            self._moving = self._on_each(self.model.bank.forget, state.bank)
        for rows in self.row_buckets():
            progress(f"decode of {rows}")
            rows = rows * shards
            nothing, one = np.zeros(rows, np.int32), np.ones(rows, np.int32)  # one real step: XLA's CPU kernels are set up when they first run
            for _ in self.programs.ways():
                out, state, _ = self._decode(self.start(), nothing, nothing, nothing, one, sampling_params(rows))
                jax.block_until_ready(out)
                self._moving = self._on_each(self.model.bank.forget, state.bank)
            self.programs.restart()
        return time.perf_counter() - began

    def trace(self) -> Trace:
        """The routing of every `generate` so far.

        Raises:
            ValueError: the engine was not made to record, or nothing was generated.
        """
        if self._recorder is None:
            raise ValueError("this engine was not made to record: Engine(..., record=True)")
        for add in self._unread:
            add(self._recorder)
        self._unread = []
        return self._recorder.build()

    def forget(self) -> None:
        """Forgets the experts that are on the device, for the next call to begin without any."""
        if self._moving is not None:
            self._moving = self._on_each(self.model.bank.forget, self._moving)

    def experts(self) -> Any:
        """The bank's moving part as the last call left it; None before the first."""
        return self._moving

    def _prefill(self, state, batch, sampling: SamplingParams, positions):
        tokens, state, routed = self.programs.prefill(self.model.params, self.model.bank, state, batch, sampling, positions)
        return np.asarray(tokens), state, routed

    def _decode(self, state, rows, tokens, positions, budget, sampling: SamplingParams):
        return self.programs.decode(self.model.params, self.model.bank, state, rows, tokens, positions, budget, self._eos, sampling)

    def _record_prompt(self, first: int, batch, routed) -> None:
        """Keeps a prompt's routing for `trace` to read: reading it here would cost every step some of its time."""

        def add(recorder: TraceBuilder) -> None:
            ids, weights, *gates = map(np.asarray, routed)
            group = np.repeat(np.arange(self._shards), len(batch.tokens) // self._shards)
            recorder.add(ids, weights, batch.tokens, first + batch.segments * self._shards + group, PROMPT, batch.segments >= 0, *gates)

        if self._recorder is not None:
            self._unread.append(add)

    def _record_decode(self, first: int, live: list[int], at: list[int], last: np.ndarray, out: np.ndarray, routed) -> None:
        """Keeps a chunk's: what each step reads is what the step before wrote."""

        def add(recorder: TraceBuilder) -> None:
            read = np.concatenate([last[None], out[:-1]])
            for tokens, new, ids, weights, *gates in zip(read, out, *map(np.asarray, routed), strict=True):
                recorder.add(ids[at], weights[at], tokens[at], first + np.asarray(live), DECODE, new[at] >= 0, *(g[at] for g in gates))

        if self._recorder is not None:
            self._unread.append(add)

    def generate(
        self,
        requests: Sequence[Request],
        tokenizer: Tokenizer | None = None,
        on_text: Callable[[int, str], None] = lambda i, text: None,
    ) -> tuple[list[Result], Timings]:
        """Runs requests to their ends.

        Args:
            requests: at most `rows`, each within `positions`.
            tokenizer: for text and stop strings; without one only ids come back.
            on_text: called with `(request index, text)` as text becomes final.

        Returns:
            Results in the order of the requests, and timings.

        Raises:
            RequestError: a request that can't be run; nothing has been run then.
        """
        check_requests(self.model.spec, requests)
        if len(requests) > self.rows:
            raise RequestError(f"{len(requests)} requests are more than the engine's {self.rows} rows")
        longest = max(len(r.prompt_ids) + r.max_new_tokens for r in requests)
        if longest > self.positions:
            raise RequestError(f"a request needs {longest} positions, the engine has {self.positions}")
        for i, r in enumerate(requests):
            if r.stop and tokenizer is None:
                raise RequestError(f"request {i} has stop strings {r.stop}, but without a tokenizer there is no text to find them in")
            if self.greedy and r.sampling.temperature > 0:
                raise RequestError(f"request {i} has temperature {r.sampling.temperature}, but this engine was made greedy")
        rows = [Row(r, tokenizer, self.eos) for r in requests]
        first, self._sequence = self._sequence, self._sequence + len(requests)
        timings = Timings(prompt_tokens=sum(len(r.prompt_ids) for r in requests))
        state = self.start()
        at_start = self._counters(state)
        began = time.perf_counter()
        for _, batch, ended in self._prefill_batches(requests):
            own = [[requests[i] for i in group] for group in ended]
            at = np.concatenate([steps.pad_to([len(r.prompt_ids) for r in group], steps.LOGIT_ROWS) for group in own])
            tokens, state, routed = self._prefill(state, batch, self._sampling(own, steps.LOGIT_ROWS), at)
            self._record_prompt(first, batch, routed)
            ends = zip(ended, np.split(tokens, self._shards), strict=True)
            for i, token in [pair for group, new in ends for pair in zip(group, new, strict=False)]:
                timings.first_token_seconds = timings.first_token_seconds or time.perf_counter() - began
                on_text(i, rows[i].push(int(token)))
        timings.prefill_seconds = time.perf_counter() - began
        stalled = self.programs.stalled
        after_prefill = self._counters(state)
        state = self._decode_all(rows, first, state, timings, on_text)
        timings.decode_stall_seconds = self.programs.stalled - stalled
        timings.prefill_experts = {name: n - at_start[name] for name, n in after_prefill.items()}
        timings.decode_experts = {name: n - after_prefill[name] for name, n in self._counters(state).items()}
        self._moving = state.bank
        return [row.result for row in rows], timings

    def _prefill_batches(self, requests: Sequence[Request]):
        """Packs prompts, in order, into prefill steps; yields each one's bucket, its batch, and the requests whose prompts end in it, by group of
        devices."""
        held = [np.zeros((self._parts, self._own_rows), np.int64) for _ in range(self._shards)]
        queues = [[(i, 0) for i in range(group, len(requests), self._shards)] for group in range(self._shards)]
        biggest = self.token_buckets()[-1]
        while any(queues):
            total = max(sum(len(requests[i].prompt_ids) - at for i, at in queue[: steps.LOGIT_ROWS]) for queue in queues)
            tokens = steps.bucket(min(total, biggest), self.token_buckets())
            packed = [self._pack(requests, queue, tokens) for queue in queues]
            yield tokens, self._joined([batch for batch, _ in packed], held), [ended for _, ended in packed]

    def _joined(self, batches: list[Batch], held: list[np.ndarray] | None = None) -> Batch:
        """One batch of those of all groups of devices, each dealt out to its devices where they divide positions; `held`, by group, is how many
        tokens each of them has, and is updated."""
        if self._parts == 1:
            return join_batches(batches, self.model.on.mesh is not None)
        dealt = []
        for group, batch in enumerate(batches):
            parts = deal_batch(batch, self._parts, None if held is None else held[group])
            if held is not None:
                held[group] = take_room(held[group], parts, local_places(self.positions, steps.run_length(steps.TOKEN_BUCKETS[-1]), self._parts))
            dealt += parts
        return join_batches(dealt, over_devices=True)

    def _pack(self, requests: Sequence[Request], waiting: list[tuple[int, int]], tokens: int) -> tuple[Batch, list[int]]:
        """Takes as much from the front of a queue of (request, its next position) as a step of so many tokens has room for."""
        run = steps.run_length(tokens)
        pieces: list[tuple[int, int, list[int]]] = []
        ended: list[int] = []
        last: list[int] = []
        used = 0
        while waiting and used < tokens // run and len(ended) < steps.LOGIT_ROWS:
            i, at = waiting[0]
            ids = list(requests[i].prompt_ids[at : at + (tokens // run - used) * run])
            pieces.append((i // self._shards, at, ids))
            used += -(-len(ids) // run)
            if at + len(ids) < len(requests[i].prompt_ids):
                waiting[0] = (i, at + len(ids))
                break
            waiting.pop(0)
            ended.append(i)
            last.append((used - 1) * run + (len(ids) - 1) % run)
        return make_batch(pieces, run, tokens, last or [0], steps.LOGIT_ROWS), ended

    def _decode_all(self, rows: list[Row], first: int, state: steps.EngineState, timings: Timings, on_text) -> steps.EngineState:
        """Decodes until every row has ended, in chunks; ended rows leave the batch between chunks."""
        began = time.perf_counter()
        while live := [i for i, row in enumerate(rows) if row.result.finish_reason is None]:
            groups = [[i for i in live if i % self._shards == group] for group in range(self._shards)]
            n = steps.bucket(max(map(len, groups)), steps.ROW_BUCKETS)
            live = [i for group in groups for i in group]
            at = [n * g + j for g, group in enumerate(groups) for j in range(len(group))]

            def column(value: Callable[[Row], int], groups=groups, n=n) -> np.ndarray:
                return np.concatenate([steps.pad_to([value(rows[i]) for i in group], n) for group in groups])

            last = column(lambda row: row.result.ids[-1])
            positions = column(lambda row: len(row.result.prompt_ids) + len(row.result.ids) - 1)
            budget = column(lambda row: row.request.max_new_tokens - len(row.result.ids))
            sampling = self._sampling([[rows[i].request for i in group] for group in groups], n)
            own_rows = np.concatenate([steps.pad_to([i // self._shards for i in group], n) for group in groups])
            out, state, routed = self._decode(state, own_rows, last, positions, budget, sampling)
            out = np.asarray(out)
            self._record_decode(first, live, at, last, out, routed)
            for tokens in out[:, at]:
                if (tokens < 0).all():
                    break
                timings.decode_steps += 1
                for i, token in zip(live, tokens, strict=True):
                    if token >= 0 and rows[i].result.finish_reason is None:
                        timings.decode_tokens += 1
                        on_text(i, rows[i].push(int(token)))
        timings.decode_seconds = time.perf_counter() - began
        return state

    def _sampling(self, groups: Sequence[Sequence[Request]], n: int) -> SamplingParams:
        """Sampling arrays for n rows of each group, padded with the group's last request's values."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(Sampling):
            columns = [[getattr(r.sampling, field.name) for r in group] or [field.default] for group in groups]
            values[field.name] = np.concatenate([np.asarray(column + [column[-1]] * (n - len(column))) for column in columns])
        return sampling_params(n * len(groups), **values)


def prompt_logits(model: Model, ids: Sequence[int], tokens: int = 512) -> np.ndarray:
    """float32 logits [len(ids), V] of every position of one sequence (teacher-forced), in steps of `tokens`."""
    if model.on.mesh is not None:
        raise ValueError(f"logits of a whole prompt are for a model on one device: leave out the split {model.on.layout.split}")
    check_ids(model.spec, ids, "the sequence")
    if len(ids) > model.spec.max_positions:
        raise RequestError(f"{len(ids)} tokens are more than the model's {model.spec.max_positions} positions")
    run = steps.run_length(tokens)
    model = model.for_positions(len(ids))
    state = steps.committed(steps.EngineState(init_layers(model.spec, 1, positions_bucket(len(ids)), run), model.bank.init_state()))
    step = steps.logits_step(model.spec, model.kernels)
    out = []
    for at in range(0, len(ids), tokens):
        part = list(ids[at : at + tokens])
        batch = make_batch([(0, at, part)], run, tokens, list(range(len(part))), tokens)
        logits, state = step(model.params, model.bank, state, batch)
        out.append(np.asarray(logits)[: len(part)])
    return np.concatenate(out)
