"""Advice on expert streaming as a table and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich import box
from rich.table import Table

from jaxmoe.offload.advise import Advice

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


def as_json(found: Advice) -> dict[str, Any]:
    """All ways, and the one advised."""
    def row(way) -> dict[str, Any]:
        return dataclasses.asdict(way) | {"error": way.error}

    return {
        "best": row(found.best), "ways": [row(way) for way in found.ways], "slots": found.slots, "x": found.x,
        "machine": dataclasses.asdict(found.machine),
    }  # fmt: skip
