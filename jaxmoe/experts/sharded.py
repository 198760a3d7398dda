"""A bank of experts that are divided among devices, inside `shard_map`: what a layer's tokens need of other devices' experts, and how they get it.

Every way calls the same bank of a device's own experts, with rows of one expert each, so that what a row gives doesn't depend on the way; they differ
in what travels. The ways where tokens are each device's own stand in `jaxmoe.experts.exchange`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.experts.dispatch import weighted_sum
from jaxmoe.experts.exchange import EXCHANGES
from pallas_kernels.dispatch import Kernels
from pallas_kernels.grouped_matmul.biases import Biases
from sharding.split import Layout


@flax.struct.dataclass
class ShardedBank:
    """Attributes: `own` the bank of this device's experts, which are neighbours in the model's order; `experts` those of the model, E."""

    own: Any
    layout: Layout = flax.struct.field(pytree_node=False)
    experts: int = flax.struct.field(pytree_node=False)

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
        if not self.layout.experts:
            y, own, aux = self.own.expert_ffn(moe_layer, x_TD, ids_TA, weights_TA, valid_T, kernels, biases)
            return y, dataclasses.replace(self, own=own), aux

        def compute(bank: Any, x_MD: Float[Array, "M D"], ids_M: Int[Array, "M"], valid_M: Bool[Array, "M"]) -> tuple[jax.Array, Any]:
            """Rows of one expert each, by a bank of this device's experts; zeros where not valid."""
            y_MD, bank, _ = bank.expert_ffn(moe_layer, x_MD, ids_M[:, None], jnp.ones_like(ids_M, jnp.float32)[:, None], valid_M, kernels, biases)
            return y_MD, bank

        if self.layout.split.attention == "tensor":
            y_TAD, own = self._own_experts(compute, x_TD, ids_TA, valid_T)
        else:
            y_TAD, own = EXCHANGES[self.layout.split.exchange](self.own, compute, x_TD, ids_TA, valid_T, self.experts, self.layout)
        y_TD = weighted_sum(y_TAD.astype(jnp.float32), weights_TA, valid_T)
        return y_TD.astype(x_TD.dtype), dataclasses.replace(self, own=own), {}

    def _own_experts(self, compute, x_TD, ids_TA, valid_T) -> tuple[Float[Array, "T A D"], Any]:
        """The results of this device's experts for tokens that every device has; zeros elsewhere."""
        count = self.experts // self.layout.size(self.layout.experts)
        ids = ids_TA - jax.lax.axis_index(self.layout.experts) * count
        mine = (ids >= 0) & (ids < count) & valid_T[:, None]
        rows = jnp.repeat(x_TD, ids_TA.shape[1], axis=0)
        y, own = compute(self.own, rows, jnp.where(mine, ids, 0).reshape(-1), mine.reshape(-1))
        return y.reshape(*ids_TA.shape, -1), own
