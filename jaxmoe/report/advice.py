"""Advice on expert streaming as a table and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from jaxmoe.offload.advise import Advice
from jaxmoe.offload.budget import format_bytes

ROWS = 12
"""Ways that are shown."""


def table(found: Advice) -> Table:
    """The fastest ways, the one advised marked."""
    out = Table("", "policy", "prefetch by", "ahead", "a layer", "hit %", "tok/s", "held out", "gain", box=box.SIMPLE)
    for way in found.ways[:ROWS] if found.best in found.ways[:ROWS] else (*found.ways[: ROWS - 1], found.best):
        numbers = (f"{100 * way.hit_rate:.1f}", f"{way.tokens_per_second:.1f}", f"{way.held_out:.1f}", f"{way.gain:.2f}")
        ahead = ("-", "", "") if way.predictor is None else (way.predictor, str(way.depth), str(way.width))
        out.add_row("*" if way is found.best else "", way.policy, *ahead, *numbers)
    return out


def sizes_table(found: Sequence[Advice], chosen: Advice) -> Table:
    """The best way by slots, the number advised marked."""
    out = Table("", "slots a layer", "of the device", "policy", "prefetch by", "hit %", "tok/s", "held out", box=box.SIMPLE)
    for one in found:
        way = one.best
        numbers = (f"{100 * way.hit_rate:.1f}", f"{way.tokens_per_second:.1f}", f"{way.held_out:.1f}")
        out.add_row("*" if one is chosen else "", str(one.slots), format_bytes(one.bytes), way.policy, way.predictor or "-", *numbers)
    return out


def as_json(found: Advice, sizes: Sequence[Advice] = (), files: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All ways, and the one advised; and what other numbers of slots would bring."""
    def row(way) -> dict[str, Any]:
        return dataclasses.asdict(way) | {"error": way.error}

    return {
        "best": row(found.best), "ways": [row(way) for way in found.ways], "slots": found.slots, "bytes": found.bytes, "x": found.x,
        "by_bits": {str(bits): speed for bits, speed in found.by_bits.items()}, "options": found.options(files),
        "sizes": [{"slots": one.slots, "bytes": one.bytes} | row(one.best) for one in sizes], "machine": dataclasses.asdict(found.machine),
    }  # fmt: skip
