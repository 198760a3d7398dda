"""Keys and values in pages that sequences are given one at a time, and may share.

The pool is flat over layers, so that no layer is ever sliced out of it: page p of layer l is `l * stride + p`, and a sequence's table names the same
p for all layers. The last page of each layer is trash: what padding writes lands there, and tables name it where they have no page. Which page
belongs to whom is the scheduler's business (`jaxmoe.engine.serving.pages`).

On the CPU attention goes by run and by block of keys exactly as over contiguous rows (`contiguous.attend_run`), to the same bits. Elsewhere the
kernels of `pallas_kernels.paged_attention` read the pages in place.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe import formats
from jaxmoe.cache.batch import Batch
from jaxmoe.cache.contiguous import KEY_BLOCK, attend_run
from jaxmoe.cache.order import as_it_lies
from jaxmoe.spec import AttentionSpec
from pallas_kernels.dispatch import Kernels
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.types import Pages, Queries, packed, plain, tokens_per_row, unpacked

KV_DTYPES = ("float32", "bfloat16", "int8")


@flax.struct.dataclass
class PagedKV:
    """Attributes: `pages` of all layers; `stride` pages of a layer, the trash page included; `channels` C of a key."""

    pages: Pages
    stride: int = flax.struct.field(pytree_node=False)
    channels: int = flax.struct.field(pytree_node=False)

    @property
    def width(self) -> int:
        """W, tokens of a page."""
        return self.pages.k.shape[2] * self.pages.k.shape[3] // self.channels

    def logical_axes(self) -> dict[str, tuple[str | None, ...]]:
        """The logical name of every axis of every leaf."""
        named: dict[str, tuple[str | None, ...]] = {name: ("pages", "kv_heads", "positions", "head_dim") for name in ("k", "v")}
        named |= {"k_scales": ("pages", "kv_heads", "positions"), "v_scales": ("pages", "kv_heads", "positions")}
        return {name: axes for name, axes in named.items() if getattr(self.pages, name) is not None}

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
    ) -> tuple[Float[Array, "T H V"], PagedKV]:
        """Adds the step's keys and values to the pages of their sequences, then attends; see `KVState.attend`.

        Runs of more than one token begin at a multiple of their length, which divides a page's, so that a run lies in one page.

        Raises:
            ValueError: the batch names no pages, or its runs don't fit into pages.
            NotImplementedError: attention in chunks, off the CPU.
        """
        if batch.tables is None:
            raise ValueError("this cache lies in pages, and the batch has no page tables: give Batch.tables")
        if self.width % batch.run:
            raise ValueError(f"runs of {batch.run} tokens don't fit into pages of {self.width}: choose a run that divides a page")
        state, outs, parts = self, [], batch.parts()
        if kernels.backend == "cpu":
            if batch.tables.shape[1] * self.width % KEY_BLOCK:
                raise ValueError(f"tables of {batch.tables.shape[1]} pages of {self.width} tokens: give whole blocks of {KEY_BLOCK} keys")
            for mine, part in parts:
                values = None if v is None else v[mine]
                out, state = _attend_runs(state, spec, layer, q[mine], k[mine], values, part, kernels.row_invariant, sinks)
                outs.append(out)
            return _joined(outs), state
        if spec.chunk is not None:
            raise NotImplementedError(f"attention in chunks of {spec.chunk} positions over pages is for the CPU alone")
        # All tokens are written before any attends: pages that were read between two writes would be copied for the second.
        for mine, part in parts if kernels.backend == "tpu" else [(slice(None), batch)]:
            state = _with_tokens(state, layer, k[mine], None if v is None else v[mine], part, kernels.backend == "tpu")
        pages = state.pages if v is not None else dataclasses.replace(state.pages, value_width=_value_width(self, spec))
        for mine, part in parts:
            starts = jnp.asarray(part.run_positions)
            lengths = jnp.where(jnp.arange(starts.shape[0]) < part.n_runs, part.run_lengths, 0)
            queries = Queries(
                layer * self.stride + jnp.asarray(batch.tables)[jnp.asarray(part.run_segments)], jnp.arange(starts.shape[0]) * part.run, lengths,
                starts + lengths, starts, most=part.run,
            )  # fmt: skip
            outs.append(paged_attention(q[mine], pages, queries, spec.softmax_scale, kernels, spec.window, sinks_H=sinks))
        return _joined(outs), state


def init_paged(shape: tuple[int, int, int | None], layers: int, pages: int, page: int, dtype: str, kernels: Kernels) -> PagedKV:
    """An empty pool.

    Args:
        shape: heads, channels of a key, and of a value (None: values are the keys' first channels), as `AttentionSpec.cached` has them.
        layers: how many layers share it.
        pages: of each layer; the trash page comes on top.
        page: W, tokens of a page, a divisor of a block of keys.
        dtype: one of `KV_DTYPES`; int8 has a float32 scale for each token and head.
        kernels: what will attend: on TPUs pages are held packed.

    Raises:
        ValueError: a dtype or page that there isn't.
    """
    if dtype not in KV_DTYPES:
        raise ValueError(f"keys and values are held as {', '.join(KV_DTYPES)}, not {dtype!r}")
    if page < 1 or KEY_BLOCK % page:
        raise ValueError(f"pages of {page} tokens: choose a divisor of {KEY_BLOCK}")
    heads, key, value = shape
    count, held = layers * (pages + 1), jnp.int8 if dtype == "int8" else formats.leaf_dtype(dtype)

    def scales(there: bool):
        return jnp.zeros((count, heads, page), jnp.float32) if there and dtype == "int8" else None

    k = jnp.zeros((count, heads, page, key), held)
    v = None if value is None else jnp.zeros((count, heads, page, value), held)
    # The value's width of latents is the attention's to say (`AttentionSpec.latent`); all keys' channels until then.
    found = Pages(k, v, scales(True), scales(value is not None), value_width=None if value is not None else key)
    if kernels.backend == "tpu":
        as_kernels_read = packed(found)
        # int8 rows stay as they are; scales that don't lie as the kernel reads them would be laid out anew in every step.
        found = dataclasses.replace(as_kernels_read, k=k, v=v) if dtype == "int8" else as_kernels_read
    return PagedKV(found, pages + 1, key)


def quantized(x: Float[Array, "T K C"]) -> tuple[Array, Float[Array, "T K"]]:
    """int8 values and the float32 scale of each token and head: the largest magnitude is 127."""
    x = x.astype(jnp.float32)
    scales = jnp.abs(x).max(-1) / 127
    return jnp.round(x / jnp.where(scales == 0, 1, scales)[..., None]).astype(jnp.int8), scales


def _as_held(x: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Keys or values as the pool holds them, with scales where it has some."""
    if like.dtype == jnp.int8:
        return quantized(x)
    return formats.store(x, "bfloat16" if like.dtype == jnp.uint16 else "float32"), None


def _joined(parts: list[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _value_width(state: PagedKV, spec: AttentionSpec) -> int:
    if state.pages.v is not None:
        return state.pages.v.shape[-1] * state.channels // state.pages.k.shape[-1]
    assert spec.latent is not None, "a cache without values is one of latents"
    return spec.latent.kv_rank


def _leaves(state: PagedKV, k, v) -> list[tuple[str, jax.Array]]:
    """What a step writes, by the leaf it goes to; [T, K, C] or scales [T, K]."""
    out = []
    for name, x in (("k", k), ("v", v)):
        if x is not None:
            values, scales = _as_held(x, getattr(state.pages, name))
            out += [(name, values)] + ([] if scales is None else [(f"{name}_scales", scales)])
    return out


def _attend_runs(state: PagedKV, spec: AttentionSpec, layer, q, k, v, batch: Batch, row_invariant: bool, sinks):
    """The CPU's way: one run after another, each over the key blocks that it can see."""
    run, heads, kv_heads, width = batch.run, q.shape[1], k.shape[1], _value_width(state, spec)
    page, first_page, tables = state.width, layer * state.stride, jnp.asarray(batch.tables)
    new, each = _leaves(state, k, v), KEY_BLOCK // page
    out = jnp.zeros((q.shape[0], heads, width), jnp.float32)

    def one_run(r, carry):
        held, out = carry
        at, seg, pos = r * run, batch.run_segments[r], batch.run_positions[r]
        # A run without a token has a place and nothing to say: its sequence may be gone, and what it would write is somebody's.
        target = first_page + jnp.where(batch.run_lengths[r] > 0, tables[seg, pos // page], state.stride - 1)
        for name, values in new:
            part = jax.lax.dynamic_slice_in_dim(values, at, run).swapaxes(0, 1)[None]
            held = held | {name: jax.lax.dynamic_update_slice(held[name], part, (target, 0, pos % page) + (0,) * (part.ndim - 3))}

        def read(j):
            ids = first_page + jax.lax.dynamic_slice(tables, (seg, j * each), (1, each))[0]

            def block(name):
                scales = f"{name}_scales"
                x = plain(held[name][ids], held[scales][ids] if scales in held else None)
                return x.swapaxes(0, 1).reshape(kv_heads, KEY_BLOCK, -1)

            # Keys transposed as contiguous rows hold them, and not within the dot, which would be added up in another order.
            keys = jax.lax.optimization_barrier(block("k").swapaxes(1, 2))
            return keys, block("v") if "v" in held else None

        o = attend_run(jax.lax.dynamic_slice_in_dim(q, at, run).astype(jnp.float32), read, kv_heads, width, pos, batch.run_lengths[r], spec,
                       row_invariant, sinks)  # fmt: skip
        return held, jax.lax.dynamic_update_slice(out, o, (at, 0, 0))

    held = {name: getattr(state.pages, name) for name in ("k", "v", "k_scales", "v_scales") if getattr(state.pages, name) is not None}
    held, out = jax.lax.fori_loop(0, batch.n_runs, one_run, (held, out))
    return out.astype(q.dtype), dataclasses.replace(state, pages=dataclasses.replace(state.pages, **held))


def _with_tokens(state: PagedKV, layer, k, v, batch: Batch, tpu: bool) -> PagedKV:
    """The pages with a step's keys and values in them; those of padding in the trash page."""
    page, trash = state.width, state.stride - 1
    segments, positions = jnp.asarray(batch.segments), jnp.asarray(batch.positions)
    tables = jnp.asarray(batch.tables)
    if not tpu:
        target = jnp.where(segments >= 0, tables[jnp.maximum(segments, 0), positions // page], trash) + layer * state.stride
        pages = state.pages
        for name, values in _leaves(state, k, v):
            pages = dataclasses.replace(pages, **{name: getattr(pages, name).at[target, :, positions % page].set(values)})
        return dataclasses.replace(state, pages=pages)
    # A scatter would have XLA's TPU compiler lay the whole pool out anew; a run in one page is one piece.
    run, packs = batch.run, tokens_per_row(unpacked(state.pages, state.channels)) if state.pages.k.shape[-1] != state.channels else 1
    runs = jnp.asarray(batch.run_segments).shape[0]
    leaves = _leaves(state, k, v)

    def one_run(r, held):
        pos, seg = batch.run_positions[r], batch.run_segments[r]
        real = (r < batch.n_runs) & (batch.run_lengths[r] > 0)
        target = jnp.where(real, tables[seg, pos // page], trash) + layer * state.stride
        for name, values in leaves:
            part = jax.lax.dynamic_slice_in_dim(values, r * run, run).swapaxes(0, 1)[None]
            at, place = pos % page, [target, 0]
            if part.ndim == 3:  # scales, of all heads in one row: that row is read and written
                place, heads = [target, 0, 0], part.shape[1]
                row = jax.lax.dynamic_slice(held[name], tuple(place), (1, 1, heads * page)).reshape(1, heads, page)
                part = jax.lax.dynamic_update_slice(row, part, (0, 0, at)).reshape(1, 1, -1)
            elif run % packs == 0:
                part = part.reshape(*part.shape[:2], run // packs, -1)
                place += [at // packs, 0]
            else:
                place += [at // packs, at % packs * part.shape[-1]]
            held = held | {name: as_it_lies(jax.lax.dynamic_update_slice(held[name], part, tuple(place)), True)}
        return held

    held = jax.lax.fori_loop(0, runs, one_run, {name: getattr(state.pages, name) for name, _ in leaves})
    return dataclasses.replace(state, pages=dataclasses.replace(state.pages, **held))
