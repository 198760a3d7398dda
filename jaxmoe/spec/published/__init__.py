"""The config.json files of released models, by a short name: what anything can be planned or counted from without any weights."""

from __future__ import annotations

import json
from pathlib import Path

from jaxmoe.spec.types import ModelSpec, SpecError

_FOLDER = Path(__file__).parent


def names() -> tuple[str, ...]:
    """All there are."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.json")))


def published(name: str) -> ModelSpec:
    """A released model's spec.

    Raises:
        SpecError: there is none of this name.
    """
    file = _FOLDER / f"{name}.json"
    if not file.is_file():
        raise SpecError(f"no published model {name!r}: there are {', '.join(names())}")
    return ModelSpec.from_hf(json.loads(file.read_text(encoding="utf-8")))
