"""Which implementation of an op runs: a static choice that travels with the jitted step, never a global or an environment variable."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

ROW_SLACK = 128
"""Rows that a grouped matmul which writes into a given array may read and write past its last group: the largest row tile."""

Backend = Literal["reference", "cpu", "gpu", "tpu"]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """A jit key. `backend` picks implementations; `row_invariant` keeps every row's bits independent of the rows around it.

    Row invariance costs some speed in prefill on the CPU (see the README's table); without it the CPU runs each dot in one piece.
    Off the CPU it has no effect: there, differences across batch sizes are reported instead of promised away.
    """

    backend: Backend = "cpu"
    row_invariant: bool = True

    def compiler_options(self) -> dict[str, bool]:
        """XLA options that a step with these kernels has to be compiled with, for its results to be those that the code writes down.

        Without them XLA leaves out roundings to bfloat16 where a float32 value is at hand, in one program and not in the next.
        """
        return {"xla_allow_excess_precision": False}

    @staticmethod
    def default(row_invariant: bool = True) -> Kernels:
        """The kernels of the process's default device."""
        platform = jax.default_backend()
        backend: Backend = {"cuda": "gpu", "rocm": "gpu", "gpu": "gpu", "tpu": "tpu"}.get(platform, "cpu")  # type: ignore[assignment]
        return Kernels(backend, row_invariant)
