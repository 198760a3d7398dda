"""Refusals as clients get to see them: a status, and OpenAI's error body. Knows no requests and no engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN_CHARS = 80
MESSAGE_CHARS = 500

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""OpenAI's `type` by status; other 4xx are invalid_request_error, 5xx server_error."""


class ApiError(Exception):
    """An answer other than 200.

    Attributes:
        status: HTTP's.
        message: what is wrong and what would be right, in one line.
        param: the field that is wrong, or None.
        code: a word that programs can tell it by, or None.
        headers: to be sent with it, such as Retry-After.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})
        self.message = " ".join(message.split())[:MESSAGE_CHARS]

    def body(self) -> dict[str, Any]:
        """The answer's JSON, in OpenAI's shape."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str, expected: str, got: Any) -> ApiError:
    """A 400 about a field: what it must be, and what it was."""
    return ApiError(400, f"{param} must be {expected}, got {shown(got)}", param=param, code="invalid_value")


def shown(value: Any) -> str:
    """A value as a message quotes it: its repr, cut if long. repr keeps control characters and lone surrogates out of messages."""
    if isinstance(value, dict | list) and len(value) > 20:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    try:
        text = ascii(value) if isinstance(value, dict | list) else repr(value)
    except RecursionError:
        text = "something nested deeply"
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."
