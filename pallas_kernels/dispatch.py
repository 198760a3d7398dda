"""Which implementation of an op runs: a static choice that travels with the jitted step, never a global or an environment variable."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import jax

from jaxmoe.formats import ExpertLayout

ROW_SLACK = 128
"""Rows that a grouped matmul which writes into a given array may read and write past its last group: the largest row tile."""

Backend = Literal["reference", "cpu", "gpu", "tpu"]


_CPU_OPTIONS: dict[str, bool | int | str] = {"xla_cpu_prefer_vector_width": 512, "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


@dataclasses.dataclass(frozen=True)
class Kernels:
    """A jit key. `backend` picks implementations; `row_invariant` keeps every row's bits independent of the rows around it.

    `pallas`: kernels written in Pallas run where they take the shapes (`interpret`: on the CPU, step by step, for tests), and plain XLA elsewhere.

    Row invariance costs some speed in prefill on the CPU (see the README's table); without it the CPU runs each dot in one piece.
    Off the CPU it has no effect: there, differences across batch sizes are reported instead of promised away.
    """

    backend: Backend = "cpu"
    row_invariant: bool = True
    pallas: bool = True
    interpret: bool = False

    @property
    def expert_layout(self) -> ExpertLayout:
        """In which order the axes of experts have to lie for the fastest implementation."""
        layouts: dict[Backend, ExpertLayout] = {"gpu": "2fd", "tpu": "2df"}
        return layouts.get(self.backend, "d2f") if self.pallas else "d2f"

    @property
    def in_place(self) -> bool:
        """Whether loops of our own may stand for the CPU's dots of few rows: with the compiler options here they have the same bits."""
        return True

    def compiler_options(self) -> dict[str, bool | int | str]:
        """XLA options that a step with these kernels has to be compiled with, for its results to be those that the code writes down.

        Without the first XLA leaves out roundings to bfloat16 where a float32 value is at hand, in one program and not in the next. The CPU's others
        are for speed: XLA otherwise uses half of a register of 512 bits, and orders a program for many threads that wake one another, for which
        a decoding step's operations are too small.
        """
        exact: dict[str, bool | int | str] = {"xla_allow_excess_precision": False}
        return exact | _CPU_OPTIONS if self.backend == "cpu" else exact

    @staticmethod
    def default(row_invariant: bool = True, pallas: bool = True) -> Kernels:
        """The kernels of the process's default device."""
        platform = jax.default_backend()
        backend: Backend = {"cuda": "gpu", "rocm": "gpu", "gpu": "gpu", "tpu": "tpu"}.get(platform, "cpu")  # type: ignore[assignment]
        return Kernels(backend, row_invariant, pallas)


T = TypeVar("T")
_log = logging.getLogger("pallas_kernels")


def first_that_takes(op: str, implementations: Sequence[tuple[str, Callable[[], T]]]) -> T:
    """The result of the first implementation that takes the arguments.

    What was refused, and why, and what runs instead, is logged once, as a warning.

    Raises:
        NotImplementedError: none does; the message has every reason.
    """
    refused = []
    for name, run in implementations:
        try:
            with jax.named_scope(f"{op}_{name}"):
                result = run()
        except NotImplementedError as error:
            refused.append(f"{name}: {error}")
            continue
        if refused:
            _say(op, name, "; ".join(refused))
        return result
    raise NotImplementedError(f"no implementation of {op} takes these arguments: {'; '.join(refused)}")


@functools.cache
def _say(op: str, chosen: str, refused: str) -> None:
    _log.warning("%s runs as %s, because others refuse (%s)", op, chosen, refused)
