"""What the two learned predictors share: their settings, what a row remembers, and a network that is run once a step. Training is elsewhere.

A row remembers its last W tokens and its recent routing. The network takes a batch of them at a size from `BUCKETS`, one program each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxmoe.offload.predictors.interface import Predictor, Sizes, State, one_hot, silent_at
from jaxmoe.offload.trace import Trace

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Rows that a program takes."""

FUTURES = 2
"""This step, and the next."""


@dataclasses.dataclass(frozen=True)
class NetSettings:
    """The shape of a network.

    Attributes:
        sizes: of the model whose routing it predicts.
        tokens: rows of the table of tokens; ids are taken modulo these.
        pairs: rows of the table of pairs of tokens, by a hash; 0 for none.
        width: of the hidden state.
        heads: of its attention.
        hidden: of its feed-forward part; 0 for none.
        blocks: of attention and feed-forward part.
        window: tokens that it sees, the last of them the one that the step reads.
        decays: of the running frequencies of the row's own routing that it sees; none if it sees tokens alone.
    """

    sizes: Sizes
    tokens: int = 4096
    pairs: int = 4096
    width: int = 48
    heads: int = 4
    hidden: int = 128
    blocks: int = 1
    window: int = 32
    decays: tuple[float, ...] = (0.0, 0.8, 0.97)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A trained network. Attributes: `kind` 'path' or 'readme'; `settings`; `leaves`, its Linen parameters as jax arrays."""

    kind: str
    settings: NetSettings
    leaves: Any

    def __getitem__(self, name: str) -> Any:
        """As the other predictors' parameters give `sizes`."""
        return getattr(self.settings, name)

    @property
    def bytes(self) -> int:
        """Of all parameters."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.leaves))


class Embedding(nn.Module):
    """Tokens, each with the pair that it makes with the one before; [B, T, width]."""

    settings: NetSettings

    @nn.compact
    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        s = self.settings
        x = nn.Embed(s.tokens + 1, s.width, name="tokens")(jnp.where(tokens_BT < 0, s.tokens, tokens_BT % s.tokens))
        if s.pairs:
            before = jnp.pad(tokens_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
            x = x + nn.Embed(s.pairs, s.width, name="pairs")(pair_bucket(before, tokens_BT, s.pairs))
        return x


def pair_bucket(before: Int[Array, "*N"], token: Int[Array, "*N"], buckets: int) -> Int[Array, "*N"]:
    """A multiplicative hash of two ids."""
    mixed = before.astype(jnp.uint32) * jnp.uint32(2654435761) + token.astype(jnp.uint32) * jnp.uint32(2246822519)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(3266489917)
    return ((mixed ^ (mixed >> 13)) % jnp.uint32(buckets)).astype(jnp.int32)


class CausalAttention(nn.Module):
    """Attention of each of the last `queries` positions over the `window` that ends with it, with a learned bias for each distance."""

    settings: NetSettings

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], there_BT: Bool[Array, "B T"], queries: int) -> Float[Array, "B Q D"]:
        s, T = self.settings, x_BTD.shape[1]
        shape = (s.heads, s.width // s.heads)
        q = nn.DenseGeneral(shape, use_bias=False, name="q")(x_BTD[:, T - queries :])
        k, v = (nn.DenseGeneral(shape, use_bias=False, name=name)(x_BTD) for name in ("k", "v"))
        bias = self.param("distance", nn.initializers.zeros, (s.heads, s.window))
        distance = jnp.arange(T - queries, T)[:, None] - jnp.arange(T)
        seen = ((distance >= 0) & (distance < s.window))[None, None] & there_BT[:, None, None]
        scores = jnp.einsum("bqhc,bkhc->bhqk", q, k) * shape[1] ** -0.5 + bias[:, jnp.clip(distance, 0, s.window - 1)]
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), -1)
        return nn.DenseGeneral(s.width, axis=(-2, -1), use_bias=False, name="o")(jnp.einsum("bhqk,bkhc->bqhc", weights, v))


def frequencies(used_BTLE: Float[Array, "B T L E"], decay: float) -> Float[Array, "B T L E"]:
    """What a row's running frequency is before each position, divided by the weight of all positions so far; 0 at the first."""
    T = used_BTLE.shape[1]
    age = np.arange(T)[:, None] - 1 - np.arange(T)
    weight = np.where(age >= 0, float(decay) ** np.maximum(age, 0), 0.0)
    weight = weight / np.maximum(weight.sum(1, keepdims=True), 1e-9)
    return jnp.einsum("tu,bule->btle", jnp.asarray(weight, jnp.float32), used_BTLE)


