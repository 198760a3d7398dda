"""Attention over keys that are divided over the devices of a mesh axis: keys travel to the queries, or queries to the keys.

Both go round the ring of devices and use its links in both directions, half of what travels each way. `choose` says which of them sends fewer bytes.

- `ring`: keys and values travel (Ring Attention, arXiv:2310.01889), here half of each block to either side.
- `token_ring`: queries travel, and what they have found follows them one hop behind, so that it is home after n hops.
- `token_ring_direct`: as TokenRing is published (arXiv:2412.20501): queries go one way, and each result straight home the other way. Over links
  between neighbours alone, a result from s hops away takes s links (or n - s, the short way); `token_ring` takes one a hop.

All are called under `shard_map`. They know positions, not how these were dealt out, so any division is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxmoe import formats
from jaxmoe.cache.masks import seen
from jaxmoe.cache.merge import Partial, attend_block, finish, merge_partials, of_sinks
from jaxmoe.spec import AttentionSpec

Tree = TypeVar("Tree")
Way = Literal["ring", "token", "direct"]

_SIDES = (1, -1)
"""Where the first half of what travels goes, and where the second."""


def shifted(tree: Tree, axis: str, by: int) -> Tree:
    """What the device `by` places before this one has. bfloat16 crosses as its bits: XLA's CPU backend would widen it."""
    n = jax.lax.axis_size(axis)

    def one(x):
        narrow = x.dtype == jnp.bfloat16
        moved = jax.lax.ppermute(formats.store(x, "bfloat16") if narrow else x, axis, [(i, (i + by) % n) for i in range(n)])
        return formats.load(moved, x.dtype) if narrow else moved

    return jax.tree.map(one, tree)


def _shifted_result(part: Partial, axis: str, by: int) -> Partial:
    """In two messages: o, whose rows fill a TPU's tiles, and the two numbers beside it."""
    o, (m, l) = shifted((part.o, jnp.stack([part.m, part.l])), axis, by)
    return Partial(o, m, l)


def ring(blocks: Sequence[Any], partial: Callable[[Any], Partial], axis: str) -> Partial:
    """Blocks of keys visit every device, which attends to each.

    A block is sent on while it is attended to, and the next hop waits for both: two blocks are held at a time, not n.

    Args:
        blocks: this device's, one pytree or two; the first goes to the next device, the second to the one before.
        partial: the local queries over a block.
        axis: of the mesh.

    Returns:
        The local queries' result over the blocks of all devices.
    """
    n = jax.lax.axis_size(axis)
    total = None
    for hop in range(n):
        sent = [shifted(block, axis, side) for block, side in zip(blocks, _SIDES, strict=False)] if hop < n - 1 else []
        for block in blocks:
            found = partial(block)
            total = found if total is None else merge_partials(total, found)
        if sent:
            blocks, total = jax.lax.optimization_barrier((sent, total))
    assert total is not None, "there is at least one block"
    return total


def token_ring(queries: Sequence[Any], partial: Callable[[Any], Partial], axis: str) -> list[Partial]:
    """Queries visit every device, which attends from each to its own keys; results follow one hop behind.

    Args:
        queries: this device's, one pytree or two; the first goes to the next device, the second to the one before.
        partial: queries over the local keys.
        axis: of the mesh.

    Returns:
        Of each of `queries` its result over the keys of all devices.
    """
    n = jax.lax.axis_size(axis)
    carried: list[Partial] = []
    for hop in range(n):
        sent = [shifted(query, axis, side) for query, side in zip(queries, _SIDES, strict=False)] if hop < n - 1 else []
        found = [partial(query) for query in queries]
        if sent:
            queries, found = jax.lax.optimization_barrier((sent, found))
        carried = [merge_partials(c, f) for c, f in zip(carried, found, strict=True)] if hop else found
        if n > 1:
            carried = [_shifted_result(c, axis, side) for c, side in zip(carried, _SIDES, strict=False)]
    return carried


def token_ring_direct(query: Any, partial: Callable[[Any], Partial], axis: str) -> Partial:
    """Queries go to the next device, hop after hop, and each result straight back to where its queries came from.

    Args, Returns:
        See `token_ring`, for all of a device's queries in one.
    """
    total = partial(query)
    for hop in range(1, jax.lax.axis_size(axis)):
        query = shifted(query, axis, 1)
        total = merge_partials(total, _shifted_result(partial(query), axis, -hop))
    return total


