"""Configs with an unknown or contradictory field, or a value that isn't supported: refused by an error that names it, for every family."""

import copy
import importlib
from pathlib import Path

import pytest

from jaxmoe.spec import FAMILIES, ModelSpec, SpecError
from scripts import golden_cases

HERE = Path(__file__).parent
FILES = [importlib.import_module(f"tests.families.{file.stem}") for file in sorted(HERE.glob("bad_*.py"))]
BAD = {family: cases for file in FILES for family, cases in file.BAD.items()}
"""By family: `(change of the first case's config, what the error says)`; a change to `...` takes the field out."""

ALL = [(family, change, message) for family, cases in BAD.items() for change, message in cases]


def config_of(family: str) -> dict:
    return copy.deepcopy(next(iter(golden_cases.FAMILIES[family].values())).config)


def changed(config: dict, change: dict) -> dict:
    """The config with fields replaced, taken out (`...`), or, in a nested object, changed likewise."""
    for key, value in change.items():
        if value is ...:
            del config[key]
        elif isinstance(value, dict) and isinstance(config.get(key), dict):
            changed(config[key], value)
        else:
            config[key] = value
    return config


def test_every_family_is_here():
    assert sorted(BAD) == sorted(FAMILIES)
    assert all(family.models for family in FAMILIES.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_field(family):
    config = config_of(family)
    nested = FAMILIES[family].nested
    (config[nested] if nested in config else config)["novel_gating"] = True
    with pytest.raises(SpecError, match="'novel_gating' = True .* not known"):
        ModelSpec.from_hf(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_required_field(family):
    nested = FAMILIES[family].nested
    for field in FAMILIES[family].required:
        config = config_of(family)
        (config[nested] if nested in config else config)[field] = None
        with pytest.raises(SpecError, match=rf"needs the field '{field}'"):
            ModelSpec.from_hf(config)


@pytest.mark.parametrize(("family", "change", "message"), ALL, ids=[f"{family}-{str(change)[:50]}" for family, change, _ in ALL])
def test_refused(family, change, message):
    with pytest.raises(SpecError, match=message) as caught:
        ModelSpec.from_hf(changed(config_of(family), change))
    assert "\n" not in str(caught.value)
