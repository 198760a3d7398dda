"""Cases that `make test` leaves to `make test-all`."""

from collections.abc import Collection, Iterable

import pytest


def more(*values, **options):
    """`pytest.param`, for `--exhaustive` only."""
    return pytest.param(*values, marks=pytest.mark.exhaustive, **options)


def mostly(cases: Iterable, few: Collection) -> list:
    """The cases as parameters; those that are not among the few, for `--exhaustive` only."""
    return [case if case in few else more(*(case if isinstance(case, tuple) else (case,))) for case in cases]
