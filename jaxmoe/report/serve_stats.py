"""What users of a server see, from the times at which tokens reached them: first token, gaps, rates, and how much load is borne within limits.

Times are plain numbers in any one unit of a clock, real or virtual. Definitions are those of vLLM's `bench serve` and DistServe (OSDI 2024).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True)
class Served:
    """What one request got.

    Attributes:
        arrived: when it was sent.
        events: (time, tokens) of everything that it got, in order; several tokens may come together.
        done: it got all that it was promised. A request that was refused, cancelled or lost is not done.
        prompt: tokens of its prompt.
        user: whose it was.
    """

    arrived: float
    events: tuple[tuple[float, int], ...]
    done: bool = True
    prompt: int = 0
    user: str = ""

    def __post_init__(self):
        times = [self.arrived, *(time for time, _ in self.events)]
        if any(b < a for a, b in zip(times, times[1:], strict=False)):
            raise ValueError(f"times {times} of a request go back")
        if any(tokens < 1 for _, tokens in self.events):
            raise ValueError(f"events {self.events} of a request: each needs at least one token")

    @property
    def tokens(self) -> int:
        """That it got."""
        return sum(tokens for _, tokens in self.events)

    @property
    def ttft(self) -> float | None:
        """Time to the first token; None if there was none."""
        return self.events[0][0] - self.arrived if self.events else None

    @property
    def e2e(self) -> float | None:
        """Time to the last token; None if there was none."""
        return self.events[-1][0] - self.arrived if self.events else None

    @property
    def tpot(self) -> float | None:
        """Time per token after the first event, (e2e - TTFT) / (tokens - 1); None where there is one token or none."""
        return (self.events[-1][0] - self.events[0][0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Times between events, every one: tokens that come together have one gap before them."""
        times = [time for time, _ in self.events]
        return [b - a for a, b in zip(times, times[1:], strict=False)]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request must keep to count. Attributes: `ttft`, `tpot` and `gap`, the longest of each; `gap` is left out of the usual two."""

    ttft: float = math.inf
    tpot: float = math.inf
    gap: float = math.inf

    def kept(self, served: Served) -> bool:
        """Whether a request is done and kept all of them."""
        if not served.done or served.ttft is None:
            return False
        return served.ttft <= self.ttft and (served.tpot or 0.0) <= self.tpot and max(served.gaps, default=0.0) <= self.gap


def limits_of(unloaded: Sequence[Served], ttft: float = 5.0, tpot: float = 2.0) -> Limits:
    """Limits that need no hardware to be named: so many times the medians of a run with one request at a time.

    Raises:
        ValueError: no request of that run got two tokens.
    """
    firsts, each = _numbers(s.ttft for s in unloaded), _numbers(s.tpot for s in unloaded)
    if not len(firsts) or not len(each):
        raise ValueError(f"of {len(unloaded)} unloaded requests none got two tokens: no limits follow")
    return Limits(ttft * float(np.median(firsts)), tpot * float(np.median(each)))


def percentiles(values: Iterable[float | None], at: Sequence[int] = PERCENTILES) -> dict[str, float]:
    """{"p50", "p90", "p99", "mean", "max", "n"} of the values that are there; {"n": 0} if none is."""
    found = _numbers(values)
    if not len(found):
        return {"n": 0}
    out = {f"p{p}": float(np.percentile(found, p)) for p in at}
    return out | {"mean": float(found.mean()), "max": float(found.max()), "n": len(found)}


def _numbers(values: Iterable[float | None]) -> np.ndarray:
    return np.array([value for value in values if value is not None], np.float64)


def span(served: Sequence[Served]) -> float:
    """From the first request sent to the last token given; 0 of no events."""
    ends = [s.events[-1][0] for s in served if s.events]
    return max(ends) - min(s.arrived for s in served) if ends else 0.0


def attainment(served: Sequence[Served], limits: Limits) -> float:
    """The share of requests that kept the limits; those that got nothing count as not; 1 of none."""
    return sum(limits.kept(s) for s in served) / len(served) if served else 1.0


def goodput(served: Sequence[Served], limits: Limits) -> float:
    """Requests that kept the limits, per unit of time; 0 of no time."""
    duration = span(served)
    return sum(limits.kept(s) for s in served) / duration if duration > 0 else 0.0


def stalls(served: Sequence[Served], limit: float) -> int:
    """Gaps longer than a limit, over all requests: each is a reader who waited in the middle of a sentence."""
    return sum(gap > limit for s in served for gap in s.gaps)


def summary(served: Sequence[Served], limits: Limits | None = None) -> dict[str, Any]:
    """All of it as JSON values.

    Args:
        served: every request that was sent.
        limits: for goodput and attainment.

    Returns:
        "requests", "done", "tokens", "prompt_tokens", "duration", "tokens_per_time", "requests_per_time", "tokens_per_event"; "ttft", "tpot", "itl"
        and "e2e" as of `percentiles`; with limits also "limits", "attainment" and "goodput".
    """
    duration, tokens, events = span(served), sum(s.tokens for s in served), sum(len(s.events) for s in served)
    done = sum(s.done for s in served)
    out: dict[str, Any] = {"requests": len(served), "done": done, "tokens": tokens, "prompt_tokens": sum(s.prompt for s in served)}
    per = 1 / duration if duration else 0.0
    out |= {"duration": duration, "tokens_per_time": tokens * per, "requests_per_time": done * per}
    out |= {"tokens_per_event": tokens / events if events else 0.0}
    out |= {"ttft": percentiles(s.ttft for s in served), "tpot": percentiles(s.tpot for s in served)}
    out |= {"itl": percentiles(gap for s in served for gap in s.gaps), "e2e": percentiles(s.e2e for s in served)}
    if limits is not None:
        named = {name: value for name, value in dataclasses.asdict(limits).items() if math.isfinite(value)}
        out |= {"limits": named, "attainment": attainment(served, limits), "goodput": goodput(served, limits)}
    return out


# --- How much load is borne


@dataclasses.dataclass(frozen=True)
class Search:
    """What a bisection found.

    Attributes:
        rate: the highest tried at which enough requests kept the limits; 0 where not even the lowest did.
        probes: (rate, attainment) of every try, in order of rate.
        bounded: a higher rate that failed was tried; if not, the answer is "at least".
    """

    rate: float
    probes: tuple[tuple[float, float], ...]
    bounded: bool

    @property
    def violation(self) -> float:
        """By how much attainment rises with the rate anywhere, at most: it should fall, so more than a few percent is noise to be looked at."""
        lowest, worst = 1.0, 0.0
        for _, share in self.probes:
            lowest = min(lowest, share)
            worst = max(worst, share - lowest)
        return worst


def best_rate(attained: Callable[[float], float], low: float, high: float, width: float, target: float = 0.9) -> Search:
    """The highest rate at which a share `target` of requests keeps its limits, by bisection (DistServe's search).

    Args:
        attained: `rate -> share`, of a run at that rate, with seeds of its own: the same rate gives the same share.
        low, high: rates between which it is looked for.
        width: it stops where two rates, one kept and one not, are so close.
        target: the share.

    Raises:
        ValueError: not 0 < low < high, or the width is not positive.
    """
    if not (0 < low < high and width > 0):
        raise ValueError(f"rates from {low} to {high} in steps of {width}: needs 0 < low < high and a positive width")
    probes = {low: attained(low)}
    if probes[low] < target:
        return Search(0.0, tuple(probes.items()), True)
    probes[high] = attained(high)
    if probes[high] >= target:
        return Search(high, tuple(probes.items()), False)
    good, bad = low, high
    while bad - good > width and good < (middle := (good + bad) / 2) < bad:
        probes[middle] = attained(middle)
        good, bad = (middle, bad) if probes[middle] >= target else (good, middle)
    return Search(good, tuple(sorted(probes.items())), True)
