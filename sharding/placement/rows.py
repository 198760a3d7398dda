"""JSON files that hold a row of whole numbers for every layer: written with a line a layer, and checked when they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32


def with_rows(head: Mapping[str, Any], name: str, rows: np.ndarray) -> str:
    """JSON with one line a layer, which people can read and version control can compare."""
    lines = ",\n".join("  " + json.dumps(row.tolist(), separators=(",", ":")) for row in rows)
    fields = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    return "{\n" + ",\n".join([*fields, f' "{name}": [\n{lines}\n ]']) + "\n}\n"


def read_object(text: str, fmt: str, version: int, what: str) -> dict[str, Any]:
    """The JSON object of a format and version.

    Raises:
        ValueError: it isn't one.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not a {what}: {error}") from None
    if not isinstance(found, dict) or found.get("format") != fmt:
        raise ValueError(f"not a {what}: its format is {found.get('format') if isinstance(found, dict) else None!r}, not {fmt!r}")
    if found.get("version") != version:
        raise ValueError(f"a {what} of version {found.get('version')!r}; this program reads version {version}")
    return found


def whole(found: Mapping[str, Any], name: str, what: str) -> int:
    """A field that is a whole number, at least 1."""
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"a {what}'s {name} is {value!r}, not a whole number of at least 1")
    return value


def read_hash(found: Mapping[str, Any], what: str) -> str | None:
    """The model's hash."""
    value = found.get("spec_hash")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"a {what}'s spec_hash is {value!r}, neither a text nor null")
    return value


def read_rows(found: Mapping[str, Any], name: str, layers: int, width: int, what: str) -> Int32[np.ndarray, "L W"]:
    """A field of a row of whole numbers a layer."""
    rows = found.get(name)
    if not isinstance(rows, list) or len(rows) != layers:
        raise ValueError(f"a {what}'s {name} has {len(rows) if isinstance(rows, list) else 'no'} rows, not one for each of {layers} layers")
    for layer, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != width:
            raise ValueError(f"{name}: layer {layer} has {len(row) if isinstance(row, list) else 'no'} entries, not {width}")
        if any(isinstance(x, bool) or not isinstance(x, int) or abs(x) >= 2**31 for x in row):
            raise ValueError(f"{name}: layer {layer} holds an entry that is not a whole number")
    return np.asarray(rows, np.int32)
