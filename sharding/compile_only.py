"""Real TPU and CUDA compilers on a machine that has neither device: what a program lowers to there, and the bytes it needs.

Compiling proves lowering, layouts and memory; it proves no speed. Needs the `compile` extra (libtpu and jax's CUDA plugin). `JAX_PLATFORMS=cpu`
must stand in the environment before jax is imported, or both plugins look for devices and complain. It may not know what it compiles: steps come
in as callables.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA wants to know of a GPU it cannot see; from NVIDIA's data sheet and deviceQuery of an H100 SXM."""

_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Keeps libtpu from asking a metadata server about a machine that is not there, and from locking out other processes that only compile."""


class MissingCompiler(ImportError):
    """The plugin of a target is not installed; the message says which extra brings it."""


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def devices(target: str) -> tuple[Any, ...]:
    """Compile-only devices of `target`.

    Args:
        target: 'h100', or a TPU topology such as 'v5e:2x2', 'v5p:2x2x1', 'v6e:4x4' or 'tpu7x:2x2x1'.

    Raises:
        MissingCompiler: the compiler for it is not installed.
        ValueError: XLA knows no such topology.
    """
    plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12") if target == "h100" else ("libtpu",)
    if not any(_installed(name) for name in plugins):
        raise MissingCompiler(f"no compiler for {target!r} here ({' or '.join(plugins)} is not installed): pip install 'jaxmoe[compile]'")
    try:
        if target == "h100":
            topology = topologies.get_topology_desc("", platform="cuda", target_config=H100, topology="1x1x1")
        else:
            for name, value in _TPU_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            topology = topologies.get_topology_desc(target, platform="tpu")
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{target!r} is not a target that XLA knows: {error}") from error
    return tuple(topology.devices)


def compile_for(target: str, f: Callable, *args: Any, donate: tuple[int, ...] = (), options: dict[str, Any] | None = None) -> Any:
    """Compiles `f(*args)` for one device of `target`.

    Args:
        target: see `devices`.
        f: the function.
        args: arrays or `jax.ShapeDtypeStruct`s, in pytrees.
        donate: arguments whose buffers the program may reuse.
        options: XLA's options for this program.

    Returns:
        The compiled program: `as_text()`, `memory_analysis()`, `cost_analysis()`.
    """
    on = jax.sharding.SingleDeviceSharding(devices(target)[0])

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on)

    return jax.jit(f, donate_argnums=donate).lower(*jax.tree.map(place, args)).compile(compiler_options=options)
