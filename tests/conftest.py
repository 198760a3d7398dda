"""Set up jax before any test imports it: eight virtual CPU devices, and no accelerator unless one was asked for.

`device` tests run where JAX_PLATFORMS names an accelerator that is there (`JAX_PLATFORMS=cuda,cpu make test`).
"""

import os
import sys
from collections.abc import Iterator

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect `device` tests where jax's default backend is the CPU."""
    device_items = [item for item in items if item.get_closest_marker("device")]
    if not device_items:
        return
    import jax

    if jax.default_backend() != "cpu":
        return
    config.hook.pytest_deselected(items=device_items)
    items[:] = [item for item in items if not item.get_closest_marker("device")]


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
