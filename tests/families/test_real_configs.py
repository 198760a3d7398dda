"""Released config.json files, read and counted without any weights: parameters as published."""

import importlib
import json
from pathlib import Path

import pytest

from jaxmoe.spec import ModelSpec, abstract_experts, abstract_params
from jaxmoe.spec.params import parameter_counts
from jaxmoe.spec.published import names, published

HERE = Path(__file__).parent
FILES = [importlib.import_module(f"tests.families.{file.stem}") for file in sorted(HERE.glob("real_*.py"))]
REAL = {name: counts for file in FILES for name, counts in file.REAL.items()}
"""By name in `jaxmoe.spec.published`: published parameters, all and those that a token uses (None where the publisher names none)."""


def spec_of(name: str) -> ModelSpec:
    return published(name)


def test_every_file_is_counted():
    assert list(names()) == sorted(REAL)


@pytest.mark.parametrize("name", REAL)
def test_parameters_are_as_published(name):
    total, active = REAL[name]
    spec = spec_of(name)
    found, used = parameter_counts(spec)
    assert found == pytest.approx(total, rel=0.01)
    if active is not None:
        assert used == pytest.approx(active, rel=0.01)
    leaves = abstract_params(spec.with_precision("bfloat16")), abstract_experts(spec)
    assert len(leaves[1]) == len(spec.moe_layers) + len(spec.extra_heads)


@pytest.mark.parametrize("name", REAL)
def test_a_real_spec_survives_json(name):
    spec = spec_of(name)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert sum(len(segment.pattern) for segment in spec.segments) <= 12, "scanned, not unrolled"
