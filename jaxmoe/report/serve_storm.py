"""A storm of good and bad clients against a server on this machine: what it answers, what it refuses, and whether anything of them stays behind.

Needs the standard library alone, and knows nothing of the server but its address: it may run in another process, and against another server.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import random
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmoe.server.raw_client import Reply, exchange

KINDS = {
    "whole": 18, "stream": 24, "chat": 10, "several": 8, "logprobs": 4, "leave_whole": 8, "leave_stream": 12, "slow": 4,
    "too_long": 4, "broken_json": 3, "wrong_key": 3, "unknown_field": 2, "wrong_model": 2, "big_body": 1, "wrong_path": 1,
}  # fmt: skip
"""What clients do, and how many of a hundred do it about. `leave_*` close the connection early, `slow` reads a little at a time."""
REFUSED = {"too_long": 400, "broken_json": 400, "wrong_key": 401, "unknown_field": 400, "wrong_model": 404, "big_body": 413, "wrong_path": 404}
"""Kinds that have to be refused, and with what status."""
BUSY = (429, 503)  # anyone may be sent away for a while
WORDS = "the river and a grey stone under light over small house in old wood".split()


@dataclasses.dataclass(frozen=True)
class Target:
    """A server: its URL without /v1, the model's name and positions, a key or "", and whether it has a chat template."""

    url: str
    model: str
    positions: int
    key: str = ""
    chat: bool = True


@dataclasses.dataclass(frozen=True)
class Shot:
    """One client's doing. Attributes: `leave` seconds, or streamed bytes, after which a client leaves; the others as sent."""

    kind: str
    prompts: tuple[str, ...]
    n: int
    tokens: int
    seed: int
    leave: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a shot.

    Attributes:
        result: 'answered' in full; 'refused'; 'busy', sent away with 429 or 503; 'left' by the client; 'cut' by the server, which only slow readers
            may be; or 'wrong'.
        status: HTTP's, 0 where none came.
        problem: what is wrong.
        seconds, first: until the end, and until the first byte of the answer.
        tokens: new ones, as the answer counts them.
    """

    kind: str
    result: str
    status: int
    seconds: float
    first: float = 0.0
    tokens: int = 0
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class StormReport:
    """What came of a storm: every shot's outcome, in the order of the shots, and metrics of the server's before and after (see `read_metrics`)."""

    outcomes: tuple[Outcome, ...]
    seconds: float
    before: Mapping[str, float]
    after: Mapping[str, float]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Kind -> 'result status' -> how many."""
        found: dict[str, dict[str, int]] = {}
        for outcome in self.outcomes:
            row = found.setdefault(outcome.kind, {})
            name = f"{outcome.result} {outcome.status}"
            row[name] = row.get(name, 0) + 1
        return found

    @property
    def statuses(self) -> dict[int, int]:
        """Status -> how many."""
        return dict(sorted(collections.Counter(outcome.status for outcome in self.outcomes).items()))

    @property
    def problems(self) -> list[str]:
        """All that is wrong, one line each; empty after a storm that was weathered."""
        found = [f"{outcome.kind}: {outcome.problem}" for outcome in self.outcomes if outcome.problem]
        for name in ("jaxmoe:num_requests_running", "jaxmoe:num_requests_waiting", "jaxmoe:num_requests_swapped", 'jaxmoe:kv_pages{state="held"}'):
            if self.after.get(name, 0) != 0:
                found.append(f"afterwards {name} is {self.after[name]:g}, not 0")
        return found

    @property
    def resident_bytes(self) -> tuple[float, float]:
        """The server's memory before and after; 0 where it doesn't say."""
        name = "process_resident_memory_bytes"
        return self.before.get(name, 0.0), self.after.get(name, 0.0)


