"""Open-loop load on a server over HTTP: each request on a connection of its own when it is due, whatever has come of the others.

Needs the standard library alone, and knows nothing of the server but that it streams completions as OpenAI's does.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from jaxmoe.report.serve_load import Job
from jaxmoe.report.serve_stats import Served


@dataclasses.dataclass(frozen=True)
class Server:
    """Attributes: `url` without /v1; `key`, or ""; `model`, the name that requests give; `positions` of its longest sequence, 0 where nobody knows;
    `timeout` seconds, of silence."""

    url: str
    key: str = ""
    model: str = ""
    positions: int = 0
    timeout: float = 600.0

    def connect(self) -> http.client.HTTPConnection:
        """A connection that is not open yet.

        Raises:
            ValueError: no URL of http or https.
        """
        place = urllib.parse.urlsplit(self.url)
        if place.scheme not in ("http", "https") or not place.hostname:
            raise ValueError(f"{self.url!r} is no address of a server: give one such as http://127.0.0.1:8000")
        kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
        return kind(place.hostname, place.port, timeout=self.timeout)

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        return {"content-type": "application/json"} | ({"authorization": f"Bearer {self.key}"} if self.key else {})


@dataclasses.dataclass
class Got:
    """What has come of a request. Attributes: `events` of (time, tokens), seconds; `done`, all that it should be; `problem` if not."""

    events: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    done: bool = False
    problem: str = ""


def find_model(server: Server) -> Server:
    """The server with the name and positions of its first model.

    Raises:
        ValueError: it does not say.
        OSError: it can't be reached.
    """
    connection = server.connect()
    try:
        connection.request("GET", "/v1/models", headers=server.headers)
        reply = connection.getresponse()
        body = reply.read()
        if reply.status != 200:
            raise ValueError(f"{server.url}/v1/models answers {reply.status}: {body[:200].decode(errors='replace')}")
        model = json.loads(body)["data"][0]
        return dataclasses.replace(server, model=model["id"], positions=int(model.get("max_model_len", 0)))
    except http.client.HTTPException as error:
        raise ValueError(f"{server.url} speaks no HTTP: {error!r}") from error
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{server.url}/v1/models names no model") from error
    finally:
        connection.close()


def send_all(
    server: Server, jobs: Sequence[Job], clock: Callable[[], float] = time.perf_counter, together: bool = True,
    tell: Callable[[int], None] = lambda sent: None,
) -> tuple[list[Served], list[str]]:  # fmt: skip
    """Sends jobs when they are due and waits for all.

    Args:
        server: with its model's name.
        jobs: with token ids, in order of arrival.
        clock: seconds.
        together: as they arrive; else one after another, each when the last has ended, whatever their times.
        tell: is told how many were sent.

    Returns:
        What each got, times in seconds from the beginning; a request's own counts from when it was due. And what was wrong, by kind, once each.
    """
    began, got = clock(), [Got() for _ in jobs]
    due, threads = [], []
    for i, job in enumerate(jobs):
        if together:
            time.sleep(max(0.0, job.arrival - (clock() - began)))
        due.append(job.arrival if together else clock() - began)
        thread = threading.Thread(target=_ask, args=(server, job, got[i], lambda: clock() - began), daemon=True)
        thread.start()
        threads.append(thread)
        if not together:
            thread.join()
        tell(i + 1)
    for thread in threads:
        thread.join()
    served = [Served(at, tuple(g.events), g.done, job.tokens, job.user) for at, g, job in zip(due, got, jobs, strict=True)]
    return served, sorted({g.problem for g in got if g.problem})


def body_of(server: Server, job: Job) -> bytes:
    """The request of a job."""
    assert not isinstance(job.prompt, int)
    body: dict[str, Any] = {"model": server.model, "prompt": list(job.prompt), "max_tokens": job.new, "seed": job.seed, "temperature": 1.0}
    return json.dumps(body | {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}).encode()


def _ask(server: Server, job: Job, got: Got, now: Callable[[], float]) -> None:
    connection = server.connect()
    try:
        connection.request("POST", "/v1/completions", body_of(server, job), server.headers)
        reply = connection.getresponse()
        if reply.status != 200:
            got.problem = f"status {reply.status}: {reply.read(200).decode(errors='replace')}"
            return
        tokens = 0
        for line in reply:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                tokens = _take(json.loads(line[6:]), got, now()) or tokens
        if got.events and tokens > len(got.events):  # an event's text may be of several tokens, or of none yet: those count with the last
            got.events[-1] = (got.events[-1][0], 1 + tokens - len(got.events))
        got.done = tokens == job.new
        got.problem = "" if got.done else got.problem or f"{tokens} tokens of the {job.new} that were asked for"
    except (OSError, http.client.HTTPException, ValueError) as error:
        got.problem = f"{type(error).__name__}: {error}"
    finally:
        connection.close()


def _take(event: dict[str, Any], got: Got, now: float) -> int:
    """Takes an event; returns new tokens in all, if it says so."""
    if "error" in event:
        got.problem = f"an error in the stream: {event['error']}"
    if any(choice.get("text") for choice in event.get("choices", ())):
        got.events.append((now, 1))
    return int((event.get("usage") or {}).get("completion_tokens", 0))
