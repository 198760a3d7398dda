"""What every exchange is told of a layer and of the devices, and how rows run through a bank of a device's own experts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import Kernels
from pallas_kernels.grouped_matmul.biases import Biases
from sharding.split import Layout


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Attributes:
    moe_layer: which MoE layer; may be traced.
    experts: of all devices, copies among them.
    layout: how it is split.
    kernels: which implementations run.
    biases: of the layer's experts that this device has.
    """

    moe_layer: Any
    experts: int
    layout: Layout
    kernels: Kernels
    biases: Biases | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that the experts are divided over."""
        return self.layout.experts

    @property
    def devices(self) -> int:
        """Devices along them, n."""
        return self.layout.size(self.axes)

    @property
    def count(self) -> int:
        """Experts of each device."""
        return self.experts // self.devices

    @property
    def deciding(self) -> tuple[str, ...]:
        """The mesh axes whose devices have different tokens: what they do by turns, all have to do equally often."""
        return tuple(dict.fromkeys((*self.layout.batch, *self.layout.sequence)))

    def compute(self, bank: Any, x_MD: Float[Array, "M D"], ids_M: Int[Array, "M"], valid_M: Bool[Array, "M"]) -> tuple[jax.Array, Any]:
        """Rows of one of the device's own experts each; zeros where not valid. Returns the results in x's dtype, and the bank."""
        ids, ones = jnp.where(valid_M, ids_M, 0)[:, None], jnp.ones((x_MD.shape[0], 1), jnp.float32)
        y_MD, bank, _ = bank.expert_ffn(self.moe_layer, x_MD, ids, ones, valid_M, self.kernels, self.biases)
        return y_MD, bank
