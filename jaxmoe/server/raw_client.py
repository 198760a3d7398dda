"""An HTTP/1.1 client that can misbehave: read slowly, leave early, and see exactly what came. The standard library alone."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import time
from collections.abc import Mapping

SLOW_BYTES, SLOW_SECONDS = 256, 0.01
SLOW_BUFFER = 4096


@dataclasses.dataclass
class Reply:
    """What has come of an answer so far. Attributes: `first`, when its first byte came, by perf_counter; `complete`, all of it has."""

    status: int = 0
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    first: float = 0.0
    complete: bool = False


async def exchange(
    host: str, port: int, path: str, headers: Mapping[str, str], body: bytes, reply: Reply, slow: bool = False, leave_bytes: int | None = None
) -> None:
    """Sends a POST on a connection of its own, and reads the answer into `reply` as it comes, so that it is there if this is broken off.

    Args:
        host, port, path, headers, body: of the request.
        reply: empty; gets the answer.
        slow: reads a few bytes at a time, with little room for more to wait.
        leave_bytes: leaves after so many bytes of the answer's body.

    Raises:
        OSError, EOFError, ValueError: the connection breaks, ends early, or what comes is no HTTP.
    """
    reader, writer = await _connect(host, port, slow)
    try:
        lines = [f"POST {path} HTTP/1.1", f"host: {host}:{port}", f"content-length: {len(body)}", "connection: close"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n")
        await _send(writer, body)
        await _read_head(reader, reply)
        if reply.headers.get("transfer-encoding") == "chunked":
            while size := int((await reader.readline()).strip() or b"-1", 16):
                if size < 0:
                    raise EOFError("the answer ends early")
                await _read_part(reader, size + 2, reply, slow)
                if leave_bytes is not None and len(reply.body) >= leave_bytes:
                    return
        else:
            await _read_part(reader, int(reply.headers.get("content-length", 0)), reply, slow, tail=0)
        reply.complete = True
    finally:
        writer.transport.abort() if not reply.complete else writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _connect(host: str, port: int, slow: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if not slow:
        return await asyncio.open_connection(host, port)
    family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, number)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
        return await asyncio.open_connection(sock=sock, limit=SLOW_BUFFER)
    except BaseException:
        sock.close()
        raise


async def _send(writer: asyncio.StreamWriter, body: bytes) -> None:
    """Sends a body; a server that refuses it may close before it has all, and its answer is there nevertheless."""
    with contextlib.suppress(ConnectionError):
        writer.write(body)
        await writer.drain()


async def _read_head(reader: asyncio.StreamReader, reply: Reply) -> None:
    line = await reader.readline()
    reply.first = time.perf_counter()
    parts = line.split(None, 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/1."):
        raise ValueError(f"not an HTTP answer: {line[:80]!r}") if line else EOFError("no answer came")
    reply.status = int(parts[1])
    while (line := await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        reply.headers[name.strip().lower()] = value.strip()


async def _read_part(reader: asyncio.StreamReader, size: int, reply: Reply, slow: bool, tail: int = 2) -> None:
    """Reads `size` bytes, of which the last `tail` are no content."""
    rest = size
    while rest:
        data = await reader.read(min(rest, SLOW_BYTES) if slow else rest)
        if not data:
            raise EOFError("the answer ends early")
        reply.body += data[: max(0, rest - tail)]
        rest -= len(data)
        if slow:
            await asyncio.sleep(SLOW_SECONDS)
