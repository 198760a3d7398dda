"""Tile sizes that were measured: one JSON file a device in each op's folder `tuned`, written by `scripts/tune_kernels.py`.

    {"device": "NVIDIA H100 80GB HBM3", "versions": {...}, "measured": [{"problem": {...}, "config": {...}, "seconds": ..., "tried": ...}, ...]}

A problem is looked up by all of its fields but those that may differ, such as the number of rows: of these the nearest is taken, and they may be
four times as many or as few, all together.
Without an entry an op's own heuristic chooses.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parent
FACTOR = 4.0


def find(op: str, problem: Mapping[str, Any], near: Sequence[str], device: str | None = None) -> dict[str, Any] | None:
    """The config that was fastest at the nearest problem that was measured.

    Args:
        op: the op's folder.
        problem: its sizes.
        near: which of them may differ.
        device: the device's kind; the default device's if None.

    Returns:
        The config's fields, or None if nothing near was measured on such a device.
    """
    measured = read(op).get(jax.devices()[0].device_kind if device is None else device, [])
    found = [(distance, entry["config"]) for entry in measured if (distance := _distance(problem, entry["problem"], near)) <= math.log(FACTOR)]
    return dict(min(found, key=lambda pair: pair[0])[1]) if found else None


def _distance(a: Mapping[str, Any], b: Mapping[str, Any], near: Sequence[str]) -> float:
    """How far two problems are apart in the logarithms of what may differ; infinitely, if anything else does."""
    same = a.keys() == b.keys() and all(a[key] == b[key] for key in a if key not in near)
    return sum(abs(math.log(a[key] / b[key])) for key in near) if same else math.inf


@functools.cache
def read(op: str) -> dict[str, Sequence[Mapping[str, Any]]]:
    """What was measured, by the kind of device.

    Raises:
        ValueError: a file is damaged; it is named.
    """
    found = {}
    for path in sorted((ROOT / op / "tuned").glob("*.json")):
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            found[held["device"]] = held["measured"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    return found
