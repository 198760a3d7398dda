"""Paged attention on a TPU: the kernel in TPU interpret mode against the plain loop, and what it compiles to for four generations.

Interpret mode fills memory that nothing was written to with NaN. The pages' own NaN stand past every sequence's last key, in unused pages, and in the
page that unused entries of the page table name.

`python tests/pallas_kernels/test_paged_attention_tpu.py` compiles every model's shapes in every regime for every generation.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxmoe.formats import load_numpy, store_numpy
from pallas_kernels.paged_attention import reference, tpu
from pallas_kernels.paged_attention.shapes import PAGE, REGIMES, SHAPES
from pallas_kernels.paged_attention.tpu import Config
from pallas_kernels.paged_attention.types import Pages, Queries, finish, merge
from pallas_kernels.paged_attention.types import packed as as_packed
from sharding.compile_only import compile_for
from tests.more import more
from tests.quick import OPTIONS

SCALE = 0.1


def problem(lengths, keys, K=2, G=4, C=128, W=16, kind="uint16", latent=None, bias=None, words=None, spare_rows=0, seed=0):
    """Queries of sequences with `lengths` rows and `keys` keys; `bias` is the number of its heads, `words` that of the tree's."""
    rng = np.random.default_rng(seed)
    counts = [-(-n // W) for n in keys]
    table, P = np.full((len(keys), max(counts) + 1), sum(counts)), sum(counts) + 2
    ids = np.split(rng.permutation(sum(counts)), np.cumsum(counts)[:-1])
    live = np.zeros((P, 1, W), bool)
    for b, (mine, n) in enumerate(zip(ids, keys, strict=True)):
        table[b, : len(mine)] = mine
        live[mine, 0] = np.arange(len(mine) * W).reshape(-1, W) < n

    def of_tokens(x):
        return jnp.asarray(np.where(live, x, np.nan), jnp.float32)

    def leaf(channels):
        if kind == "int8":
            return jnp.asarray(rng.integers(-127, 128, (P, K, W, channels)), jnp.int8), of_tokens(rng.uniform(0.005, 0.02, (P, K, W)))
        x = np.where(live[..., None], rng.normal(size=(P, K, W, channels)), np.nan)
        return jnp.asarray(store_numpy(x.astype(np.float32), "float32" if kind == "float32" else "bfloat16")), None

    (k, k_scales), (v, v_scales) = leaf(C), (None, None) if latent else leaf(C)
    held = None if bias is None else of_tokens(np.where(rng.random((P, bias, W)) < 0.3, -np.inf, rng.normal(size=(P, bias, W))))
    T = sum(lengths) + spare_rows
    tree = None if words is None else jnp.asarray(rng.integers(0, 2**32, (T, words), dtype=np.uint64).astype(np.uint32))
    starts = np.cumsum([0, *lengths[:-1]])
    of_sequences = [jnp.asarray(x, jnp.int32) for x in (table, starts, lengths, keys, np.subtract(keys, lengths))]
    q = rng.normal(size=(T, K * G, C))
    q[T - spare_rows :] = np.nan
    q = jnp.asarray(q, jnp.float32 if kind == "float32" else jnp.bfloat16)
    return q, Pages(k, v, k_scales, v_scales, held, latent), Queries(*of_sequences, tree, max(lengths))


def largest_value(pages):
    """The bound of what rounding a probability of one to bfloat16 changes in a sum."""
    if pages.k.dtype == jnp.int8:
        return 127 * 0.02
    x = pages.k if pages.v is None else pages.v
    return float(np.nanmax(np.abs(load_numpy(np.asarray(x)))))


def assert_close(got, want, pages, rounding=2**-8):
    for x, y in ((got.m, want.m), (got.l, want.l)):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    exact = pages.k.dtype == jnp.float32
    bound = (1e-5 if exact else rounding) * largest_value(pages) * np.asarray(want.l)[..., None]
    error = np.abs(np.asarray(got.o) - np.asarray(want.o))
    assert (error <= bound + 1e-6).all(), (error / (bound + 1e-6)).max()
    empty = np.asarray(want.m) == -np.inf
    assert not np.asarray(got.o)[empty].any() and not np.asarray(got.l)[empty].any()


def attend(q, pages, queries, packed=False, config=None, interpret=None, **kind):
    def run(q, pages, queries):
        pages = as_packed(pages) if packed else pages
        return tpu.paged_attention(q, pages, queries, SCALE, config=config, interpret=interpret or pltpu.InterpretParams(), **kind)

    return jax.jit(run, compiler_options=OPTIONS)(q, pages, queries)


def check(q, pages, queries, packed=False, config=None, **kind):
    want = jax.jit(functools.partial(reference.paged_attention, scale=SCALE, **kind), compiler_options=OPTIONS)(q, pages, queries)
    got = attend(q, pages, queries, packed, config, **kind)
    assert_close(got, want, pages)
    return got


@pytest.mark.parametrize("K, G", [more(2, 1), (2, 4), (1, 8)])
def test_decoding(K, G):
    # No row, one key, exactly a page, a page and a key, many pages; two rows of no sequence.
    got = check(*problem([1, 0, 1, 1, 1], [40, 0, 1, 16, 17], K, G, spare_rows=2), config=Config(1, 2, K))
    assert np.isneginf(got.m[4:]).all()


def test_no_sequence_at_all():
    q, pages, queries = problem([1, 1], [20, 3])
    got = attend(q, pages, queries.replace(lengths=jnp.zeros(2, jnp.int32)), config=Config(1, 2, 1))
    assert not got.o.any() and not got.l.any() and np.isneginf(got.m).all()


@pytest.mark.parametrize(
    "G, heads, kind",
    [more(4, 1, {}), (3, 2, {"window": 13, "soft_cap": 2.0})],
)
def test_pieces_of_prompts_beside_decoding(G, heads, kind):
    """A whole prompt, a piece of one that starts and ends within a page, decoding; tiles of 8 rows, in which few rows take a path of their own."""
    check(*problem([20, 0, 1, 11, 1], [20, 0, 33, 40, 70], 2, G, spare_rows=1), config=Config(8, 2, heads), **kind)


@pytest.mark.parametrize("bias, words, window, config", [more(2, 1, None, Config(8, 2, 1)), (1, 2, 40, Config(16, 2, 2, 2))])
def test_trees_and_biases(bias, words, window, config):
    """Words for 32 rows and for 64; the tree of a sequence has 40. With one word, no row sees the last keys."""
    check(*problem([5, 1, 40], [40, 33, 90], bias=bias, words=words), config=config, window=window)


@pytest.mark.parametrize("packed, config", [(False, Config(1, 2, 2, 3)), (True, Config(2, 1, 4))])
def test_int8(packed, config):
    check(*problem([1, 1, config.rows], [80, 33, 60], 4, 2, kind="int8", bias=4), packed=packed, config=config)


def test_narrow_heads():
    check(*problem([5, 1, 20], [40, 33, 60], C=64), config=Config(8, 1, 1), window=40)


def test_narrow_heads_packed():
    check(*problem([5, 1, 20], [40, 33, 60], C=64, kind="int8", bias=2, words=1), packed=True, config=Config(8, 2, 2), window=40)


@pytest.mark.parametrize("kind, packed", [("uint16", True), ("int8", False)])
def test_latent(kind, packed):
    """192 channels, of which 128 are the value: the second token of a packed row starts within a register, as with 576."""
    check(*problem([3, 1, 1], [80, 33, 16], 1, 8, C=192, latent=128, kind=kind), packed=packed, config=Config(2, 2, 1))


def test_float32_is_exact():
    check(*problem([3, 1, 1], [80, 33, 16], 2, 2, C=64, kind="float32"), packed=True)


def test_splits_of_one_sequence_merge():
    """Four blocks of keys in five splits: one has none."""
    check(*problem([1], [150], 1, 8), config=Config(1, 3, 1, 5))


def test_partial_results_over_halves_of_the_pages_merge_and_finish_with_sinks():
    q, pages, queries = problem([3, 1], [70, 44])
    near = 32
    first = queries.replace(page_table=queries.page_table[:, : near // 16], keys=jnp.minimum(queries.keys, near))
    second = queries.replace(page_table=queries.page_table[:, near // 16 :], keys=queries.keys - near, first=queries.first - near)
    sinks = jnp.linspace(-1, 3, q.shape[1])
    plain = jax.jit(functools.partial(reference.paged_attention, scale=SCALE), compiler_options=OPTIONS)
    want = finish(plain(q, pages, queries), sinks, jnp.float32)
    got = finish(merge(attend(q, pages, first), attend(q, pages, second)), sinks, jnp.float32)
    np.testing.assert_allclose(got, want, atol=2**-8 * largest_value(pages))


def test_buffers_are_not_read_while_they_are_written(capfd):
    q, pages, queries = problem([9, 1, 0, 1], [70, 40, 0, 33], bias=1)
    attend(q, pages, queries, config=Config(2, 1, 1, 2), interpret=pltpu.InterpretParams(detect_races=True))
    assert "RACE" not in capfd.readouterr().out


def shapes(model, regime, kind="uint16", P=16384, X=128, packed=True):
    """Arguments of a real model's attention, and its window."""
    shape, step = SHAPES[model], REGIMES[regime]
    T, B = step.rows, step.sequences
    K, W, array = shape.kv_heads, PAGE, jax.ShapeDtypeStruct
    scales = array((P, K, W), jnp.float32) if kind == "int8" else None
    k, v = (array((P, K, W, c), jnp.dtype(kind)) for c in (shape.head_dim, shape.value_dim))
    pages = Pages(k, None if shape.latent else v, scales, None if shape.latent else scales, value_width=shape.value_dim if shape.latent else None)
    of_sequences = [array((B,), jnp.int32)] * 4
    tree = array((T, step.words), jnp.uint32) if step.words else None
    queries = Queries(array((B, X), jnp.int32), *of_sequences, tree, step.most)
    return (array((T, shape.heads, shape.head_dim), jnp.bfloat16), jax.eval_shape(as_packed, pages) if packed else pages, queries), shape.window


@pytest.mark.parametrize("model", SHAPES)
def test_every_model_has_block_sizes(model):
    for regime, kind in itertools.product(REGIMES, ("uint16", "int8")):
        (q, pages, queries), window = shapes(model, regime, kind)
        configs = tpu.candidates(q, pages, queries)
        chosen = tpu.heuristic(q, pages, queries)
        assert len(set(configs)) == len(configs) >= 4
        assert chosen.heads * chosen.rows * chosen.pages * chosen.splits and chosen.rows <= queries.most
        # A refusal would come before the kernel is traced.
        if regime == "decode" or (regime, kind) == ("prompt", "uint16"):
            got = jax.eval_shape(lambda *args: tpu.paged_attention(*args, SCALE), q, pages, queries)
            assert got.o.shape == (*q.shape[:2], SHAPES[model].value_dim) and got.m.shape == got.l.shape == q.shape[:2]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, p, s: (q[:, :3], p, s), "3 query heads are no multiple of 2 KV heads"),
        (lambda q, p, s: (q[..., :100], p, s), "128 channels, which is no multiple of the queries' 100"),
        (lambda q, p, s: (q.astype(jnp.float16), p, s), "not float16"),
        (lambda q, p, s: (q, p.replace(k=p.k.astype(jnp.int32)), s), "int32"),
        (lambda q, p, s: (q, p.replace(k=p.k.astype(jnp.int8), v=p.v.astype(jnp.int8)), s), "scales belong to int8"),
        (lambda q, p, s: (q, p.replace(k=p.k[:, :, :12], v=p.v[:, :, :12]), s), "pages of 12 tokens"),
        (lambda q, p, s: (q, p.replace(v=None), s), "values of 0 channels"),
        (lambda q, p, s: (q, p.replace(bias=jnp.zeros((len(p.k), 3, 16))), s), "2 heads of 16 tokens"),
        (lambda q, p, s: (q, p, s.replace(page_table=jnp.zeros((2, 200_000), jnp.int32))), "2 x 200000"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(lambda *args: tpu.paged_attention(*args, SCALE), *change(*problem([1, 1], [20, 20])))


@pytest.mark.parametrize("config, message", [(Config(1, 1, 3), "3 heads"), (Config(0, 1, 1), "positive"), (Config(4096, 8, 2), "bytes of VMEM")])
def test_configurations_that_do_not_fit_are_refused(config, message):
    q, pages, queries = problem([1, 1], [20, 20])
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(lambda *args: tpu.paged_attention(*args, SCALE, config=config), q, pages, queries)


def nbytes(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def temporaries(target, model, regime, kind, **more):
    """Bytes of temporaries, those that queries and results may take, and those of the pages."""
    (q, pages, queries), window = shapes(model, regime, kind, **more)
    program = compile_for(target, lambda *args: tpu.paged_attention(*args, SCALE, window), q, pages, queries)
    stats = program.memory_analysis()
    # Tiles have at least 8 rows and 128 lanes, and may be half empty; one head's scales are padded to 128 lanes.
    padding = max(1, 8 * pages.k.shape[1] // q.shape[1]) * max(1, 128 // q.shape[2])
    tiles = padding * (nbytes(q) + stats.output_size_in_bytes)
    scales = 2 * nbytes((pages.k_scales, pages.v_scales)) if pages.k.shape[1] == 1 else 0
    return stats.temp_size_in_bytes, 5 * tiles + scales + 2**21, nbytes((pages.k, pages.v))


COVER = [
    ("v5e:2x2", "mixtral-8x7b", "decode", "uint16"),
    more("v6e:4x4", "mixtral-8x7b", "tree", "uint16"),
    ("tpu7x:2x2x1", "mixtral-8x7b", "decode", "int8"),
    ("tpu7x:2x2x1", "qwen3-30b-a3b", "mixed", "uint16"),
    ("v6e:4x4", "qwen3-235b-a22b", "prompt", "uint16"),
    ("v6e:4x4", "olmoe-1b-7b", "one", "uint16"),
    ("v5e:2x2", "deepseek-v3", "decode", "uint16"),
    more("tpu7x:2x2x1", "deepseek-v3", "tree", "uint16"),
    more("v5e:2x2", "gpt-oss-120b", "mixed", "uint16"),
    ("v5p:2x2x1", "gpt-oss-120b", "tree", "int8"),
]


@pytest.mark.compile_only
@pytest.mark.parametrize("target, model, regime, kind", COVER)
def test_compiles_without_a_copy_of_the_pages(target, model, regime, kind):
    temporary, allowed, pages = temporaries(target, model, regime, kind)
    assert temporary <= allowed < pages, (temporary, allowed, pages)


@pytest.mark.compile_only
def test_pages_with_a_ragged_last_axis_are_copied_unless_packed():
    """The reason for `packed`; if this fails, XLA has changed for the better."""
    temporary, _, pages = temporaries("v5e:2x2", "gpt-oss-120b", "decode", "uint16", packed=False)
    assert temporary > pages


def write(pool, new, page, slot):
    """One new token per sequence, [B, K, C], into packed pages: whole rows are read, changed and written, which XLA does in place."""
    _, K, page_rows, lanes = pool.shape
    f = lanes // new.shape[2]
    rows = (page[:, None] * K + jnp.arange(K)) * page_rows + (slot // f)[:, None]
    flat = pool.reshape(-1, lanes)
    mine = (jnp.arange(lanes) // new.shape[2])[None, None] == (slot % f)[:, None, None]
    return flat.at[rows].set(jnp.where(mine, jnp.tile(new.view(pool.dtype), (1, 1, f)), flat[rows])).reshape(pool.shape)


@pytest.mark.compile_only
@pytest.mark.parametrize("model", [more("mixtral-8x7b"), "gpt-oss-120b", "deepseek-v3"])
def test_a_pool_that_layers_write_and_read_stays_in_place(model):
    (q, pages, queries), window = shapes(model, "decode", P=8192)
    shape, layers = SHAPES[model], 4

    def step(q, pages, queries, new, page, slot):
        def layer(i, carry):
            q, pages = carry
            at = i * (pages.k.shape[0] // layers)
            k, v = (x if x is None else write(x, new[..., :c], page + at, slot) for x, c in ((pages.k, shape.head_dim), (pages.v, shape.value_dim)))
            pages = pages.replace(k=k, v=v)
            o = tpu.paged_attention(q, pages, queries.replace(page_table=queries.page_table + at), SCALE, window).o
            return q.at[..., : shape.value_dim].set(o.astype(q.dtype)), pages

        return jax.lax.fori_loop(0, layers, layer, (q, pages))

    new = jax.ShapeDtypeStruct((8, shape.kv_heads, shape.head_dim), jnp.bfloat16)
    stats = compile_for("v5e:2x2", step, q, pages, queries, new, *[queries.keys] * 2, donate=(1,)).memory_analysis()
    assert stats.temp_size_in_bytes < 2**22 and stats.alias_size_in_bytes >= nbytes(pages)
