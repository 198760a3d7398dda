"""How long a step takes: a model fitted to steps as they are measured, and what follows from it for groups of layers, chunks and preemption.

Numbers in, numbers out: no clock is read here, and nothing is known of the machine but what the measured steps say.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from scipy.optimize import nnls

from jaxmoe.engine.serving.types import Preemption


@dataclasses.dataclass(frozen=True)
class Step:
    """One step that ran.

    Attributes:
        tokens: that went through the model, padding left out.
        context: positions attended to, summed over those tokens.
        bytes: copied to the device for it.
        seconds: it took.
    """

    tokens: int
    context: int
    bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class StepModel:
    """Seconds of a step: `fix + max(base + token * tokens + context * context, byte * bytes)`, or `fix` plus the sum of both where nothing overlaps.

    Attributes:
        fix: seconds of any step.
        base: seconds of any step's computing, which copies can hide; 0 in the serial form, where it can't be told from `fix`.
        token: seconds a token.
        context: seconds a token and position it attends to.
        byte: seconds a byte that is copied to the device: 1 / bandwidth.
        overlapped: copies run beside computing.
    """

    fix: float
    base: float
    token: float
    context: float
    byte: float
    overlapped: bool

    def seconds(self, tokens: float, context: float = 0.0, bytes: float = 0.0) -> float:
        """Of a step of so many tokens, positions attended to and bytes copied."""
        compute, link = self.base + self.token * tokens + self.context * context, self.byte * bytes
        return self.fix + (max(compute, link) if self.overlapped else compute + link)


def fit(steps: Sequence[Step], overlapped: bool | None = None) -> StepModel:
    """The model with the least squared relative error on these steps, none of its numbers negative.

    The serial form is linear. The overlapped one is fitted in turns: which side each step is bound by, then both sides together.

    Args:
        steps: at least one.
        overlapped: which form; the better on these steps if not given.

    Raises:
        ValueError: there are no steps, or one took no time or a count is negative.
    """
    if not steps:
        raise ValueError("a model of steps' time needs at least one step")
    for step in steps:
        if not (step.seconds > 0 and math.isfinite(step.seconds)) or min(step.tokens, step.context, step.bytes) < 0:
            raise ValueError(f"{step} can't be fitted: seconds must be positive, counts not negative")
    given = _columns(steps)
    found = [model for form, make in ((False, _serial), (True, _overlapped)) if overlapped in (None, form) for model in make(*given)]
    return min(found, key=lambda model: _loss(model, *given))


def errors(model: StepModel, steps: Sequence[Step]) -> Float[np.ndarray, "n"]:
    """Relative errors |predicted - measured| / measured."""
    return np.array([abs(model.seconds(s.tokens, s.context, s.bytes) / s.seconds - 1) for s in steps])


def held_out(steps: Sequence[Step], every: int = 5, overlapped: bool | None = None) -> tuple[StepModel, float]:
    """Fits to all but every `every`-th step and tries the model on those.

    Returns:
        The model and its mean relative error on the steps left out (DistServe's simulator counts as good what is below 0.15).

    Raises:
        ValueError: there are fewer than `every` steps, so that none is left out.
    """
    if len(steps) < every or every < 2:
        raise ValueError(f"{len(steps)} steps, every {every}-th left out: none would be, or all")
    model = fit([s for i, s in enumerate(steps) if i % every != every - 1], overlapped)
    return model, float(errors(model, steps[every - 1 :: every]).mean())


def _columns(steps: Sequence[Step]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return tuple(np.array([getattr(s, name) for s in steps], np.float64) for name in ("tokens", "context", "bytes", "seconds"))  # type: ignore[return-value]


def _solve(rows: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Non-negative least squares of relative errors, columns brought to one size first."""
    weighted = rows / seconds[:, None]
    size = np.maximum(np.abs(weighted).max(0), 1e-300)
    found, _ = nnls(weighted / size, np.ones(len(rows)))
    return np.where(weighted.any(0), found / size, 0.0)


def _serial(tokens: np.ndarray, context: np.ndarray, bytes: np.ndarray, seconds: np.ndarray) -> list[StepModel]:
    fix, token, at, byte = _solve(np.stack([np.ones_like(tokens), tokens, context, bytes], axis=1), seconds).tolist()
    return [StepModel(fix, 0.0, token, at, byte, False)]


TURNS = 12
"""Of fitting the overlapped form, at most, from each beginning."""


def _overlapped(tokens: np.ndarray, context: np.ndarray, bytes: np.ndarray, seconds: np.ndarray) -> list[StepModel]:
    """Every model that the turns come by: squared error need not fall from turn to turn, so the caller takes the best."""
    out = []
    per_byte = seconds / np.maximum(bytes, 1)
    for share in (0.0, 0.25, 0.5, 0.75):  # of steps with copies that begin on the computing side
        linked = (bytes > 0) & (per_byte <= np.quantile(per_byte[bytes > 0], 1 - share) if (bytes > 0).any() else False)
        for _ in range(TURNS):
            compute = (~linked).astype(np.float64)
            rows = np.stack([np.ones_like(tokens), compute, compute * tokens, compute * context, linked * bytes], axis=1)
            fix, base, token, at, byte = _solve(rows, seconds).tolist()
            out.append(StepModel(fix, base, token, at, byte, True))
            now = byte * bytes > base + token * tokens + at * context
            if (now == linked).all():
                break
            linked = now
    return out


def _loss(model: StepModel, tokens: np.ndarray, context: np.ndarray, bytes: np.ndarray, seconds: np.ndarray) -> float:
    compute, link = model.base + model.token * tokens + model.context * context, model.byte * bytes
    found = model.fix + (np.maximum(compute, link) if model.overlapped else compute + link)
    return float((((found - seconds) / seconds) ** 2).sum())


# --- While steps run


@dataclasses.dataclass(frozen=True)
class Online:
    """A model that is fitted anew as steps are measured.

    Attributes:
        overlapped: the form; None for the better one each time.
        window: steps that count, at most, the last ones.
        every: steps between two fits.
        steps: the window.
        seen: steps so far.
        model: the last fitted; None before the first.
        missed: relative errors of the last steps, each of a model that had not seen the step.
    """

    overlapped: bool | None = None
    window: int = 512
    every: int = 32
    steps: tuple[Step, ...] = ()
    seen: int = 0
    model: StepModel | None = None
    missed: tuple[float, ...] = ()

    @property
    def error(self) -> float | None:
        """Mean relative error on steps that the model had not seen; None before there are any."""
        return sum(self.missed) / len(self.missed) if self.missed else None


def observe(state: Online, step: Step) -> Online:
    """Takes one measured step, and fits where it is time to: after 8 steps, and then every `every`."""
    missed = state.missed if state.model is None else (*state.missed, float(errors(state.model, [step])[0]))[-state.window :]
    steps, seen = (*state.steps, step)[-state.window :], state.seen + 1
    due = seen == 8 or seen % state.every == 0
    model = fit(steps, state.overlapped) if due else state.model
    return dataclasses.replace(state, steps=steps, seen=seen, model=model, missed=missed)


# --- What follows


def groups_for(stream_bytes: float, bandwidth: float, gap_slo: float, t_dec: float) -> int:
    """Groups of layers such that a step of decoding and one group's experts keeps the gap between tokens (layered prefill, arXiv 2510.08055).

    Args:
        stream_bytes: of all experts that a wave of prompts brings in.
        bandwidth: bytes per second to the device.
        gap_slo: seconds between two tokens of a sequence, at most.
        t_dec: seconds of a step that only decodes.

    Returns:
        G = ceil(stream_bytes / bandwidth / (gap_slo - t_dec)), at least 1. It may be more than there are layers: then no grouping keeps the gap.

    Raises:
        ValueError: decoding alone takes as long as the gap allows, or the bandwidth is not positive.
    """
    _check_link(stream_bytes, bandwidth)
    if gap_slo <= t_dec:
        raise ValueError(f"a gap of {gap_slo} s leaves nothing for prompts where a decoding step takes {t_dec} s: allow more")
    return max(1, math.ceil(stream_bytes / bandwidth / (gap_slo - t_dec) - 1e-9))


def chunk_for(slo: float, seconds: Callable[[int], float], run: int, most: int) -> int:
    """Sarathi-Serve's token budget: the largest chunk whose step keeps the gap between tokens (OSDI 2024, section 4.3).

    Args:
        slo: seconds of a step, at most.
        seconds: `n -> seconds` of a step with `n` prompt tokens beside the sequences that decode; never falling.
        run: the chunk is a multiple of it.
        most: the largest chunk there is a program for, a multiple of `run`.

    Returns:
        Tokens; 0 where not even one run keeps the gap.

    Raises:
        ValueError: `most` is no positive multiple of `run`.
    """
    if run < 1 or most < run or most % run:
        raise ValueError(f"chunks of up to {most} tokens in runs of {run}: the first must be a positive multiple of the second")
    low, high = 0, most // run  # low runs keep the gap
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if seconds(middle * run) <= slo else (low, middle - 1)
    return low * run


def swap_or_recompute(tokens: int, kv_bytes: float, bandwidth: float, prefill_seconds: float, host_tokens: int = 0) -> Preemption:
    """Which way to put a sequence aside: swap if its keys and values travel there and back sooner than they are computed again.

    Args:
        tokens: computed.
        kv_bytes: per token, over all layers.
        bandwidth: bytes per second between device and host.
        prefill_seconds: to compute that many tokens again, experts that have to be brought in for it included.
        host_tokens: tokens that the host has already, which travel one way only.

    Returns:
        "swap" if (2 * tokens - host_tokens) * kv_bytes / bandwidth <= prefill_seconds, else "recompute".

    Raises:
        ValueError: the host has more tokens than there are, or the bandwidth is not positive.
    """
    if not 0 <= host_tokens <= tokens:
        raise ValueError(f"{host_tokens} tokens on the host of a sequence of {tokens}: give 0 to {tokens}")
    _check_link((2 * tokens - host_tokens) * kv_bytes, bandwidth)
    return "swap" if (2 * tokens - host_tokens) * kv_bytes / bandwidth <= prefill_seconds else "recompute"


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a way to compute a prompt comes to. Attributes: `first`, seconds to its first token; `gap`, the longest between two tokens of others;
    `bytes` of experts brought in."""

    first: float
    gap: float
    bytes: float


def layered(stream_bytes: float, bandwidth: float, groups: int, t_dec: float, compute: float = 0.0, overlapped: bool = True) -> Bounds:
    """By groups of layers: every expert comes once, and a decoding step goes between any two groups.

    Args:
        stream_bytes: of all experts that the prompt asks for and the device lacks.
        bandwidth: bytes per second.
        groups: G.
        t_dec: seconds of a step that only decodes.
        compute: seconds to compute the prompt, all experts being there.
        overlapped: copies run beside computing; else one waits for the other.
    """
    _check_link(stream_bytes, bandwidth)
    wave = _both(stream_bytes / bandwidth, compute, overlapped)
    return Bounds(wave + groups * t_dec, wave / groups + t_dec, stream_bytes)


def chunked(stream_bytes: float, bandwidth: float, chunks: int, t_dec: float, compute: float = 0.0, overlapped: bool = True) -> Bounds:
    """By chunks: each brings the experts that it asks for, and a decoding step goes with it; 1 chunk is a whole prompt.

    Args:
        stream_bytes: of the experts that one chunk asks for and the device lacks.
        chunks: the prompt's tokens over those of a chunk, rounded up.
        bandwidth, t_dec, compute, overlapped: as for `layered`.
    """
    _check_link(stream_bytes, bandwidth)
    step = _both(stream_bytes / bandwidth, compute / chunks, overlapped) + t_dec
    return Bounds(chunks * step, step, chunks * stream_bytes)


def distinct_experts(tokens: int, experts: int, active: int, reuse: float = 0.0) -> float:
    """Experts of a layer that so many tokens ask for together, expected of uniform routing.

    Args:
        tokens: n.
        experts: E of the layer.
        active: k of a token.
        reuse: share of a token's experts that the token before asked for too.

    Returns:
        U_n with U_1 = k and U_(n+1) = U_n + (1 - reuse) * k * (1 - U_n / E), in closed form.
    """
    if tokens < 1:
        return 0.0
    keep = 1 - (1 - reuse) * active / experts
    return experts - (experts - active) * keep ** (tokens - 1)


def _both(link: float, compute: float, overlapped: bool) -> float:
    return max(link, compute) if overlapped else link + compute


def _check_link(bytes: float, bandwidth: float) -> None:
    if not bandwidth > 0 or bytes < 0:
        raise ValueError(f"{bytes} bytes over a link of {bandwidth} bytes per second: the first may not be negative, the second must be positive")
