"""Paged attention on a TPU: one Mosaic kernel for decoding, tree verification and pieces of prompts, mixed in one call.

The grid runs over jobs: a tile of one sequence's query rows (times the G query heads of a KV head: they are the tile's rows), one of `splits`
ranges of its keys, and `heads` KV heads. A job visits the pages that its rows can see and no others. Pages are fetched by the kernel itself,
`pages` of them at a time into one of two buffers, always one block ahead, also across the end of a job: the wrapper links every job to the next
one that has keys. Softmax is online, in float32; bfloat16 (uint16 in the pages) is read by its bits in VMEM, int8 is widened there, and scales
are applied to scores and probabilities rather than to keys and values. In a tile with few live rows only the first rows are computed, so that a
sequence that decodes beside prompts costs its keys' bytes. The first grid axis has two halves that a chip with two cores under one device
(v5p) may run side by side.

Decoding should be bound by the pages' bytes, prompts by the matmuls or the vector unit's work on the scores. No speed has been measured; block
sizes are guesses from the sizes of VMEM and of a DMA. What compiling shows:

- XLA stores an argument whose last axis is no multiple of 128 with the page axis last, and a call of a kernel then copies the whole pool. Where C
  or V is 64 or 576, keep the pool as [P, K, W / f, f * C], f tokens to a row (`types.packed`; f = 2 for both): no padding, no copy. The kernel takes
  both forms and tells them apart by q's width; it reads a packed row once and multiplies it with f shifted copies of the queries.
- The same holds for scales and biases where W is below 128; keep them as [P, 1, K * W]. With K * W below 128 too they are copied, 512 bytes a page.
- New tokens are written in place by a scatter of whole rows of the pool seen as [P * K * W / f, f * C] (those of f tokens read, changed and written
  back). `pool.at[page, :, slot].set` and `dynamic_update_slice` make XLA want another layout: three pools of temporaries.
- Queries and results make one extra pass each: rows of a sequence start anywhere, tiles do not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.paged_attention.tpu_kernel import BEGIN, CORES, END, FIELDS, Call, Config, Sizes, kernel, scratch
from pallas_kernels.paged_attention.types import Pages, Partial, Queries, merge_axis

VMEM_BYTES = 14 * 2**20
"""What a kernel may hold: below the 16 MiB that a v5e grants without being asked."""
SCALAR_BYTES = 960 * 2**10
"""Page table and jobs, which lie in a scalar memory of 1 MiB."""


def heuristic(q_THC: Any, pages: Pages, queries: Queries) -> Config:
    """The block sizes for arguments of these shapes (arrays or `jax.ShapeDtypeStruct`s)."""
    return _block_sizes(_sizes(q_THC, pages, queries))


def _block_sizes(sizes: Sizes) -> Config:
    """By case: plain decoding takes all heads of a block of keys at once, long runs of rows one head and tiles of 256 rows."""
    rows = min(sizes.most, max(1, 256 // sizes.group))
    pages = max(1, min(512 // sizes.width, sizes.table))
    for heads in sorted((d for d in range(1, sizes.heads + 1) if sizes.heads % d == 0), reverse=True):
        config = Config(rows, pages, heads)
        if heads == 1 or (heads * sizes.tile(config) <= 256 and sizes.vmem_bytes(config) <= VMEM_BYTES // 2):
            break
    while sizes.vmem_bytes(config) > VMEM_BYTES and config.pages > 1:
        config = dataclasses.replace(config, pages=config.pages // 2)
    while sizes.vmem_bytes(config) > VMEM_BYTES and config.rows > 1:
        config = dataclasses.replace(config, rows=config.rows // 2)
    # Both halves of the grid have work, however few the sequences.
    return dataclasses.replace(config, splits=1 if sizes.items(config) > 1 else CORES)


def paged_attention(
    q_THC: Float[Array, "T H C"],
    pages: Pages,
    queries: Queries,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    *,
    config: Config | None = None,
    interpret: Any = False,
) -> Partial:
    """See `api.paged_attention`; before the sinks and the division.

    Args:
        q_THC: bfloat16, or float32.
        pages: as in `Pages`, or `packed`. NaN past a sequence's last key and in pages of none does no harm.
        queries: their `most` bounds the rows of every sequence; more would be lost. Page ids must be ids of pages: they are not checked.
        scale, window, soft_cap: see `reference.paged_attention`.
        config: block sizes; by `heuristic` if None.
        interpret: `pltpu.InterpretParams()` to run on the CPU.

    Returns:
        Partial: over all keys in the page table; (0, -inf, 0) for rows of no sequence.

    Raises:
        NotImplementedError: sizes or types that the kernel does not take; the message names the number.
    """
    sizes = _sizes(q_THC, pages, queries)
    config = _block_sizes(sizes) if config is None else config
    _check(sizes, config)
    jobs, chains, owner = _jobs(queries, sizes, config, window)
    args, specs = _tiles(q_THC, queries, owner, sizes, config)
    call = Call(sizes, config, scale, window, soft_cap)
    o, ml = _run(call, pages, (jobs, chains, queries.page_table.reshape(-1)), args, specs, interpret)
    return _rows(o, ml, queries, owner, sizes, config)


def candidates(q_THC: Any, pages: Pages, queries: Queries) -> list[Config]:
    """The block sizes worth timing for arguments of these shapes (arrays or `jax.ShapeDtypeStruct`s)."""
    sizes = _sizes(q_THC, pages, queries)
    found = []
    for rows in sorted({min(sizes.most, max(1, r // sizes.group)) for r in (8, 64, 128, 256, 512)}):
        for n in sorted({max(1, min(tokens // sizes.width, sizes.table)) for tokens in (128, 256, 512, 1024)}):
            for heads in (d for d in range(1, sizes.heads + 1) if sizes.heads % d == 0):
                for splits in (1, 2) if sizes.items(Config(rows, n, heads)) <= 8 else (1,):
                    config = Config(rows, n, heads, splits)
                    if sizes.vmem_bytes(config) <= VMEM_BYTES:
                        found.append(config)
    return found


def _sizes(q_THC: Any, pages: Pages, queries: Queries) -> Sizes:
    """The call's numbers. Raises NotImplementedError, see `paged_attention`."""
    n_rows, q_heads, channels = q_THC.shape
    _, heads, page_rows, row = pages.k.shape
    if row % channels:
        raise NotImplementedError(f"the keys' rows have {row} channels, which is no multiple of the queries' {channels}")
    tokens = row // channels
    if q_heads % heads:
        raise NotImplementedError(f"{q_heads} query heads are no multiple of {heads} KV heads")
    if q_THC.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"queries are to be bfloat16 or float32, not {q_THC.dtype}")
    kinds = {x.dtype for x in (pages.k, pages.v) if x is not None}
    if len(kinds) != 1 or kinds.isdisjoint({jnp.dtype(t) for t in ("uint16", "int8", "float32")}):
        raise NotImplementedError(f"pages are to be uint16 (bfloat16's bits), int8 or float32, all alike, not {sorted(map(str, kinds))}")
    kind = kinds.pop()
    if (kind == jnp.int8) != (pages.k_scales is not None) or (pages.v is not None and (kind == jnp.int8) != (pages.v_scales is not None)):
        raise NotImplementedError(f"scales belong to int8 pages and to no others; these are {kind}")
    width = page_rows * tokens
    if width % 16 or page_rows % 8:
        raise NotImplementedError(f"pages of {width} tokens in {page_rows} rows: tokens must be a multiple of 16, rows one of 8")
    per_token = [x for x in (pages.k_scales, pages.v_scales, pages.bias) if x is not None]
    for x in per_token:
        if x.dtype != jnp.float32 or x.shape[1] * x.shape[2] not in (width, heads * width):
            raise NotImplementedError(f"scales and bias are to be float32 for {heads} heads of {width} tokens, not {x.dtype} {x.shape[1:]}")
    row_of_values = 0 if pages.v is None else pages.v.shape[-1]
    values = (pages.value_width or 0) if pages.v is None else row_of_values // tokens
    if row_of_values % tokens or not 0 < values or (pages.v is None and values > channels):
        raise NotImplementedError(f"values of {values} channels ({row_of_values} in a row of {tokens}) beside keys of {channels}")
    compute = jnp.float32 if jnp.float32 in (q_THC.dtype, kind) else jnp.bfloat16
    return Sizes(
        heads=heads,
        group=q_heads // heads,
        channels=channels,
        values=values,
        width=width,
        tokens=tokens,
        page_rows=page_rows,
        table=queries.page_table.shape[1],
        sequences=queries.page_table.shape[0],
        n_rows=n_rows,
        most=max(1, min(queries.most, n_rows)),
        compute=compute,
        itemsize=kind.itemsize,
        own_values=pages.v is not None,
        words=0 if queries.tree is None else queries.tree.shape[1],
        scales=len(per_token),
    )


