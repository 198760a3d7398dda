"""Paged attention on a Hopper GPU: decoding, verifying trees and pieces of prompts, in one Mosaic GPU kernel (`gpu_kernel`).

A tile's rows are the query heads of one KV head times some consecutive query rows, up to 64 (or 128, by two warpgroups that share the keys);
more than 64 query heads to a KV head (MLA) are tiles of 64. Only key tiles that a tile can see are visited, each tile's shared evenly among
`splits` blocks, whose results are merged outside of the kernel. The grid is static: as many tiles as the rows of a step could make.
What bounds it: the bytes of keys and values while decoding; the tensor cores in prefill.

Around the kernel, XLA gathers queries into tiles (of 8 rows at least) and results out of them: in prefill one more pass over o in float32, which
is the price for copies of whole tiles. Tiles of one query row need no such pass but where splits are merged.

Compiled for H100 and interpreted on the CPU. Unmeasured: every speed, and so the choice of stages, splits and warpgroups in `heuristic`. Known to
cost: results of splits in float32, which for MLA's decoding are nearly the bytes of the keys; with V of 256 and more, some 400 bytes of registers a
thread that go to memory in every key tile. Sums accumulated in place (`pl.run_state` around wgmma) would keep them there, and can't be interpreted.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import tuned
from pallas_kernels.paged_attention import gpu_kernel
from pallas_kernels.paged_attention.gpu_kernel import ROWS, Plan
from pallas_kernels.paged_attention.types import Pages, Partial, Queries, merge_axis

SHARED_BYTES = 232448
"""Shared memory that a block of an H100 may have."""
PROCESSORS = 132
MOST_TILES = 65535
MOST_TREE_WORDS = 16
"""Each word of a tree's mask costs every score an instruction or three."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel is cut.

    Attributes:
        block_keys: keys of a tile.
        stages: key tiles in shared memory at a time.
        share: what two warpgroups of a block share: "rows" (128 rows a tile), "columns" (of the values), or None: one warpgroup.
        splits: blocks among which the keys of a tile are shared.
    """

    block_keys: int = 64
    stages: int = 2
    share: Literal["rows", "columns"] | None = None
    splits: int = 1


def heuristic(q_THC: Float[Array, "T H C"], pages: Pages, queries: Queries, window: int | None = None) -> Config:
    """The config for these shapes. By reasoning alone: two warpgroups on every multiprocessor, then as few splits as fill all of them."""
    config = Config(share="columns") if pages.width_of_values > 192 else Config()
    plan = _plan(q_THC, pages, queries, 1.0, window, None, config, False)
    wide = Config(share="rows")
    if config.share is None and plan.group * queries.most >= 2 * ROWS and _fits(q_THC, pages, queries, window, wide):
        config, plan = wide, _plan(q_THC, pages, queries, 1.0, window, None, wide, False)
    seen = queries.page_table.shape[1] * plan.width
    if window is not None:
        seen = min(seen, window + rows_of_tile(plan, queries.most) + plan.block_keys)
    blocks, at_once = plan.tiles * plan.head_tiles, PROCESSORS * (1 if config.share else 2)
    splits = min(at_once // blocks, -(-seen // (4 * plan.block_keys)))
    return dataclasses.replace(config, splits=max(splits, 1))


def problem_of(q_THC: Float[Array, "T H C"], pages: Pages, queries: Queries, window: int | None = None) -> dict[str, Any]:
    """What a measured choice depends on. Page tables have room for `keys` keys, of which sequences may have fewer."""
    (_, heads, channels), (_, kv_heads, page, _) = q_THC.shape, pages.k.shape
    return {
        "heads": heads, "kv_heads": kv_heads, "channels": channels, "values": pages.width_of_values, "page": page,
        "bits": 8 * pages.k.dtype.itemsize, "latent": pages.v is None, "bias": pages.bias is not None, "tree": queries.tree is not None,
        "window": window or 0, "most": queries.most, "sequences": queries.page_table.shape[0], "keys": queries.page_table.shape[1] * page,
    }  # fmt: skip


def choose(q_THC: Float[Array, "T H C"], pages: Pages, queries: Queries, window: int | None = None) -> Config:
    """The config that was fastest where these shapes, or about as many sequences, rows and keys, were measured on this device; or `heuristic`'s."""
    measured = tuned.find("paged_attention", problem_of(q_THC, pages, queries, window), ("most", "sequences", "keys"))
    if measured is not None and _fits(q_THC, pages, queries, window, config := Config(**measured)):
        return config
    return heuristic(q_THC, pages, queries, window)


