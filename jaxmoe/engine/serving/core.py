"""The serving engine: requests in, events out. It owns tokens and text; the scheduler decides, the runner computes.

    engine.submit(request); while not engine.idle: events = engine.step()

One thread calls it. Every token of a request is a function of the request alone (its prompt, sampling and seed), whatever runs beside it, how its
prompt was cut, and how often it was put aside: on the CPU to the bit (unless kernels are `fast`), elsewhere as far as the kernels' rounding goes.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoe.decode.grammar import GrammarError
from jaxmoe.decode.penalties import RowEdits, check_edits
from jaxmoe.decode.sampling import sampling_params
from jaxmoe.engine.generate import RequestError, Row, check_ids
from jaxmoe.engine.serving import scheduler
from jaxmoe.engine.serving.compiles import CompileCount
from jaxmoe.engine.serving.counting import Watch, computed
from jaxmoe.engine.serving.prefix import page_keys
from jaxmoe.engine.serving.recovery import lost
from jaxmoe.engine.serving.requests import MOST_LOGPROBS, Event, QueueFull, ServeRequest
from jaxmoe.engine.serving.runner import Given, Runner
from jaxmoe.engine.serving.scheduler import Policy
from jaxmoe.engine.serving.types import Results, Seq, ServeSpec, StepPlan
from jaxmoe.engine.text import Tokenizer
from jaxmoe.spec import ModelSpec


class Answer:
    """One sequence on its way: tokens, text and what its logits go through. It is what a runner calls `Live`."""

    def __init__(self, request: ServeRequest, tokenizer: Tokenizer | None, eos: Sequence[int], vocab: int):
        self.request, self.sampling, self.logprobs = request, request.sampling, request.logprobs
        self.ids = list(request.prompt_ids)
        self.row = Row(request, tokenizer, () if request.ignore_eos else eos)  # type: ignore[arg-type]
        self._vocab, self._settings = vocab, _edits(request, eos)
        self.matcher = None if request.grammar is None else request.grammar.matcher()
        self.keys: list[bytes] = []
        self.failed: str | None = None
        self.began = False
        self.mask: np.ndarray | None = None
        self._look()

    @functools.cached_property
    def edits(self) -> RowEdits | None:
        """What changes its logits: rows of the vocabulary, made when it is first computed and not while it waits."""
        return None if self._settings is None else RowEdits(self._vocab, prompt_ids=self.request.prompt_ids, **self._settings)

    @property
    def stepwise(self) -> bool:
        """Whether the host has a say between any two of its tokens."""
        return self._settings is not None or self.matcher is not None or self.logprobs is not None

    def push(self, token: int) -> str:
        """Takes a token; returns the text that has become final."""
        self.ids.append(token)
        text = self.row.push(token)
        if self.row.result.finish_reason is None:
            if self.edits is not None:
                self.edits.push(token)
            self._follow(token)
        return text

    def _follow(self, token: int) -> None:
        """The grammar goes on by a token; it may give up on what it has become: that is this sequence's end, and no other's."""
        if self.matcher is None:
            return
        try:
            if not self.matcher.consume(token):
                self.failed = f"the grammar does not allow the token {token} that was drawn"
        except GrammarError as error:
            self.failed = str(error)
        if self.failed is None:
            self._look()

    def _look(self) -> None:
        """Asks the grammar what may come next."""
        if self.matcher is not None:
            try:
                self.mask = self.matcher.mask()
            except GrammarError as error:
                self.failed = str(error)


class ServingEngine:
    """Attributes: `model_name` for answers; `tokenizer`; `spec` sizes; `eos`; `runner`; `state` the scheduler's."""

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer | None, eos: Sequence[int], policy: Policy, model_name: str = "jaxmoe",
        clock: Callable[[], float] = time.perf_counter, max_waiting: int | None = None, salt: bytes = b"", paths: Any = None,
        longest: int | None = None,
    ):  # fmt: skip
        """
        Args:
            runner: warmed up, or `warm_up` is called before requests come.
            tokenizer: for text and stop strings; without one only ids come back.
            eos: ids that end a text.
            policy: the scheduler's.
            model_name: for answers.
            clock: seconds.
            max_waiting: requests that may wait before others are turned away; None for any number.
            salt: what makes this model's pages differ from another's (`prefix.fingerprint`).
            longest: positions of the longest sequence, where that is less than the spec's, which are whole pages.
            paths: a `Paths`, what foretells the experts of sequences, for policies that go by it.
        """
        self.runner, self.tokenizer, self.eos, self.policy, self.model_name = runner, tokenizer, tuple(eos), policy, model_name
        self.spec: ServeSpec = runner.spec
        self.longest = min(self.spec.positions, longest or self.spec.positions)
        self.model_spec: ModelSpec = runner.model.spec
        self._clock, self._max_waiting, self._salt, self._paths = clock, max_waiting, salt, paths
        self.state = scheduler.fresh(self.spec, self.spec.move)
        self._live: dict[int, Answer] = {}
        self._next = 0
        self._aborted: list[Event] = []
        self.errors = 0
        self._closed = False
        self._compiles = CompileCount()
        self._watch = Watch()
        self._modes = ("decode", {"layered": "group", "whole": "whole"}.get(policy.prefill, "chunk"), "pages")

    def warm_up(self, progress: Callable[[str], None] = lambda name: None) -> float:
        """Compiles all that steps can need; returns the seconds it took. `counters` counts what is compiled after it."""
        seconds = self.runner.warm_up(progress, self._modes)
        self._compiles = CompileCount()
        return seconds

    @property
    def programs(self) -> int:
        """Runs of a warm-up. Each is a program; where the host sends experts each has several, a few for every kind of layer."""
        return len(self.runner.programs(self._modes)) + 2  # copies of pages are three

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._live and not self._aborted

    def check(self, request: ServeRequest) -> None:
        """Refuses what can't be run.

        Raises:
            RequestError: an empty or too long prompt, ids outside the vocabulary, or values out of range; the message names them.
        """
        spec, vocab = self.spec, self.model_spec.vocab
        check_ids(self.model_spec, request.prompt_ids, "the prompt")
        if request.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens = {request.max_new_tokens} must be at least 1")
        total = len(request.prompt_ids) + request.max_new_tokens
        if total > self.longest:
            raise RequestError(
                f"the prompt has {len(request.prompt_ids)} tokens and max_new_tokens is {request.max_new_tokens}: {total} positions, but the engine "
                f"has {self.longest}"
            )
        if (needed := spec.pages_for(total)) > spec.pages:
            raise RequestError(f"{total} positions need {needed} pages of {spec.page} tokens, and the engine has {spec.pages}: it can never run")
        if request.logprobs is not None and not 0 <= request.logprobs <= MOST_LOGPROBS:
            raise RequestError(f"logprobs = {request.logprobs} is outside [0, {MOST_LOGPROBS}]")
        if not 0 <= request.min_new_tokens <= request.max_new_tokens:
            raise RequestError(f"min_new_tokens = {request.min_new_tokens} is outside [0, max_new_tokens = {request.max_new_tokens}]")
        if request.stop and self.tokenizer is None:
            raise RequestError(f"stop strings {request.stop}, but without a tokenizer there is no text to find them in")
        try:
            sampling_params(1, **dataclasses.asdict(request.sampling))
            check_edits(vocab, **(_edits(request, self.eos) or {}))
            Row(request, self.tokenizer, self.eos)  # type: ignore[arg-type]
        except ValueError as error:
            raise RequestError(str(error)) from error

    def submit(self, request: ServeRequest, n: int = 1) -> list[int]:
        """Takes a request in.

        Args:
            request: what to continue.
            n: answers to it, with seeds that count up from the request's; they share the prompt's pages.

        Returns:
            A number for each answer.

        Raises:
            RequestError: see `check`; `QueueFull` where too many wait.
        """
        if self._closed:
            raise QueueFull("the engine is closing: it takes no more requests")
        if n < 1:
            raise RequestError(f"n = {n} must be at least 1")
        self.check(request)
        waiting = self.state.waiting
        if self._max_waiting is not None and waiting + n > self._max_waiting:
            raise QueueFull(f"{waiting} requests wait already, and {n} more would be above {self._max_waiting}: try again later")
        answers = [self._answer(request, k) for k in range(n)]  # all of them first: one that can't be leaves none behind
        return [self._take(live, k, self._next - k) for k, live in enumerate(answers)]

    def _answer(self, request: ServeRequest, turn: int) -> Answer:
        seed = (request.sampling.seed + turn) % 2**32
        own = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=seed))
        try:
            live = Answer(own, self.tokenizer, self.eos, self.model_spec.vocab)
        except GrammarError as error:
            raise RequestError(str(error)) from error
        if live.failed is not None:
            raise RequestError(live.failed)
        return live

    def _take(self, live: Answer, turn: int, first: int) -> int:
        request = live.request
        id, self._next = self._next, self._next + 1
        if self.spec.sharing:
            live.keys = list(page_keys(live.ids, self.spec.page, self._salt))
        self._live[id] = live
        now, prompt = self._clock(), len(request.prompt_ids)
        seq = Seq(
            id, prompt, prompt, prompt + request.max_new_tokens, now, keys=tuple(live.keys), priority=request.priority, user=request.user,
            expected=request.expected or request.max_new_tokens, stepwise=live.stepwise, ran=now,
            parent=first if turn and self.spec.sharing else None,
        )  # fmt: skip
        self.state = scheduler.submit(self.state, seq)
        return id

    def cancel(self, ids: Iterable[int]) -> None:
        """Ends requests; an event with the reason 'abort' follows for each that was not over."""
        gone = [id for id in ids if id in self._live]
        for id in gone:
            del self._live[id]
            self.runner.host.forget(id)
            self._aborted.append(Event(id, finish_reason="abort"))
        if gone:
            self.state = scheduler.cancel(self.state, gone)

    def step(self) -> list[Event]:
        """One step; nothing if there is nothing to do."""
        events, self._aborted = self._aborted, []
        if not self._live:
            return events
        now = self._clock()
        paths, held = (None, None) if self._paths is None else self._paths.of(self.state, self._live, self.runner)
        plan, self.state = scheduler.plan(self.state, self.policy, now, paths, held)
        try:
            given = self.runner.run(plan, self._live)
            self._watch.see(plan, sum(len(new.ids) for new in given.values()), self._began(plan, now))
            if self._paths is not None:
                self._paths.learn(plan, given, self._live, self.runner)
            now = self._clock()
            new, results = self._push(given)
            self.state = scheduler.commit(self.state, plan, results, now)
        except Exception as error:  # whatever a device or a disk may do: those whose step it was are told, the others are computed again
            return events + self._lost(plan, error)
        for id in results.ended:
            self._live.pop(id, None)
            self.runner.host.forget(id)
        return events + new

    def _began(self, plan: StepPlan, now: float) -> list[float]:
        """Seconds that the sequences had waited which this step was the first for."""
        first = [id for id in computed(plan) if not self._live[id].began]
        for id in first:
            self._live[id].began = True
        return [now - self.state.seqs[id].arrived for id in first]

    def _push(self, given: Mapping[int, Given]) -> tuple[list[Event], Results]:
        events, tokens, ended, keys = [], {}, set(), {}
        for id, new in given.items():
            live = self._live[id]
            text, count = "", 0
            for token in new.ids:
                text, count = text + live.push(token), count + 1
                if live.row.result.finish_reason is not None or live.failed is not None:
                    break
            tokens[id] = count
            if self.spec.sharing and (more := self._new_keys(live)):
                keys[id] = more
            cached = self.state.seqs[id].cached if id in self.state.seqs else 0
            reason = live.row.result.finish_reason if live.failed is None else "error"
            event = Event(id, new.ids[:count], text, new.logprobs[:count], reason, live.row.matched, live.failed, cached)
            if reason is not None:
                ended.add(id)
            events.append(event)
        return events, Results(tokens, frozenset(ended), keys)

    def _new_keys(self, live: Answer) -> tuple[bytes, ...]:
        have = len(live.keys)
        if len(live.ids) // self.spec.page <= have:
            return ()
        more = page_keys(live.ids, self.spec.page, self._salt, live.keys[-1] if live.keys else None, have * self.spec.page)
        live.keys += more
        return tuple(more)

    def _lost(self, plan: StepPlan, error: Exception) -> list[Event]:
        """After a step that failed: its requests end with an error, the device's state is made anew, and the others are computed again."""
        self.errors += 1
        ids = computed(plan) | {move.id for move in (*plan.out, *plan.into)}
        ids = {id for id in ids if id in self._live}
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        events = [Event(id, finish_reason="error", error=reason) for id in sorted(ids)]
        for event in events:
            del self._live[event.id]
            self.runner.host.forget(event.id)
        self.state = lost(scheduler.cancel(self.state, ids))
        self.runner.rebuild()
        return events

    def counters(self) -> dict[str, Any]:
        """What happened so far and how things stand, by the names that `jaxmoe.server.metrics` tells of."""
        return self._watch.shown(self.state, self.runner) | {"xla_compiles_after_warmup": self._compiles.since}

    def close(self) -> None:
        """Takes no more requests; those that are there go on."""
        self._closed = True


def _edits(request: ServeRequest, eos: Sequence[int]) -> dict[str, Any] | None:
    """What changes a request's logits, as `RowEdits` takes it; None if nothing does."""
    r = request
    if not (r.presence_penalty or r.frequency_penalty or r.repetition_penalty != 1 or r.logit_bias or r.min_new_tokens):
        return None
    return {
        "presence": r.presence_penalty, "frequency": r.frequency_penalty, "repetition": r.repetition_penalty, "logit_bias": r.logit_bias,
        "min_new_tokens": r.min_new_tokens, "eos_ids": () if r.ignore_eos else eos,
    }  # fmt: skip
