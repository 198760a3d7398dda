"""Experts in another order than the model's, so that those which work together share a device (`sharding.placement`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.experts.resident import ResidentBank
from jaxmoe.experts.still import NothingMoves
from pallas_kernels.dispatch import Kernels
from pallas_kernels.grouped_matmul.biases import Biases


def at_positions(position_of_expert: Int[Array, "L E ..."] | None, moe_layer, ids: Int[Array, "T A"]) -> Int[Array, "T A"]:
    """Where a layer's experts stand, of their ids.

    Args:
        position_of_expert: by layer and expert; where experts have copies also by turn, which tokens take by their order (EPLB). None for where they
            stand in the model.
        moe_layer: which MoE layer.
        ids: routed experts.
    """
    if position_of_expert is None:
        return ids
    where = jnp.asarray(position_of_expert)[moe_layer]
    return where[ids] if where.ndim == 1 else where[ids, jnp.arange(ids.shape[0])[:, None] % where.shape[1]]


def permute_bank(bank: ResidentBank, order_LE: Int[np.ndarray, "L E"]) -> ResidentBank:
    """The bank with expert `order_LE[l, p]` of each layer l at position p of its axis of experts.

    Raises:
        ValueError: `order_LE` is not a permutation of each layer's experts.
    """
    layers, experts = bank.w_in.shape[:2]
    order = _checked(order_LE, layers, experts)
    w_in, w_out = (jnp.take_along_axis(w, jnp.asarray(order).reshape(layers, experts, *(1,) * (w.ndim - 2)), 1) for w in (bank.w_in, bank.w_out))
    return dataclasses.replace(bank, w_in=w_in, w_out=w_out)


def placed_bank(bank: ResidentBank, order_LE: Int[np.ndarray, "L E"]) -> PlacedBank:
    """The bank in a placement's order (`Placement.order`), used by the model's ids. See `permute_bank`."""
    own = permute_bank(bank, order_LE)
    return PlacedBank(own, jnp.asarray(np.argsort(order_LE, axis=1), jnp.int32))


def _checked(order_LE: Any, layers: int, experts: int) -> np.ndarray:
    order = np.asarray(order_LE)
    if order.shape != (layers, experts) or (np.sort(order, axis=1) != np.arange(experts)).any():
        raise ValueError(f"order_LE {list(order.shape)} is not a permutation of {experts} experts for each of {layers} layers: use Placement.order")
    return order.astype(np.int32)


@flax.struct.dataclass
class PlacedBank(NothingMoves):
    """Attributes: `own` a bank whose experts are placed in some order, perhaps several times; `position_of_expert` where each expert of each layer
    stands in it, see `at_positions`."""

    own: ResidentBank
    position_of_expert: Int[Array, "L E ..."]

    def logical_axes(self) -> dict[str, Any]:
        """The logical name of every axis of every leaf."""
        return {"own": self.own.logical_axes(), "position_of_expert": ("layers", None)}

    @property
    def device_bytes(self) -> int:
        """Bytes of the experts on the device."""
        return self.own.device_bytes

    def expert_ffn(
        self,
        moe_layer: Int[Array, ""],
        x_TD: Float[Array, "T D"],
        ids_TA: Int[Array, "T A"],
        weights_TA: Float[Array, "T A"],
        valid_T: Bool[Array, "T"],
        kernels: Kernels,
        biases: Biases | None = None,
    ) -> tuple[Float[Array, "T D"], PlacedBank, dict]:
        """See `jaxmoe.experts.expert_ffn`; biases are in the order of the placement, as the experts are."""
        ids = at_positions(self.position_of_expert, moe_layer, ids_TA)
        y, _, aux = self.own.expert_ffn(moe_layer, x_TD, ids, weights_TA, valid_T, kernels, biases)
        return y, self, aux
