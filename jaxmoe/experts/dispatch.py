"""From a token's experts to rows sorted by expert, and back: the plan around every grouped matmul."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmoe import formats
from pallas_kernels.grouped_matmul.biases import Biases
from pallas_kernels.one_kernel import one_kernel, part, put


class Dispatch(NamedTuple):
    """Rows sorted by expert: `token_M` the token of each sorted row, `row_TA` where each assignment went, `sizes_E` rows of each expert."""

    token_M: Int[Array, "M"]
    row_TA: Int[Array, "T A"]
    sizes_E: Int[Array, "E"]


def dispatch(ids_TA: Int[Array, "T A"], valid_T: Bool[Array, "T"], experts: int) -> Dispatch:
    """Sorts assignments by expert, stably; those of padding tokens come last and belong to no expert."""
    active = ids_TA.shape[1]
    key = jnp.where(valid_T[:, None] & (ids_TA >= 0) & (ids_TA < experts), ids_TA, experts).reshape(-1).astype(jnp.int32)
    order, row, sizes = jax.lax.platform_dependent(
        key, cpu=functools.partial(_counted, experts=experts), default=functools.partial(_sorted, experts=experts)
    )
    return Dispatch(order // active, row.reshape(ids_TA.shape), sizes)


def _sorted(key_N: Int[Array, "N"], *, experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which assignment each sorted row has, the row of each assignment, and how many rows each expert has."""
    order = jnp.argsort(key_N, stable=True).astype(jnp.int32)
    row = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32), unique_indices=True)
    return order, row, (key_N[:, None] == jnp.arange(experts)[None, :]).sum(0, dtype=jnp.int32)


@one_kernel(static=("experts",))
def _counted(key_N: Int[Array, "N"], *, experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same by counting, without a sort."""
    n = key_N.shape[0]

    def at(x, i):
        return part(x, (i,), (1,))

    def count(i, sizes):
        e = at(key_N, i)[0]
        return put(sizes, at(sizes, e) + 1, (e,))

    sizes = jax.lax.fori_loop(0, n, count, jnp.zeros(experts + 1, jnp.int32))

    def begin(e, starts):
        return put(starts, at(starts, e) + at(sizes, e), (e + 1,))

    starts = jax.lax.fori_loop(0, experts, begin, jnp.zeros(experts + 1, jnp.int32))

    def place(i, carry):
        order, row, starts = carry
        e = at(key_N, i)[0]
        to = at(starts, e)
        return put(order, i[None].astype(jnp.int32), (to[0],)), put(row, to, (i,)), put(starts, to + 1, (e,))

    order, row, _ = jax.lax.fori_loop(0, n, place, (jnp.zeros(n, jnp.int32), jnp.zeros(n, jnp.int32), starts))
    return order, row, sizes[:experts]


def weighted_sum(y: Float[Array, "T A D"], weights_TA: Float[Array, "T A"], valid_T: Bool[Array, "T"]) -> Float[Array, "T D"]:
    """Each token's sum over its experts, added in the order of its ids; zero for padding tokens."""
    # Of two products that are added, XLA would round one, and which depends on what else is in the fusion.
    out = formats.rounded(y[:, 0] * weights_TA[:, :1])
    for j in range(1, weights_TA.shape[1]):
        out = out + formats.rounded(y[:, j] * weights_TA[:, j : j + 1])
    return jnp.where(valid_T[:, None], out, 0.0)


def rows_of(x_TD: jax.Array, plan: Dispatch) -> jax.Array:
    """The activations of every assignment, sorted by expert."""
    return x_TD.at[plan.token_M].get(**_THERE)


def outputs_of(y_MD: jax.Array, plan: Dispatch) -> jax.Array:
    """What each token's experts gave [T, A, D], of sorted rows."""
    return y_MD.at[plan.row_TA].get(**_THERE)


_THERE: dict[str, Any] = {"mode": "promise_in_bounds", "wrap_negative_indices": False}
"""That the indices are there: else XLA looks whether they are wherever a number is used."""


def of_experts(biases: Biases | None, experts: Int[Array, "G"]) -> Biases | None:
    """The biases of some experts, in their order."""
    return None if biases is None else (biases[0][experts], biases[1][experts])
