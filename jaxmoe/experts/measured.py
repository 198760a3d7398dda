"""The resident bank, watched: beside what it computes, the largest output of every expert. What it gives is the resident bank's, bit for bit."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.experts.resident import ResidentBank
from pallas_kernels.dispatch import Kernels
from pallas_kernels.grouped_matmul.biases import Biases


@flax.struct.dataclass
class MeasuredBank:
    """Attributes:
    own: every expert, on the device.
    max_abs_LE: float32, what is carried: the largest |output| of each expert's down projection (with its bias, where it has one) over all tokens so
        far, before the router's weight. 0 for an expert that no token had. None in the fixed part.
    """

    own: ResidentBank
    max_abs_LE: Float[Array, "L E"] | None = None

    def logical_axes(self) -> dict:
        """The logical name of every axis of every leaf of the fixed part."""
        return {"own": self.own.logical_axes()}

    def split(self) -> tuple[MeasuredBank, Float[Array, "L E"] | None]:
        """`(fixed, moving)`: the experts and what was measured."""
        return dataclasses.replace(self, max_abs_LE=None), self.max_abs_LE

    def join(self, moving: Float[Array, "L E"]) -> MeasuredBank:
        """The bank with what was measured so far."""
        return dataclasses.replace(self, max_abs_LE=moving)

    def in_order(self) -> MeasuredBank:
        """See `ResidentBank.in_order`."""
        return self

    def init_state(self) -> Float[Array, "L E"]:
        """Nothing measured."""
        return jnp.zeros(self.own.w_in.shape[:2], jnp.float32)

    def forget(self, moving: Float[Array, "L E"]) -> Float[Array, "L E"]:
        """Nothing measured, again."""
        return self.init_state()

    def new_text(self, moving: Float[Array, "L E"]) -> Float[Array, "L E"]:
        """What was measured goes on over all texts."""
        return moving

    def counters(self, moving: Float[Array, "L E"]) -> dict:
        """See `ResidentBank.counters`."""
        return {}

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
    ) -> tuple[Float[Array, "T D"], MeasuredBank, dict]:
        """See `jaxmoe.experts.expert_ffn`."""
        assert self.max_abs_LE is not None, "a bank's fixed part can't measure: join it with a state"
        y = self.own.outputs(moe_layer, x_TD, ids_TA, valid_T, kernels, biases)
        with jax.named_scope("measure"):
            # Padding tokens' rows hold values of no meaning, NaN among them.
            largest_TA = jnp.where(valid_T[:, None], jnp.max(jnp.abs(y.astype(jnp.float32)), axis=-1), 0.0)
            measured = self.max_abs_LE.at[moe_layer, ids_TA].max(largest_TA)
        return self.own.combined(y, x_TD, weights_TA, valid_T), dataclasses.replace(self, max_abs_LE=measured), {}
