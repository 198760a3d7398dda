"""Runs the tests of `goldens.py` case by case."""

import pytest

from tests.families import goldens
from tests.more import mostly


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test for the cases of its file's `FAMILIES`."""
    families = getattr(metafunc.module, "FAMILIES", None)
    for argument in goldens.ARGUMENTS:
        if argument in metafunc.fixturenames and families is not None and metafunc.function.__module__ == goldens.__name__:
            names = goldens.names_of(families, argument)
            always = goldens.names_of(goldens.ALWAYS[argument], argument) if argument in goldens.ALWAYS else names
            metafunc.parametrize(argument, mostly(names, always))


def _case(item: pytest.Item) -> str | None:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return next((params[argument] for argument in goldens.ARGUMENTS if argument in params), None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of a case one after another, within their file."""
    order: dict = {}
    for item in items:
        order.setdefault((item.path, _case(item)), len(order))
    files: dict = {}
    for item in items:
        files.setdefault(item.path, len(files))
    items.sort(key=lambda item: (files[item.path], order[item.path, _case(item)]))


_last: list[goldens.Run] = []


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, exhaustive: bool) -> goldens.Run:
    """The case of a test, kept until the next case's first test."""
    name = _case(request.node)
    assert name is not None, "a test with a run has a case"
    if not _last or _last[0].name != name:
        _last.clear()
        goldens.forget_programs()
        _last.append(goldens.make_run(name, tmp_path_factory.mktemp(name), not exhaustive and name not in goldens.BITS))
    return _last[0]
