"""Keys and values of each sequence in one contiguous row, and attention over them.

On the CPU, attention goes by run and by blocks of `KEY_BLOCK` keys from position 0, with a running maximum: a block without a visible key changes
no bit, so a token's result does not depend on how long the cache is, how the prompt was cut, or what else is in the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from jaxmoe import formats
from jaxmoe.cache.batch import Batch
from jaxmoe.cache.masks import first_seen, seen, softmax_with
from jaxmoe.cache.order import as_it_lies
from jaxmoe.cache.single import KEY_BLOCK, NONE_YET, attend_single, plan_of, write_single
from jaxmoe.spec import AttentionSpec
from pallas_kernels.dense.api import MIN_ROWS
from pallas_kernels.dense.cpu import ROW_TILES, row_sum, same_order
from pallas_kernels.dispatch import Kernels
from pallas_kernels.one_kernel import part, put

BlockReader = Callable[[jax.Array], tuple[jax.Array, jax.Array | None]]
"""Block j of a sequence: keys [K, C, KEY_BLOCK] and values [K, KEY_BLOCK, V] as they are held; None where values are the keys' first channels."""


@flax.struct.dataclass
class KVState:
    """Attributes: `k` [L, B, K, C, S] and `v` [L, B, K, S, C], float32 or bfloat16 held as uint16; `v` is None where values are the keys' first
    channels, as in latent attention.

    L counts the layers that share the state, and S leaves room for one whole run past the last position. Keys lie transposed: on XLA's CPU backend
    few queries times [C, S] take a third of the time of few queries times the transpose of [S, C].
    """

    k: Num[Array, "L B K C S"]
    v: Num[Array, "L B K S C"] | None

    def logical_axes(self) -> dict[str, tuple[str | None, ...]]:
        """The logical name of every axis of every leaf."""
        head = ("layers", "batch", None if self.v is None else "kv_heads")  # latents are for all heads
        out: dict[str, tuple[str | None, ...]] = {"k": (*head, "head_dim", "positions")}
        return out if self.v is None else out | {"v": (*head, "positions", "head_dim")}

    def attend(
        self,
        spec: AttentionSpec,
        layer: Int[Array, ""],
        q: Float[Array, "T H C"],
        k: Float[Array, "T K C"],
        v: Float[Array, "T K V"] | None,
        batch: Batch,
        kernels: Kernels,
        sinks: Float[Array, "H"] | None = None,
    ) -> tuple[Float[Array, "T H V"], KVState]:
        """Adds the step's keys and values, then attends from each query to its sequence up to its own position.

        Args:
            spec: masks, scale, and with `latent` how many of a key's channels are its value.
            layer: which of the layers that share this state.
            q, k, v: of the step's tokens; v is None where the state has none.
            batch: whose tokens they are.
            kernels: on the CPU, bits don't depend on what is around a token.
            sinks: float32, a logit per head that takes part in the softmax and adds nothing.

        Returns:
            Outputs in q's dtype (zeros in padding), and the state with the keys and values written.
        """
        if kernels.backend == "cpu":
            return _attend_runs(self, spec, layer, q, k, v, batch, kernels, sinks)
        return _attend_gathered(self, spec, layer, q, k, v, batch, sinks, kernels.backend == "tpu")


