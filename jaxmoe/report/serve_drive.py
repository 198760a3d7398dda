"""Drives a serving engine in this process and notes when each token reached its reader, by the wall clock or any other.

One thread submits and steps, as a server's does. A request that becomes due while a step runs is taken in after it, and its wait counts from when it
was due: an open loop does not slow down with what it measures.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from jaxmoe.engine.serving.core import ServingEngine
from jaxmoe.engine.serving.requests import ServeRequest
from jaxmoe.report.serve_stats import Served

COMPILES = "xla_compiles_after_warmup"


@dataclasses.dataclass(frozen=True)
class Sent:
    """A request and when it is sent.

    Attributes:
        request: what is asked.
        at: seconds after the beginning.
        calm: if above 0, not before every request whose own `calm` is 0 has so many tokens; its wait counts from when it is sent.
    """

    request: ServeRequest
    at: float = 0.0
    calm: int = 0


@dataclasses.dataclass(frozen=True)
class Drive:
    """What came of it.

    Attributes:
        served: of each request, in the order in which they were given; times are seconds after the beginning.
        tokens: new ones of each.
        seconds: until the last event.
        compiles: programs that were compiled on the way.
    """

    served: tuple[Served, ...]
    tokens: tuple[tuple[int, ...], ...]
    seconds: float
    compiles: int


def drive(
    engine: ServingEngine, sent: Sequence[Sent], clock: Callable[[], float] = time.perf_counter, sleep: Callable[[float], None] = time.sleep,
    enough: Collection[int] | None = None, submitted: Callable[[int], None] = lambda i: None, tell: Callable[[int], None] = lambda done: None,
) -> Drive:  # fmt: skip
    """Sends requests when they are due and steps until all are over.

    Args:
        engine: warmed up and idle.
        sent: in the order in which they are sent.
        clock, sleep: seconds.
        enough: once these have ended, the others are cancelled, and are not done.
        submitted: called with each request's place when it is sent.
        tell: is told how many are over.

    Raises:
        ValueError: the engine has other work, requests are not in order of time, or one that the engine refuses (`RequestError`).
        RuntimeError: a step failed.
    """
    if not engine.idle:
        raise ValueError("the engine has other work: what it takes would be measured too")
    if any(b.at < a.at for a, b in zip(sent, sent[1:], strict=False)):
        raise ValueError("requests must be in the order of their times")
    order: dict[int, int] = {}  # the engine's number -> place
    arrived = [0.0] * len(sent)
    events: list[list[tuple[float, int]]] = [[] for _ in sent]
    tokens: list[list[int]] = [[] for _ in sent]
    done: set[int] = set()
    over: set[int] = set()
    compiled, began, at = engine.counters()[COMPILES], clock(), 0
    wanted = set(range(len(sent))) if enough is None else set(enough)
    while at < len(sent) or not engine.idle:
        now = clock() - began
        while at < len(sent) and sent[at].at <= now and all(len(tokens[i]) >= sent[at].calm for i in range(at) if not sent[i].calm and i not in over):
            (id,) = engine.submit(sent[at].request)
            order[id], arrived[at] = at, sent[at].at if not sent[at].calm else now
            submitted(at)
            at += 1
        if engine.idle:
            sleep(max(0.0, sent[at].at - now))
            continue
        for event in engine.step():
            i, now = order[event.id], clock() - began
            if event.error is not None or event.finish_reason == "error":
                raise RuntimeError(f"request {i} ended with an error: {event.error}")
            if event.ids:
                events[i].append((now, len(event.ids)))
                tokens[i] += event.ids
            if event.finish_reason is not None:
                over.add(i)
                done |= {i} if event.finish_reason != "abort" else set()
        tell(len(over))
        if wanted <= over and len(over) < len(order):
            engine.cancel([id for id, i in order.items() if i not in over])
    seconds, compiles = clock() - began, engine.counters()[COMPILES] - compiled
    rows = [Served(arrived[i], tuple(events[i]), i in done, len(s.request.prompt_ids), s.request.user) for i, s in enumerate(sent)]
    return Drive(tuple(rows), tuple(map(tuple, tokens)), seconds, int(compiles))


def check_drive(found: Drive, what: str) -> Drive:
    """The drive, if nothing was compiled in it.

    Raises:
        RuntimeError: something was: the times mean little.
    """
    if found.compiles:
        raise RuntimeError(f"{what}: {found.compiles} programs were compiled while it was measured, which warm-up should have done")
    return found


def loads(engine: ServingEngine) -> dict[str, int]:
    """Experts brought to the device so far: `all` of them, and those of calls that only decode; nothing of a model whose experts are all there."""
    counters: dict[str, Any] = engine.counters()
    if "expert_loads" not in counters:
        return {"all": 0, "decode": 0}
    decoded = engine.runner.decoded.read().get("loads")
    return {"all": int(counters["expert_loads"]), "decode": 0 if decoded is None else int(decoded.sum())}
