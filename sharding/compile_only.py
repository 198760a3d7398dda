"""Real TPU and CUDA compilers on a machine that has neither device: what a program lowers to there, and the bytes it needs.

Compiling proves lowering, layouts and memory; it proves no speed. Needs the `compile` extra (libtpu and jax's CUDA plugin). `JAX_PLATFORMS=cpu`
must stand in the environment before jax is imported, or both plugins look for devices and complain. It may not know what it compiles: steps come
in as callables.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Collection
from typing import Any

import jax
from jax._src.lib import xla_client
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
        target: 'h100', 'h100:8' for several of one machine, or a TPU topology such as 'v5e:2x2', 'v5p:2x2x1', 'v6e:4x4' or 'tpu7x:2x2x1'.

    Raises:
        MissingCompiler: the compiler for it is not installed.
        ValueError: XLA knows no such topology.
    """
    plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12") if target.startswith("h100") else ("libtpu",)
    if not any(_installed(name) for name in plugins):
        raise MissingCompiler(f"no compiler for {target!r} here ({' or '.join(plugins)} is not installed): pip install 'jaxmoe[compile]'")
    try:
        if target.startswith("h100"):
            count = target.partition(":")[2] or "1"
            topology = topologies.get_topology_desc("", platform="cuda", target_config=H100, topology=f"1x1x{int(count)}")
        else:
            for name, value in _TPU_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            topology = topologies.get_topology_desc(target, platform="tpu")
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{target!r} is not a target that XLA knows: {error}") from error
    return tuple(topology.devices)


def on_device(target: str) -> jax.sharding.SingleDeviceSharding:
    """One device of `target`; see `devices`."""
    return jax.sharding.SingleDeviceSharding(devices(target)[0])


def compile_for(target: str, f: Callable, *args: Any, donate: tuple[int, ...] = (), options: dict[str, Any] | None = None) -> Any:
    """Compiles `f(*args)` for one device of `target`.

    Args:
        target: see `devices`.
        f: the function.
        args: arrays or `jax.ShapeDtypeStruct`s, in pytrees; of a struct, a format (layout in memory, and `on_device(target)`) is kept.
        donate: arguments whose buffers the program may reuse.
        options: XLA's options for this program.

    Returns:
        The compiled program: `as_text()`, `memory_analysis()`, `cost_analysis()`.
    """
    on = on_device(target)

    def place(x):
        given = getattr(x, "format", None) if isinstance(x, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=given if given is not None and given.layout is not None else on)

    return jax.jit(f, donate_argnums=donate).lower(*jax.tree.map(place, args)).compile(compiler_options=options)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program and the bytes it needs."""

    text: str
    """The optimized HLO; arrays in host memory have `S(5)` in their layouts."""
    argument_size: int
    """Bytes of arguments on the device."""
    host_argument_size: int
    """Bytes of arguments in host memory."""
    temp_size: int
    """Bytes on the device that only live during the program."""
    host_temp_size: int
    """The same in host memory."""
    alias_size: int
    """Bytes of donated arguments that results are written over."""


def compile_with_host(
    target: str, f: Callable, *args: Any, host: Collection[int], donate: tuple[int, ...] = (), options: dict[str, Any] | None = None
) -> Compiled:
    """Compiles `f(*args)` for one device of `target`, with some arguments in the host's pinned memory.

    Compile-only GPU devices know no memory kinds: jax drops `pinned_host` on them without a word, and a host operand would compile as a device
    one. For 'h100' the program is therefore lowered with shardings of the CPU, which keep the kind, and the module handed to XLA's CUDA compiler.

    Args:
        target, f, args, donate, options: see `compile_for`.
        host: which arguments live in `pinned_host`, with all of their leaves.

    Raises:
        MissingCompiler, ValueError: see `devices`.
    """
    device = devices(target)[0]
    shown = jax.devices("cpu")[0] if target == "h100" else device
    on_device = jax.sharding.SingleDeviceSharding(shown)
    on_host = jax.sharding.SingleDeviceSharding(shown, memory_kind="pinned_host")

    def place(i, arg):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_host if i in host else on_device), arg)

    traced = jax.jit(f, donate_argnums=donate).trace(*(place(i, arg) for i, arg in enumerate(args)))
    if target == "h100":
        settings = xla_client.CompileOptions()
        settings.env_option_overrides = list((options or {}).items())
        module = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
        program = device.client.compile(module, xla_client.DeviceList((device,)), settings)
        text, stats = program.hlo_modules()[0].to_string(), program.get_compiled_memory_stats()
    else:
        program = traced.lower().compile(compiler_options=options)
        text, stats = program.as_text(), program.memory_analysis()
    return Compiled(
        text=text,
        argument_size=stats.argument_size_in_bytes,
        host_argument_size=stats.host_argument_size_in_bytes,
        temp_size=stats.temp_size_in_bytes,
        host_temp_size=stats.host_temp_size_in_bytes,
        alias_size=stats.alias_size_in_bytes,
    )