def candidates(q_THC: Float[Array, "T H C"], pages: Pages, queries: Queries, window: int | None = None) -> list[Config]:
    """The configs that are legal for these shapes, for a tuner to try; none where the kernel takes no such shapes."""
    try:
        best = heuristic(q_THC, pages, queries, window)
    except NotImplementedError:
        return []
    shares: tuple[Literal["rows", "columns"] | None, ...] = (None, "rows", "columns")
    splits = sorted({1, 2, max(1, best.splits // 2), best.splits, 2 * best.splits})
    every = (Config(64, stages, share, n) for stages in (2, 3, 4) for share in shares for n in splits)
    return [config for config in every if _fits(q_THC, pages, queries, window, config)]


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
        q_THC: bfloat16.
        pages: keys and values in uint16 (bfloat16's bits) or in int8.
        config: None has `choose` pick one.
        interpret: `pallas_kernels.compat.interpret_gpu()` to run on the CPU.

    Raises:
        NotImplementedError: a shape or type that the kernel does not take; the message has the number that is in the way.
    """
    plan = _plan(q_THC, pages, queries, scale, window, soft_cap, config or choose(q_THC, pages, queries, window), interpret)
    most_rows = rows_of_tile(plan, queries.most)
    owners = _owners(queries, q_THC.shape[0])
    tiles, tile_T = _tiles(plan, queries, owners, most_rows)
    row_of = tiles[:, gpu_kernel.POSITION] - tiles[:, gpu_kernel.FIRST] + queries.rows[tiles[:, gpu_kernel.SEQUENCE]]
    row_of = jnp.clip(row_of[:, None] + jnp.arange(most_rows), 0, q_THC.shape[0] - 1)
    operands = {
        "q": _into_tiles(plan, q_THC, row_of),
        "k": _as_bfloat16(pages.k),
        "v": None if pages.v is None else _as_bfloat16(pages.v),
        "k_scales": pages.k_scales,
        "v_scales": pages.v_scales,
        "bias": pages.bias,
        "tree": None if queries.tree is None else _tree_tiles(plan, queries.tree, row_of),
        "table": queries.page_table,
        "tiles": tiles,
    }
    o, ml = gpu_kernel.run(plan, operands)
    parts = Partial(*(_out_of_tiles(plan, q_THC.shape, most_rows, owners, tile_T, x) for x in (o, ml[..., 0, :], ml[..., 1, :])))
    if most_rows > 1:
        owned = owners[0][:, None]
        parts = Partial(jnp.where(owned[..., None], parts.o, 0.0), jnp.where(owned, parts.m, -jnp.inf), jnp.where(owned, parts.l, 0.0))
    return jax.tree.map(lambda x: x[0], parts) if plan.splits == 1 else merge_axis(parts)


def rows_of_tile(plan: Plan, most: int) -> int:
    """Query rows that a tile has room for, if no sequence has more than `most`."""
    return max(1, min(plan.tile_rows // plan.group, most))


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise NotImplementedError(f"paged attention on a GPU: {message}")


def _check(q_THC: jax.Array, pages: Pages, queries: Queries, config: Config) -> None:
    (_, heads, channels), (_, kv_heads, width, _), values = q_THC.shape, pages.k.shape, pages.width_of_values
    group, quantized = heads // kv_heads, pages.k.dtype == jnp.int8
    _refuse(q_THC.dtype != jnp.bfloat16, f"queries are bfloat16, got {q_THC.dtype}")
    for leaf in (pages.k, pages.v):
        _refuse(leaf is not None and leaf.dtype not in (jnp.uint16, jnp.int8), f"pages are uint16 or int8, got {getattr(leaf, 'dtype', None)}")
    _refuse(pages.v is not None and pages.v.dtype != pages.k.dtype, f"keys in {pages.k.dtype} beside values in {getattr(pages.v, 'dtype', None)}")
    _refuse(quantized != (pages.k_scales is not None), f"pages in {pages.k.dtype} {'without' if quantized else 'with'} scales")
    _refuse((quantized and pages.v is not None) != (pages.v_scales is not None), "scales of keys or of values only")
    _refuse(channels % 64 != 0 or channels > 576, f"{channels} channels; keys have a multiple of 64, up to 576")
    _refuse(values % 64 != 0 or values > 512, f"{values} channels; values have a multiple of 64, up to 512")
    _refuse(pages.v is None and values > channels, f"values of {values} channels within keys of {channels}")
    _refuse(heads % kv_heads != 0 or (group > ROWS and group % ROWS != 0), f"{group} query heads to a KV head; up to {ROWS}, or a multiple of it")
    fits = width % 8 == 0 and (width % config.block_keys == 0 or config.block_keys % width == 0)
    _refuse(not fits, f"pages of {width} keys; they are 8, 16, 32 or a multiple of {config.block_keys}")
    small = width < 32 and (quantized or pages.bias is not None)
    _refuse(small, f"pages of {width} keys with scales or bias; a copy of less than 32 numbers would not be aligned")
    words = 0 if queries.tree is None else queries.tree.shape[1]
    _refuse(words > MOST_TREE_WORDS, f"trees of {32 * words} nodes; up to {32 * MOST_TREE_WORDS}")
    _refuse(config.block_keys != 64, f"tiles of {config.block_keys} keys; only 64 do")
    columns = values // 2 if config.share == "columns" else values
    _refuse(columns % 64 != 0 or columns > 256, f"{columns} columns of values to a warpgroup; a multiple of 64, up to 256")
    _refuse(config.share == "rows" and columns > 192, f"{columns} columns of values in tiles of 128 rows; up to 192")
    most = min(group, ROWS) * queries.most
    _refuse(config.share == "rows" and most <= ROWS, f"tiles of 128 rows; a head tile of a sequence has {most}")


def _fits(q_THC: jax.Array, pages: Pages, queries: Queries, window: int | None, config: Config) -> bool:
    try:
        _plan(q_THC, pages, queries, 1.0, window, None, config, False)
    except NotImplementedError:
        return False
    return True


def _plan(
    q_THC: jax.Array,
    pages: Pages,
    queries: Queries,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: Config,
    interpret: Any,
) -> Plan:
    _check(q_THC, pages, queries, config)
    (rows, heads, channels), (_, kv_heads, width, _) = q_THC.shape, pages.k.shape
    sequences, group = queries.page_table.shape[0], min(heads // kv_heads, ROWS)
    plan = Plan(
        tiles=0,
        head_tiles=heads // group,
        splits=config.splits,
        kv_heads=kv_heads,
        group=group,
        stored_rows=0,
        channels=channels,
        values=pages.width_of_values,
        width=width,
        block_keys=config.block_keys,
        stages=config.stages,
        share=config.share,
        tree_words=0 if queries.tree is None else queries.tree.shape[1],
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        interpret=interpret,
    )
    most_rows = rows_of_tile(plan, queries.most)
    tiles = rows if most_rows == 1 else min(sequences * -(-queries.most // most_rows), (rows + sequences * (most_rows - 1)) // most_rows)
    stored = -(-most_rows * group // 8) * 8
    plan = dataclasses.replace(plan, tiles=max(tiles, 1), stored_rows=plan.tile_rows if config.share else min(stored, ROWS))
    operands = {"v": pages.v, "k_scales": pages.k_scales, "v_scales": pages.v_scales, "bias": pages.bias}
    _refuse(plan.tiles > MOST_TILES, f"{plan.tiles} tiles of query rows; a grid has up to {MOST_TILES}")
    needed = gpu_kernel.shared_bytes(plan, {"q", "k"} | {name for name, x in operands.items() if x is not None})
    _refuse(needed > SHARED_BYTES, f"{needed} bytes of shared memory with {config.stages} stages; a block has {SHARED_BYTES}")
    return plan


def _as_bfloat16(x: jax.Array) -> jax.Array:
    """The same bytes: XLA makes no copy of them for this."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _owners(queries: Queries, n_rows: int) -> tuple[Bool[Array, "T"], Int[Array, "T"], Int[Array, "T"]]:
    """Of each row: whether it is a sequence's, whose, and its number there."""
    t = jnp.arange(n_rows)
    mine = (t[:, None] >= queries.rows) & (t[:, None] < queries.rows + queries.lengths)
    b = jnp.argmax(mine, 1)
    return mine.any(1), b, t - queries.rows[b]


def _tiles(plan: Plan, queries: Queries, owners: tuple[jax.Array, ...], most_rows: int) -> tuple[Int[Array, "N 8"], Int[Array, "T"]]:
    """The record of each tile (see `gpu_kernel`), without rows where there are less tiles than that; and the tile of each row.

    Tiles of one row each are the rows, in their order; others follow the sequences.
    """
    owned, owner, number = owners
    if most_rows == 1:
        b, offset, count, tile_T = owner, number, owned.astype(jnp.int32), jnp.arange(len(owner))
    else:
        each = -(-queries.lengths // most_rows)
        ends = jnp.cumsum(each)
        n = jnp.arange(plan.tiles)
        b = jnp.minimum((ends <= n[:, None]).sum(1), len(ends) - 1)
        offset = (n - (ends - each)[b]) * most_rows
        count = jnp.where(n < ends[-1], jnp.clip(queries.lengths[b] - offset, 0, most_rows), 0)
        tile_T = jnp.clip((ends - each)[owner] + number // most_rows, 0, plan.tiles - 1)
    first, keys = queries.first[b], queries.keys[b]
    position = first + offset
    past = jnp.minimum(keys, first + 32 * plan.tree_words if plan.tree_words else position + count)
    low = jnp.zeros_like(past) if plan.window is None else jnp.maximum(position - plan.window + 1, 0)
    begin = low // plan.block_keys
    end = jnp.where((count > 0) & (past > low), -(-past // plan.block_keys), begin)
    last_page = jnp.maximum(keys - 1, 0) // plan.width
    return jnp.stack([b, position, count, keys, first, begin, end, last_page], 1).astype(jnp.int32), tile_T


def _into_tiles(plan: Plan, q_THC: jax.Array, row_of: Int[Array, "N R"]) -> jax.Array:
    """[tiles, head_tiles, stored_rows, C]: a tile's rows are query rows, and for each the heads of the tile."""
    (tiles, most_rows), channels = row_of.shape, q_THC.shape[2]
    x = q_THC[row_of] if most_rows > 1 else q_THC
    x = x.reshape(tiles, most_rows, plan.head_tiles, plan.group, channels).swapaxes(1, 2)
    x = x.reshape(tiles, plan.head_tiles, most_rows * plan.group, channels)
    return jnp.pad(x, ((0, 0), (0, 0), (0, plan.stored_rows - x.shape[2]), (0, 0)))


def _tree_tiles(plan: Plan, tree: jax.Array, row_of: Int[Array, "N R"]) -> Int[Array, "N U M"]:
    """The words of the tree's masks of each tile's rows."""
    words = jnp.repeat(lax.bitcast_convert_type(tree, jnp.int32)[row_of], plan.group, axis=1)
    return jnp.pad(words, ((0, 0), (0, plan.tile_rows - words.shape[1]), (0, 0))).swapaxes(1, 2)


def _out_of_tiles(
    plan: Plan, shape: tuple[int, ...], most_rows: int, owners: tuple[jax.Array, ...], tile_T: jax.Array, x: jax.Array
) -> Float[Array, "S T H ..."]:
    """Row by row what is held as [splits, tiles, head_tiles, rows of the tile, ...]; no copy where a tile is one row and full."""
    x = x[:, :, :, : most_rows * plan.group]
    if most_rows > 1:
        x = x.reshape(*x.shape[:3], most_rows, plan.group, *x.shape[4:])[:, tile_T, :, owners[2] % most_rows]
        x = x.swapaxes(0, 1)  # the two indexed axes came first
    return x.reshape(plan.splits, shape[0], shape[1], *x.shape[4:])
