"""Every fill leaves the bits of a plain loop, counts what it reads, touches no other slot, and needs no second copy of the pools."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compat import interpret_gpu
from pallas_kernels.dispatch import Kernels
from pallas_kernels.expert_fill import api, gpu
from sharding.compile_only import compile_with_host

CPU, GPU = Kernels("cpu"), Kernels("gpu")
X, Z, M = 7, 6, 4
RANGES = [(0, 0), (2, 2), (M, M), (0, M), (1, 3)]
SHAPES = [((16, 2, 32), (32, 16)), ((48, 32),), ((24,), (3, 5), (2, 4, 7))]


def case(shapes, dtype, cols):
    """Store, pools, ids and slots: random bits, a permutation of slots, and one id that comes twice."""
    rng = np.random.default_rng(0)
    size = sum(math.prod(s) for s in shapes)
    store = rng.integers(0, 65536, (X, size // cols, cols)).astype(dtype)
    pools = tuple(rng.integers(0, 65536, (Z, *s)).astype(dtype) for s in shapes)
    return store, pools, np.array([5, 0, 5, 3], np.int32), rng.permutation(Z)[:M].astype(np.int32)


def plain_loop(pools, store, ids, slots, first, stop):
    want = [pool.copy() for pool in pools]
    for i in range(first, stop):
        at = 0
        for pool in want:
            pool[slots[i]] = store[ids[i]].reshape(-1)[at : at + pool[0].size].reshape(pool.shape[1:])
            at += pool[0].size
    return want


def pinned(x):
    return jax.device_put(x, jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"))


def jitted(method, kernels=CPU):
    return jax.jit(lambda *args: api.fill(*args, kernels, method), donate_argnums=0)


@pytest.mark.parametrize("method", ["while", "fixed"])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_bits_count_and_place(method, dtype, shapes):
    store, pools, ids, slots = case(shapes, dtype, cols=1 if len(shapes) == 3 else 32)
    f, in_host = jitted(method), pinned(store)
    for first, stop in RANGES:
        on_device = tuple(jnp.array(p) for p in pools)
        where = [p.unsafe_buffer_pointer() for p in on_device]
        out, count = f(on_device, in_host, ids, slots, first, stop)
        for got, want in zip(out, plain_loop(pools, store, ids, slots, first, stop), strict=True):
            np.testing.assert_array_equal(np.asarray(got), want)
        assert int(count) == (stop - first if method == "while" else M), "the loop of fixed length reads a record in each of its rounds"
        assert [p.unsafe_buffer_pointer() for p in out] == where


@pytest.mark.parametrize("method", ["while", "fixed"])
def test_entries_outside_of_the_range_mean_nothing(method):
    store, pools, ids, slots = case(SHAPES[0], np.uint16, 32)
    ids[[0, 3]], slots[[0, 3]] = -1, 10**6
    for first, stop in ((1, 3), (0, 0), (M, M)):
        out, _ = jitted(method)(tuple(jnp.array(p) for p in pools), pinned(store), ids, slots, first, stop)
        for got, want in zip(out, plain_loop(pools, store, ids, slots, first, stop), strict=True):
            np.testing.assert_array_equal(np.asarray(got), want)


@pytest.mark.parametrize("method", ["while", "fixed"])
def test_no_second_copy_on_the_cpu(method):
    store, pools, ids, slots = case(((256, 2, 512), (512, 256)), np.uint16, 256)
    stats = jitted(method).lower(tuple(map(jnp.array, pools)), pinned(store), ids, slots, 0, 0).compile().memory_analysis()
    assert stats.alias_size_in_bytes == sum(p.nbytes for p in pools)
    assert stats.temp_size_in_bytes <= 2 * store[0].nbytes + 4096


@pytest.mark.parametrize("kernel", [gpu.by_tma, gpu.by_loads])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_kernels_interpreted(kernel, dtype):
    store, pools, ids, slots = case(((16, 2, 32), (16, 32)), dtype, 32)
    f = jax.jit(functools.partial(kernel, blocks=2, interpret=interpret_gpu()))
    for first, stop in RANGES:
        out, count = f(pools, store, ids, slots, jnp.int32(first), jnp.int32(stop))
        for got, want in zip(out, plain_loop(pools, store, ids, slots, first, stop), strict=True):
            np.testing.assert_array_equal(np.asarray(got), want)
        assert int(count) == stop - first


def test_more_tiles_than_stages_interpreted():
    """One block, so that every stage of shared memory is used several times over."""
    store, pools, ids, slots = case(((8 * (2 * gpu.STAGES + 1), 32),), np.uint16, 32)
    out, count = jax.jit(functools.partial(gpu.by_tma, blocks=1, interpret=interpret_gpu()))(pools, store, ids, slots, jnp.int32(0), jnp.int32(2))
    np.testing.assert_array_equal(np.asarray(out[0]), plain_loop(pools, store, ids, slots, 0, 2)[0])
    assert int(count) == 2


def shapes_of(pools, rows, cols, dtype=jnp.uint16):
    return tuple(jax.ShapeDtypeStruct((Z, *s), dtype) for s in pools), jax.ShapeDtypeStruct((X, rows, cols), dtype)


@pytest.mark.parametrize(
    "dtype, leaves, rows", [(jnp.uint16, ((128, 256), (64, 256)), 64), (jnp.uint16, ((128, 256), (24, 256)), 8), (jnp.float32, ((64, 2, 256),), 32)]
)
def test_tiles_lie_within_a_pool(dtype, leaves, rows):
    pools, store = shapes_of(leaves, sum(math.prod(s) for s in leaves) // 256, 256, dtype)
    assert gpu.tile_rows(pools, store) == rows
    assert api.choose(pools, store, GPU) == "mosaic_tma"


@pytest.mark.parametrize(
    "leaves, rows, cols, reason",
    [
        (((4, 256), (8, 256)), 12, 256, "have 4, 8 rows of 256"),
        (((8, 128), (8, 384)), 16, 256, "have 4, 12 rows of 256"),
        (((8, 512),), 8, 512, "the store has 512"),
    ],
)
def test_shapes_that_the_kernel_refuses(leaves, rows, cols, reason):
    pools, store = shapes_of(leaves, rows, cols)
    ids = jax.ShapeDtypeStruct((M,), jnp.int32)
    with pytest.raises(NotImplementedError, match=reason):
        jitted("mosaic_tma").trace(pools, store, ids, ids, 0, 1)
    assert api.choose(pools, store, GPU) == "fixed"
    assert api.choose(pools, store, CPU) == "while"
    jitted(None, GPU).trace(pools, store, ids, ids, 0, 1)


@pytest.mark.parametrize("method", ["mosaic_tma", "mosaic_loads"])
def test_kernels_take_an_array_in_host_memory(method):
    """Mosaic by itself refuses one whose type names its memory, as arrays' types do and shapes' don't."""
    store, pools, ids, slots = case(((64, 2, 32), (64, 32)), np.uint16, 32)
    lowered = jitted(method, GPU).trace(pools, pinned(store), ids, slots, 0, 1).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def refuse(message, pools, store, ids=M, slots=M, method=None):
    with pytest.raises(ValueError, match=message):
        api.fill(pools, store, jnp.zeros(ids, jnp.int32), jnp.zeros(slots, jnp.int32), 0, 1, CPU, method)