def _check(sizes: Sizes, config: Config) -> None:
    """Raises NotImplementedError for sizes that no configuration takes, and for a configuration that these sizes do not."""
    if sizes.heads % config.heads:
        raise NotImplementedError(f"{config.heads} heads at a time do not divide {sizes.heads} KV heads")
    if min(config.rows, config.pages, config.heads, config.splits) < 1:
        raise NotImplementedError(f"block sizes must be positive: {config}")
    scalars = 4 * (sizes.sequences * sizes.table + FIELDS * CORES * pl.cdiv(sizes.items(config) * config.splits, CORES))
    if scalars > SCALAR_BYTES:
        raise NotImplementedError(
            f"a page table of {sizes.sequences} x {sizes.table} with its jobs takes {scalars} bytes of scalar memory; there are {SCALAR_BYTES}"
        )
    need = sizes.vmem_bytes(config)
    if need > VMEM_BYTES:
        raise NotImplementedError(f"{config} with {sizes.group} query heads to a KV head needs {need} bytes of VMEM; there are {VMEM_BYTES}")


def _jobs(queries: Queries, sizes: Sizes, config: Config, window: int | None):
    """What each step of the grid does.

    Returns:
        int32 [J * 8] fields of the jobs; job i of a core is number `i * CORES + core`.
        int32 [CORES] the first job with keys of each core, or -1.
        (sequence [I], first row in it [I]) of each item, a sequence's tile; jobs are items times splits.
    """
    n_items, X, W = sizes.items(config), sizes.table, sizes.width
    tiles_B = pl.cdiv(queries.lengths, config.rows)
    ends_B = jnp.cumsum(tiles_B)
    item = jnp.arange(n_items, dtype=jnp.int32)
    b = jnp.minimum(jnp.searchsorted(ends_B, item, side="right", method="compare_all"), sizes.sequences - 1).astype(jnp.int32)
    i0 = (item - (ends_B - tiles_B)[b]) * config.rows
    count = jnp.where(item < ends_B[-1], jnp.minimum(config.rows, queries.lengths[b] - i0), 0)
    first, keys = queries.first[b], queries.keys[b]
    low = first + i0
    high = jnp.minimum(keys, low + count if queries.tree is None else first + 32 * sizes.words)
    begin = jnp.zeros_like(low) if window is None else jnp.maximum(low - window + 1, 0) // W
    end = jnp.where(count > 0, jnp.minimum(pl.cdiv(jnp.maximum(high, 0), W), X), 0)
    end = jnp.maximum(begin, end)
    per = pl.cdiv(pl.cdiv(end - begin, config.pages), config.splits) * config.pages
    split = jnp.arange(config.splits, dtype=jnp.int32)
    begin_s = jnp.minimum(begin[:, None] + split * per[:, None], end[:, None])
    end_s = jnp.minimum(begin_s + per[:, None], end[:, None])

    def of_jobs(x):
        return jnp.broadcast_to(x[:, None], begin_s.shape)

    fields = jnp.stack([of_jobs(b * X), begin_s, end_s, *map(of_jobs, (low, count, keys, first))], -1)
    fields = fields.reshape(-1, FIELDS - 1).astype(jnp.int32)
    steps = pl.cdiv(len(fields), CORES)
    fields = jnp.pad(fields, ((0, steps * CORES - len(fields)), (0, 0)))
    none = steps * CORES
    number = jnp.where(fields[:, BEGIN] < fields[:, END], jnp.arange(none, dtype=jnp.int32), none).reshape(steps, CORES)
    from_here = lax.cummin(number, axis=0, reverse=True)
    after = jnp.concatenate([from_here[1:], jnp.full((1, CORES), none, jnp.int32)])
    from_here, after = (jnp.where(x == none, -1, x) for x in (from_here, after))
    return jnp.concatenate([fields, after.reshape(-1, 1)], 1).reshape(-1), from_here[0], (b, i0)


