"""Expert fill on a GPU: one Mosaic kernel that reads the miss list on the device, so that XLA has no loop of unknown length and no branch to run.

XLA runs both by copying a predicate to the host and waiting for it, in every layer. Here the blocks stay for the whole fill: each takes every
132nd tile of the records asked for, reads it from host memory over the link and writes it to its place in a pool, which is updated in place.
Compiled for H100 and interpreted on the CPU; the speeds of the two methods, and of `xla.by_fixed` beside them, have not been measured.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int, Num

from pallas_kernels.compat import call_as_on_device
from pallas_kernels.expert_fill.xla import Filled, Pools

BLOCKS = 132
"""As many as an H100 has multiprocessors."""
STAGES = 4
"""Tiles in shared memory at a time, of up to 32 KB each."""
_TILE_ROWS = (64, 32, 16, 8)
"""Rows of 16-bit elements that a tile may have; with 32 bits it is half of them."""


def tile_rows(pools: Pools, store: Num[Array, "X R C"]) -> int:
    """Rows of the tiles that a fill moves: the most that lie within one pool, wherever they are in the record.

    Raises:
        NotImplementedError: no tile fits; the message says which size is in the way.
    """
    cols, scale = store.shape[2], store.dtype.itemsize // 2
    if cols > 256 or cols % 32:
        raise NotImplementedError(f"the kernel moves tiles of at most 256 columns, in multiples of 32; the store has {cols}")
    rows = [math.prod(pool.shape[1:]) / cols for pool in pools]
    fitting = [t // scale for t in _TILE_ROWS if all(r % (t // scale) == 0 for r in rows)]
    if not fitting:
        leaves = ", ".join(f"{r:g}" for r in rows)
        least = _TILE_ROWS[-1] // scale
        raise NotImplementedError(f"the kernel moves tiles of at least {least} rows; the pools have {leaves} rows of {cols} in a slot")
    return fitting[0]


def by_tma(
    pools: Pools,
    store: Num[Array, "X R C"],
    ids_M: Int[Array, "M"],
    slots_M: Int[Array, "M"],
    first: Int[Array, ""],
    stop: Int[Array, ""],
    blocks: int = BLOCKS,
    interpret: Any = False,
) -> Filled:
    """See `api.fill`. Tiles go through shared memory by the copy engine (TMA), up to `STAGES` of a block under way at a time.

    Args:
        blocks: blocks of the kernel's grid.
        interpret: `pallas_kernels.compat.interpret_gpu()` to run on the CPU; jax then takes no argument in host memory, so the store must not be.
    """
    shape = (STAGES, tile_rows(pools, store), store.shape[2])
    scratch = (plgpu.SMEM(shape, store.dtype), plgpu.Barrier(num_barriers=STAGES))
    return _run(_move_by_tma, scratch, (pools, store, ids_M, slots_M, first, stop), blocks, interpret)


def by_loads(
    pools: Pools,
    store: Num[Array, "X R C"],
    ids_M: Int[Array, "M"],
    slots_M: Int[Array, "M"],
    first: Int[Array, ""],
    stop: Int[Array, ""],
    blocks: int = BLOCKS,
    interpret: Any = False,
) -> Filled:
    """See `api.fill` and `by_tma`. Tiles go through registers, by plain loads from the host's address and plain stores."""
    return _run(_move_by_loads, (), (pools, store, ids_M, slots_M, first, stop), blocks, interpret)


def _move_by_tma(mine: jax.Array, source: Callable, to_pool: Callable, smem: Any, barriers: Any) -> jax.Array:
    """Moves this block's tiles 0..mine-1; returns how many it has read."""

    def load(k):
        plgpu.copy_gmem_to_smem(source(k), smem.at[k % STAGES], barriers.at[k % STAGES])

    def step(k, read):
        stage = k % STAGES
        plgpu.barrier_wait(barriers.at[stage])
        to_pool(k, lambda target: plgpu.copy_smem_to_gmem(smem.at[stage], target))
        # All copies but this one have left shared memory, so the stage of the one before is free.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        pl.when((k >= 1) & (k - 1 + STAGES < mine))(lambda: load(k - 1 + STAGES))
        return read + 1

    for k in range(STAGES):
        pl.when(k < mine)(functools.partial(load, k))
    read = lax.fori_loop(0, mine, step, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
    return read


def _move_by_loads(mine: jax.Array, source: Callable, to_pool: Callable) -> jax.Array:
    """Moves this block's tiles 0..mine-1; returns how many it has read."""

    def step(k, read):
        tile = source(k)[...]

        def put(target):
            target[...] = tile

        to_pool(k, put)
        return read + 1

    return lax.fori_loop(0, mine, step, jnp.int32(0))


def _run(move: Callable, scratch: tuple, operands: tuple, blocks: int, interpret: Any) -> Filled:
    """The kernel around `move(mine, source, to_pool, *scratch)`: which tiles are a block's, where each comes from and where it goes."""
    pools, store, ids_M, slots_M, first, stop = operands
    rows, cols = tile_rows(pools, store), store.shape[2]
    ends = [0]
    for pool in pools:
        ends.append(ends[-1] + math.prod(pool.shape[1:]) // (rows * cols))
    tiles = ends[-1]

    def body(store_ref, ids_ref, slots_ref, range_ref, *refs):
        *pool_refs, counts_ref = refs
        block = lax.axis_index("block")
        first, stop = range_ref[0], range_ref[1]
        mine = ((stop - first) * tiles - block + blocks - 1) // blocks

        def place(k):
            t = block + k * blocks
            return first + t // tiles, t % tiles

        def source(k):
            i, tile = place(k)
            return store_ref.at[ids_ref[i], pl.ds(tile * rows, rows), :]

        def to_pool(k, put):
            i, tile = place(k)
            for ref, (start, end) in zip(pool_refs, itertools.pairwise(ends), strict=True):
                target = ref.at[slots_ref[i], pl.ds((tile - start) * rows, rows), :]
                pl.when((tile >= start) & (tile < end))(functools.partial(put, target))

        def scoped(*scratch_refs):
            counts_ref[block] = move(mine, source, to_pool, *scratch_refs)

        pl.run_scoped(scoped, *scratch)

    kernel = pl.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((blocks,), jnp.int32),
        mesh=plgpu.Mesh(grid=(blocks,), grid_names=("block",)),
        interpret=interpret,
        name="expert_fill",
    )

    def in_place(pools, *arguments):
        refs = [jax.new_ref(pool.reshape(pool.shape[0], -1, cols), memory_space=plgpu.GMEM) for pool in pools]
        read = kernel(*arguments, *refs)
        return tuple(jax.freeze(ref).reshape(pool.shape) for ref, pool in zip(refs, pools, strict=True)), read

    pools, read = call_as_on_device(in_place, pools, store, ids_M, slots_M, jnp.stack([first, jnp.maximum(stop, first)]))
    # Tiles are counted where they are read; a record is all of its tiles.
    return pools, read.sum() // tiles
