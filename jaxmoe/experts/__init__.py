"""Expert banks: what an MoE layer computes with. The model calls `expert_ffn` and knows no more of a bank than that."""

from __future__ import annotations

from typing import Any

from jaxmoe.experts.resident import ResidentBank
from jaxmoe.experts.slots import SlotBank
from pallas_kernels.grouped_matmul.biases import Biases

ExpertBank = Any
"""A pytree with `expert_ffn`, `init_state`, `forget`, `new_text`, `split`, `join` and `in_order`. A bank splits into a fixed part, which steps only
read, and a moving part, which they carry, donate and return; carrying the fixed part too would copy it out of every program."""

__all__ = ["ExpertBank", "ResidentBank", "SlotBank", "expert_ffn"]


def expert_ffn(bank: ExpertBank, moe_layer, x_TD, ids_TA, weights_TA, valid_T, kernels, biases: Biases | None = None):
    """Runs the chosen experts of one layer.

    Args:
        bank: the experts.
        moe_layer: which MoE layer, counted among MoE layers; may be traced.
        x_TD: activations.
        ids_TA: int32 expert ids.
        weights_TA: float32 combine weights.
        valid_T: False for padding tokens, which route nowhere and give zero.
        kernels: static choice of implementations.
        biases: `(w_in [E, 2, F], w_out [E, D])` of this layer's experts, float32 or bfloat16 held as uint16: they are the layer's, not the bank's.

    Returns:
        `(y_TD, bank, aux)`: the weighted sum of expert outputs in x's dtype, the bank as it is afterwards, and counters.
    """
    return bank.expert_ffn(moe_layer, x_TD, ids_TA, weights_TA, valid_T, kernels, biases)