def _tiles(q_THC: jax.Array, queries: Queries, owner: tuple, sizes: Sizes, config: Config):
    """The queries as tiles [I, K, 1, R, C], and the tree's words as [I, R, U]."""
    b, i0 = owner
    n_items, tile = len(b), sizes.tile(config)
    rows = jnp.clip(queries.rows[b][:, None] + i0[:, None] + jnp.arange(config.rows), 0, sizes.n_rows - 1)
    spare = tile - config.rows * sizes.group
    q = q_THC.astype(sizes.compute).reshape(-1, sizes.heads, sizes.group, sizes.channels)[rows]
    q = q.transpose(0, 2, 1, 3, 4).reshape(n_items, sizes.heads, -1, sizes.channels)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, spare), (0, 0)))[:, :, None]
    args, specs = [q], [pl.BlockSpec((1, config.heads, *q.shape[2:]), _at_item(sizes, config, lambda item, h: (item, h, 0, 0, 0)))]
    if queries.tree is not None:
        words = lax.bitcast_convert_type(queries.tree, jnp.int32)[rows]
        words = jnp.pad(jnp.repeat(words, sizes.group, axis=1), ((0, 0), (0, spare), (0, 0)))
        args.append(words)
        specs.append(pl.BlockSpec((1, *words.shape[1:]), _at_item(sizes, config, lambda item, h: (item, 0, 0))))
    return args, specs


