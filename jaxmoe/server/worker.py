"""The thread that owns the engine: takes commands, runs its steps, and hands what they give to the event loop. Knows no HTTP.

Nothing but this thread touches the engine. It never waits for a reader: events are posted to the loop, where a mailbox takes or refuses them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxmoe.engine.generate import RequestError
from jaxmoe.engine.serving.requests import Event, QueueFull, ServeRequest
from jaxmoe.server.errors import ApiError
from jaxmoe.server.mailbox import Mailbox
from jaxmoe.server.metrics import Metrics

LOGGER = logging.getLogger("jaxmoe.server")
MOST_FAILURES = 3  # steps that fail one after another although there is no request left to blame, before the engine counts as lost
SNAPSHOT_SECONDS = 0.5


@dataclasses.dataclass(eq=False)
class Job:
    """The sequences of one HTTP request; made in the event loop.

    Attributes:
        requests, n: as of `protocol.Call`.
        mailbox: where what they give goes.
        accepted: done when the engine has taken all of them; ends with an ApiError when it refuses one, and then has none.
        arrived: by the worker's clock.
        ids: the engine's numbers of those that haven't ended; the worker's alone.
        cancelled: nobody waits for it any more.
    """

    requests: Sequence[ServeRequest]
    n: int
    mailbox: Mailbox
    accepted: asyncio.Future[None]
    arrived: float
    ids: set[int] = dataclasses.field(default_factory=set)
    cancelled: bool = False

    def fail(self, error: ApiError) -> None:
        """Ends it with an error, whether it was accepted yet or not; in the event loop's thread."""
        self.mailbox.fail(error)
        if not self.accepted.done():
            self.accepted.set_exception(error)


@dataclasses.dataclass
class _Sequence:
    """A sequence that hasn't ended: whose it is, and its times by the worker's clock."""

    job: Job
    choice: int
    prompt: int
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0


