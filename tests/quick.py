"""Compile settings for tests that hold values within a tolerance: XLA and LLVM optimize little.

A program that runs once takes longer to compile than to run. Not for tests of bits: they hold what the product's own settings give.
"""

from __future__ import annotations

import dataclasses
import os

import jax

from pallas_kernels.dispatch import Kernels

_LITTLE: dict[str, bool | int] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}
_PLAIN_FUSIONS: dict[str, bool | int] = {"xla_cpu_use_fusion_emitters": False}
"""Fusions by the emitters of single operations: where they are many, most of the time goes to the other ones' compiler. jax 0.11.2 has no others."""


def _known(options: dict[str, bool | int]) -> dict[str, bool | int]:
    """The options, if this jax has them; else none."""
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


OPTIONS = _LITTLE | _known(_PLAIN_FUSIONS)


def environment(flags: str | None = None) -> dict[str, str]:
    """An environment in which another process compiles so whatever it compiles; with other flags in the place of this process's."""
    little = [f"--{name}={str(value).lower()}" for name, value in OPTIONS.items()]
    return {**os.environ, "XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", "") if flags is None else flags, *little]).strip()}


@dataclasses.dataclass(frozen=True)
class QuickKernels(Kernels):
    """Kernels whose steps are compiled so. Equal to no `Kernels`, hence another key of whatever caches steps by them."""

    @property
    def in_place(self) -> bool:
        """No: what LLVM leaves of loops has other bits than dots, which it has no part in."""
        return False

    def compiler_options(self) -> dict[str, bool | int]:
        """See `Kernels.compiler_options`."""
        return super().compiler_options() | OPTIONS
