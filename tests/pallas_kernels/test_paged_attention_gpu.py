"""The Hopper kernel gives what the plain meaning gives, whatever lies where nothing is held; and compiles without a copy of the pages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.compat import interpret_gpu
from pallas_kernels.paged_attention import gpu, reference
from pallas_kernels.paged_attention.gpu import Config
from pallas_kernels.paged_attention.shapes import PAGE, SHAPES
from pallas_kernels.paged_attention.types import Pages, Partial, Queries, finish, merge, plain
from sharding.compile_only import compile_for
from tests.more import more, mostly
from tests.quick import OPTIONS

SCALE = 0.11
NOWHERE = 10**6
"""Stands in page tables where no page does."""


def as_uint16(x):
    return lax.bitcast_convert_type(jnp.asarray(x, jnp.bfloat16), jnp.uint16)


def in_int8(rng, x, dead):
    """Integers and scales; scales are NaN where nothing is held."""
    return np.clip(np.round(x * 40), -127, 127).astype(np.int8), np.where(dead, np.nan, rng.uniform(0.01, 0.03, x.shape[:3])).astype(np.float32)


def case(keys, lengths, kv_heads=1, group=4, width=64, channels=64, values=64, latent=False, quantized=False, bias_heads=0, tree_words=0, nobody=2):
    """Sequences of `keys` keys, of which the last `lengths` are queries; NaN wherever no key is, `nobody` rows of no sequence on both sides."""
    rng = np.random.default_rng(0)
    n_pages = max(-(-max(keys) // width), 1) + 1
    total = len(keys) * n_pages + 2
    table = rng.permutation(total)[: len(keys) * n_pages].reshape(len(keys), n_pages).astype(np.int32)
    dead = np.ones((total, 1, width), bool)
    for row, n in zip(table, keys, strict=True):
        for at in range(n):
            dead[row[at // width], 0, at % width] = False
        row[-(-n // width) :] = NOWHERE
    k, v = (rng.normal(size=(total, kv_heads, width, c)) for c in (channels, values))
    if quantized:
        (k, k_scales), (v, v_scales) = in_int8(rng, k, dead), in_int8(rng, v, dead)
    else:
        (k, v), k_scales, v_scales = (as_uint16(np.where(dead[..., None], np.nan, x)) for x in (k, v)), None, None
    bias = None
    if bias_heads:
        bias = np.where(rng.random((total, bias_heads, width)) < 0.3, -np.inf, rng.normal(size=(total, bias_heads, width)))
        bias = np.where(dead, np.nan, bias).astype(np.float32)
    pages = Pages(k, None if latent else v, k_scales, None if latent else v_scales, bias, values if latent else None)
    n_rows = sum(lengths) + 2 * nobody
    tree = rng.integers(0, 2**32, (n_rows, tree_words), dtype=np.uint32) if tree_words else None
    starts = nobody + np.cumsum([0, *lengths])[:-1]
    numbers = (np.asarray(x, np.int32) for x in (starts, lengths, keys, np.subtract(keys, lengths)))
    queries = Queries(table, *numbers, tree, most=max(lengths))
    q = jnp.asarray(rng.normal(size=(n_rows, kv_heads * group, channels)), jnp.bfloat16)
    return jax.tree.map(jnp.asarray, (q, pages, queries))


def run(f, args, **kw):
    return jax.jit(functools.partial(f, scale=SCALE, **kw), compiler_options=OPTIONS)(*args)


def kernel(args, config=None, **kw):
    return run(gpu.paged_attention, args, config=config, interpret=interpret_gpu(), **kw)


def assert_close(got: Partial, want: Partial):
    np.testing.assert_allclose(got.m, want.m, atol=1e-5)
    np.testing.assert_allclose(got.l, want.l, rtol=1e-5)
    l = np.where(want.l == 0, 1, want.l)[..., None]
    np.testing.assert_allclose(got.o / l, want.o / l, atol=6e-3)
    for x in (got.m, got.o, got.l):
        assert not np.isnan(x).any()


def check(args, config=None, **kw):
    got = kernel(args, config, **kw)
    assert_close(got, run(reference.paged_attention, args, **kw))
    return got


def test_reference_is_softmax_attention():
    """In float64, one query at a time, over keys laid out one after another."""
    q, pages, queries = case([70, 9], [3, 1], 2, 2, 32, values=32)
    k, v = (np.asarray(plain(x), np.float64) for x in (pages.k, pages.v))
    out = np.zeros((*q.shape[:2], 32))
    for b in range(2):
        ids = np.asarray(queries.page_table[b])
        ids = ids[ids != NOWHERE]
        keys, values = (np.moveaxis(x[ids], 1, 0).reshape(2, -1, x.shape[-1]) for x in (k, v))
        for i in range(queries.lengths[b]):
            t, seen = int(queries.rows[b]) + i, slice(max(0, int(queries.first[b]) + i + 1 - 20), int(queries.first[b]) + i + 1)
            for h in range(4):
                s = 3 * np.tanh(keys[h // 2, seen] @ np.asarray(q[t, h], np.float64) * SCALE / 3)
                p = np.exp(s) / (np.exp(s).sum() + np.exp(0.5 * h))
                out[t, h] = p @ values[h // 2, seen]
    got = run(reference.paged_attention, (q, pages, queries), window=20, soft_cap=3.0)
    np.testing.assert_allclose(finish(got, 0.5 * jnp.arange(4.0), jnp.float32), out, atol=2e-6)


@pytest.mark.parametrize("group, width", [more(1, 16), (4, 64), (8, 128)])
def test_decoding(group, width):
    """No rows, one key, a page, a page and one; rows of no sequence."""
    got = check(case([50, 1, 64, 65, 150], [0, 1, 1, 1, 1], 2, group, width))
    nobody = np.r_[0, 1, 6, 7]
    assert np.isneginf(got.m[nobody]).all() and not got.o[nobody].any() and not got.l[nobody].any()
    assert np.isfinite(np.delete(got.m, nobody, 0)).all()


def test_decoding_with_window_and_sinks():
    args = case([1, 40, 130, 200], [1, 1, 1, 1], 1, 8, 32)
    got, want = kernel(args, window=70), run(reference.paged_attention, args, window=70)
    assert_close(got, want)
    sinks = jnp.linspace(-2.0, 3.0, 8)
    np.testing.assert_allclose(finish(got, sinks, jnp.float32), finish(want, sinks, jnp.float32), atol=5e-3)


@pytest.mark.parametrize("window", [more(None), 30])
def test_pieces_of_prompts_beside_decoding(window):
    """Five heads to a KV head, so that rows of a tile are no power of two; more rows than a tile has."""
    check(case([3, 70, 90, 20], [3, 1, 29, 0], 1, 5), Config(), window=window, soft_cap=4.0)


def test_two_warpgroups_share_rows():
    check(case([90], [17], 1, 8), Config(share="rows"))


@pytest.mark.parametrize("words, window", [more(1, None), (2, 25)])
def test_trees(words, window):
    check(case([100, 45], [12, 20 * words], 1, 4, tree_words=words), Config(), window=window)


@pytest.mark.parametrize("bias_heads", [more(1), 2])
def test_bias_and_dead_slots(bias_heads):
    check(case([100, 45, 1], [1, 3, 1], 2, 4, 32, bias_heads=bias_heads))


def test_int8():
    check(case([100, 45], [1, 3], 2, 4, 32, channels=128, values=64, quantized=True, bias_heads=1))


def test_int8_in_two_warpgroups():
    check(case([70], [17], 1, 8, quantized=True), Config(share="rows"))


def test_latent_values():
    check(case([100, 130], [1, 2], 1, 16, channels=192, values=128, latent=True))


@pytest.mark.parametrize("quantized", [False, True])
def test_two_warpgroups_share_columns(quantized):
    check(case([130], [1], 1, 16, channels=192, values=128, latent=True, quantized=quantized, nobody=0), Config(share="columns"))


def test_more_heads_than_a_tile_has_rows():
    check(case([70], [1], 1, 128, channels=128, latent=True, nobody=1))


def test_splits_change_nothing_but_rounding():
    """More splits than some sequences have key tiles."""
    args = case([0, 1, 300], [0, 1, 1], 2, 4)
    assert_close(check(args, Config(splits=3, stages=3)), kernel(args, Config(splits=1)))


def test_halves_of_the_pages_merge():
    q, pages, queries = case([150, 40], [2, 1], 1, 4, 32)
    left = dataclasses.replace(queries, keys=jnp.minimum(queries.keys, 64), page_table=queries.page_table[:, :2])
    right = dataclasses.replace(queries, keys=jnp.maximum(queries.keys - 64, 0), first=queries.first - 64, page_table=queries.page_table[:, 2:])
    parts = [kernel((q, pages, half)) for half in (left, right)]
    assert_close(merge(*parts), run(reference.paged_attention, (q, pages, queries)))


S = jax.ShapeDtypeStruct


def shapes(model="mixtral-8x7b", sequences=8, rows=8, most=1, keys=4096, width=PAGE, n_pages=4096, quantized=False, tree_words=0, dtype=jnp.uint16):
    a = SHAPES[model]
    held, scales = (S((n_pages, a.kv_heads, width, c), jnp.int8 if quantized else dtype) for c in (a.head_dim, a.value_dim)), None
    k, v = held
    if quantized:
        scales = S(k.shape[:3], jnp.float32)
    pages = Pages(k, None if a.latent else v, scales, None if a.latent else scales, value_width=a.value_dim if a.latent else None)
    each = S((sequences,), jnp.int32)
    tree = S((rows, tree_words), jnp.uint32) if tree_words else None
    queries = Queries(S((sequences, keys // width), jnp.int32), each, each, each, each, tree, most=most)
    return S((rows, a.heads, a.head_dim), jnp.bfloat16), pages, queries


def refuse(message, q, pages, queries, config=None):
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(functools.partial(gpu.paged_attention, scale=1.0, config=config), q, pages, queries)
    if config is None:
        assert gpu.candidates(q, pages, queries) == []


def test_what_the_kernel_refuses():
    q, pages, queries = shapes()
    refuse("queries are bfloat16, got float32", S(q.shape, jnp.float32), pages, queries)
    refuse("pages are uint16 or int8, got float32", *shapes(dtype=jnp.float32))
    refuse("80 channels", S((8, 32, 80), q.dtype), dataclasses.replace(pages, k=S((9, 8, 64, 80), jnp.uint16)), queries)
    refuse("values of 192 channels within keys of 128", q, dataclasses.replace(pages, v=None, value_width=192), queries)
    refuse("96 query heads to a KV head", S((8, 96 * 8, 128), q.dtype), pages, queries)
    refuse("pages of 96 keys", *shapes(width=96))
    refuse("pages of 16 keys with scales", *shapes(width=16, quantized=True))
    refuse("int8 without scales", q, dataclasses.replace(pages, k=S(pages.k.shape, jnp.int8), v=S(pages.v.shape, jnp.int8)), queries)
    refuse("trees of 1024 nodes", *shapes(tree_words=32))
    refuse("bytes of shared memory with 9 stages", q, pages, queries, Config(stages=9))
    refuse("512 columns of values to a warpgroup", *shapes("deepseek-v3"), Config())
    refuse("tiles of 128 rows; a head tile of a sequence has 4", q, pages, queries, Config(share="rows"))


def test_configs():
    """One warpgroup decodes, two share rows in prefill and columns in MLA; splits fill the chip once, and no window is cut to pieces."""
    assert gpu.heuristic(*shapes()) == Config(share=None, splits=4)
    assert gpu.heuristic(*shapes(rows=512, most=512)) == Config(share="rows", splits=1)
    assert gpu.heuristic(*shapes("deepseek-v3")) == Config(share="columns", splits=8)
    assert gpu.heuristic(*shapes("gpt-oss-120b"), window=128).splits == 1
    assert gpu.heuristic(*shapes(sequences=1, rows=1, keys=131072)).splits == 33
    found = gpu.candidates(*shapes())
    assert gpu.heuristic(*shapes()) in found and len(set(found)) == len(found) > 1
    assert all(c.share == "columns" and c.stages == 2 for c in gpu.candidates(*shapes("deepseek-v3")))


REGIMES = {"decode": {}, "prefill": {"sequences": 4, "rows": 512, "most": 512}, "tree": {"rows": 64, "most": 32, "tree_words": 2}}


COMPILED = [(m, ("decode", "prefill")[i % 2], False) for i, m in enumerate(SHAPES)]
COMPILED += [("qwen3-30b-a3b", "tree", True), ("deepseek-v3", "decode", True)]
ALWAYS = [case for case in COMPILED if case[2] or case[0] in ("mixtral-8x7b", "olmoe-1b-7b", "gpt-oss-120b")]
"""Groups of four heads, of one, with a window, and what is quantized; latents that are not have a test below."""


@pytest.mark.compile_only
@pytest.mark.parametrize("model, regime, quantized", mostly(COMPILED, ALWAYS))
def test_compiles_without_a_copy_of_the_pages(model, regime, quantized):
    q, pages, queries = shapes(model, n_pages=2**16, quantized=quantized, **REGIMES[regime])
    window = SHAPES[model].window
    program = compile_for("h100", functools.partial(gpu.paged_attention, scale=SCALE, window=window), q, pages, queries)
    plan = gpu._plan(q, pages, queries, SCALE, window, None, gpu.heuristic(q, pages, queries, window), False)
    blocks = plan.splits * plan.tiles * plan.head_tiles
    results = 4 * blocks * (plan.stored_rows * plan.values + 2 * plan.tile_rows)
    tiles = 2 * plan.tiles * plan.head_tiles * plan.stored_rows * plan.channels
    temporary = program.memory_analysis().temp_size_in_bytes
    assert temporary <= results + tiles + 2**18
    assert temporary < 0.05 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pages))


@pytest.mark.compile_only
def test_full_tiles_of_one_row_are_the_result():
    """MLA in prefill: 64 heads fill a tile, so that nothing of the size of the result is gathered."""
    q, pages, queries = shapes("deepseek-v3", **REGIMES["prefill"])
    program = compile_for("h100", functools.partial(gpu.paged_attention, scale=SCALE), q, pages, queries)
    assert program.memory_analysis().temp_size_in_bytes < 0.02 * q.size * 4