def make_shots(requests: int, target: Target, seed: int, kinds: Mapping[str, int] = KINDS, most_tokens: int = 24) -> list[Shot]:
    """What each client will do; the same for the same seed.

    Args:
        requests: how many.
        target: kinds that it can't have (a wrong key where there is none, a chat without a template) are left out.
        seed: of Python's generator.
        kinds: weight by kind.
        most_tokens: new tokens of a request, at most.
    """
    draw = random.Random(seed)
    left = {kind: weight for kind, weight in kinds.items() if (kind != "wrong_key" or target.key) and (kind != "chat" or target.chat)}
    shots = []
    for kind in draw.choices(list(left), list(left.values()), k=requests):
        several = kind == "several"
        prompts = tuple(" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(draw.randint(1, 3) if several else 1))
        n = draw.randint(1, 3) if several else 1
        shots.append(Shot(kind, prompts, n, draw.randint(1, most_tokens), draw.randrange(2**31), draw.random()))
    return shots


def request_of(shot: Shot, target: Target) -> tuple[str, dict[str, str], bytes]:
    """Path, headers and body of a shot."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {target.key}"} if target.key else {})
    path, prompt = "/v1/completions", list(shot.prompts) if len(shot.prompts) > 1 else shot.prompts[0]
    body: dict[str, Any] = {"model": target.model, "max_tokens": shot.tokens, "seed": shot.seed, "temperature": 1.0, "ignore_eos": True}
    if shot.kind == "chat":
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": shot.prompts[0]}]
    else:
        body |= {"prompt": prompt, "n": shot.n}
    if shot.kind in ("stream", "leave_stream", "slow") or (shot.kind in ("chat", "several") and shot.leave < 0.5):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if shot.kind == "logprobs":
        body["logprobs"] = 3
    elif shot.kind == "too_long":
        body["max_tokens"] = target.positions
    elif shot.kind == "unknown_field":
        body["no_such_field"] = 1
    elif shot.kind == "wrong_model":
        body["model"] = "no-such-model"
    elif shot.kind == "wrong_key":
        headers["authorization"] = "Bearer wrong"
    elif shot.kind == "wrong_path":
        path = "/v1/no/such/path"
    data = json.dumps(body).encode()
    if shot.kind == "broken_json":
        data = data[: max(1, int(shot.leave * (len(data) - 1)))]
    elif shot.kind == "big_body":
        data = b'{"prompt": "' + b"a" * 2**23 + b'"}'
    return path, headers, data


async def storm(
    target: Target, clients: int = 64, requests: int = 2000, seed: int = 0, kinds: Mapping[str, int] = KINDS, most_tokens: int = 24,
    timeout: float = 120.0, settle: float = 10.0,
) -> StormReport:  # fmt: skip
    """Lets clients loose on a server, each with one request after another, and looks at what they got.

    Args:
        target: where.
        clients: at a time.
        requests: in all.
        seed, kinds, most_tokens: see `make_shots`.
        timeout: seconds after which a request counts as never answered.
        settle: seconds, at most, that the server gets to forget the last of them.

    Returns:
        What came of it.
    """
    before = await asyncio.to_thread(read_metrics, target)
    shots = make_shots(requests, target, seed, kinds, most_tokens)
    outcomes: list[Outcome | None] = [None] * len(shots)
    places = iter(range(len(shots)))

    async def client() -> None:
        for i in places:
            outcomes[i] = await _fire(shots[i], target, timeout)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - began
    end = time.perf_counter() + settle
    after = await asyncio.to_thread(read_metrics, target)
    while after.get("jaxmoe:num_requests_running", 0) + after.get("jaxmoe:num_requests_waiting", 0) > 0 and time.perf_counter() < end:
        await asyncio.sleep(0.1)
        after = await asyncio.to_thread(read_metrics, target)
    return StormReport(tuple(outcome for outcome in outcomes if outcome is not None), seconds, before, after)


def read_metrics(target: Target) -> dict[str, float]:
    """The server's metrics, by name with labels as its page has them, without histograms' buckets."""
    with urllib.request.urlopen(target.url + "/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    pairs = (re.fullmatch(r"([^#\s{]+(?:\{.*\})?) (\S+)", line) for line in lines if "_bucket{" not in line)
    return {found[1]: float(found[2]) for found in pairs if found}


async def _fire(shot: Shot, target: Target, timeout: float) -> Outcome:
    began = time.perf_counter()
    path, headers, body = request_of(shot, target)
    place = urllib.parse.urlsplit(target.url)
    reply = Reply()
    kind, slow = shot.kind, shot.kind == "slow"
    leave_after = 0.002 + 0.1 * shot.leave**2 if kind == "leave_whole" else None
    leave_bytes = int(1 + 2000 * shot.leave) if kind == "leave_stream" else None
    error = ""
    try:
        async with asyncio.timeout(leave_after or timeout):
            await exchange(place.hostname or "127.0.0.1", place.port or 80, path, headers, body, reply, slow=slow, leave_bytes=leave_bytes)
    except TimeoutError:
        error = "" if leave_after else f"no answer within {timeout:g} s"
    except (OSError, EOFError, ValueError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    seconds = time.perf_counter() - began
    first = (reply.first or began + seconds) - began
    result, problem, tokens = judge(shot, reply, error)
    return Outcome(kind, result, reply.status, seconds, first, tokens, problem)


def judge(shot: Shot, reply: Reply, error: str) -> tuple[str, str, int]:
    """What a reply amounts to.

    Args:
        shot: what was sent.
        reply: what came.
        error: how the connection ended early, or "".

    Returns:
        (result, problem, new tokens), as of `Outcome`.
    """
    wanted = REFUSED.get(shot.kind)
    if shot.kind.startswith("leave") and not reply.complete:
        return ("wrong", error, 0) if error else ("left", "", 0)
    if shot.kind == "slow" and reply.status == 200 and (error or not reply.complete or b'"slow_reader"' in reply.body):
        return "cut", "", 0
    if error or not reply.complete:
        return "wrong", error or f"the answer breaks off after {len(reply.body)} bytes", 0
    if reply.status in BUSY:
        return ("busy", "", 0) if "retry-after" in reply.headers else ("wrong", f"{reply.status} without Retry-After", 0)
    if wanted is not None or reply.status != 200:
        problem = "" if reply.status == wanted else f"status {reply.status}, expected {wanted or 200}: {reply.body[:200]!r}"
        return "wrong" if problem or not _is_error(reply.body) else "refused", problem or ("" if _is_error(reply.body) else "no error body"), 0
    tokens, problem = _check_answer(shot, reply)
    return "wrong" if problem else "answered", problem, tokens


def _is_error(body: bytes) -> bool:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return isinstance(json.loads(body)["error"]["message"], str)
    return False


def _check_answer(shot: Shot, reply: Reply) -> tuple[int, str]:
    """New tokens of an answer, and what is wrong with it."""
    streamed = reply.headers.get("content-type", "").startswith("text/event-stream")
    try:
        parts = _events(reply.body) if streamed else [json.loads(reply.body)]
    except ValueError as error:
        return 0, f"the answer can't be read: {error}"
    for part in parts:
        if "error" in part:
            return 0, f"an error in the stream: {part['error']}"
    ends: dict[int, list[str]] = {}
    for choice in (choice for part in parts for choice in part["choices"]):
        if choice["finish_reason"] is not None:
            ends.setdefault(choice["index"], []).append(choice["finish_reason"])
    wanted = len(shot.prompts) * shot.n
    if sorted(ends) != list(range(wanted)) or any(len(reasons) != 1 or reasons[0] not in ("stop", "length") for reasons in ends.values()):
        return 0, f"{wanted} choices should each end once, got {ends}"
    usage: dict[str, int] = parts[-1].get("usage") or {}
    tokens = usage.get("completion_tokens", -1)
    return tokens, "" if tokens == wanted * shot.tokens else f"{tokens} new tokens, expected {wanted * shot.tokens}"


def _events(body: bytes) -> list[dict[str, Any]]:
    """The events of a stream; ValueError unless it ends as it should."""
    events = [event for event in body.decode("ascii").split("\n\n") if event]
    if not events or events[-1] != "data: [DONE]":
        raise ValueError("the stream doesn't end with [DONE]")
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def storm_lines(report: StormReport) -> list[str]:
    """A report as lines of text."""
    answered = [outcome for outcome in report.outcomes if outcome.result == "answered"]
    tokens = sum(outcome.tokens for outcome in answered)
    lines = [f"{len(report.outcomes)} requests in {report.seconds:.1f} s; {len(answered)} answered with {tokens} tokens; statuses {report.statuses}"]
    lines += [f"  {kind:14s} " + ", ".join(f"{name}: {n}" for name, n in sorted(row.items())) for kind, row in sorted(report.counts.items())]
    if answered:
        lines.append("  seconds: " + ", ".join(f"p{q} {percentile([o.seconds for o in answered], q):.3f}" for q in (50, 90, 99)))
    old, new = report.resident_bytes
    lines.append(f"  the server's memory: {old / 1e6:.1f} MB before, {new / 1e6:.1f} MB after")
    return lines + [f"  WRONG {problem}" for problem in report.problems]


def percentile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least q percent of them don't exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * int(q * 100) // 10000) - 1)]
