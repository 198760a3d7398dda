"""Set up jax before any test imports it: eight virtual CPU devices, and no accelerator unless one was asked for.

`device` tests run where JAX_PLATFORMS names an accelerator that is there (`JAX_PLATFORMS=cuda,cpu make test`).
"""

import os
import sys

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
