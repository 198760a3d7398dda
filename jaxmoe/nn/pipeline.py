"""Layers that are divided among the devices of a mesh axis, one group after another: a step's tokens pass them in parts, so that all work at once.

In tick t the device of stage s has part t - s of the tokens (GPipe, arXiv:1811.06965, forward alone). Parts that aren't there are padding, which is
routed nowhere and written nowhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.cache.batch import Batch

AXIS = "stage"


def run_stages(
    layers: Callable[[Any, Any, Batch], tuple[Any, Any]], stages: int, x: Any, kept: Any, batch: Batch, whole: bool = False
) -> tuple[Any, Any]:
    """Passes tokens through all stages, inside `shard_map`.

    Args:
        layers: `(x, kept, batch) -> (x, kept)`, this stage's.
        stages: how many there are.
        x: a tree of [T, ...], or scalars that are one for all tokens, the same on every stage: what the layers before gave.
        kept: what each stage keeps, such as caches.
        batch: the tokens.
        whole: pass all tokens at once: where a prompt's tokens are divided among devices, a part of one may need keys of a later part of another.

    Returns:
        x after the last stage, on every stage, and what is kept.
    """
    n = 1 if whole else parts_of(batch, stages)
    stage, last = jax.lax.axis_index(AXIS), stages - 1
    onward = [(i, (i + 1) % stages) for i in range(stages)]
    given = jax.tree.map(lambda t: t.reshape(n, -1, *t.shape[1:]) if t.ndim else jnp.broadcast_to(t, (n,)), x)

    def tick(t, carry):
        here, out, kept = carry
        part = jnp.clip(t - stage, 0, n - 1)
        active = (t - stage >= 0) & (t - stage < n)
        here = jax.tree.map(lambda new, old: jnp.where(stage == 0, new[jnp.minimum(t, n - 1)], old), given, here)
        here, kept = layers(here, kept, _part(batch, part, n, active))
        done = active & (stage == last)
        out = jax.tree.map(lambda all, one: all.at[part].set(jnp.where(done, one, all[part])), out, here)
        return jax.tree.map(lambda y: jax.lax.ppermute(y, AXIS, onward), here), out, kept

    empty = jax.tree.map(lambda t: jnp.zeros_like(t[0]), given)
    _, out, kept = jax.lax.fori_loop(0, n + stages - 1, tick, (empty, jax.tree.map(jnp.zeros_like, given), kept))
    summed = jax.tree.map(lambda t: jax.lax.psum(jnp.where(stage == last, t, jnp.zeros_like(t)), AXIS).astype(t.dtype), out)
    return jax.tree.map(lambda t, like: t.reshape(like.shape) if like.ndim else t[0], summed, x), kept


def parts_of(batch: Batch, stages: int) -> int:
    """Into how many parts a batch is cut: one a stage, or as many of them as its runs divide into."""
    runs = batch.tokens.shape[0] // batch.run
    return max(n for n in range(1, stages + 1) if runs % n == 0)


def _part(batch: Batch, part: jax.Array, n: int, active: jax.Array) -> Batch:
    """Part `part` of n of the tokens; padding if not `active`."""

    def cut(x):
        size = x.shape[0] // n
        return jax.lax.dynamic_slice_in_dim(x, part * size, size)

    names = ("tokens", "positions", "segments", "run_segments", "run_positions", "run_lengths")
    cuts = {name: cut(jnp.asarray(getattr(batch, name))) for name in names}
    cuts["segments"] = jnp.where(active, cuts["segments"], -1)
    runs = cuts["run_segments"].shape[0]
    there = jnp.where(active, jnp.clip(batch.n_runs - part * runs, 0, runs), 0).astype(jnp.int32)
    return dataclasses.replace(batch, n_runs=there, grouped=True, **cuts)
