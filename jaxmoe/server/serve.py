"""Runs the server: binds its socket, prints its address and statistics, and ends in order on SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import uvicorn
from rich.console import Console
from starlette.applications import Starlette

from jaxmoe.server.app import build_app
from jaxmoe.server.connection import Connection
from jaxmoe.server.metrics import Metrics, kv_usage
from jaxmoe.server.prompts import Served
from jaxmoe.server.service import Service
from jaxmoe.server.settings import ServerSettings
from jaxmoe.server.worker import Worker

LOGGER = logging.getLogger("jaxmoe.server")
STOP_SECONDS = 10.0  # that the engine's thread gets to end its step
INTERRUPTED = 130


def run_server(
    engine: Any, settings: ServerSettings, console: Console | None = None, compile_grammar: Callable[[str, str], Any] | None = None
) -> None:
    """Serves an engine until SIGTERM or SIGINT; then admits nothing, finishes what runs within `drain_seconds`, ends the rest and returns.

    A second signal ends the process at once, with exit code 130. To be called in the main thread.

    Args:
        engine: a ServingEngine; it belongs to the server from here on, which closes it.
        settings: address, keys and limits.
        console: where the address, statistics and the end are told; standard error if not given.
        compile_grammar: see `Served`; None refuses every grammar.

    Raises:
        ValueError: settings that can't be used, such as a public address without a key.
        OSError: the address can't be bound.
    """
    server = HttpServer(engine, settings, console or Console(stderr=True), compile_grammar)
    server.bind()
    server.run()


@contextlib.contextmanager
def serving(engine: Any, settings: ServerSettings, compile_grammar: Callable[[str, str], Any] | None = None) -> Iterator[str]:
    """Serves an engine in a thread while its block runs, and gives the server's URL; drains at the end. For tests and benchmarks."""
    server = HttpServer(engine, settings, Console(quiet=True), compile_grammar)
    url = server.bind()
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        if not thread.is_alive():
            raise RuntimeError("the server ended before it began")
        yield url
    finally:
        server.end()
        thread.join()


class HttpServer(uvicorn.Server):
    """uvicorn's server, with an order in which it ends."""

    def __init__(self, engine: Any, settings: ServerSettings, console: Console, compile_grammar: Callable[[str, str], Any] | None = None):
        """Checks the settings; opens nothing. Arguments as of `run_server`."""
        settings.check()
        self._settings, self._console = settings, console
        metrics = Metrics()
        self._worker = Worker(engine, metrics)
        served = Served(
            model=settings.model or engine.model_name, tokenizer=engine.tokenizer, positions=engine.longest,
            default_tokens=settings.default_tokens, allow_truncation=settings.allow_truncation, max_choices=settings.max_choices,
            max_prompts=settings.max_prompts, max_sequences=settings.max_sequences, compile_grammar=compile_grammar,
        )  # fmt: skip
        self.service = Service(self._worker, served, settings, metrics)
        self._socket: socket.socket | None = None
        self.url = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending = False
        self._draining: asyncio.Future[None] | None = None
        super().__init__(
            uvicorn.Config(
                build_app(self.service, self._lifespan), http=Connection.within(settings.header_seconds, settings.close_seconds), ws="none",
                loop="asyncio", lifespan="on", log_config=None, log_level="error", access_log=False, server_header=False, proxy_headers=False,
                limit_concurrency=settings.max_connections, timeout_keep_alive=settings.keep_alive_seconds, timeout_graceful_shutdown=1,
            )  # fmt: skip
        )

    def bind(self) -> str:
        """Binds the socket and gives the URL under which it can be reached."""
        settings = self._settings
        found = socket.getaddrinfo(settings.host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, number, _, address = found[0]
        sock = socket.socket(family, kind, number)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Connections inherit it: what a slow reader can leave with the kernel is bounded too.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, settings.send_buffer_bytes)
            sock.bind(address)
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"can't listen on {settings.host or '*'}:{settings.port}: {error.strerror}") from None
        self._socket = sock
        host, port = sock.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        return self.url

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until `end` is called or a signal comes, and then until all is over."""
        assert self._socket is not None, "bind first"
        asyncio.run(self.serve([self._socket]))
        if not self._worker.stop(STOP_SECONDS):
            LOGGER.error("the engine's thread is still in a step after %g seconds; it is left behind", STOP_SECONDS)

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """uvicorn's hook: begins to listen. Only then is the address told."""
        await super().startup(None if sockets is None else list(sockets))
        if self.started:
            self._console.print(f"{self.service.served.model} at {self.url}", soft_wrap=True, highlight=False)

    def end(self) -> None:
        """Begins the end: nothing is admitted, what runs may finish within `drain_seconds`, the rest is ended. From any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._begin_end)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's hook for SIGTERM and SIGINT: the first begins the end, the second is the end."""
        if self._ending:
            os.write(2, b"ended at once\n")
            os._exit(INTERRUPTED)
        if self._loop is None:  # while it starts
            self.should_exit = True
            return
        self._ending = True
        self._loop.call_soon_threadsafe(self._begin_end)

    def _begin_end(self) -> None:
        self._ending = True
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        busy, seconds = self.service.busy, self._settings.drain_seconds
        self._console.print(f"no more requests are taken; {busy} may finish within {seconds:g} s", soft_wrap=True, highlight=False)
        try:
            await self.service.drain(self._settings.drain_seconds)
        finally:
            self.should_exit = True

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        self._worker.start(self._loop)
        statistics = asyncio.create_task(self._statistics())
        try:
            yield
        finally:
            statistics.cancel()

    async def _statistics(self) -> None:
        """Prints a line every so often, unless nothing has happened."""
        seconds = self._settings.log_seconds
        before: Mapping[str, float] = {}
        while seconds:
            await asyncio.sleep(seconds)
            now = _totals(self.service.metrics)
            if now != before or self.service.busy:
                self._console.print(statistics_line(self.service.metrics.snapshot, now, before, seconds), soft_wrap=True, highlight=False)
            before = now


def _totals(metrics: Metrics) -> Mapping[str, float]:
    """The tokens so far, of prompts and generated."""
    counters = {"prompt": metrics.prompt_tokens, "generation": metrics.new_tokens}
    return {name: sum(sample.value for sample in next(iter(counter.collect())).samples if sample.name.endswith("_total"))
            for name, counter in counters.items()}  # fmt: skip


def statistics_line(counters: Mapping[str, Any], now: Mapping[str, float], before: Mapping[str, float], seconds: float) -> str:
    """One line of how it goes; what the engine doesn't count is left out.

    Args:
        counters: the engine's.
        now, before: prompt and generated tokens so far, and `seconds` ago.
    """
    parts = [f"{name} {(now[name] - before.get(name, 0)) / seconds:.1f} tok/s" for name in ("prompt", "generation")]
    parts += [f"{name} {counters[name]}" for name in ("running", "waiting", "swapped") if name in counters]
    if (usage := kv_usage(counters)) is not None:
        parts.append(f"KV {usage:.1%}")
    for label, hits, others in (("prefix hits", "prefix_hits", "prefix_queries"), ("expert hits", "expert_hits", "expert_misses")):
        if hits in counters and others in counters:
            total = counters[others] + (counters[hits] if others == "expert_misses" else 0)
            parts.append(f"{label} {counters[hits] / total:.1%}" if total else f"{label} -")
    return ", ".join(parts)
