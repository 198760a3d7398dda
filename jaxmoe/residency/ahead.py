"""Policies that keep what is needed soonest: Belady's on a known future, next-use lookahead on a predicted one, and ExpertFlow's cache.

Where the future is not known, an expert is worth minus the steps until it is expected to be used again: at its next chance with the predicted
probability, failing that at the one after, and beyond what is predicted at its recent rate.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmoe import formats
from jaxmoe.residency.counts import count, no_counts, no_stamps, rate, stamp
from jaxmoe.residency.policy import FORESEEN, Keep, Knowledge, Policy, Shape, Tables

NEVER = np.iinfo(np.int32).max
"""The next use of an expert that the known future does not use."""


def next_uses(used_SLE: Bool[np.ndarray, "S L E"], never: int) -> Int[np.ndarray, "S L E"]:
    """The next step after each that asks for each expert; `never` where none does."""
    out_SLE = np.empty(used_SLE.shape, np.int32)
    coming_LE = np.full(used_SLE.shape[1:], never, np.int32)
    for s in range(len(used_SLE) - 1, -1, -1):
        out_SLE[s] = coming_LE
        coming_LE[used_SLE[s]] = s
    return out_SLE


def _known(shape: Shape, knowledge: Knowledge) -> Tables:
    """`next` [L, S, E]; every layer's steps are counted by its own clock, and steps that ask it for nothing are none."""
    used_LSE = np.asarray(knowledge.future, bool).swapaxes(0, 1)
    rows = []
    for used_SE in used_LSE:
        active = used_SE[used_SE.any(1)]
        rows.append(np.concatenate([next_uses(active[:, None], NEVER)[:, 0], np.full((len(used_SE) - len(active), shape.experts), NEVER, np.int32)]))
    return no_stamps(shape) | {"next": jnp.asarray(np.stack(rows))}


def _keep_known(row: Tables) -> Keep:
    """The soonest used again stays; where the run outlives what is known of it, the last used."""
    steps = row["next"].shape[0]
    at = jnp.clip(row["clock"] - 1, 0, steps - 1)
    coming = jnp.where((row["clock"] >= 1) & (row["clock"] <= steps), row["next"][at], NEVER)
    return -coming.astype(jnp.float32), row["stamp"]


OPT = Policy("opt", _known, stamp, _keep_known, bypass=True, needs=("future",))
"""Belady's optimum with bypass, on a future that is known: Read-ME's cache (arXiv 2410.19123), where the router runs ahead of the model."""


def predicted(tables: Tables) -> Float[Array, "... M E"]:
    """Predicted probabilities, and the recent rate where nothing was predicted (-1)."""
    return jnp.where(tables[FORESEEN] < 0, rate(tables)[..., None, :], tables[FORESEEN])


def steps_until_use(p: Float[Array, "... M E"], tables: Tables) -> Float[Array, "... E"]:
    """Expected steps from one chance to the use, where the chances come a step apart: `p[0]` is the first one's, 0 steps away."""
    wait = 1.0 / rate(tables)
    for m in range(p.shape[-2] - 1, -1, -1):
        wait = formats.rounded((1.0 - p[..., m, :]) * (1.0 + wait if m + 1 < p.shape[-2] else wait))
    return wait


def _keep_soonest(row: Tables) -> Keep:
    return -steps_until_use(predicted(row)[1:], row), row["stamp"]


LOOKAHEAD = Policy("lookahead", no_counts, count, _keep_soonest, bypass=True, foresees=True)
"""Next-use lookahead: Belady's rule, with bypass, on what any predictor says of the next steps, recent rates beyond."""


def until_turn(layers: int, layer: Int[Array, ""] | int) -> Int[Array, "L"]:
    """Layers from the one that runs to each one's next turn: 1 for the next one, L for the running one itself."""
    return (jnp.arange(layers) - layer - 1) % layers + 1


def _keep_path(tables: Tables, layer) -> Keep:
    """Layers that have not run yet have a chance in this step, the others in the next."""
    p = predicted(tables)
    layers = p.shape[0]
    later = (jnp.arange(layers) > layer)[:, None]
    wait = jnp.where(later, steps_until_use(p, tables), steps_until_use(p[:, 1:], tables))
    return -(wait + until_turn(layers, layer)[:, None] / layers), tables["stamp"]


PLEC = Policy("plec", no_counts, count, keep_all=_keep_path, bypass=True, foresees=True)
"""ExpertFlow's predictive locality-aware cache (arXiv 2410.17954): one pool whose slots go to the layers in proportion to the experts that they are
predicted to need, freed as a layer has run and refilled for those to come, and corrected as the true routing appears. Here that is one rule: what
is expected to be needed last, counted from the layer that runs, leaves or does not enter. Without that last part a batch that asks for more than it
will need again floods the pool. Slots by layer follow from it instead of being planned. Bringing experts ahead of their turn is prefetch's business.
"""
