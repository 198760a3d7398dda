"""How tokens and experts meet, where each device has its own tokens and its own experts.

All ways take the same arrays, so that a program with another way needs nothing moved (Tutel, arXiv:2206.03382, section 3). Each is a function

    exchange(bank, at, x_TD, ids_TA, valid_T) -> (y_TAD, bank)

of a bank of the device's own experts, what there is to know of the layer (`Meeting`), and the device's tokens with the ids of their experts among
those of all devices. It gives each token's result from each of its experts, in x's dtype and with the bits that this device would have computed
itself (but for sums over `layout.expert_hidden`, which are left to the caller), and zeros for padding. No token is ever dropped.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxmoe.experts.exchange.gather import gather_sums, gather_tokens, own_experts
from jaxmoe.experts.exchange.meeting import Meeting
from jaxmoe.experts.exchange.tokens import exchange_tokens
from jaxmoe.experts.exchange.weights import send_weights
from sharding.split import Exchange

EXCHANGES: dict[Exchange, Callable] = {"tokens": exchange_tokens, "gather": gather_tokens, "weights": send_weights, "coherent": own_experts}
"""The ways by name. 'coherent' is what its prompts go by, every device having all tokens; how it decodes stands in `jaxmoe.engine.coherent`."""

__all__ = ["EXCHANGES", "Meeting", "exchange_tokens", "gather_sums", "gather_tokens", "own_experts", "send_weights"]
