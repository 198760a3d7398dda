"""Which implementation of an op runs: a static choice that travels with the jitted step, never a global or an environment variable."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

Backend = Literal["reference", "cpu", "gpu", "tpu"]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """A jit key. `backend` picks implementations; `row_invariant` keeps every row's bits independent of the rows around it.

    Row invariance costs some speed in prefill on the CPU (see the README's table); without it the CPU runs each dot in one piece.
    Off the CPU it has no effect: there, differences across batch sizes are reported instead of promised away.
    """

    backend: Backend = "cpu"
    row_invariant: bool = True

    @staticmethod
    def default(row_invariant: bool = True) -> Kernels:
        """The kernels of the process's default device."""
        platform = jax.default_backend()
        backend: Backend = {"cuda": "gpu", "rocm": "gpu", "gpu": "gpu", "tpu": "tpu"}.get(platform, "cpu")  # type: ignore[assignment]
        return Kernels(backend, row_invariant)
