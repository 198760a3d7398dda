"""In which order a cache's axes lie in memory."""

from __future__ import annotations

import jax
from jax.experimental.layout import Layout, with_layout_constraint

LANES = 128
"""Numbers in the last axis of a TPU's tile."""


def as_it_lies(cache: jax.Array, tpu: bool) -> jax.Array:
    """A cache or a piece of one, rows [L, B, K, .., ..] or pages [N, K, ..], laid out as caches are given: the layout that a new piece is made or
    used in would else become the whole cache's, by a copy of it.

    On TPUs, values [.., S, C] have their positions last where their channels would have to be filled up, as XLA gives them by default.
    """
    n = cache.ndim
    narrow = tpu and n == 5 and cache.shape[-1] % LANES and not cache.shape[-2] % LANES
    return with_layout_constraint(cache, Layout((0, 1, 2, 4, 3) if narrow else tuple(range(n))))
