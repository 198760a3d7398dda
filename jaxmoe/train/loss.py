"""What training minimises: next-token cross-entropy, and the router's balance and z losses over the whole step's tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.cache.batch import Batch
from jaxmoe.cache.full import FullState
from jaxmoe.nn.transformer import forward
from jaxmoe.routing.route import RouterOut
from jaxmoe.spec import ModelSpec
from jaxmoe.train.bank import TrainBank
from pallas_kernels.dispatch import Kernels


def sequences(tokens_BT: Int[Array, "B T"]) -> Batch:
    """Whole sequences, each from position 0, as one batch for `FullState(rows=B)`; every token's logits are wanted."""
    b, t = tokens_BT.shape
    flat = jnp.arange(b * t)
    zero = jnp.zeros(b, jnp.int32)
    return Batch(
        tokens_BT.reshape(-1), flat % t, flat // t, jnp.arange(b), zero, zero + t, jnp.asarray(b), flat, run=t
    )


def balance_loss(routed: list[RouterOut], experts: int) -> Float[Array, ""]:
    """`E * sum_e f_e p_e`, averaged over layers, with f and p taken over the global batch ("Demons in the Detail", eq. 2-4): 1 when even.

    Over a whole batch of several domains an expert may specialise in one of them; over each sequence it could not.
    """
    total, layers = jnp.float32(0.0), 0
    for layer in routed:
        p = jax.nn.softmax(layer.logits, -1).mean(1)
        f = (layer.ids[..., None] == jnp.arange(experts)).sum((1, 2)) / (layer.ids.shape[1] * layer.ids.shape[2])
        total = total + experts * (f * p).sum(-1).sum()
        layers += p.shape[0]
    return total / layers


def z_loss(routed: list[RouterOut]) -> Float[Array, ""]:
    """Mean squared log-partition of the router's logits (ST-MoE, eq. 5), which keeps them small enough for bfloat16."""
    return jnp.stack([(jax.nn.logsumexp(layer.logits, -1) ** 2).mean() for layer in routed]).mean()


def loss(
    spec: ModelSpec, params: dict, bank: TrainBank, tokens: Int[Array, "B T1"], balance: float, z: float
) -> tuple[Float[Array, ""], dict]:
    """The training loss of sequences of T + 1 tokens.

    Returns:
        The sum of losses, and metrics: `nll` in nats per token, `balance`, `busiest` (the largest expert's share times E).
    """
    b, t1 = tokens.shape
    kernels = Kernels("cpu", row_invariant=False)
    logits, _, _, aux = forward(
        spec, params, bank, FullState(b), sequences(tokens[:, :-1]), kernels, collect=True
    )
    nll = token_nll(logits, tokens[:, 1:].reshape(-1)).mean()
    experts = spec.moe[0].experts
    even = balance_loss(aux["routed"], experts)
    total = nll + balance * even + z * z_loss(aux["routed"])
    ids = jnp.concatenate([r.ids.reshape(r.ids.shape[0], -1) for r in aux["routed"]])
    share = (ids[..., None] == jnp.arange(experts)).mean(1) * experts
    return total, {"nll": nll, "balance": even, "busiest": share.max()}


def token_nll(logits: Float[Array, "T V"], targets: Int[Array, "T"]) -> Float[Array, "T"]:
    """Negative log-likelihood of each target, in nats."""
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
