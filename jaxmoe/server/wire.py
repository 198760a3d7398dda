"""HTTP in small pieces: read a body within limits, check a key, send JSON, and see a client go. Knows ASGI, nothing of models."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from jaxmoe.server.answers import to_json
from jaxmoe.server.errors import ApiError

LINGER_SECONDS, LINGER_BYTES = 2.0, 2**24
"""For what a refused client still sends: if the connection were closed at once, it would see that, and not the answer."""


def header(scope: Scope, name: bytes) -> str | None:
    """A header's value, or None; several are joined by commas."""
    found = [value.decode("latin-1") for key, value in scope["headers"] if key == name]
    return ", ".join(found) if found else None


def check_key(scope: Scope, keys: Iterable[str]) -> None:
    """Raises a 401 unless the request carries one of the keys, where there are any. How long it takes says nothing about them."""
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]
    if not digests:
        return
    kind, _, given = (header(scope, b"authorization") or "").partition(" ")
    token = hashlib.sha256(given.strip().encode("latin-1")).digest()
    right = False
    for digest in digests:
        right |= hmac.compare_digest(digest, token)
    if kind.lower() != "bearer" or not right:
        headers = {"www-authenticate": "Bearer"}
        message = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
        raise ApiError(401, message, code="invalid_api_key", headers=headers)


def check_json(scope: Scope) -> None:
    """Raises a 415 unless the body is said to be plain JSON."""
    kind = (header(scope, b"content-type") or "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"content-type must be application/json, got {kind or 'none'}", code="unsupported_media_type")
    coding = (header(scope, b"content-encoding") or "identity").lower()
    if coding != "identity":
        raise ApiError(415, f"content-encoding {coding!r} isn't supported", code="unsupported_media_type")


class Gone(Exception):
    """The client has closed the connection."""


async def read_body(scope: Scope, receive: Receive, most: int, seconds: float) -> bytes:
    """A request's whole body.

    Args:
        scope, receive: ASGI's.
        most: bytes, at most, whether the client has announced them or not.
        seconds: in which it has to come.

    Raises:
        ApiError: 413 or 408.
        Gone: the client has.
    """
    announced = header(scope, b"content-length")
    if announced is not None and announced.isdigit() and int(announced) > most:
        raise ApiError(413, f"the body has {announced} bytes; at most {most} are taken", code="body_too_large")
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > most:
                    raise ApiError(413, f"the body has more than {most} bytes, which is the most that are taken", code="body_too_large")
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {seconds:g} seconds", code="timeout") from None


async def wait_gone(receive: Receive) -> None:
    """Returns when the client has closed the connection, or the answer is complete."""
    while (await receive())["type"] != "http.disconnect":
        pass


def head(status: int, headers: Mapping[str, str]) -> Message:
    """The message that begins an answer."""
    pairs = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": pairs}


async def send_json(send: Send, value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> None:
    """Sends a whole answer."""
    body = to_json(value)
    await send(head(status, {"content-type": "application/json", "content-length": str(len(body))} | dict(headers or {})))
    await send({"type": "http.response.body", "body": body})


async def refuse(error: ApiError, receive: Receive, send: Send) -> None:
    """Sends an error to a client that may still be sending its body, and closes the connection when it has, or a little later."""
    body = to_json(error.body())
    fixed = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    await send(head(error.status, fixed | error.headers))
    await send({"type": "http.response.body", "body": body, "more_body": True})
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while size < LINGER_BYTES:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    break
                size += len(message.get("body", b""))
    await send({"type": "http.response.body", "body": b""})
