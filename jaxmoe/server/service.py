"""One request from its body to the last byte of its answer: admission, supervision, and every way in which it can end early.

Knows the worker and the protocol; routes are `app`'s. All of it runs in the event loop's thread, but for reading a request into tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from jaxmoe.server.answers import DONE, Answer, sse
from jaxmoe.server.errors import ApiError
from jaxmoe.server.fields import read_object
from jaxmoe.server.mailbox import Mailbox
from jaxmoe.server.metrics import Metrics
from jaxmoe.server.prompts import Served
from jaxmoe.server.protocol import Call, parse_chat, parse_completion
from jaxmoe.server.settings import ServerSettings
from jaxmoe.server.wire import Gone, check_json, head, read_body, refuse, send_json, wait_gone
from jaxmoe.server.worker import Job, Worker

DRAIN_TICK = 0.05


class Service:
    """Answers requests for completions and chats with a worker's engine.

    Attributes:
        draining: no request is taken any more.
        jobs: those that are being answered.
        busy: requests that are being read or answered.
    """

    def __init__(self, worker: Worker, served: Served, settings: ServerSettings, metrics: Metrics):
        self.worker, self.served, self.settings, self.metrics = worker, served, settings, metrics
        self.draining, self.busy = False, 0
        self.jobs: set[Job] = set()

    async def answer(self, scope: Scope, receive: Receive, send: Send, chat: bool) -> None:
        """Answers one POST, whatever it holds; the client may go at any time."""
        try:
            self._check_open()
        except ApiError as error:
            return await refuse(error, receive, send)
        self.busy += 1
        try:
            await self._answer(scope, receive, send, chat)
        finally:
            self.busy -= 1

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, lets those that run finish within so many seconds, and ends the rest with an error."""
        self.draining = True
        await self._until_idle(seconds)
        for job in list(self.jobs):
            job.fail(ApiError(503, "the server is shutting down", code="shutting_down"))
        await self._until_idle(self.settings.last_word_seconds + 1)

    async def _until_idle(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.busy and time.monotonic() < end:
            await asyncio.sleep(DRAIN_TICK)

    def _check_open(self) -> None:
        again = {"retry-after": str(self.settings.retry_seconds)}
        if self.draining:
            raise ApiError(503, "the server is shutting down and takes no requests", code="shutting_down", headers=again)
        if self.worker.status == "failed":
            raise ApiError(503, "the engine has failed and takes no requests", code="engine_failed")
        if self.busy >= self.settings.max_concurrent:
            message = f"{self.busy} requests are being worked on, as many as are taken at a time; try again later"
            raise ApiError(429, message, code="too_many_requests", headers=again)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, chat: bool) -> None:
        settings = self.settings
        try:
            check_json(scope)
            body = await read_body(scope, receive, settings.max_body_bytes, settings.body_seconds)
        except ApiError as error:
            return await refuse(error, receive, send)
        except Gone:
            return self.metrics.aborted.labels("disconnect").inc()
        arrived = self.worker.clock()
        abort = (scope.get("state") or {}).get("abort")
        gone = asyncio.create_task(wait_gone(receive))
        try:
            try:
                # Long prompts and grammars take a while; other streams go on meanwhile.
                call = await run_in_threadpool(parse, body, self.served, chat, secrets.randbits(31))
            except ApiError as error:
                return await _within(send_json(send, error.body(), error.status, error.headers), gone, settings.request_seconds, abort)
            if not gone.done():
                await self._supervise(call, arrived, send, gone, abort)
        finally:
            await _end(gone)

    async def _supervise(self, call: Call, arrived: float, send: Send, gone: asyncio.Task[None], abort: Callable[[], None] | None) -> None:
        """Runs a call until it is answered, the client has gone, or it fails; then nothing of it is left in the engine."""
        loop, settings = asyncio.get_running_loop(), self.settings
        room = settings.buffer_bytes * (call.choices + 3) // 4  # several answers share a reader, and a step may give something of each
        mailbox = Mailbox(call.choices, room if call.stream else None)
        job = Job(call.requests, call.n, mailbox, loop.create_future(), arrived)
        late = ApiError(504, f"the request took longer than {settings.request_seconds:g} seconds", code="timeout")
        timer = loop.call_later(max(settings.request_seconds - (self.worker.clock() - arrived), 0), job.fail, late)
        self.jobs.add(job)
        self.worker.submit(job)
        respond = asyncio.create_task(self._respond(call, job, send))
        failed = asyncio.create_task(mailbox.failed.wait())
        try:
            await asyncio.wait({respond, gone, failed}, return_when=asyncio.FIRST_COMPLETED)
            if mailbox.error is not None:
                self.worker.cancel(job)
                self.metrics.aborted.labels(mailbox.error.code or "error").inc()
            await _within(respond, gone, settings.last_word_seconds if mailbox.error is not None else None, abort)
            if gone.done() and not (respond.done() and not respond.cancelled()):
                self.metrics.aborted.labels("disconnect").inc()
        finally:
            timer.cancel()
            self.jobs.discard(job)
            if mailbox.left or mailbox.error is not None:
                self.worker.cancel(job)
            await _end(respond)
            await _end(failed)
            if job.accepted.done() and not job.accepted.cancelled():
                job.accepted.exception()  # seen, so that asyncio doesn't complain that nobody did

    async def _respond(self, call: Call, job: Job, send: Send) -> None:
        answer = Answer(call, self.served.tokenizer, _new_id(call), int(time.time()), self.served.model)
        headers = {"x-request-id": answer.id}
        if any(call.truncated):
            headers["x-truncated-prompt-tokens"] = ",".join(map(str, call.truncated))
        try:
            await job.accepted
            if not call.stream:
                pieces = await job.mailbox.take_whole()
                return await send_json(send, answer.whole(pieces, job.mailbox), headers=headers)
        except ApiError as error:
            again = {"retry-after": str(self.settings.retry_seconds)} if error.status in (429, 503) else {}
            return await send_json(send, error.body(), error.status, headers | again | error.headers)
        await send(head(200, headers | {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}))
        await self._stream(answer, job.mailbox, send)

    async def _stream(self, answer: Answer, mailbox: Mailbox, send: Send) -> None:
        try:
            while pieces := await mailbox.take():
                for choice, piece in pieces.items():
                    if events := b"".join(sse(chunk) for chunk in answer.chunks(choice, piece)):
                        await send({"type": "http.response.body", "body": events, "more_body": True})
            end = b"".join(sse(chunk) for chunk in answer.last(mailbox))
        except ApiError as error:
            end = sse(error.body())
        await send({"type": "http.response.body", "body": end + DONE})


def parse(body: bytes, served: Served, chat: bool, seed: int) -> Call:
    """A call from the bytes of a body; see `protocol`."""
    try:
        fields: Mapping[str, Any] = read_object(body)
        return (parse_chat if chat else parse_completion)(fields, served, seed)
    except RecursionError:
        raise ApiError(400, "the body's JSON is nested too deeply", code="invalid_json") from None


def _new_id(call: Call) -> str:
    return ("chatcmpl-" if call.chat else "cmpl-") + secrets.token_hex(12)


async def _within(sending: Any, gone: asyncio.Task[None], seconds: float | None, abort: Callable[[], None] | None) -> None:
    """Waits until an answer is sent, or the client is gone; after `seconds` of neither, breaks the connection off."""
    task = asyncio.ensure_future(sending)
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and not gone.done() and abort is not None:
            abort()
            await asyncio.wait({gone}, timeout=1)  # so that the server knows that it is gone
        if task.done() and not task.cancelled():
            task.result()
    finally:
        await _end(task)


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancels a task, unless it is done, and waits for that."""
    if not task.done():
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task
