"""The golden files and the families they are of."""

from jaxmoe.spec import FAMILIES, ModelSpec
from scripts import golden_cases, make_goldens
from tests.families import test_goldens_1, test_goldens_2
from tests.families.goldens import GOLDENS, HALVED


def test_every_family_has_goldens():
    assert sorted(golden_cases.FAMILIES) == sorted(FAMILIES) == sorted((*test_goldens_1.FAMILIES, *test_goldens_2.FAMILIES))
    assert set(HALVED) <= set(FAMILIES)
    names = sorted([*golden_cases.CASES, make_goldens.SHIPPED_CASE])
    assert sorted(p.stem for p in GOLDENS.glob("*.json")) == sorted(p.stem for p in GOLDENS.glob("*.npz")) == names
    for family, cases in golden_cases.FAMILIES.items():
        assert {ModelSpec.from_hf(case.config).family for case in cases.values()} == {family}
