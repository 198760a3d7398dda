"""Families against transformers: logits that it gave in float32 for tiny random models (`scripts/make_goldens.py` made the files)."""

from scripts import golden_cases
from tests.families.goldens import *  # noqa: F403  # the tests, for the families below

FAMILIES = tuple(golden_cases.FAMILIES)[1::2]
