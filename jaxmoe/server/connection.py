"""uvicorn's HTTP/1.1 connection, with a limit on the time for headers, on what is unsent at its end, and a way to break it off."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import struct
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """A connection. An application finds `abort` in the scope's state: it breaks the connection off, whatever is unsent."""

    header_seconds = 10.0
    close_seconds = 60.0

    @classmethod
    def within(cls, header_seconds: float, close_seconds: float) -> type[Connection]:
        """The class with other limits: seconds for the headers of a request, and for what is unsent when a connection is closed."""
        return type("Connection", (cls,), {"header_seconds": header_seconds, "close_seconds": close_seconds})

    def connection_made(self, transport: Any) -> None:
        """As uvicorn's; the time for the first request's headers begins."""
        super().connection_made(_Closing(transport, self.loop, self.close_seconds))  # type: ignore[arg-type]
        self._reset = functools.partial(_reset, transport)
        self.app_state = {**self.app_state, "abort": self._reset}
        self._timer: asyncio.TimerHandle | None = self.loop.call_later(self.header_seconds, self._reset)

    def data_received(self, data: bytes) -> None:
        """As uvicorn's; the time for headers ends when they are there, and begins with the first byte of the next."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.header_seconds, self._reset)

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn's."""
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _reset(transport: asyncio.Transport) -> None:
    """Breaks a connection off, so that its peer sees that, and the kernel doesn't go on offering what is unsent."""
    sock = transport.get_extra_info("socket")
    with contextlib.suppress(OSError, AttributeError):  # closed already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class _Closing:
    """A transport that is closed within a time although its peer takes nothing any more."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, seconds: float):
        self._transport, self._loop, self._seconds = transport, loop, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        """As the transport's."""
        if not self._transport.is_closing() and self._transport.get_write_buffer_size():
            self._loop.call_later(self._seconds, _reset, self._transport)
        self._transport.close()
