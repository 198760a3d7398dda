"""What a request's answers have given and its reader hasn't taken yet. Lives in the event loop's thread; knows no engine and no HTTP.

What piles up is merged, one piece for each answer, so that a slow reader costs memory only for text. Beyond a bound the mailbox fails.
"""

from __future__ import annotations

import asyncio
import dataclasses

from jaxmoe.engine.serving.requests import Event, TokenLogprob
from jaxmoe.server.errors import ApiError

LOGPROB_BYTES = 64  # of one token's log probability, as JSON, about


@dataclasses.dataclass
class Piece:
    """What one answer has given since it was last taken; fields as of `Event`, with texts still apart."""

    texts: list[str] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_string: str | None = None

    @property
    def text(self) -> str:
        """The text, in one."""
        return "".join(self.texts)


class Mailbox:
    """The answers to one HTTP request, on their way from the engine to the client.

    Attributes:
        tokens: new tokens of each answer so far.
        cached: tokens of each answer's prompt that were found in the cache.
        left: answers that haven't ended.
        failed: set once there is an `error`.
        error: why nothing more will come, or None.
    """

    def __init__(self, choices: int, limit: int | None = None):
        """Begin.

        Args:
            choices: how many answers there will be.
            limit: bytes that may wait for the reader; None: all of it may.
        """
        self.tokens, self.cached, self.left = [0] * choices, [0] * choices, choices
        self.failed = asyncio.Event()
        self.error: ApiError | None = None
        self._limit, self._waiting = limit, 0
        self._pieces: dict[int, Piece] = {}
        self._changed = asyncio.Event()

    def put(self, choice: int, event: Event) -> None:
        """Adds what a step gave one answer. After a failure it is dropped."""
        if self.error is not None:
            return
        if event.finish_reason == "error":
            # What went wrong may name files and devices; that is for the log.
            return self.fail(ApiError(500, "the engine failed on this request; the server's log says why", code="engine_error"))
        if event.finish_reason == "abort":
            return self.fail(ApiError(503, "the server ended this request", code="aborted"))
        piece = self._pieces.setdefault(choice, Piece())
        piece.texts.append(event.text)
        piece.logprobs.extend(event.logprobs)
        piece.finish_reason, piece.stop_string = event.finish_reason, event.stop_string
        self.tokens[choice] += len(event.ids)
        self.cached[choice] = max(self.cached[choice], event.cached_tokens)
        self.left -= event.finish_reason is not None
        self._waiting += len(event.text.encode("utf-8", "replace")) + LOGPROB_BYTES * sum(1 + len(token.top) for token in event.logprobs)
        if self._limit is not None and self._waiting > self._limit:
            message = f"the client reads too slowly: {self._waiting} bytes wait for it, more than the {self._limit} that may"
            return self.fail(ApiError(500, message, code="slow_reader"))
        self._changed.set()

    def fail(self, error: ApiError) -> None:
        """Ends it: what waits is dropped, and whoever takes next gets the error. The first error stays."""
        if self.error is None:
            self.error = error
            self._pieces.clear()
            self.failed.set()
            self._changed.set()

    async def take(self) -> dict[int, Piece]:
        """Waits for something to come and takes all that has; {} when every answer has ended and was taken.

        Raises:
            ApiError: the mailbox failed.
        """
        while self.error is None and not self._pieces and self.left:
            self._changed.clear()
            await self._changed.wait()
        if self.error is not None:
            raise self.error
        pieces, self._pieces, self._waiting = self._pieces, {}, 0
        return pieces

    async def take_whole(self) -> dict[int, Piece]:
        """Waits until every answer has ended, and takes them.

        Raises:
            ApiError: the mailbox failed.
        """
        while self.error is None and self.left:
            self._changed.clear()
            await self._changed.wait()
        return await self.take()
