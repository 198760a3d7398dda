"""The golden files and the families they are of."""

import dataclasses

from jaxmoe.spec import FAMILIES, ModelSpec
from scripts import golden_cases, make_goldens
from tests.families import test_goldens_1, test_goldens_2
from tests.families.goldens import GOLDENS, HALVED, WRAPPED


def test_every_family_has_goldens():
    assert sorted(golden_cases.FAMILIES) == sorted(FAMILIES) == sorted((*test_goldens_1.FAMILIES, *test_goldens_2.FAMILIES))
    assert set(HALVED) <= set(FAMILIES)
    for family, inner in WRAPPED.items():
        config = next(iter(golden_cases.FAMILIES[family].values())).config
        nested = FAMILIES[family].nested
        assert nested is not None
        own = {**config[nested], "model_type": inner}
        outer = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
        inner_spec = ModelSpec.from_hf({**own, **outer})
        assert dataclasses.replace(ModelSpec.from_hf(config), family=inner) == inner_spec, "the same graph"
    names = sorted([*golden_cases.CASES, make_goldens.SHIPPED_CASE])
    assert sorted(p.stem for p in GOLDENS.glob("*.json")) == sorted(p.stem for p in GOLDENS.glob("*.npz")) == names
    for family, cases in golden_cases.FAMILIES.items():
        assert {ModelSpec.from_hf(case.config).family for case in cases.values()} == {family}
