"""How long collectives take on a machine's links: alpha-beta closed forms, one per kind.

`alpha` is the latency of the hops that a message makes one after another, `beta` the bytes that the busiest link carries over its rate. Over several
kinds of links a collective goes level by level, nearest first, without overlap of the levels: an upper bound for what a good implementation takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from sharding.hardware import Level

Kind = Literal["psum", "all_gather", "reduce_scatter", "all_to_all", "ppermute"]


def collective_seconds(kind: Kind, nbytes: float, levels: Sequence[Level]) -> float:
    """The time of one collective.

    Over n devices that each send at rate W, by level, with V the bytes that are left when the levels before have divided them:

    - all_gather, reduce_scatter: `(n - 1) / n * V / W` (Patarasuk and Yuan 2009, bandwidth-optimal rings; on a line, whose last device takes in all
      others' parts over its one link, the same with W of one direction, on a closed ring with W of both).
    - psum: both of them, `2 (n - 1) / n * V / W`.
    - all_to_all: over a switch `(n - 1) / n * V / W`; on a line or a ring half of all data crosses the middle, `n V / (4 W)`. V is not divided from
      level to level: each level forwards everything.
    - ppermute: `V / W` of the slowest level, in one direction.

    Args:
        kind: of collective.
        nbytes: of the whole array: a psum's operand on each device, an all_gather's result, a reduce_scatter's operand; of each device's buffer in an
            all_to_all and a ppermute.
        levels: of `Machine.levels`; none is no time.

    Returns:
        Seconds.

    Raises:
        ValueError: a kind that isn't known.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"collective = {kind!r}: choose from {', '.join(get_args(Kind))}")
    if not levels:
        return 0.0
    if kind == "ppermute":
        slowest = min(levels, key=_one_way)
        return slowest.hop_s + nbytes / _one_way(slowest)
    if kind == "all_to_all":
        return sum(level.hops * level.hop_s + _crossing(level) * nbytes / level.bytes_per_s for level in levels)
    one, left = 0.0, nbytes
    for level in levels:
        one += level.hops * level.hop_s + (level.size - 1) / level.size * left / level.bytes_per_s
        left /= level.size
    return 2 * one if kind == "psum" else one


def _one_way(level: Level) -> float:
    return level.bytes_per_s / (2 if level.kind == "ring" else 1)


def _crossing(level: Level) -> float:
    return (level.size - 1) / level.size if level.kind == "switch" else level.size / 4
