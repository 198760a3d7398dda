"""Keys and values of each sequence divided over the devices of a mesh axis by position, and attention over all of them.

Each device holds the positions that it was dealt (`jaxmoe.cache.deal`), in the order in which it got them, and beside them which they are; all masks
go by absolute positions. Called under `shard_map`, where every array here is one device's own part.

To decode, every device has all tokens: one of them keeps the new key, each attends over its own keys, and what they found is gathered and merged in
one order, to the same bits everywhere. In a prompt, every device has its own tokens; keys or queries travel (`jaxmoe.cache.ring`).

The state of a whole mesh is what `jax.jit(jax.shard_map(lambda: init_split_kv(...), mesh=mesh, in_specs=(), out_specs=specs, check_vma=False))()`
gives, with `specs` from `logical_axes()`: nothing is made on one device first.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxmoe import formats
from jaxmoe.cache import merge, ring
from jaxmoe.cache.batch import Batch
from jaxmoe.cache.contiguous import KEY_BLOCK
from jaxmoe.cache.masks import first_seen, seen
from jaxmoe.cache.merge import Partial
from jaxmoe.cache.order import as_it_lies
from jaxmoe.spec import AttentionSpec
from pallas_kernels.dense.api import MIN_ROWS
from pallas_kernels.dispatch import Kernels

LARGEST_BLOCK = 512
"""Keys that a run attends to at a time, at most."""

_NEVER = jnp.iinfo(jnp.int32).max


@flax.struct.dataclass
class SplitKVState:
    """Attributes:
        k [L, B, K, C, S], v [L, B, K, S, C]: as in `KVState`, of one device; S places in no order of positions.
        positions: int32 [B, S], whose key is in each place; -1 in those that are empty, which come last.
        axis: of the mesh.
        way: how a prompt's attention crosses devices; 'auto' picks what sends fewer bytes.
        prefix: how many places of a row travel when keys do; None for all. At least as many as any device has filled after the step.
    """

    k: Num[Array, "L B K C S"]
    v: Num[Array, "L B K S C"] | None
    positions: Int[Array, "B S"]
    axis: str = flax.struct.field(pytree_node=False, default="sequence")
    way: Literal["auto", "ring", "token", "direct"] = flax.struct.field(pytree_node=False, default="auto")
    prefix: int | None = flax.struct.field(pytree_node=False, default=None)

    def logical_axes(self) -> dict[str, tuple[str | None, ...]]:
        """The logical name of every axis of every leaf."""
        head = ("layers", "batch", None if self.v is None else "kv_heads")  # latents are for all heads
        out: dict[str, tuple[str | None, ...]] = {"k": (*head, "head_dim", "positions"), "positions": ("batch", "positions")}
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
    ) -> tuple[Float[Array, "T H V"], SplitKVState]:
        """Adds the step's keys and values, then attends from each query to its sequence up to its own position.

        Args:
            spec, layer, q, k, v, sinks: see `KVState.attend`.
            batch: of `split_batch`, a device's own; with runs of one token, the same on every device.
            kernels: on the CPU products are in float32; elsewhere in q's dtype.

        Returns:
            Outputs in q's dtype (zeros in padding), and the state with the keys and values written; what was held of a sequence at or behind the
            first position that the step writes is dropped. NaN where places run out, or where more are filled than `prefix`: neither can
            be refused from within a step.
        """
        how = _How(spec, "float32" if kernels.backend == "cpu" else q.dtype.name, kernels.backend == "gpu", kernels.backend == "tpu")
        state, full = _write(self, layer, k, v, batch, how.tpu)
        query = (q.reshape(-1, batch.run, *q.shape[1:]), jnp.asarray(batch.run_segments), jnp.asarray(batch.run_positions))
        if batch.run == 1:
            found = _over(how, query, state.k, state.v, state.positions, layer)
        else:
            found, cut = state._exchanged(how, layer, query)
            full |= cut
        found = found._replace(o=jnp.where(full, jnp.nan, found.o))
        if batch.run == 1:
            found = _whole(self.axis, found)
        if sinks is not None:
            found = merge.merge_partials(found, merge.of_sinks(sinks, found))
        o = merge.finish(found).reshape(q.shape[0], q.shape[1], -1)
        return jnp.where(batch.segments[:, None, None] >= 0, o, 0.0).astype(q.dtype), state

    def delta(self, *args) -> None:
        """Refuses: a delta rule passes its state along the positions.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self.axis}: a delta-rule layer passes a state along its positions, which can't be split; choose {self.axis} = 1")

    def _exchanged(self, how: _How, layer, query) -> tuple[Partial, Array]:
        """A prompt's attention over the keys of all devices, and whether keys were left behind."""
        way, places = self._way(how.spec, query), self.prefix or self.positions.shape[1]

        def local(query) -> Partial:
            return _over(how, query, self.k, self.v, self.positions, layer)

        if way == "token":
            parts = ring.token_ring(ring.halves(query), local, self.axis)
            return jax.tree.map(lambda *x: jnp.concatenate(x), *parts), jnp.bool_(False)
        if way == "direct":
            return ring.token_ring_direct(query, local, self.axis), jnp.bool_(False)
        found = ring.ring(_blocks(self, layer, places), lambda block: _over(how, query, block[0], block[1], block[2], 0), self.axis)
        return found, (self.positions[:, places:] >= 0).any()

    def _way(self, spec: AttentionSpec, query) -> str:
        if self.way != "auto":
            return self.way
        (runs, run), held = query[0].shape[:2], self.k.dtype.itemsize
        keys = ring.key_bytes(spec, self.positions.shape[0] * (self.prefix or self.positions.shape[1]), held)
        sizes = keys, ring.query_bytes(spec, runs * run, query[0].dtype.itemsize, 2 * runs), ring.result_bytes(spec, runs * run)
        return ring.choose(jax.lax.axis_size(self.axis), *sizes)