def _at_item(sizes: Sizes, config: Config, at: Callable) -> Callable:
    """An index map from the grid's (core, step, block of heads). A last job that only evens out the cores has no item of its own."""
    last = sizes.items(config) - 1

    def index(core, step, head_block, *_):
        return at(jnp.minimum(lax.div(step * CORES + core, config.splits), last), head_block)

    return index


def _run(call: Call, pages: Pages, scalars: tuple, args: list, specs: list, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel: results [J, K, R, V], and [J, K, 8, R] with m and l in the first two rows."""
    sizes, config = call.sizes, call.config
    K, tile = sizes.heads, sizes.tile(config)
    steps = scalars[0].shape[0] // FIELDS // CORES
    held = {name: getattr(pages, name) for name in ("k", "v", "k_scales", "v_scales", "bias")}
    held = {name: x for name, x in held.items() if x is not None}

    def at_job(core, step, head_block, *_):
        return step * CORES + core, head_block, 0, 0

    run = pl.pallas_call(
        functools.partial(kernel, call, tuple(held)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(CORES, steps, K // config.heads),
            in_specs=[*specs, *[pl.BlockSpec(memory_space=pl.ANY)] * len(held)],
            out_specs=[pl.BlockSpec((1, config.heads, *rest), at_job) for rest in ((tile, sizes.values), (8, tile))],
            scratch_shapes=scratch(call, held),
        ),
        out_shape=[jax.ShapeDtypeStruct((steps * CORES, K, *rest), jnp.float32) for rest in ((tile, sizes.values), (8, tile))],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
        name="paged_attention",
    )
    return run(*scalars, *args, *held.values())


def _rows(o: jax.Array, ml: jax.Array, queries: Queries, owner: tuple, sizes: Sizes, config: Config) -> Partial:
    """The tiles' results, back where their rows are."""
    n_items = len(owner[0])
    t = jnp.arange(sizes.n_rows)
    mine_TB = (t[:, None] >= queries.rows) & (t[:, None] < queries.rows + queries.lengths)
    b, live = jnp.argmax(mine_TB, 1), mine_TB.any(1)
    tiles_B = pl.cdiv(queries.lengths, config.rows)
    i = t - queries.rows[b]
    item = jnp.clip((jnp.cumsum(tiles_B) - tiles_B)[b] + i // config.rows, 0, n_items - 1)

    def of_rows(x, empty):
        """[J, K, rows * G, ...] -> [splits, T, H, ...]"""
        x = x[: n_items * config.splits, :, : config.rows * sizes.group]
        x = x.reshape(n_items, config.splits, sizes.heads, config.rows, sizes.group, *x.shape[3:])
        x = x[item, :, :, i % config.rows]
        x = jnp.moveaxis(x, 1, 0).reshape(config.splits, sizes.n_rows, sizes.heads * sizes.group, *x.shape[4:])
        return jnp.where(live.reshape(1, -1, *[1] * (x.ndim - 2)), x, empty)

    parts = Partial(of_rows(o, 0.0), of_rows(ml[:, :, 0], -jnp.inf), of_rows(ml[:, :, 1], 0.0))
    return merge_axis(parts) if config.splits > 1 else jax.tree.map(lambda x: x[0], parts)
