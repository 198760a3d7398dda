"""Read-ME's router outside the backbone (2410.19123): one layer of causal attention over token ids, whose output routes for every layer.

Read-ME builds a model that has no other router, and the same experts at every layer. Here it is distilled to the routing of a model that has others:
one head is shared by all layers, and a learned embedding of the layer tells them apart (a second set of them, for the next step).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.offload.predictors.network import FUTURES, CausalAttention, Embedding, NetSettings, learned_predictor


class ReadMeNet(nn.Module):
    """Tokens to router logits, whose softmax is the share that an expert has of the token's weight."""

    settings: NetSettings

    @nn.compact
    def __call__(self, tokens_BT: Int[Array, "B T"], recent_BQNLE: Float[Array, "B Q N L E"]) -> Float[Array, "B Q M1 L E"]:
        """The last Q positions' logits; of the recent routing only the number of positions is used."""
        s, queries = self.settings, recent_BQNLE.shape[1]
        x = Embedding(s, name="embed")(tokens_BT)
        attended = CausalAttention(s, name="attention")(nn.LayerNorm(name="norm_a")(x), tokens_BT >= 0, queries)
        x = nn.LayerNorm(name="norm")(x[:, x.shape[1] - queries :] + attended)
        layer = self.param("layer", nn.initializers.normal(1.0), (FUTURES, s.sizes.layers, s.hidden))
        hidden = nn.gelu(nn.Dense(s.hidden, name="up")(x)[:, :, None, None] + layer)
        return nn.Dense(s.sizes.experts, name="head")(hidden)

    def probabilities(self, tokens_BT, recent_BQNLE):
        """The chance that one of A draws by these shares takes an expert: `1 - (1 - p)^A`."""
        share = jax.nn.softmax(self(tokens_BT, recent_BQNLE), -1)
        return 1 - (1 - jnp.minimum(share, 1.0)) ** self.settings.sizes.active


README = learned_predictor("readme", ReadMeNet)