def local_places(positions: int, max_run: int, n: int) -> int:
    """Places that a device has for each sequence: its share of the positions, and room for four runs.

    One run is that of a write past the last position; the others are what a device can be dealt of a sequence beyond its share, by zig-zag order and
    in steps that several sequences share. That isn't a bound: `deal.take_room` refuses what goes beyond it.

    Args:
        positions: of a sequence, on all devices.
        max_run: the longest run that a device is dealt (`split_batch` makes them shorter than the batch's).
        n: devices.
    """
    return -(-(-(-positions // n) + 4 * max_run) // (2 * KEY_BLOCK)) * 2 * KEY_BLOCK


def init_split_kv(shape: tuple[int, int, int | None], layers: int, rows: int, positions: int, max_run: int, dtype: str, n: int) -> SplitKVState:
    """One device's part of an empty cache.

    Args:
        shape, layers, rows, dtype: see `init_kv`.
        positions: of each sequence, on all devices.
        max_run, n: see `local_places`.
    """
    kv_heads, key, value = shape
    length, head, held = local_places(positions, max_run, n), (layers, rows, kv_heads), formats.leaf_dtype(dtype)
    v = None if value is None else jnp.zeros((*head, length, value), held)
    return SplitKVState(jnp.zeros((*head, key, length), held), v, jnp.full((rows, length), -1, jnp.int32))


def _whole(axis: str, own: Partial) -> Partial:
    """What all devices found together, merged in the same order on each."""
    return merge.merge_all(merge.unpacked(jax.lax.all_gather(merge.packed(own), axis)))


# --- Writing


def _write(state: SplitKVState, layer, k, v, batch: Batch, tpu: bool) -> tuple[SplitKVState, Array]:
    """The state with the step's tokens in it, and whether places ran out.

    Every layer finds the same places: those that the layer before has filled are dropped first, being at or behind the step's first position.
    """
    run, axis = batch.run, state.axis
    valid, segments, positions = batch.segments >= 0, jnp.asarray(batch.run_segments), jnp.asarray(batch.positions)
    rows, length = state.positions.shape
    first = jnp.full(rows, _NEVER).at[jnp.where(valid, batch.segments, rows)].min(positions, mode="drop")
    if run == 1:
        mine = valid & (positions % jax.lax.axis_size(axis) == jax.lax.axis_index(axis))
    else:
        mine, first = valid, jax.lax.pmin(first, axis)
    kept = jnp.where(state.positions < first[:, None], state.positions, -1)
    lengths = mine.reshape(-1, run).sum(1)
    earlier = jnp.tril(segments[:, None] == segments, -1) @ lengths
    places = (kept >= 0).sum(1)[segments] + earlier
    caches = _write_runs(state.k, state.v, kept, layer, k, v, jnp.where(mine, positions, -1), mine, segments, places, run, tpu)
    full = ((lengths > 0) & (places + run > length)).any()
    return dataclasses.replace(state, **dict(zip(("k", "v", "positions"), caches, strict=True))), full


def _write_runs(keys, values, at_key, layer, k, v, positions, mine, segments, places, run: int, tpu: bool):
    """One run after another, each in one piece; what isn't `mine` stays as it was."""

    def put(cache, new, where, start):
        kept = jax.lax.dynamic_slice(cache, start, new.shape)
        cache = jax.lax.dynamic_update_slice(cache, jnp.where(where, new, kept), start)
        return as_it_lies(cache, tpu)

    def held(new, like):
        return formats.store(new, "bfloat16" if like.dtype == jnp.uint16 else "float32")[None, None]

    def one_run(r, caches):
        keys, values, at_key = caches
        row, place = segments[r], places[r]
        own, k_run, at_run = (jax.lax.dynamic_slice_in_dim(t, r * run, run) for t in (mine, k, positions))
        keys = put(keys, held(k_run.transpose(1, 2, 0), keys), own, (layer, row, 0, 0, place))
        if values is not None:
            v_run = jax.lax.dynamic_slice_in_dim(v, r * run, run)
            values = put(values, held(v_run.transpose(1, 0, 2), values), own[:, None], (layer, row, 0, place, 0))
        return keys, values, put(at_key, at_run[None], own, (row, place))

    return jax.lax.fori_loop(0, segments.shape[0], one_run, (keys, values, at_key))


# --- Attending


class _How(NamedTuple):
    """The mask and scale; the dtype that products are computed in; whether loops have to have a known length; whether this is a TPU."""

    spec: AttentionSpec
    dtype: str
    known_length: bool
    tpu: bool


def _blocks(state: SplitKVState, layer, places: int) -> list[tuple[Array, Array | None, Array]]:
    """What travels to either side: every other block of keys, so that both have as much to do while rows are filling up."""
    k = jax.lax.dynamic_slice_in_dim(state.k, layer, 1)[..., :places]
    v = None if state.v is None else jax.lax.dynamic_slice_in_dim(state.v, layer, 1)[..., :places, :]
    half = math.gcd(places, 2 * KEY_BLOCK) // 2
    if half < 1:
        return [(k, v, state.positions[:, :places])]

    def every_other(x, axis: int, side: int):
        shape = (*x.shape[:axis], -1, 2, half, *x.shape[axis + 1 :])
        part = jax.lax.index_in_dim(x.reshape(shape), side, axis + 1, keepdims=False)
        return part.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    return [(every_other(k, 4, i), None if v is None else every_other(v, 3, i), every_other(state.positions[:, :places], 1, i)) for i in (0, 1)]


def _over(how: _How, query, k, v, positions, layer) -> Partial:
    """Queries (q [R, run, H, C], cache rows [R], first positions [R]) over the keys k [L, B, K, C, S] of a layer, of shape [R, run, H]."""

    def one_run(part):
        q, row, first = part
        run, (heads, c), kv_heads = q.shape[0], q.shape[1:], k.shape[2]
        group, m = heads // kv_heads, max(q.shape[0] * heads // kv_heads, MIN_ROWS)
        rows = q.reshape(run, kv_heads, group, c).transpose(1, 0, 2, 3).reshape(kv_heads, run * group, c)
        rows = jnp.pad(rows.astype(how.dtype), ((0, 0), (0, m - run * group), (0, 0)))
        at = jnp.pad(first + jnp.repeat(jnp.arange(run), group), (0, m - run * group), mode="edge")
        found = _one_row(how, rows, at, k, v, positions[row], (layer, row), first, first + run - 1)
        return ring.by_token(jax.tree.map(lambda x: x[:, : run * group], found), run)

    return jax.lax.map(one_run, query)


def _one_row(how: _How, rows, at, k, v, at_key, where, first, last) -> Partial:
    """Rows of queries [K, m, C] at positions `at` [m], from `first` to `last`, over the blocks of one cache row that they can see."""
    spec, (kv_heads, c, places), width = how.spec, k.shape[2:], ring.value_width(how.spec)
    size = math.gcd(places, LARGEST_BLOCK) if places % 8 == 0 else places

    def step(j, found):
        begin = j * size
        keys = as_it_lies(jax.lax.dynamic_slice(k, (*where, 0, 0, begin), (1, 1, kv_heads, c, size)), how.tpu)[0, 0]
        if v is None:
            values = keys[:, :width]
        else:
            values = as_it_lies(jax.lax.dynamic_slice(v, (*where, 0, begin, 0), (1, 1, kv_heads, size, width)), how.tpu)[0, 0]
        there = jax.lax.dynamic_slice_in_dim(at_key, begin, size)
        visible = seen(spec, at[:, None], there) & (there >= 0)
        return merge.merge_partials(found, merge.attend_block(rows, keys, values, visible, spec.softmax_scale, v is None))

    start: Any = 0
    end: Any = places // size
    if not how.known_length:  # GPUs would read a loop's predicate back to the host
        wanted = (at_key >= first_seen(spec, first)) & (at_key >= 0) & (at_key <= last)
        place = jnp.arange(places)
        start = jnp.min(jnp.where(wanted, place, places)) // size
        end = (jnp.max(jnp.where(wanted, place + 1, 0)) + size - 1) // size
    return jax.lax.fori_loop(start, end, step, merge.nothing(rows.shape[:2], width))
