"""A bank of experts that are divided among devices, inside `shard_map`: what a layer's tokens need of other devices' experts, and how they get it.

Every way calls the same bank of a device's own experts, with rows of one expert each, so that what a row gives doesn't depend on the way; they differ
in what travels (`jaxmoe.experts.exchange`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.experts.dispatch import weighted_sum
from jaxmoe.experts.exchange import EXCHANGES, Meeting, gather_sums
from jaxmoe.experts.exchange.gather import part_of_experts
from jaxmoe.experts.placed import at_positions
from pallas_kernels.dispatch import Kernels
from pallas_kernels.grouped_matmul.biases import Biases
from sharding.split import Layout


@flax.struct.dataclass
class ShardedBank:
    """Attributes:
    own: the bank of this device's experts, which are neighbours in the order that they are placed in.
    layout: how the model is split.
    experts: of all devices: the model's E, and further copies where experts have some.
    position_of_expert: where each expert of each layer stands in that order, on every device (`placed.at_positions`); None for the model's order.
    sums: 'gather' sends sums of results back instead of each: a token's active experts times fewer bytes, but not the bits of one device.
    """

    own: Any
    layout: Layout = flax.struct.field(pytree_node=False)
    experts: int = flax.struct.field(pytree_node=False)
    position_of_expert: Int[Array, "L E ..."] | None = None
    sums: bool = flax.struct.field(pytree_node=False, default=False)

    def split(self) -> tuple[ShardedBank, Any]:
        """See `ResidentBank.split`."""
        fixed, moving = self.own.split()
        return dataclasses.replace(self, own=fixed), moving

    def join(self, moving: Any) -> ShardedBank:
        """See `ResidentBank.join`."""
        return dataclasses.replace(self, own=self.own.join(moving))

    def in_order(self) -> ShardedBank:
        """See `ResidentBank.in_order`."""
        return dataclasses.replace(self, own=self.own.in_order())

    def expert_ffn(
        self,
        moe_layer: Int[Array, ""],
        x_TD: Float[Array, "T D"],
        ids_TA: Int[Array, "T A"],
        weights_TA: Float[Array, "T A"],
        valid_T: Bool[Array, "T"],
        kernels: Kernels,
        biases: Biases | None = None,
    ) -> tuple[Float[Array, "T D"], ShardedBank, dict]:
        """See `jaxmoe.experts.expert_ffn`; the result is this device's part of a sum over `layout.summed`."""
        ids_TA = at_positions(self.position_of_expert, moe_layer, ids_TA)
        if not self.layout.experts:
            y, own, aux = self.own.expert_ffn(moe_layer, x_TD, ids_TA, weights_TA, valid_T, kernels, biases)
            return y, dataclasses.replace(self, own=own), aux
        at = Meeting(moe_layer, self.experts, self.layout, kernels, biases)
        split = self.layout.split
        if self.sums and split.attention == "data" and split.exchange == "gather":
            y_TD, own = gather_sums(self.own, at, x_TD, ids_TA, weights_TA, valid_T)
            return y_TD, dataclasses.replace(self, own=own), {}
        exchange = part_of_experts if split.attention == "tensor" else EXCHANGES[split.exchange]
        y_TAD, own = exchange(self.own, at, x_TD, ids_TA, valid_T)
        y_TD = weighted_sum(y_TAD.astype(jnp.float32), weights_TA, valid_T)
        return y_TD.astype(x_TD.dtype), dataclasses.replace(self, own=own), {}
