"""All experts on the device: the plainest bank, and the reference that every other bank is compared with."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from jaxmoe.experts.dispatch import dispatch, of_experts, outputs_of, rows_of, weighted_sum
from jaxmoe.experts.still import NothingMoves
from jaxmoe.formats import ExpertLayout, expert_axis_names
from pallas_kernels.dispatch import Kernels
from pallas_kernels.grouped_matmul.api import grouped_swiglu, swiglu_rows
from pallas_kernels.grouped_matmul.biases import Biases
from pallas_kernels.grouped_matmul.glu import GLUS


@flax.struct.dataclass
class ResidentBank(NothingMoves):
    """Every expert of every MoE layer, on device.

    Attributes:
        w_in: [L, E, D, 2, F], gate at index 0 and up at 1, the last three in the order of `layout`; float32, or bfloat16 held as uint16.
        w_out: [L, E, F, D], down, likewise.
        activation: what joins gate and up (`GLUS`).
        layout: see `jaxmoe.formats.ExpertLayout`.
    """

    w_in: Num[Array, "L E D two F"]
    w_out: Num[Array, "L E F D"]
    activation: str = flax.struct.field(pytree_node=False, default="silu")
    layout: ExpertLayout = flax.struct.field(pytree_node=False, default="d2f")

    def logical_axes(self) -> dict[str, tuple[str | None, ...]]:
        """The logical name of every axis of every leaf."""
        w_in, w_out = expert_axis_names(self.layout)
        return {"w_in": ("layers", "experts", *w_in), "w_out": ("layers", "experts", *w_out)}

    @property
    def device_bytes(self) -> int:
        """Bytes of the experts on the device."""
        return self.w_in.nbytes + self.w_out.nbytes

    def expert_ffn(
        self,
        moe_layer: Int[Array, ""],
        x_TD: Float[Array, "T D"],
        ids_TA: Int[Array, "T A"],
        weights_TA: Float[Array, "T A"],
        valid_T: Bool[Array, "T"],
        kernels: Kernels,
        biases: Biases | None = None,
    ) -> tuple[Float[Array, "T D"], ResidentBank, dict]:
        """See `jaxmoe.experts.expert_ffn`."""
        y = self.outputs(moe_layer, x_TD, ids_TA, valid_T, kernels, biases)
        return self.combined(y, x_TD, weights_TA, valid_T), self, {}

    def outputs(
        self, moe_layer: Int[Array, ""], x_TD: Float[Array, "T D"], ids_TA: Int[Array, "T A"], valid_T: Bool[Array, "T"], kernels: Kernels,
        biases: Biases | None = None,
    ) -> Float[Array, "T A D"]:  # fmt: skip
        """What each token's experts give, float32, before the router's weights; rows of padding tokens hold values of no meaning."""
        layers, experts = self.w_in.shape[:2]
        w_in, w_out = (w.reshape(layers * experts, *w.shape[2:]) for w in (self.w_in, self.w_out))
        first, glu = moe_layer * experts, GLUS[self.activation]
        if x_TD.shape[0] == 1:
            return swiglu_rows(x_TD, w_in, w_out, first + ids_TA[0], glu, kernels, self.layout, of_experts(biases, ids_TA[0]))[None]
        plan = dispatch(ids_TA, valid_T, experts)
        ids = first + jnp.arange(experts)
        y = grouped_swiglu(rows_of(x_TD, plan), w_in, w_out, ids, plan.sizes_E, glu, kernels, layout=self.layout, biases=biases)
        return outputs_of(y, plan)

    def combined(
        self, y: Float[Array, "T A D"], x_TD: Float[Array, "T D"], weights_TA: Float[Array, "T A"], valid_T: Bool[Array, "T"]
    ) -> Float[Array, "T D"]:
        """The weighted sum of `outputs`, in x's dtype."""
        return weighted_sum(y.astype(x_TD.dtype).astype(jnp.float32), weights_TA, valid_T).astype(x_TD.dtype)
