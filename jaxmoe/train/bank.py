"""Experts as training computes them: every expert on an equal number of rows, differentiable, in two batched matmuls.

An expert takes at most `capacity * T * A / E` assignments of a step; those beyond are left out of the sum and counted. Inference never drops any: the
balance loss keeps the count near zero, and the trainer reports it.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.formats import load
from pallas_kernels.grouped_matmul.glu import GLUS


@flax.struct.dataclass
class TrainBank:
    """Attributes: `w_in` float32 [L, E, D, 2, F]; `w_out` float32 [L, E, F, D]; `capacity`: rows per expert relative to an even spread."""

    w_in: Float[Array, "L E D two F"]
    w_out: Float[Array, "L E F D"]
    capacity: float = flax.struct.field(pytree_node=False, default=2.0)
    activation: str = flax.struct.field(pytree_node=False, default="silu")

    def split(self) -> tuple[TrainBank, tuple]:
        """See `ResidentBank.split`."""
        return self, ()

    def join(self, moving: tuple) -> TrainBank:
        """See `ResidentBank.join`."""
        return self

    def expert_ffn(self, moe_layer, x_TD, ids_TA, weights_TA, valid_T, kernels, biases=None):
        """See `jaxmoe.experts.expert_ffn`; aux holds `dropped`, the assignments that found no room."""
        w_in = jax.lax.dynamic_index_in_dim(self.w_in, moe_layer, 0, False)
        w_out = jax.lax.dynamic_index_in_dim(self.w_out, moe_layer, 0, False)
        experts, d, _, f = w_in.shape
        tokens, active = ids_TA.shape
        room = int(-(-self.capacity * tokens * active // experts))
        slot_TA, token_S = slots(ids_TA, valid_T, experts, room)
        rows = gather_rows(x_TD, token_S, slot_TA).reshape(experts, room, d)
        both = jnp.einsum("ecd,edf->ecf", rows, w_in.reshape(experts, d, 2 * f))
        if biases is not None:
            both = both + load(biases[0], both.dtype).reshape(experts, 1, 2 * f)
        hidden = GLUS[self.activation](both[..., :f], both[..., f:])
        out = jnp.einsum("ecf,efd->ecd", hidden, w_out)
        if biases is not None:
            out = out + load(biases[1], out.dtype)[:, None]
        out = out.reshape(experts * room, d)
        kept = slot_TA < experts * room
        y = sum_rows(out, jnp.where(kept, weights_TA, 0.0).astype(out.dtype), token_S, slot_TA)
        return y, self, {"dropped": (~kept & valid_T[:, None]).sum()}


def slots(
    ids_TA: Int[Array, "T A"], valid_T: Bool[Array, "T"], experts: int, room: int
) -> tuple[Int[Array, "T A"], Int[Array, "S"]]:
    """Places assignments into `room` slots per expert, first come first served.

    Returns:
        The slot of each assignment (`experts * room` for those left out), and the token of each slot (T for an empty one).
    """
    tokens, active = ids_TA.shape
    flat = jnp.where(valid_T[:, None], ids_TA, experts).reshape(-1)
    order = jnp.argsort(flat, stable=True)
    expert = flat[order]
    first = jnp.searchsorted(expert, jnp.arange(experts + 1), side="left")
    rank = jnp.arange(flat.shape[0]) - first[expert]
    slot = jnp.where((rank < room) & (expert < experts), expert * room + rank, experts * room)
    slot_TA = slot[jnp.argsort(order)].reshape(tokens, active)
    within = jnp.arange(experts * room)
    at = first[within // room] + within % room
    filled = at < first[within // room + 1]
    token_S = jnp.where(filled, order[jnp.minimum(at, flat.shape[0] - 1)] // active, tokens)
    return slot_TA, token_S


def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of x, zeros where the index is past the end."""
    return jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])[rows]


@jax.custom_vjp
def gather_rows(x_TD: Float[Array, "T D"], token_S: Int[Array, "S"], slot_TA: Int[Array, "T A"]) -> Float[Array, "S D"]:
    """The row of every slot's token. Its gradient is a gather too: a scatter-add is slow on the CPU."""
    return _take(x_TD, token_S)


def _gather_fwd(x_TD, token_S, slot_TA):
    return gather_rows(x_TD, token_S, slot_TA), (slot_TA, np.zeros(0))


def _gather_bwd(saved, dy_SD):
    slot_TA, _ = saved
    return sum(_take(dy_SD, slot_TA[:, j]) for j in range(slot_TA.shape[1])), None, None


gather_rows.defvjp(_gather_fwd, _gather_bwd)


@jax.custom_vjp
def sum_rows(
    y_SD: Float[Array, "S D"], weights_TA: Float[Array, "T A"], token_S: Int[Array, "S"], slot_TA: Int[Array, "T A"]
) -> Float[Array, "T D"]:
    """Each token's weighted sum over its slots; differentiable in rows and weights."""
    out = _take(y_SD, slot_TA[:, 0]) * weights_TA[:, :1]
    for j in range(1, slot_TA.shape[1]):
        out = out + _take(y_SD, slot_TA[:, j]) * weights_TA[:, j : j + 1]
    return out


def _sum_fwd(y_SD, weights_TA, token_S, slot_TA):
    return sum_rows(y_SD, weights_TA, token_S, slot_TA), (y_SD, weights_TA, token_S, slot_TA)


def _sum_bwd(saved, dout_TD):
    y_SD, weights_TA, token_S, slot_TA = saved
    dweights = jnp.stack([(_take(y_SD, slot_TA[:, j]) * dout_TD).sum(-1) for j in range(slot_TA.shape[1])], axis=1)
    match = _take_ids(slot_TA, token_S) == jnp.arange(token_S.shape[0])[:, None]
    weight_S = jnp.where(match, _take(weights_TA, token_S), 0.0).sum(-1)
    return _take(dout_TD, token_S) * weight_S[:, None], dweights, None, None


def _take_ids(slot_TA: jax.Array, token_S: jax.Array) -> jax.Array:
    padded = jnp.concatenate([slot_TA, jnp.full((1, slot_TA.shape[1]), -1, slot_TA.dtype)])
    return padded[token_S]


sum_rows.defvjp(_sum_fwd, _sum_bwd)
