"""ExpertFlow's routing-path predictor (2410.17954): a small transformer that says a step's whole path before its first MoE layer.

As in the paper: several labels, binary cross-entropy, one head a layer, run once a step. Departures: a decoder over the row's last tokens takes the
place of T5's encoder and decoder, so that it runs at every step of a generation; each position also sees the pair that its token makes with the one
before, and the row's own recent routing; and a second set of heads says the next step's path.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.offload.predictors.network import FUTURES, CausalAttention, Embedding, NetSettings, learned_predictor


class PathNet(nn.Module):
    """Tokens and recent routing to logits of each expert's use."""

    settings: NetSettings

    @nn.compact
    def __call__(self, tokens_BT: Int[Array, "B T"], recent_BQNLE: Float[Array, "B Q N L E"]) -> Float[Array, "B Q M1 L E"]:
        """The last Q positions' logits, of this step and the next."""
        s, queries = self.settings, recent_BQNLE.shape[1]
        L, E = s.sizes.layers, s.sizes.experts
        x, there = Embedding(s, name="embed")(tokens_BT), tokens_BT >= 0
        for i in range(s.blocks):
            last = queries if i == s.blocks - 1 else x.shape[1]
            attended = CausalAttention(s, name=f"attention_{i}")(nn.LayerNorm(name=f"norm_a_{i}")(x), there, last)
            x = x[:, x.shape[1] - last :] + attended
            if i == s.blocks - 1 and s.decays:
                x = x + nn.Dense(s.width, use_bias=False, name="recent")(recent_BQNLE[:, :, -1].reshape(*x.shape[:2], L * E))
            hidden = nn.gelu(nn.Dense(s.hidden, name=f"up_{i}")(nn.LayerNorm(name=f"norm_f_{i}")(x)))
            x = x + nn.Dense(s.width, name=f"down_{i}")(hidden)
        x = nn.LayerNorm(name="norm")(x)
        out = nn.Dense(FUTURES * L * E, name="heads", bias_init=nn.initializers.constant(_logit(s.sizes.active / E)))(x)
        out = out.reshape(*x.shape[:2], FUTURES, L, E)
        if s.decays:
            gain = self.param("gain", nn.initializers.ones, (FUTURES, len(s.decays), L, E))
            out = out + jnp.einsum("bqnle,mnle->bqmle", recent_BQNLE, gain)
        return out

    def probabilities(self, tokens_BT, recent_BQNLE):
        """Each expert's probability of use."""
        return jax.nn.sigmoid(self(tokens_BT, recent_BQNLE))


def _logit(p: float) -> float:
    return float(np.log(p / (1 - p))) if 0 < p < 1 else 0.0


PATH = learned_predictor("path", PathNet)
