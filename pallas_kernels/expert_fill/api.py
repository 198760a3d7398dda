"""Expert fill: the experts that a step misses, read from host memory and written over slots of the device pools, inside the step."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from pallas_kernels.dispatch import Kernels
from pallas_kernels.expert_fill import gpu, xla
from pallas_kernels.expert_fill.xla import Filled, Pools

METHODS = {"while": xla.by_while, "fixed": xla.by_fixed, "mosaic_tma": gpu.by_tma, "mosaic_loads": gpu.by_loads}
"""How a fill runs; all of them leave the same bits. The Mosaic kernels are for NVIDIA GPUs, the others for every device."""


def fill(
    pools: Pools,
    store: Num[Array, "X R C"],
    ids_M: Int[Array, "M"],
    slots_M: Int[Array, "M"],
    first: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
    kernels: Kernels,
    method: str | None = None,
) -> Filled:
    """`pools[*, slots[i]] = store[ids[i]]` for i in first..stop-1. Donate the pools, and they are updated in place.

    Args:
        pools: arrays [Z, ...] on the device. A slot's record is the elements of every pool's entry, one pool after the other.
        store: one contiguous record per expert in `pinned_host` memory, uint16 or float32 as the pools are; read only.
        ids_M: which record of the store each miss wants.
        slots_M: which slot it goes to. Within a call no two are the same: a kernel copies all of them at once.
        first, stop: the misses of this call; entries outside of them are ignored. `stop` is at most M.
        kernels: which implementation, where `method` is None.
        method: one of `METHODS`.

    Returns:
        The pools, and how many records were read from the store, int32, counted where they are read.

    Raises:
        ValueError: shapes or dtypes that don't belong together, or a method that does not exist.
        NotImplementedError: a method that cannot take these shapes; the message says why.
    """
    _check_arguments(pools, store, ids_M, slots_M)
    if method is None:
        method = choose(pools, store, kernels)
    if method not in METHODS:
        raise ValueError(f"no method {method!r} to fill with; there are {', '.join(METHODS)}")
    with jax.named_scope("expert_fill"):
        return METHODS[method](tuple(pools), store, ids_M, slots_M, jnp.asarray(first, jnp.int32), jnp.asarray(stop, jnp.int32))


def read_record(store: Num[Array, "X R C"], i: Int[Array, ""]) -> Num[Array, "N"]:
    """One record on the device, flat: a read that a compiler may start early, for `land` to write later."""
    return xla.read(store, i)


def land(pools: Pools, record: Num[Array, "R C"], slot: Int[Array, ""]) -> Pools:
    """The pools with one record, which is on the device already, in a slot. Donate the pools, and they are updated in place."""
    parts = xla.split(record.reshape(-1), pools)
    once = jnp.minimum(slot + 1, 1)  # unknown to the compiler: out of a loop, XLA's CPU backend updates a copy where the pools are read afterwards
    return jax.lax.fori_loop(0, once, lambda _, pools: xla.write(pools, parts, slot), tuple(pools))


def choose(pools: Pools, store: Num[Array, "X R C"], kernels: Kernels) -> str:
    """The method that `fill` takes when none is asked for.

    On a GPU it is the Mosaic kernel by TMA, or the loop of fixed length for shapes that the kernel does not take. Which method is fastest there is
    for a measurement to decide that has not run yet (benchmarks/gpu_fill.json); until then this order is a guess.
    """
    if kernels.backend != "gpu":
        return "while"
    try:
        gpu.tile_rows(pools, store)
    except NotImplementedError:
        return "fixed"
    return "mosaic_tma"


def _check_arguments(pools: Pools, store: jax.Array, ids_M: jax.Array, slots_M: jax.Array) -> None:
    if store.ndim != 3 or store.dtype not in (jnp.uint16, jnp.float32):
        raise ValueError(f"expected a store [X, rows, cols] of uint16 or float32, got {store.dtype} {list(store.shape)}")
    if not pools or any(pool.ndim < 2 or pool.shape[0] != pools[0].shape[0] or pool.dtype != store.dtype for pool in pools):
        got = " beside ".join(f"{pool.dtype} {list(pool.shape)}" for pool in pools)
        raise ValueError(f"expected pools [Z, ...] of {store.dtype}, as the store is, got {got or 'none'}")
    sizes = [math.prod(pool.shape[1:]) for pool in pools]
    if sum(sizes) != math.prod(store.shape[1:]):
        raise ValueError(
            f"a record of the store has {store.shape[1]} x {store.shape[2]} = {math.prod(store.shape[1:])} elements, "
            f"a slot of the pools {' + '.join(map(str, sizes))} = {sum(sizes)}"
        )
    if ids_M.ndim != 1 or ids_M.shape != slots_M.shape or ids_M.shape[0] == 0:
        raise ValueError(f"expected ids and slots [M], at least one, got {list(ids_M.shape)} beside {list(slots_M.shape)}")