def init_kv(shape: tuple[int, int, int | None], layers: int, rows: int, positions: int, max_run: int, dtype: str) -> KVState:
    """An empty cache.

    Args:
        shape: heads, channels of a key, and of a value (None: values are the keys' first channels), as `AttentionSpec.cached` has them.
        layers: how many layers share it.
        rows, positions: sequences, and tokens of each.
        max_run: the longest run that is written.
        dtype: 'float32' or 'bfloat16'.
    """
    kv_heads, key, value = shape
    length = -(-(positions + max_run) // KEY_BLOCK) * KEY_BLOCK
    head, held = (layers, rows, kv_heads), formats.leaf_dtype(dtype)
    return KVState(jnp.zeros((*head, key, length), held), None if value is None else jnp.zeros((*head, length, value), held))


def _value_width(state: KVState, spec: AttentionSpec) -> int:
    if state.v is not None:
        return state.v.shape[-1]
    assert spec.latent is not None, "a cache without values is one of latents"
    return spec.latent.kv_rank


def _held(x: jax.Array, like: jax.Array) -> jax.Array:
    return formats.store(x, "bfloat16" if like.dtype == jnp.uint16 else "float32")


def _attend_runs(state: KVState, spec: AttentionSpec, layer, q, k, v, batch: Batch, kernels: Kernels, sinks):
    """The CPU's way: one run after another, each over the key blocks that it can see."""
    run, (heads, c), kv_heads, width = batch.run, q.shape[1:], k.shape[1], _value_width(state, spec)
    alone = q.shape[0] == run and not batch.grouped  # a single run that is there needs no loop around it

    if kernels.in_place and run == 1 and state.v is not None and single_as_run(kv_heads, heads // kv_heads, c, width):
        plan = plan_of(layer, batch.run_segments, batch.run_positions, jnp.int32(1) if alone else batch.n_runs)
        keys, values = write_single(state.k, state.v, _held(k, state.k), _held(v, state.v), plan)
        q_BKGC = (q.astype(jnp.float32) * spec.softmax_scale).reshape(-1, kv_heads, heads // kv_heads, c)
        by_head = None if sinks is None else sinks.reshape(kv_heads, -1)
        out = attend_single(q_BKGC, keys, values, plan, spec, by_head)
        return out.reshape(-1, heads, width).astype(q.dtype), KVState(keys, values)

    def one_run(r, carry):
        keys, values, out = carry
        at, seg, pos = r * run, batch.run_segments[r], batch.run_positions[r]

        def write(cache, new, axes, where):
            piece = part(new, (at, 0, 0), (run, *new.shape[1:])).transpose(axes)[None, None]
            return put(cache, _held(piece, cache), (layer, seg, 0, *where))

        keys = write(keys, k, (1, 2, 0), (0, pos))
        if values is not None:
            values = write(values, v, (1, 0, 2), (pos, 0))

        def read(j):
            at = j * KEY_BLOCK
            k_block = jax.lax.dynamic_slice(keys, (layer, seg, 0, 0, at), (1, 1, kv_heads, c, KEY_BLOCK))[0, 0]
            if values is None:
                return k_block, None
            return k_block, jax.lax.dynamic_slice(values, (layer, seg, 0, at, 0), (1, 1, kv_heads, KEY_BLOCK, width))[0, 0]

        q_run = jax.lax.dynamic_slice_in_dim(q, at, run).astype(jnp.float32)
        o = attend_run(q_run, read, kv_heads, width, pos, batch.run_lengths[r], spec, kernels.row_invariant, sinks)
        return keys, values, jax.lax.dynamic_update_slice(out, o, (at, 0, 0))

    carry = (state.k, state.v, jnp.zeros((q.shape[0], heads, width), jnp.float32))
    if alone:
        keys, values, out = one_run(0, carry)
    else:
        keys, values, out = jax.lax.fori_loop(0, batch.n_runs, one_run, carry)
    return out.astype(q.dtype), KVState(keys, values)


@functools.cache
def single_as_run(kv_heads: int, group: int, channels: int, width: int) -> bool:
    """Whether `attend_single` gives a token the bits that `attend_run` does.

    Runs both once on random values: which kernels XLA's dots are depends on sizes alone.
    """
    if channels > _CHANNELS or width <= _NARROW:
        return False
    rng = np.random.default_rng(0)
    spec = AttentionSpec(kv_heads * group, kv_heads, channels)
    q, k, v = (
        rng.standard_normal(s, dtype=np.float32)
        for s in ((1, kv_heads * group, channels), (1, 1, kv_heads, channels, _BLOCKS * KEY_BLOCK), (1, 1, kv_heads, _BLOCKS * KEY_BLOCK, width))
    )
    k *= np.repeat(np.linspace(0.5, 1.5, _BLOCKS, dtype=np.float32), KEY_BLOCK)  # largest scores that grow: what was summed is scaled down
    at = np.int32(_BLOCKS * KEY_BLOCK - KEY_BLOCK // 2)

    def by_run(q, k, v, at):
        def read(j):
            keys = jax.lax.dynamic_slice_in_dim(k[0, 0], j * KEY_BLOCK, KEY_BLOCK, axis=2)
            return keys, jax.lax.dynamic_slice_in_dim(v[0, 0], j * KEY_BLOCK, KEY_BLOCK, axis=1)

        return attend_run(q, read, kv_heads, width, at, 1, spec, True, None)

    def by_token(q, k, v, at):
        q = (q * spec.softmax_scale).reshape(1, kv_heads, group, channels)
        return attend_single(q, k, v, plan_of(jnp.int32(0), jnp.zeros(1, jnp.int32), at[None], jnp.int32(1)), spec).reshape(1, -1, width)

    with jax.ensure_compile_time_eval():
        both = jax.jit(lambda *args: (by_run(*args), by_token(*args)))(q, k, v, at)
    expected, found = (np.asarray(o).view(np.uint32) for o in both)
    return bool((found == expected).all())


def attend_run(
    q: Float[Array, "R H C"], read: BlockReader, kv_heads: int, width: int, pos, length, spec: AttentionSpec, row_invariant: bool, sinks
) -> Float[Array, "R H V"]:
    """Attention of a run's queries over the blocks of keys of their sequence; the one order of sums that all caches on the CPU share.

    Args:
        q: float32, not scaled; the run's tokens, from position `pos` on.
        read: gives block j of the sequence's keys and values.
        kv_heads, width: K, and V.
        pos, length: the run's first position, and how many of its tokens are real; their keys are among those that `read` gives.
        spec, row_invariant, sinks: as for `KVState.attend`.

    Returns:
        float32 outputs.
    """
    run, heads, c = q.shape
    group = heads // kv_heads
    m = max(run * group, ROW_TILES[0])
    more = m - run * group
    if sinks is not None:
        sinks = jnp.pad(jnp.tile(sinks.reshape(kv_heads, group), (1, run)), ((0, 0), (0, more)))
    rows = (q * spec.softmax_scale).reshape(run, kv_heads, group, c).transpose(1, 0, 2, 3).reshape(kv_heads, run * group, c)
    at_row = jnp.pad(pos + jnp.repeat(jnp.arange(run), group), (0, more))
    o = _blocks(jnp.pad(rows, ((0, 0), (0, more), (0, 0))), at_row, read, width, pos + length, pos, spec, row_invariant, sinks)
    return o[:, : run * group].reshape(kv_heads, run, group, width).transpose(1, 0, 2, 3).reshape(run, heads, width)


def widened(values: Float[Array, "K S C"], rows: int) -> Float[Array, "K S W"]:
    """Values with columns of zeros after them where the product of `rows` rows with them would else be added up in another order than that of few.

    XLA's CPU backend does so for many rows and some widths, never where the width is a multiple of 64.
    """
    _, keys, width = values.shape
    as_it_is = rows <= ROW_TILES[-1] or same_order(rows, keys, width) == (1, width)
    return values if as_it_is else jnp.pad(values, ((0, 0), (0, 0), (0, -width % 64)))


def scores(rows: Float[Array, "K m C"], keys: Float[Array, "K C S"]) -> Float[Array, "K m S"]:
    """Rows times keys, some channels at a time: how XLA's CPU backend adds up more of them can depend on the number of rows."""
    parts = [(rows[..., at : at + _CHANNELS], keys[:, at : at + _CHANNELS]) for at in range(0, rows.shape[-1], _CHANNELS)]
    return functools.reduce(jnp.add, [jnp.einsum("kmc,kcs->kms", r, k) for r, k in parts])


def weighted(p: Float[Array, "K m S"], values: Float[Array, "K S V"]) -> Float[Array, "K m V"]:
    """Values weighted with `p`, likewise some channels at a time."""
    width = values.shape[-1]
    step = _CHANNELS if width <= _CHANNELS else _CHANNELS // 2
    parts = [widened(values[..., at : at + step], p.shape[1]) for at in range(0, width, step)]
    return jnp.concatenate([jnp.einsum("kms,ksc->kmc", p, part) for part in parts], -1)[..., :width]


_BLOCKS = 5
"""Blocks of keys that a probe goes over."""

_NARROW = 16
"""Channels of values up to which dots add up keys in several sums, which `attend_single` doesn't."""

_CHANNELS = 256
"""Channels that are multiplied with at a time. Part of what fixes the bits of a result."""


def _blocks(rows, at_row, read: BlockReader, width: int, end, first, spec: AttentionSpec, row_invariant, sinks):
    """Attention of query rows [K, m, C] at positions `at_row` [m] over the blocks of one sequence; float32 [K, m, V]."""
    kv_heads, m, _ = rows.shape

    def step(j, carry):
        top, total, o = carry
        k_block, v_block = read(j)
        if v_block is None:  # the barrier keeps the transpose out of the dot, which would be added up in another order for many rows
            v_block = jax.lax.optimization_barrier(k_block[:, :width].swapaxes(1, 2))
        s = scores(rows, formats.load(k_block, jnp.float32))
        s = jnp.where(seen(spec, at_row[:, None], j * KEY_BLOCK + jnp.arange(KEY_BLOCK)), s, -jnp.inf)
        new_top = jnp.maximum(top, s.max(-1))
        p = jnp.exp(s - new_top[..., None])
        keep = jnp.exp(top - new_top)
        v_block = formats.load(v_block, jnp.float32)
        v = weighted(p, v_block) if row_invariant else jnp.einsum("kms,ksc->kmc", p, v_block)
        o = formats.rounded(o * keep[..., None]) + v
        return new_top, formats.rounded(total * keep) + row_sum(p.reshape(-1, KEY_BLOCK)).reshape(p.shape[:2]), o

    start = first_seen(spec, first) // KEY_BLOCK
    none = (jnp.full((kv_heads, m), NONE_YET), jnp.zeros((kv_heads, m))) if sinks is None else (sinks, jnp.ones((kv_heads, m)))
    _, total, o = jax.lax.fori_loop(start, -(-end // KEY_BLOCK), step, (*none, jnp.zeros((kv_heads, m, width))))
    return o / total[..., None]


def _write_runs(state: KVState, layer, k, v, batch: Batch, tpu: bool = False) -> tuple[jax.Array, jax.Array]:
    """The caches with every run written, one contiguous piece each: a scatter would have XLA lay the whole cache out for its own sake, in a copy."""
    run, valid = batch.run, batch.segments >= 0
    segments, positions = jnp.asarray(batch.run_segments), jnp.asarray(batch.run_positions)

    def write(cache, new, mine, at):
        start = (layer, *at)
        kept = jax.lax.dynamic_slice(cache, start, (1, 1, *new.shape))
        cache = jax.lax.dynamic_update_slice(cache, jnp.where(mine, _held(new, cache)[None, None], kept), start)
        return as_it_lies(cache, tpu)

    def one_run(r, caches):
        keys, values = caches
        here, seg, pos = r * run, segments[r], positions[r]
        k_run, mine = (jax.lax.dynamic_slice_in_dim(t, here, run) for t in (k, valid))
        keys = write(keys, k_run.transpose(1, 2, 0), mine, (seg, 0, 0, pos))
        if values is None:
            return keys, None
        v_run = jax.lax.dynamic_slice_in_dim(v, here, run)
        return keys, write(values, v_run.transpose(1, 0, 2), mine[:, None], (seg, 0, pos, 0))

    return jax.lax.fori_loop(0, batch.tokens.shape[0] // run, one_run, (state.k, state.v))


def _attend_gathered(state: KVState, spec: AttentionSpec, layer, q, k, v, batch: Batch, sinks, tpu: bool = False):
    """The plain way, for backends without a kernel and as a reference: one run after another, each over its whole cache row.

    All rows at once would be gathered first: a copy of a layer's cache, for which XLA's TPU compiler cuts up, and copies, the cache of all layers.
    """
    run, (heads, c), kv_heads, width = batch.run, q.shape[1:], k.shape[1], _value_width(state, spec)
    keys, values = _write_runs(state, layer, k, v, batch, tpu)
    group = heads // kv_heads
    m = max(run * group, MIN_ROWS)  # of fewer XLA makes sums of products, and lays the whole cache out anew for them
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    if sinks is not None:
        sinks = jnp.pad(jnp.tile(sinks.reshape(kv_heads, group), (1, run)), ((0, 0), (0, m - run * group)))[..., None]

    def row(cache, seg):
        return formats.load(jax.lax.dynamic_slice(cache, (layer, seg, 0, 0, 0), (1, 1, *cache.shape[2:]))[0, 0], q.dtype)

    def one_run(own):
        seg, q_run, at_row = own
        rows = q_run.reshape(run, kv_heads, group, c).transpose(1, 0, 2, 3).reshape(kv_heads, run * group, c)
        rows = jnp.pad(rows, ((0, 0), (0, m - run * group), (0, 0)))
        s = jnp.einsum("kmc,kcs->kms", rows, row(keys, seg), precision=exact, preferred_element_type=jnp.float32) * spec.softmax_scale
        at_row = jnp.pad(jnp.repeat(at_row, group), (0, m - run * group))[:, None]
        s = jnp.where(seen(spec, at_row, jnp.arange(s.shape[-1])), s, -jnp.inf)
        p = softmax_with(s, sinks).astype(q.dtype)
        if values is None:
            o = jnp.einsum("kms,kcs->kmc", p, row(keys, seg)[:, :width], precision=exact, preferred_element_type=jnp.float32)
        else:
            o = jnp.einsum("kms,ksc->kmc", p, row(values, seg), precision=exact, preferred_element_type=jnp.float32)
        return o[:, : run * group].reshape(kv_heads, run, group, width).transpose(1, 0, 2, 3).reshape(run, heads, width)

    o = jax.lax.map(one_run, (batch.run_segments, q.reshape(-1, run, heads, c), batch.positions.reshape(-1, run)))
    o = jnp.where(batch.segments[:, None, None] >= 0, o.reshape(-1, heads, width), 0.0)
    return o.astype(q.dtype), KVState(keys, values)