def init_rows(settings: NetSettings, rows: int) -> State:
    """Rows that have seen nothing."""
    s = settings.sizes
    n = len(settings.decays)
    return {
        "tokens": np.full((rows, settings.window), -1, np.int32),
        "sums": np.zeros((rows, n, s.layers, s.experts), np.float32),
        "weights": np.zeros((rows, n), np.float32),
    }


def remember(settings: NetSettings, state: State, rows: np.ndarray, tokens: np.ndarray, ids: np.ndarray) -> State:
    """Every row a token on."""
    last = state["tokens"]
    last[rows, :-1] = last[rows, 1:]
    last[rows, -1] = tokens
    if settings.decays:
        decay = np.asarray(settings.decays, np.float32)
        used = one_hot(ids, settings.sizes.experts)[:, None]
        state["sums"][rows] = state["sums"][rows] * decay[:, None, None] + used
        state["weights"][rows] = state["weights"][rows] * decay + 1
    return state


def forget(settings: NetSettings, state: State, rows: np.ndarray) -> State:
    """The rows as if they had seen nothing."""
    state["tokens"][rows] = -1
    state["sums"][rows] = 0
    state["weights"][rows] = 0
    return state


def look(settings: NetSettings, state: State, rows: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the network sees: tokens [B, W + 1], the last of them the step's, and recent routing [B, n, L, E].

    The first token is out of attention's sight: it makes the pair of the second.

    Raises:
        ValueError: a token is not known.
    """
    if (np.asarray(tokens) < 0).any():
        raise ValueError("the predictor reads tokens, and was given none: the trace holds no token ids")
    seen = np.concatenate([state["tokens"][rows], np.asarray(tokens, np.int32)[:, None]], 1)
    recent = state["sums"][rows] / np.maximum(state["weights"][rows], 1e-9)[..., None, None]
    return seen, recent


def padded(x: np.ndarray, rows: int) -> np.ndarray:
    """The array with so many rows, zeros behind."""
    return x if len(x) == rows else np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])


def bucket(rows: int) -> int:
    """The smallest size that takes these rows.

    Raises:
        ValueError: none does.
    """
    if rows > BUCKETS[-1]:
        raise ValueError(f"{rows} rows at once are more than the {BUCKETS[-1]} that the network takes")
    return next(size for size in BUCKETS if size >= rows)


def learned_predictor(name: str, module: Callable[[NetSettings], nn.Module]) -> Predictor:
    """The predictor that a network makes.

    Args:
        name: its kind.
        module: settings -> Linen module with `probabilities(tokens [B, T], recent [B, Q, n, L, E]) -> [B, Q, M + 1, L, E]`, of the last Q positions.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def apply(settings: NetSettings, leaves, tokens_BW, recent_BNLE):
        net: Any = module(settings)
        return net.apply({"params": leaves}, tokens_BW, recent_BNLE[:, None], method="probabilities")[:, -1]

    def fit(traces: Sequence[Trace], seed: int = 0, *, train: Callable | None = None, **settings: Any) -> Fitted:
        """Trains it by `train`, which is `jaxmoe.train.path_predictor.train`: training stands on a higher floor, so it comes in."""
        if train is None:
            raise ValueError(f"the {name} predictor is trained by jaxmoe.train.path_predictor.train: give it as train=, or load trained parameters")
        return train(traces, name, seed=seed, **settings)

    def before_each(params: Fitted, state: State, rows: np.ndarray, tokens: np.ndarray) -> Float32[np.ndarray, "B M1 L E"]:
        """The paths of this step and of the next."""
        seen, recent = look(params.settings, state, rows, tokens)
        size = bucket(len(seen))
        return np.asarray(apply(params.settings, params.leaves, padded(seen, size), padded(recent, size)))[: len(seen)]

    return Predictor(
        name,
        fit,
        init=lambda params, rows: init_rows(params.settings, rows),
        before_each=before_each,
        at_each=silent_at,
        after=lambda params, state, rows, tokens, ids: remember(params.settings, state, rows, tokens, ids),
        reset=lambda params, state, rows: forget(params.settings, state, rows),
        ahead=True,
        within=False,
    )
