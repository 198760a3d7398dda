"""Which experts a token asks for, as a table by token: from recordings of real models, or drawn with as much reuse and as many topics as one wants.

Such a table is what serving in virtual time knows of a model. What it keeps of a recording: which experts go together in a token, how unevenly they
are used, and that parts of a text differ. What it loses: generated tokens come in another order than they were recorded in.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int16

from jaxmoe.offload.trace import Trace


@dataclasses.dataclass(frozen=True, eq=False)
class Routed:
    """Attributes: `name`; `table`, experts of token `v`; `experts` of a layer; `expert_bytes` of one; `topics`, (from, to) of tokens that belong
    together; `source`, for people."""

    name: str
    table: Int16[np.ndarray, "V L A"]
    experts: int
    expert_bytes: int
    topics: tuple[tuple[int, int], ...]
    source: str

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """[T, L, A] of tokens [T]."""
        return self.table[tokens]

    @property
    def layers(self) -> int:
        """L."""
        return self.table.shape[1]

    @property
    def reuse(self) -> float:
        """Share of a token's experts that another token of its topic asks for too, on average over all pairs of a topic."""
        used = np.zeros((len(self.table), self.layers, self.experts), np.float32)
        np.put_along_axis(used, self.table.astype(np.int64), 1, axis=2)
        shares = []
        for a, b in self.topics:
            flat = used[a:b].reshape(b - a, -1)
            pairs = flat @ flat.T
            shares.append((pairs.sum() - np.trace(pairs)) / max(1, (b - a) * (b - a - 1)))
        return float(np.mean(shares)) / (self.layers * self.table.shape[2])

    def text(self, topic: int, tokens: int, at: int) -> tuple[int, ...]:
        """A passage of a topic from its token `at` on, which goes round where it comes to the end."""
        a, b = self.topics[topic % len(self.topics)]
        return tuple((a + (at + np.arange(tokens)) % (b - a)).tolist())


def recorded(trace: Trace, name: str, topics: int = 2) -> Routed:
    """A recording's tokens, cut into parts of equal length as topics. Of experts of several sizes all count as their mean.

    Raises:
        ValueError: tokens are fewer than topics.
    """
    whole = (trace.ids >= 0).all((1, 2))
    table = trace.ids[whole]
    if len(table) < topics:
        raise ValueError(f"{name}: {len(table)} tokens can't be cut into {topics} topics")
    edges = np.linspace(0, len(table), topics + 1).astype(int).tolist()
    parts = tuple(zip(edges, edges[1:], strict=False))
    return Routed(name, table, trace.experts, int(trace.expert_bytes.mean()), parts, f"recording of {trace.meta['model']}, {len(table)} tokens")


def drawn(
    layers: int = 8, experts: int = 128, active: int = 8, topics: int = 2, tokens: int = 256, reuse: float = 0.45, expert_bytes: int = 3_000_000,
    seed: int = 0,
) -> Routed:  # fmt: skip
    """Routing with a given reuse: every topic has `active` experts of its own in a layer; a token asks for each of them with some probability, and
    for the rest anywhere.

    Args:
        layers, experts, active: L, E, A.
        topics: how many.
        tokens: of each topic.
        reuse: share of a token's experts that another token of the topic asks for too, about, from what chance alone gives to 1.
        expert_bytes: of one expert of one layer.
        seed: of the draws.

    Raises:
        ValueError: the reuse is outside [0, 1], or the topics have too few experts.
    """
    if not 0 <= reuse <= 1 or topics * active > experts:
        raise ValueError(f"a reuse of {reuse} with {topics} topics of {active} experts among {experts}: give 0 to 1, and enough experts")
    rng = np.random.default_rng([seed, layers, experts, active, topics])
    home = np.stack([rng.permutation(experts)[: topics * active].reshape(topics, active) for _ in range(layers)], axis=1)  # [topics, L, A]
    score = rng.random((topics, tokens, layers, experts))
    own = rng.random((topics, tokens, layers, active)) < np.sqrt(reuse)
    at = np.broadcast_to(home[:, None], own.shape)
    np.put_along_axis(score, at, np.where(own, 2.0, np.take_along_axis(score, at, axis=3)), axis=3)
    table = np.argsort(-score, axis=3, kind="stable")[..., :active].astype(np.int16).reshape(topics * tokens, layers, active)
    parts = tuple((k * tokens, (k + 1) * tokens) for k in range(topics))
    source = f"drawn: {topics} topics, reuse {reuse:g}, seed {seed}"
    return Routed(f"synthetic, reuse {reuse:g}", table, experts, expert_bytes, parts, source)
