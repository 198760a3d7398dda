"""What layered and chunked prefill come to: seconds to the first token, the gap between others' tokens, bytes of experts.

Numbers in, numbers out; `bench_serve.py` holds what it measures against them.
"""

from __future__ import annotations

import dataclasses
import math


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


def _both(link: float, compute: float, overlapped: bool) -> float:
    return max(link, compute) if overlapped else link + compute


def _check_link(bytes: float, bandwidth: float) -> None:
    if not bandwidth > 0 or bytes < 0:
        raise ValueError(f"{bytes} bytes over a link of {bandwidth} bytes per second: the first may not be negative, the second must be positive")