class Worker:
    """Runs an engine in a thread of its own.

    Attributes:
        status: 'ok'; 'degraded' once a request was lost to an error of the engine's; 'failed' when the engine can't go on.
    """

    def __init__(self, engine: Any, metrics: Metrics, clock: Callable[[], float] = time.monotonic):
        """`engine`: a ServingEngine, or what has its submit, cancel, step, idle, check and counters. Nothing runs before `start`."""
        self.status, self.clock = "ok", clock
        self._engine, self._metrics = engine, metrics
        self._loop: asyncio.AbstractEventLoop | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._live: dict[int, _Sequence] = {}
        self._stopping, self._failures = False, 0
        self._step_began: float | None = None
        self._snapshot_at = -1e9
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins; what comes is posted to `loop`."""
        self._loop = loop
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Hands a job over; `job.accepted` says what became of it. From any thread."""
        self._commands.put(lambda: self._submit(job))

    def cancel(self, job: Job) -> None:
        """Ends what a job still has in the engine, wherever it stands; nothing more comes of it. From any thread, any number of times."""
        job.cancelled = True
        self._commands.put(lambda: self._cancel(job))

    async def refresh(self, timeout: float = 1.0) -> None:
        """Has the engine's counters taken anew, between two steps; those of before stay where a step takes longer than `timeout` seconds."""
        assert self._loop is not None
        done: asyncio.Future[None] = self._loop.create_future()

        def answer() -> None:
            self._take_snapshot()
            self._post(lambda: None if done.done() else done.set_result(None))

        self._commands.put(answer)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(done, timeout if self._thread.is_alive() else 0)

    @property
    def step_seconds(self) -> float:
        """How long the step that is running has run; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else max(self.clock() - began, 0.0)

    def stop(self, timeout: float) -> bool:
        """Ends the thread after the step that it is in, cancels what is left, and closes the engine.

        Args:
            timeout: seconds to wait for that.

        Returns:
            Whether it has ended.
        """
        self._commands.put(self._stop)
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # In the thread, from here on.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_commands(wait=self.status == "failed" or self._engine.idle)
                if not self._stopping and self.status != "failed" and not self._engine.idle:
                    self._step()
        except BaseException as error:  # our own fault: whoever waits has to hear of it
            LOGGER.exception("the engine's thread ended")
            self._fail(error, recoverable=False)
            while not self._stopping:
                self._commands.get()()
        with contextlib.suppress(Exception):
            self._engine.cancel(list(self._live))
            if (close := getattr(self._engine, "close", None)) is not None:
                close()

    def _take_commands(self, wait: bool) -> None:
        if wait:
            self._take_snapshot()  # what an idle engine shows must not be what it showed in its last step
            self._commands.get()()
        with contextlib.suppress(queue.Empty):
            while not self._stopping:
                self._commands.get_nowait()()

    def _stop(self) -> None:
        self._stopping = True

    def _submit(self, job: Job) -> None:
        if job.cancelled:
            return
        error: ApiError | None = None
        if self.status == "failed":
            error = ApiError(503, "the engine has failed and takes no requests", code="engine_failed")
        else:
            try:
                self._admit(job)
            except QueueFull as full:
                error = ApiError(429, str(full), code="queue_full")
            except RequestError as refused:
                error = ApiError(400, str(refused), code="invalid_request")
            except Exception as failure:
                LOGGER.exception("the engine failed to take a request")
                error = ApiError(500, f"the engine failed to take this request ({type(failure).__name__})", code="engine_error")
        if error is not None:
            self._drop(job)
        self._post(lambda: _settle(job, error))

    def _admit(self, job: Job) -> None:
        """All of a job's sequences or none: they are checked before the first goes in."""
        for request in job.requests:
            self._engine.check(request)
        for i, request in enumerate(job.requests):
            for k, id in enumerate(self._engine.submit(request, n=job.n)):
                self._live[id] = _Sequence(job, i * job.n + k, len(request.prompt_ids))
                job.ids.add(id)

    def _cancel(self, job: Job) -> None:
        for _ in job.ids:
            self._metrics.finished.labels("abort").inc()
        self._drop(job)

    def _drop(self, job: Job) -> None:
        ids, job.ids = sorted(job.ids), set()
        for id in ids:
            self._live.pop(id, None)
        if ids and self.status != "failed":
            try:
                self._engine.cancel(ids)
            except Exception as error:
                self._fail(error)

    def _step(self) -> None:
        began = self._step_began = self.clock()
        try:
            events = self._engine.step()
        except Exception as error:
            LOGGER.exception("a step of the engine failed")
            self._fail(error)
            return
        finally:
            self._step_began = None
        self._failures, now = 0, self.clock()
        self._metrics.step.observe(now - began)
        self._hand_out(events, now)
        if now - self._snapshot_at > SNAPSHOT_SECONDS:
            self._take_snapshot()

    def _hand_out(self, events: Sequence[Event], now: float) -> None:
        found: list[tuple[Mailbox, int, Event]] = []
        for event in events:
            sequence = self._live.get(event.id)
            if sequence is None:
                continue  # cancelled in the meantime
            self._observe(sequence, event, now)
            found.append((sequence.job.mailbox, sequence.choice, event))
            if event.finish_reason is not None:
                del self._live[event.id]
                sequence.job.ids.discard(event.id)
        if found:
            self._post(lambda: _deliver(found))

    def _observe(self, sequence: _Sequence, event: Event, now: float) -> None:
        metrics, count = self._metrics, len(event.ids)
        if count and not sequence.tokens:
            sequence.first = now
            metrics.first_token.observe(now - sequence.job.arrived)
            metrics.prompt_tokens.inc(sequence.prompt)
            metrics.cached_tokens.inc(event.cached_tokens)
            metrics.prompt_length.observe(sequence.prompt)
        elif count:
            metrics.gap.observe(now - sequence.last)
            for _ in range(count):
                metrics.between.observe((now - sequence.last) / count)
        if count:
            metrics.new_tokens.inc(count)
            sequence.tokens, sequence.last = sequence.tokens + count, now
        if event.finish_reason is None:
            return
        metrics.finished.labels(event.finish_reason).inc()
        if event.finish_reason == "error":
            self._degrade(event.error or "no reason given")
        elif event.finish_reason != "abort":
            metrics.whole.observe(now - sequence.job.arrived)
            metrics.answer_length.observe(sequence.tokens)
            if sequence.tokens > 1:
                metrics.per_token.observe((sequence.last - sequence.first) / (sequence.tokens - 1))

    def _fail(self, error: BaseException, recoverable: bool = True) -> None:
        """Ends the requests that an exception concerns, those of its `ids` or else all, and lets the engine recover if it can."""
        self._metrics.engine_errors.inc()
        concerned = [id for id in getattr(error, "ids", None) or list(self._live) if id in self._live]
        self._failures = 0 if concerned else self._failures + 1
        message = f"the engine failed while it worked on this request ({type(error).__name__})"
        if self.status == "ok":
            self.status = "degraded"
        self._hand_out([Event(id, finish_reason="error", error=message) for id in concerned], self.clock())
        recover = getattr(self._engine, "recover", None)
        if recoverable and recover is not None and self._failures < MOST_FAILURES:
            try:
                self._engine.cancel(concerned)
                recover()
                return
            except Exception:
                LOGGER.exception("the engine did not recover")
        self.status = "failed"
        LOGGER.error("the engine can't go on; the server answers 503 from now on")
        left = list(self._live)
        self._hand_out([Event(id, finish_reason="error", error=message) for id in left], self.clock())

    def _degrade(self, message: str) -> None:
        LOGGER.error("a request was lost: %s", message)
        if self.status == "ok":
            self.status = "degraded"

    def _take_snapshot(self) -> None:
        try:
            self._metrics.snapshot = dict(self._engine.counters())
        except Exception:
            LOGGER.exception("the engine's counters can't be read")
        self._snapshot_at = self.clock()

    def _post(self, call: Callable[[], object]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has ended, and so has everyone who waits
            self._loop.call_soon_threadsafe(call)


def _deliver(found: Sequence[tuple[Mailbox, int, Event]]) -> None:
    """Puts what a step gave into the mailboxes, in the event loop's thread."""
    for mailbox, choice, event in found:
        mailbox.put(choice, event)


def _settle(job: Job, error: ApiError | None) -> None:
    """Says what became of a job, in the event loop's thread."""
    if job.accepted.done():
        return
    if error is None:
        job.accepted.set_result(None)
    else:
        job.accepted.set_exception(error)
