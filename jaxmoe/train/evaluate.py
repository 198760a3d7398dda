"""What a trained model is worth: held-out loss per domain, and how far its routing repeats itself."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxmoe.cache.full import FullState
from jaxmoe.experts import ResidentBank
from jaxmoe.nn.transformer import forward
from jaxmoe.spec import ModelSpec
from jaxmoe.train.corpus import Corpus, windows
from jaxmoe.train.loss import sequences, token_nll
from pallas_kernels.dispatch import Kernels


def make_scorer(spec: ModelSpec, params: dict, bank: ResidentBank) -> Callable:
    """The jitted `tokens [B, T + 1] -> (nll [B, T] in nats, expert ids [L, B * T, A])`; no assignment is dropped."""
    kernels = Kernels("cpu", row_invariant=False)

    @jax.jit
    def score(tokens):
        b = tokens.shape[0]
        batch = sequences(tokens[:, :-1])
        logits, _, _, aux = forward(spec, params, bank, FullState(b), batch, kernels, collect=True)
        ids = jnp.concatenate([r.ids for r in aux["routed"]])
        return token_nll(logits, tokens[:, 1:].reshape(-1)).reshape(b, -1), ids

    return score


def held_out(
    score: Callable, corpus: Corpus, length: int = 512, rows: int = 8, most: int = 48
) -> tuple[dict[str, dict[str, float]], dict[str, Int[np.ndarray, "L T A"]]]:
    """Loss per domain over windows of `length` tokens that don't overlap.

    Returns:
        `{domain: {nats_per_token, bits_per_byte, tokens}}`, and the routing of each domain's windows in order.
    """
    losses, routes = {}, {}
    for domain in corpus.streams["held_out"]:
        held = windows(corpus, domain, length, most=most)
        total, ids = 0.0, []
        for at in range(0, len(held), rows):
            part = held[at : at + rows]
            padded = np.concatenate([part, np.repeat(part[:1], rows - len(part), 0)])
            nll, chosen = score(jnp.asarray(padded))
            total += float(np.asarray(nll, np.float64)[: len(part)].sum())
            ids.append(np.asarray(chosen)[:, : len(part) * length])
        tokens = len(held) * length
        per_token = corpus.manifest["domains"][domain]["held_out"]["bytes_per_token"]
        nats = total / tokens
        losses[domain] = {"nats_per_token": nats, "bits_per_byte": nats / math.log(2) / per_token, "tokens": tokens}
        routes[domain] = np.concatenate(ids, axis=1)
    return losses, routes


def lru_hit_rate(ids_LTA: Int[np.ndarray, "L T A"], slots: int) -> float:
    """Hits of a least-recently-used cache of `slots` experts a layer, decoding token by token, over distinct experts asked for."""
    hits = asked = 0
    for layer in ids_LTA:
        cache: OrderedDict[int, None] = OrderedDict()
        for chosen in layer:
            for expert in map(int, chosen):
                asked += 1
                if expert in cache:
                    hits += 1
                    cache.move_to_end(expert)
                else:
                    if len(cache) >= slots:
                        cache.popitem(last=False)
                    cache[expert] = None
    return hits / asked
