"""Set up jax before any test imports it: eight virtual CPU devices, and no accelerator unless one was asked for.

`device` tests run where JAX_PLATFORMS names an accelerator that is there (`JAX_PLATFORMS=cuda,cpu make test`), `exhaustive` ones with `--exhaustive`.
"""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_DEVICE_COUNT = "--xla_force_host_platform_device_count"


def _prepare_environment() -> None:
    if "jax" in sys.modules:
        raise pytest.UsageError("jax was imported before tests/conftest.py could choose its devices")
    flags = os.environ.get("XLA_FLAGS", "")
    if _DEVICE_COUNT not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_DEVICE_COUNT}=8".strip()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


_prepare_environment()


LONGEST = (
    "families/test_goldens_2.py",
    "families/test_goldens_1.py",
    "pallas_kernels/test_row_invariance.py",
    "engine/test_slots_cover.py",
    "engine/test_invariance.py",
    "experts/test_kernel_layouts.py",
    "train/test_loop.py",
    "engine/test_slots_exact.py",
    "train/test_bank.py",
    "nn/test_shipped_model.py",
    "report/test_kernel_bench.py",
    "engine/test_processes.py",
    "engine/test_mesh.py",
)
"""Files that begin first, some of a few long tests: a worker that began one of them last would leave the other with nothing to do (`make test` has
xdist keep this order)."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="run the tests marked `exhaustive` too, and more cases in those that count theirs")


@pytest.fixture(scope="session")
def exhaustive(request: pytest.FixtureRequest) -> bool:
    """Whether a test that chooses how many cases it goes through is to take all of them."""
    return request.config.getoption("exhaustive")


def deselect(config: pytest.Config, items: list[pytest.Item], marker: str) -> None:
    """Takes the tests with this marker out of the list."""
    marked = [item for item in items if item.get_closest_marker(marker)]
    if marked:
        config.hook.pytest_deselected(items=marked)
        items[:] = [item for item in items if not item.get_closest_marker(marker)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first; without `exhaustive` tests unless they are asked for, and without `device` tests where jax's backend is the CPU."""
    if not config.getoption("exhaustive"):
        deselect(config, items, "exhaustive")
    begin = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: begin.get(item.path, len(begin)))
    if not any(item.get_closest_marker("device") for item in items):
        return
    import jax

    if jax.default_backend() == "cpu":
        deselect(config, items, "device")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Garbage collection looks at what tests make, not at modules again and again, and at that less often: tracing makes much that lives on."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)


@pytest.fixture(scope="session", autouse=True)
def _interpreted_kernels_compile_once() -> Iterator[None]:
    """For the runs that have any (`tests/interpreted.py`): their modules imported Pallas when they were collected."""
    if "jax.experimental.pallas" not in sys.modules:
        yield
        return
    from tests import interpreted

    with pytest.MonkeyPatch.context() as patch:
        interpreted.install(patch)
        yield
