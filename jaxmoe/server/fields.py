"""Read the JSON of a request and its fields, strictly: a wrong type or range is a 400 that names the field and the value.

null stands for a field that is absent, as in OpenAI's protocol. Nothing here knows what the fields mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from jaxmoe.server.errors import ApiError, shown, wrong

LARGEST_INT = 2**31 - 1


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a request's body.

    Args:
        body: UTF-8.

    Returns:
        The object, without the fields that are null.

    Raises:
        ApiError: 400, where it is no JSON, no object, has a field twice, or numbers that JSON doesn't have (NaN, Infinity).
    """
    try:
        found = json.loads(body.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except ApiError:
        raise
    except RecursionError:
        raise ApiError(400, "the body's JSON is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is no valid JSON: {error}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body must be a JSON object, got {shown(found)}", code="invalid_json")
    return {name: value for name, value in found.items() if value is not None}


def check_known(body: Mapping[str, Any], known: Collection[str], unsupported: Collection[str], where: str = "") -> None:
    """Raises a 400 that names the first field that isn't known, or is known and not supported."""
    for name in body:
        if name in unsupported:
            raise ApiError(400, f"{where}{name} isn't supported by this server", param=name, code="unsupported_parameter")
        if name not in known:
            raise ApiError(400, f"unknown field {where}{shown(name)}", param=name if name.isprintable() else None, code="unknown_parameter")


def integer(body: Mapping[str, Any], name: str, default: int | None = None, low: int = 0, high: int = LARGEST_INT) -> int | None:
    """A whole number in [low, high]; `default` where there is none. 3.0 is none."""
    value = body.get(name)
    if value is None:
        return default
    if not is_int(value) or not low <= value <= high:
        raise wrong(name, f"a whole number from {low} to {high}", value)
    return value


def number(
    body: Mapping[str, Any], name: str, default: float, low: float, high: float = math.inf, open_low: bool = False, where: str = ""
) -> float:
    """A finite number in [low, high], or (low, high] if `open_low`; `where` comes before the name in what is said."""
    value = body.get(name, default)
    right = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high and not (open_low and value == low)
    if not right or not _is_finite(value):
        bounds = f"{'more than' if open_low else 'from'} {low:g}" + (f" {'and at most' if open_low else 'to'} {high:g}" if high < math.inf else " up")
        raise wrong(where + name, f"a number {bounds}", value)
    return float(value)


def boolean(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """true or false."""
    value = body.get(name, default)
    if not isinstance(value, bool):
        raise wrong(name, "true or false", value)
    return value


def string(body: Mapping[str, Any], name: str, default: str | None = None) -> str | None:
    """A string."""
    value = body.get(name, default)
    if value is not None and not isinstance(value, str):
        raise wrong(name, "a string", value)
    return value


def table(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object; {} where there is none."""
    value = body.get(name, {})
    if not isinstance(value, dict):
        raise wrong(name, "an object", value)
    return value


def is_int(value: Any) -> bool:
    """Whether it is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ApiError(400, f"field {shown(name)} is given twice", param=name if name.isprintable() else None, code="invalid_json")
        found[name] = value
    return found


def _no_number(word: str) -> None:
    raise ApiError(400, f"the body is no valid JSON: {word} is no number", code="invalid_json")