def halves(tree: Tree) -> list[Tree]:
    """A pytree cut in two along the first axis of every leaf; whole where there is only one entry."""
    n = min(x.shape[0] for x in jax.tree.leaves(tree))
    bounds = ((0, n // 2), (n // 2, n)) if n > 1 else ((0, n),)
    return [jax.tree.map(lambda x, a=a, b=b: x[a:b], tree) for a, b in bounds]


# --- Bytes


def value_width(spec: AttentionSpec) -> int:
    """Channels of a head's result."""
    _, _, value = spec.cached
    return spec.latent.kv_rank if value is None and spec.latent is not None else value or 0


def key_bytes(spec: AttentionSpec, keys: int, held: int) -> int:
    """Bytes of so many keys and values, each number `held` bytes, and their positions: what `ring` sends a hop."""
    kv_heads, key, value = spec.cached
    return keys * (kv_heads * (key + (value or 0)) * held + 4)


def query_bytes(spec: AttentionSpec, tokens: int, held: int, places: int) -> int:
    """Bytes of so many queries, each number `held` bytes, and of `places` int32 numbers that say where they are."""
    return tokens * spec.heads * spec.cached[1] * held + 4 * places


def result_bytes(spec: AttentionSpec, tokens: int) -> int:
    """Bytes of so many tokens' (o, m, l), all float32: rounding o at every hop would be rounding n times."""
    return tokens * spec.heads * (value_width(spec) + 2) * 4


def traffic(way: Way, n: int, keys: int, queries: int, results: int) -> tuple[float, float]:
    """Bytes that each of n devices sends to the next one and to the one before, for one attention.

    Args:
        way: 'ring', 'token' (`token_ring`) or 'direct' (`token_ring_direct`, over links between any two devices).
        n: devices.
        keys, queries, results: `key_bytes`, `query_bytes` and `result_bytes` of a device's own.
    """
    if way == "ring":
        return (n - 1) * keys / 2, (n - 1) * keys / 2
    if way == "token":
        each = ((n - 1) * queries + n * results) / 2 if n > 1 else 0.0
        return each, each
    return float((n - 1) * queries), float((n - 1) * results)


def choose(n: int, keys: int, queries: int, results: int) -> Literal["ring", "token"]:
    """Whether keys travel or queries: what sends fewer bytes each way.

    With as many keys as queries on a device, queries never win: (C b + 4 V + 8) H a token against (C + V) b K. They win where a step adds few tokens
    to many that are cached, by about the ratio of the two. (The comparison that is published, against keys that travel one way and with results of 2
    bytes, has queries win at H = K.)

    Args:
        n, keys, queries, results: see `traffic`.
    """
    return "token" if max(traffic("token", n, keys, queries, results)) < max(traffic("ring", n, keys, queries, results)) else "ring"


# --- Attention with tokens on one axis


def ring_attention(
    q: Float[Array, "T H C"],
    k: Num[Array, "S K C"],
    v: Num[Array, "S K V"] | None,
    q_positions: Int[Array, "T"],
    k_positions: Int[Array, "S"],
    spec: AttentionSpec,
    axis: str,
    q_segments: Int[Array, "T"] | None = None,
    k_segments: Int[Array, "S"] | None = None,
    sinks: Float[Array, "H"] | None = None,
    way: Way = "ring",
) -> Float[Array, "T H V"]:
    """Attention from local queries to the keys of all devices.

    Args:
        q: in the dtype that products are computed in.
        k, v: float32, bfloat16, or bfloat16 held as uint16; v is None where values are the keys' first channels.
        q_positions, k_positions: absolute positions; -1 for a key that isn't there.
        spec: masks and scale.
        axis: of the mesh; called under `shard_map`.
        q_segments, k_segments: sequences that queries and keys belong to, all one if None.
        sinks: a logit per head that takes part in the softmax and adds nothing.
        way: what travels; see the module.

    Returns:
        In q's dtype; zeros for a query that sees no key.
    """
    query, block = (q, q_positions, q_segments), (k, v, k_positions, k_segments)

    def over(query, block) -> Partial:
        return _flat(spec, query, block)

    if way == "ring":
        found = ring(halves(block), lambda block: over(query, block), axis)
    elif way == "token":
        parts = token_ring(halves(query), lambda query: over(query, block), axis)
        found = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    else:
        found = token_ring_direct(query, lambda query: over(query, block), axis)
    return finish(found if sinks is None else merge_partials(found, of_sinks(sinks, found))).astype(q.dtype)


def _flat(spec: AttentionSpec, query, block) -> Partial:
    """Of shape [T, H]."""
    (q, at_query, of_query), (k, v, at_key, of_key) = query, block
    (tokens, heads, c), kv_heads = q.shape, k.shape[1]
    group = heads // kv_heads
    visible = seen(spec, at_query[:, None], at_key) & (at_key >= 0)
    if of_query is not None:
        visible &= of_query[:, None] == of_key
    rows = q.reshape(tokens, kv_heads, group, c).transpose(1, 0, 2, 3).reshape(kv_heads, tokens * group, c)
    values = k[..., : value_width(spec)] if v is None else v
    found = attend_block(rows, k.transpose(1, 2, 0), values.transpose(1, 0, 2), jnp.repeat(visible, group, 0), spec.softmax_scale)
    return by_token(found, tokens)


def by_token(part: Partial, tokens: int) -> Partial:
    """From [K, tokens * G] to [tokens, H]."""
    kv_heads = part.m.shape[0]

    def turned(x: jax.Array) -> jax.Array:
        x = x.reshape(kv_heads, tokens, -1, *x.shape[2:])
        return jnp.moveaxis(x, 0, 1).reshape(tokens, -1, *x.shape[3:])

    return Partial(*map(turned, part))
