"""A serving engine without a model: its tokens follow from seed, prompt and position alone, so that tests can tell what comes of a request.

It has `ServingEngine`'s interface. It can be slow, its queue is bounded, it counts pages, and it can be made to fail.
"""

from __future__ import annotations

import dataclasses
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

from jaxmoe.engine.generate import RequestError
from jaxmoe.engine.serving.requests import Event, QueueFull, ServeRequest, TokenLogprob
from jaxmoe.engine.text import StopStrings, StreamDecoder, Tokenizer

MODEL_FOLDER = Path(__file__).resolve().parents[2] / "checkpoints" / "default"
WORDS = " the a of river stone was and light over under grey small"
PAGE = 16


@dataclasses.dataclass
class Live:
    """A sequence that hasn't ended."""

    request: ServeRequest
    decoder: StreamDecoder
    stops: StopStrings
    ids: list[int] = dataclasses.field(default_factory=list)


def fake_token(request: ServeRequest, position: int, pool: list[int]) -> int:
    """The token at a position: of the pool, by seed and prompt."""
    key = f"{request.sampling.seed} {request.prompt_ids} {position}".encode()
    return pool[zlib.crc32(key) % len(pool)]


class FakeEngine:
    """See the module. `fail_next`: what the next step raises."""

    def __init__(self, positions: int = 256, running: int = 8, waiting: int = 64, step_seconds: float = 0.0, folder: Path = MODEL_FOLDER):
        self.tokenizer = Tokenizer(folder)
        self.spec, self.model_name, self.longest = SimpleNamespace(positions=positions), "fake", positions
        self.pool = sorted(set(self.tokenizer.encode(WORDS)))
        self.step_seconds, self.running, self.waiting = step_seconds, running, waiting
        self.live: dict[int, Live] = {}
        self.requests: list[ServeRequest] = []
        self.fail_next: Exception | None = None
        self.closed = False
        self.steps = 0
        self._next, self._aborted = 0, []

    def check(self, request: ServeRequest) -> None:
        if not request.prompt_ids:
            raise RequestError("the prompt is empty")
        for id in request.prompt_ids:
            if id >= self.tokenizer.vocab_size:
                raise RequestError(f"token id {id} is outside the vocabulary of {self.tokenizer.vocab_size}")
        if len(request.prompt_ids) + request.max_new_tokens > self.spec.positions:
            raise RequestError("too long")

    def submit(self, request: ServeRequest, n: int = 1) -> list[int]:
        self.check(request)
        if len(self.live) + n > self.running + self.waiting:
            raise QueueFull(f"{len(self.live)} requests run or wait; at most {self.running + self.waiting} may")
        ids = list(range(self._next, self._next + n))
        self._next += n
        for k, id in enumerate(ids):
            own = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=request.sampling.seed + k))
            self.requests.append(own)
            self.live[id] = Live(own, StreamDecoder(self.tokenizer), StopStrings(own.stop))
        return ids

    def cancel(self, ids) -> None:
        self._aborted += [id for id in ids if self.live.pop(id, None) is not None]

    @property
    def idle(self) -> bool:
        return not self.live and not self._aborted

    def step(self) -> list[Event]:
        self.steps += 1
        if self.step_seconds:
            time.sleep(self.step_seconds)
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        events = [Event(id, finish_reason="abort") for id in self._aborted]
        self._aborted = []
        return events + [self._advance(id, self.live[id]) for id in list(self.live)[: self.running]]

    def _advance(self, id: int, live: Live) -> Event:
        request, token = live.request, fake_token(live.request, len(live.request.prompt_ids) + len(live.ids), self.pool)
        live.ids.append(token)
        text, stopped = live.stops.push(live.decoder.push(token))
        reason = "stop" if stopped else "length" if len(live.ids) >= request.max_new_tokens else None
        if reason == "length":
            tail, stopped = live.stops.push(live.decoder.flush())
            text += tail + ("" if stopped else live.stops.flush())
            reason = "stop" if stopped else reason
        if reason is not None:
            del self.live[id]
        logprobs = ()
        if request.logprobs is not None:
            others = [(other, -1.0 - i) for i, other in enumerate([token, *(t for t in self.pool if t != token)][: request.logprobs])]
            logprobs = (TokenLogprob(token, -1.0, tuple(others)),)
        return Event(id, (token,), text, logprobs, reason, live.stops.matched, cached_tokens=len(request.prompt_ids) // PAGE * PAGE)

    def counters(self) -> dict:
        held = sum(-(-(len(live.request.prompt_ids) + len(live.ids)) // PAGE) for live in list(self.live.values())[: self.running])
        running = min(len(self.live), self.running)
        return {
            "running": running,
            "waiting": len(self.live) - running,
            "swapped": 0,
            "pages": {"free": 4096 - held, "cached": 0, "held": held},
            "steps": self.steps,
            "expert_hits": 3 * self.steps,
            "expert_misses": self.steps,
            "swap_bytes": {"in": 5, "out": 7},
            "queue_seconds": {"bounds": [0.1, 1.0], "counts": [1, 2, 3], "sum": 9.5},
            "xla_compiles_after_warmup": 0,
            "of its own": 4,
        }

    def close(self) -> None:
        self.closed = True


class RecoveringEngine(FakeEngine):
    """One that can go on after an exception: what it had is gone."""

    recoveries = 0

    def recover(self) -> None:
        self.recoveries += 1


def expected_text(engine: FakeEngine, request: ServeRequest) -> str:
    """What a request without stop strings gives."""
    start = len(request.prompt_ids)
    return engine.tokenizer.decode([fake_token(request, start + i, engine.pool) for i in range(request.max_new_tokens)])
