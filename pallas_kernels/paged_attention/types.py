"""What paged attention works on: pages of keys and values, and the queries of many sequences on one axis."""

from __future__ import annotations

import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, UInt32


@flax.struct.dataclass
class Pages:
    """A flat pool of pages: all layers', one after another, so that no layer is ever sliced out (page ids are then global).

    On TPUs, pages are to be kept as `packed` gives them: there, XLA stores an array whose last axis is no multiple of 128 so that a kernel could read
    it only from a copy of it. Every implementation takes both forms.

    Attributes:
        k: [P, K, W, C] keys: float32, bfloat16 held as uint16, or int8 with scales.
        v: [P, K, W, V] values, held as the keys; None where a key's first `value_width` channels are the value (MLA's latent).
        k_scales, v_scales: float32 [P, K, W], what int8 keys and values are to be multiplied with.
        bias: float32 [P, 1 or K, W] added to a key's scores after scaling and soft cap: the logarithm of how many tokens a slot stands for, or -inf
            for a dead one.
        value_width: V where `v` is None.
    """

    k: Num[Array, "P K W C"]
    v: Num[Array, "P K W V"] | None = None
    k_scales: Float[Array, "P K W"] | None = None
    v_scales: Float[Array, "P K W"] | None = None
    bias: Float[Array, "P KorOne W"] | None = None
    value_width: int | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def width_of_values(self) -> int:
        """V."""
        return self.v.shape[-1] if self.v is not None else self.value_width or 0


LANES = 128


def tokens_per_row(pages: Pages) -> int:
    """f of `packed`: the fewest tokens whose keys, and whose values, fill whole rows of 128 channels."""
    f = max(LANES // math.gcd(LANES, x.shape[-1]) for x in (pages.k, pages.v) if x is not None)
    return f if pages.k.shape[2] % f == 0 else 1


def packed(pages: Pages) -> Pages:
    """Pages with f tokens to a row. Free where the pool is kept so: XLA takes out two reshapes.

    Returns:
        k [P, K, W / f, f * C], v [P, K, W / f, f * V], scales and bias [P, 1, K * W] (a bias of all heads [P, 1, W]).
    """
    f = tokens_per_row(pages)

    def rows(x):
        return None if x is None else x.reshape(*x.shape[:2], x.shape[2] // f, f * x.shape[3])

    def flat(x):
        return None if x is None else x.reshape(x.shape[0], 1, -1)

    return Pages(rows(pages.k), rows(pages.v), flat(pages.k_scales), flat(pages.v_scales), flat(pages.bias), pages.value_width)


def unpacked(pages: Pages, head_dim: int) -> Pages:
    """The inverse of `packed`, for keys of `head_dim` channels; pages that are not packed stay as they are.

    Raises:
        ValueError: a row of keys is not a whole number of tokens'.
    """
    p, heads, rows, channels = pages.k.shape
    if channels % head_dim:
        raise ValueError(f"expected keys [P, K, W, C] or, packed, [P, K, W / f, f * C] for C = {head_dim}, got {list(pages.k.shape)}")
    f = channels // head_dim
    width = rows * f

    def split(x):
        return None if x is None else x.reshape(*x.shape[:2], x.shape[2] * f, x.shape[3] // f)

    def by_head(x):
        return x.reshape(p, heads, width) if x is not None and x.shape == (p, 1, heads * width) else x

    return Pages(split(pages.k), split(pages.v), by_head(pages.k_scales), by_head(pages.v_scales), by_head(pages.bias), pages.value_width)


@flax.struct.dataclass
class Queries:
    """Which rows of the query axis belong to which sequence, and where its keys are.

    Row i of sequence b (`rows[b] + i`, i below `lengths[b]`) is at position `first[b] + i`, counted from the first key of the page table. It sees
    the keys before `first[b]`, and of those from there on the ones up to its own position; with `tree`, those whose bit it has.

    Attributes:
        page_table: int32 [B, X]; entry x holds keys `x * W` to `(x + 1) * W - 1`. Entries past the last key are not read.
        rows: int32 [B] first row of each sequence.
        lengths: int32 [B] rows of each sequence; 0 for none.
        keys: int32 [B] keys of each sequence, this step's included.
        first: int32 [B] position of the first row: `keys - lengths`, unless the page table holds only a part of the keys.
        tree: uint32 [T, U] or None: row t sees key `first[b] + j` if bit j % 32 of word j // 32 is set.
        most: no sequence has more rows than this (static); 1 in plain decoding.
    """

    page_table: Int[Array, "B X"]
    rows: Int[Array, "B"]
    lengths: Int[Array, "B"]
    keys: Int[Array, "B"]
    first: Int[Array, "B"]
    tree: UInt32[Array, "T U"] | None = None
    most: int = flax.struct.field(pytree_node=False, default=1)


@flax.struct.dataclass
class Partial:
    """Attention over some of the keys, to be merged with that over others.

    Attributes:
        o: float32 [T, H, V], the sum of exp(score - m) times value: not divided by l.
        m: float32 [T, H], the largest score; -inf where no key was seen.
        l: float32 [T, H], the sum of exp(score - m).
    """

    o: Float[Array, "T H V"]
    m: Float[Array, "T H"]
    l: Float[Array, "T H"]


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of both, which must not overlap. Exact in real numbers, whatever the split (Milakov and Gimelshein 2018)."""
    m = jnp.maximum(a.m, b.m)
    parts = [jnp.where(p.m == -jnp.inf, 0.0, jnp.exp(p.m - jnp.where(m == -jnp.inf, 0.0, m))) for p in (a, b)]
    return Partial(a.o * parts[0][..., None] + b.o * parts[1][..., None], m, a.l * parts[0] + b.l * parts[1])


def merge_axis(parts: Partial) -> Partial:
    """`merge` over the first axis of every array of `parts`."""
    m = parts.m.max(0)
    scale = jnp.where(parts.m == -jnp.inf, 0.0, jnp.exp(parts.m - jnp.where(m == -jnp.inf, 0.0, m)))
    return Partial((parts.o * scale[..., None]).sum(0), m, (parts.l * scale).sum(0))


def finish(partial: Partial, sinks_H: Float[Array, "H"] | None, dtype) -> Float[Array, "T H V"]:
    """The attention's output: `o / l`; zeros where no key was seen.

    Args:
        partial: over all keys.
        sinks_H: scores of a key without a value that every query sees besides (gpt-oss's attention sinks).
        dtype: of the output.
    """
    l = partial.l
    o = partial.o
    if sinks_H is not None:
        m = jnp.maximum(partial.m, sinks_H)
        scale = jnp.where(partial.m == -jnp.inf, 0.0, jnp.exp(partial.m - m))
        o, l = o * scale[..., None], l * scale + jnp.exp(sinks_H - m)
    return jnp.where((partial.m == -jnp.inf)[..., None], 0.0, o / jnp.where(l == 0, 1.0, l)[..., None]).astype(dtype)


def plain(leaf: jax.Array, scales: jax.Array | None = None) -> jax.Array:
    """Keys or values as float32."""
    if leaf.dtype == jnp.uint16:
        leaf = jax.lax.bitcast_convert_type(leaf, jnp.bfloat16)
    x = leaf.astype(jnp.float32)
    return x if scales is None else x * scales[..., None]
