"""Compile settings for tests that hold values within a tolerance: XLA and LLVM optimize little.

A program that runs once takes longer to compile than to run. Not for tests of bits: they hold what the product's own settings give.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.dispatch import Kernels

OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class QuickKernels(Kernels):
    """Kernels whose steps are compiled so. Equal to no `Kernels`, hence another key of whatever caches steps by them."""

    def compiler_options(self) -> dict[str, bool]:
        """See `Kernels.compiler_options`."""
        return super().compiler_options() | OPTIONS
