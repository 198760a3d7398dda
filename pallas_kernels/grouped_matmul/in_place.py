"""Few rows times matrices of a pool on the CPU, each matrix read where it lies, once for every eight rows.

A matmul of XLA's would copy it first (`pallas_kernels.one_kernel`), which is three times the traffic of a product that is bound by its reads.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from jaxmoe import formats
from pallas_kernels.dense.cpu import PROBED_WEIGHTS, few_rows, few_rows_dot, random_rows
from pallas_kernels.one_kernel import one_kernel, part, put

_TILES = {8: 3, 4: 1, 2: 0, 1: 0}
"""Rows that share a read of the matrix, and by how many of them a tile may overhang its group: what it writes there, the next one's writes over."""

_TERMS = (8, 4, 2)
"""Rows of a matrix that are added to the sums in one step, as many as divide K: a sum is read and written once in a step."""

_PARTS = (1, 2, 4, 8)
"""Into how many parts K may be split."""

_ONE_PART = 128
"""Length of K up to which one part is tried first, to find the number soon."""


@functools.cache
def in_place_parts(k: int, n: int) -> int | None:
    """Into how many parts K is split for a row's product to have the bits that dots of few rows have; None if no number of them gives these.

    Runs both once on random values, as `few_rows` does.
    """
    if k * n > PROBED_WEIGHTS:
        return None
    sizes = (1, 2, 4, max(_TILES))  # a tile of every size
    rows = sum(sizes)
    x, w = random_rows(rows, k, n)
    more = ((0, few_rows(k, n).tiles[-1] - rows), (0, 0))

    def both(x, w, ids, sizes, parts: int):
        return few_rows_dot(jnp.pad(x, more), w)[:rows], times(x, jnp.stack([w, w]), ids, sizes, parts)

    with jax.ensure_compile_time_eval():
        for parts in _PARTS if k <= _ONE_PART else (*_PARTS[1:], 1):
            if _terms(k, parts):
                run = jax.jit(functools.partial(both, parts=parts))(x, w, np.asarray([1, 0, 1, 0]), np.asarray(sizes))
                expected, found = (np.asarray(y).view(np.uint32) for y in run)
                if (found == expected).all():
                    return parts
    return None


def _terms(k: int, parts: int) -> int | None:
    """Of `_TERMS`, the most that K's parts are a multiple of."""
    return next((t for t in _TERMS if k % (parts * t) == 0), None)


def times(
    x_MK: Float[Array, "M K"],
    pool_ZKN: Num[Array, "Z K N"],
    ids_G: Int[Array, "G"],
    sizes_G: Int[Array, "G"],
    parts: int,
    starts_G: Int[Array, "G"] | None = None,
) -> Float[Array, "M N"]:
    """`y[m] = x[m] @ pool[ids[g]]` for the rows of each group, float32.

    Args:
        x_MK: rows.
        pool_ZKN: matrices, float32 or bfloat16 held as uint16.
        ids_G: which matrix each group has, in [0, Z).
        sizes_G: how many rows it has.
        parts: of `in_place_parts`.
        starts_G: its first row, in the order of the groups; after the last one's rows, if not given.

    Returns:
        The products; rows of no group hold zeros, or values of no meaning.
    """
    # One array, so that each of them is used whatever the sizes (see `one_kernel`).
    plan_GC = jnp.stack([a.astype(jnp.int32) for a in (ids_G, sizes_G, *(() if starts_G is None else (starts_G,)))], axis=1)
    x = jnp.pad(x_MK.astype(jnp.float32), ((0, max(_TILES) - 1), (0, 0)))
    return functools.reduce(jnp.add, _sums(x, pool_ZKN, plan_GC, parts=parts)[:, : x_MK.shape[0]])


@one_kernel(static=("parts",))
def _sums(x_MK, pool_ZKN, plan_GC, *, parts: int) -> Float[Array, "P M N"]:
    """The products of each part of K. `plan`: each group's matrix and number of rows, and its first row where that isn't after the group before."""
    (_, k, n), rows, terms = pool_ZKN.shape, x_MK.shape[0], _terms(x_MK.shape[1], parts)
    assert terms, f"{parts} parts of {k}, which `in_place_parts` did not choose"
    x_KM = x_MK.T

    def tile(count: int, z, at, y):
        """Writes the sums of some rows."""

        def of_part(p, y):
            def step(i, sums):
                first = p * (k // parts) + i * terms
                w = formats.load(part(pool_ZKN, (z, first, 0), (1, terms, n))[0], jnp.float32)
                x = part(x_KM, (first, at), (terms, count))
                for j in range(terms):
                    sums = sums + w[j, :, None] * x[j]
                return sums

            # Rows are the minor axis: a number of the matrix is read once for all of them, which fill a vector register.
            sums = jax.lax.fori_loop(0, k // parts // terms, step, jnp.zeros((n, count), jnp.float32))
            return put(y, sums.T[None], (p, at, 0))

        return jax.lax.fori_loop(0, parts, of_part, y)

    def group(g, carry):
        after, y = carry
        z, left, *starts = part(plan_GC, (g, 0), (1, plan_GC.shape[1]))[0]
        at, after = starts[0] if starts else after, after + left
        for rows, over in _TILES.items():
            count = (left + over) // rows
            y = jax.lax.fori_loop(0, count, lambda i, y, rows=rows, at=at: tile(rows, z, at + i * rows, y), y)
            at, left = at + count * rows, jnp.maximum(left - count * rows, 0)
        return after, y

    return jax.lax.fori_loop(0, plan_GC.shape[0], group, (jnp.int32(0), jnp.zeros((parts, rows, n), jnp.float32)))[1]
