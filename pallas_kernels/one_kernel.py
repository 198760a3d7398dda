"""Loops that XLA's CPU backend compiles into one function.

That backend runs a program as a list of kernels, each with a price, and hands a matmul whole buffers only, so that a matrix picked out of a pool is
copied first. A call marked as below is compiled as one function instead, with the loops and reads inside it: XLA marks loops over a few bytes so by
itself. It runs on one thread, reads at the speed of the memory, and a step of a loop costs what it costs in C.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Num

F = TypeVar("F", bound=Callable)

part = functools.partial(jax.lax.dynamic_slice, allow_negative_indices=False)
"""A piece of an array, from an index that is not counted from the end: one instruction."""

put = functools.partial(jax.lax.dynamic_update_slice, allow_negative_indices=False)
"""An array with a piece written, likewise."""


def joined(join: Callable[[jax.Array, jax.Array], jax.Array], x: Num[Array, "R N"]) -> Num[Array, "R one"]:
    """Each row's numbers, a power of two of them, joined to one, half with half. A kernel can't have a reduction where it is large."""
    while x.shape[1] > 1:
        x = join(*jnp.split(x, 2, axis=1))
    return x


_MARKS = {"xla_cpu_small_call": "true", "inlineable": "false"}
"""What XLA looks for: the first says how to compile the call, the second keeps it a call."""


def one_kernel(static: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Marks a function of arrays as one kernel of the CPU's; elsewhere, and to a compiler that knows no such mark, it is a call like any other.

    Elementwise work and loops only: a matmul in it would be a plain loop. Every array handed to it must be looked at, whatever the sizes: XLA ends
    the process (jax 0.11.2) over one that is not, as where an index can only be 0.

    Args:
        static: keyword arguments that are no arrays.
    """

    def mark(f: F) -> F:
        call = jax.jit(f, static_argnames=static)

        @functools.wraps(f)
        def marked(*args, **kwargs):
            with set_xla_metadata(**_MARKS):
                return call(*args, **kwargs)

        return marked  # type: ignore[return-value]

    return mark
