"""The JSON of answers, whole and in chunks, in the shapes that OpenAI's clients read. Knows no HTTP and no engine."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmoe.engine.serving.requests import TokenLogprob
from jaxmoe.server.mailbox import Mailbox, Piece
from jaxmoe.server.protocol import Call

LEAST_LOGPROB = -9999.0  # for minus infinity, which JSON doesn't have; vLLM's value
DONE = b"data: [DONE]\n\n"


def sse(value: Mapping[str, Any]) -> bytes:
    """One event of a stream. All of it is ASCII: some clients end lines at characters of Unicode too."""
    return b"data: " + to_json(value) + b"\n\n"


def to_json(value: Mapping[str, Any]) -> bytes:
    """Compact JSON in ASCII; ValueError for a number that JSON doesn't have."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


@dataclasses.dataclass
class Answer:
    """The answer to one call, as its pieces come.

    Attributes:
        call: what was asked.
        tokenizer: for the texts of single tokens.
        id, created, model: that every chunk carries.
        begun: choices of which something was sent.
        offsets: characters of each choice's tokens so far, for `text_offset`.
    """

    call: Call
    tokenizer: Any
    id: str
    created: int
    model: str
    begun: set[int] = dataclasses.field(default_factory=set)
    offsets: dict[int, int] = dataclasses.field(default_factory=dict)

    def chunks(self, choice: int, piece: Piece) -> list[dict[str, Any]]:
        """What a stream says of a piece: nothing, where it has neither text nor an end.

        A chat's choice begins with a chunk of its role and ends with one of its finish_reason.
        """
        found = self._chat_deltas(choice, piece) if self.call.chat else self._completion_deltas(choice, piece)
        usage = {"usage": None} if self.call.include_usage else {}
        return [self._head(streamed=True) | {"choices": [delta]} | usage for delta in found]

    def whole(self, pieces: Mapping[int, Piece], mailbox: Mailbox) -> dict[str, Any]:
        """The answer in one, of all the choices' pieces."""
        choices = []
        for choice, piece in sorted(pieces.items()):
            end: dict[str, Any] = {"index": choice, "finish_reason": piece.finish_reason, "stop_reason": piece.stop_string}
            if self.call.chat:
                message = {"role": "assistant", "content": piece.text, "refusal": None}
                choices.append(end | {"message": message, "logprobs": self._logprobs(choice, piece)})
            else:
                choices.append(end | {"text": self._echo(choice) + piece.text, "logprobs": self._logprobs(choice, piece)})
        return self._head(streamed=False) | {"choices": choices, "usage": self.usage(mailbox)}

    def last(self, mailbox: Mailbox) -> list[dict[str, Any]]:
        """The chunk after all choices: the usage, where it was asked for."""
        return [self._head(streamed=True) | {"choices": [], "usage": self.usage(mailbox)}] if self.call.include_usage else []

    def usage(self, mailbox: Mailbox) -> dict[str, Any]:
        """Token counts. A prompt counts once, however many answers it has; its cached tokens are those of its first answer."""
        prompt, new = sum(len(request.prompt_ids) for request in self.call.requests), sum(mailbox.tokens)
        details = {"cached_tokens": sum(mailbox.cached[:: self.call.n])}
        if any(self.call.truncated):
            details["truncated_tokens"] = sum(self.call.truncated)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new, "prompt_tokens_details": details}

    def _head(self, streamed: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if streamed else "chat.completion") if self.call.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": None}

    def _chat_deltas(self, choice: int, piece: Piece) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        blank = {"index": choice, "logprobs": None, "finish_reason": None}
        if choice not in self.begun:
            self.begun.add(choice)
            found.append(blank | {"delta": {"role": "assistant", "content": ""}})
        if piece.text or piece.logprobs:
            found.append(blank | {"delta": {"content": piece.text}, "logprobs": self._logprobs(choice, piece)})
        if piece.finish_reason is not None:
            found.append(blank | {"delta": {}, "finish_reason": piece.finish_reason, "stop_reason": piece.stop_string})
        return found

    def _completion_deltas(self, choice: int, piece: Piece) -> list[dict[str, Any]]:
        text = ("" if choice in self.begun else self._echo(choice)) + piece.text
        if not text and not piece.logprobs and piece.finish_reason is None:
            return []
        self.begun.add(choice)
        end = {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_string}
        return [{"index": choice, "text": text, "logprobs": self._logprobs(choice, piece)} | end]

    def _echo(self, choice: int) -> str:
        return self.call.echo[choice // self.call.n] if self.call.echo else ""

    def _logprobs(self, choice: int, piece: Piece) -> dict[str, Any] | None:
        if self.call.logprobs is None:
            return None
        if self.call.chat:
            return {"content": [self._chat_logprob(token) for token in piece.logprobs], "refusal": None}
        return self._completion_logprobs(choice, piece.logprobs)

    def _chat_logprob(self, token: TokenLogprob) -> dict[str, Any]:
        top = token.top[: self.call.logprobs]
        return self._named(token.id, token.logprob) | {"top_logprobs": [self._named(id, logprob) for id, logprob in top]}

    def _named(self, id: int, logprob: float) -> dict[str, Any]:
        """A token with its text; without bytes where it is but a part of a character, or stands for none."""
        text = self.tokenizer.decode([id], skip_special_tokens=False)
        return {"token": text, "logprob": finite(logprob), "bytes": None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode("utf-8"))}

    def _completion_logprobs(self, choice: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The older shape: parallel lists, and a dict by token text, where a text that two tokens share is told apart as token_id:N."""
        texts = [self.tokenizer.decode([token.id], skip_special_tokens=False) for token in tokens]
        tops, starts = [], []
        at = self.offsets.get(choice, len(self._echo(choice)))
        for token, text in zip(tokens, texts, strict=True):
            likeliest = token.top[: self.call.logprobs]
            named: dict[str, float] = {}
            for id, logprob in ((token.id, token.logprob), *(pair for pair in likeliest if pair[0] != token.id)):
                name = self.tokenizer.decode([id], skip_special_tokens=False)
                named[name if name not in named else f"token_id:{id}"] = finite(logprob)
            tops.append(named)
            starts.append(at)
            at += len(text)
        self.offsets[choice] = at
        return {"tokens": texts, "token_logprobs": [finite(token.logprob) for token in tokens], "top_logprobs": tops, "text_offset": starts}


def finite(logprob: float) -> float:
    """A log probability as JSON can carry it."""
    return max(float(logprob), LEAST_LOGPROB) if not math.isnan(logprob) else LEAST_LOGPROB