def test_what_does_not_belong_together_is_named():
    pool, store = jnp.zeros((Z, 4, 8), jnp.uint16), jnp.zeros((X, 4, 16), jnp.uint16)
    refuse("4 x 16 = 64 elements.*32 = 32", (pool,), store)
    refuse(r"32 \+ 32 \+ 32 = 96", (pool,) * 3, store)
    refuse("uint16, as the store is, got uint16.*float32", (pool, pool.astype(jnp.float32)), store)
    refuse(r"\[6, 4, 8\] beside uint16 \[5, 4, 8\]", (pool, pool[1:]), store)
    refuse("got none", (), store)
    refuse("uint16 or float32, got bfloat16", (pool,) * 2, store.astype(jnp.bfloat16))
    refuse(r"\[X, rows, cols\]", (pool,) * 2, store[0])
    refuse(r"\[4\] beside \[3\]", (pool,) * 2, store, slots=3)
    refuse("at least one", (pool,) * 2, store, ids=0, slots=0)
    refuse("'mosaic'.*while, fixed, mosaic_tma, mosaic_loads", (pool,) * 2, store, method="mosaic")


LAYERS, D, F, EXPERTS, SLOTS, MISSES = 12, 1024, 512, 32, 16, 8
RECORD = 3 * D * F * 2


def compiled(target, backend, method, in_scan):
    """A fill of two-matrix experts, alone or in a scan over layers in which each has its own misses, as many as its rows make."""
    s = jax.ShapeDtypeStruct
    pools = (s((SLOTS, D, 2, F), jnp.uint16), s((SLOTS, F, D), jnp.uint16))
    store = s((EXPERTS, 3 * D * F // 256, 256), jnp.uint16)
    kernels, count = Kernels(backend), s((), jnp.int32)

    def layer(store, carry, weights_and_ids):
        x, pools, read = carry
        w, ids = weights_and_ids
        x = jnp.tanh(x @ w)
        stop = (x[0, 0] > 0).astype(jnp.int32) + 2
        pools, more = api.fill(pools, store, ids, ids, stop // 2, stop, kernels, method)
        return (x + pools[1][ids[0], 0, 0].astype(x.dtype), pools, read + more), None

    def step(pools, store, x, w, ids):
        return jax.lax.scan(functools.partial(layer, store), (x, pools, jnp.int32(0)), (w, ids))[0]

    if in_scan:
        f, rest = step, (s((8, D), jnp.float32), s((LAYERS, D, D), jnp.float32), s((LAYERS, MISSES), jnp.int32))
    else:
        f, rest = functools.partial(api.fill, kernels=kernels, method=method), (s((MISSES,), jnp.int32),) * 2 + (count,) * 2
    return compile_with_host(target, f, pools, store, *rest, host={1}, donate=(0,), options=kernels.compiler_options())


@pytest.mark.compile_only
@pytest.mark.parametrize(
    "target, backend, method",
    [("h100", "gpu", m) for m in api.METHODS] + [("v5e:2x2", "tpu", "while"), ("v5e:2x2", "tpu", "fixed")],
)
@pytest.mark.parametrize("in_scan", [False, True])
def test_fills_compile(target, backend, method, in_scan):
    program = compiled(target, backend, method, in_scan)
    assert "S(5)" in program.text.splitlines()[0]
    assert program.host_argument_size == EXPERTS * RECORD
    assert program.alias_size == SLOTS * RECORD
    weights = D * D * 4 if in_scan else 0  # a layer's, taken out of the stack
    assert program.temp_size <= 2.1 * RECORD + weights and program.host_temp_size == 0
    mosaic = method.startswith("mosaic")
    if mosaic:
        assert program.temp_size <= 0.1 * RECORD + weights
    else:
        assert "dynamic-slice-start" in program.text
    if target == "h100" and method != "while":
        loops = [line for line in program.text.splitlines() if " while(" in line]
        assert " conditional(" not in program.text
        assert len(loops) == in_scan + (not mosaic) and all("known_trip_count" in line for line in loops), loops
