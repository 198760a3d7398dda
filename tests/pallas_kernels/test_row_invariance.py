"""A row's bits depend on nothing around it: not on the size of its tile, its place in it, or what the other rows hold.

XLA's CPU backend picks a matmul's emitter by its sizes, so this is a property of every single dot shape and of the machine; here are all that occur
in the shipped model and in two others. What a model makes of it is tested in `tests/engine/test_invariance.py`.
"""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import formats
from jaxmoe.cache.contiguous import KEY_BLOCK, scores, weighted
from jaxmoe.formats import store_numpy
from jaxmoe.spec import ModelSpec
from pallas_kernels.dense.api import dense, row_sum, row_sum_of_squares, softmax
from pallas_kernels.dense.cpu import ROW_TILES
from pallas_kernels.dispatch import Kernels
from pallas_kernels.grouped_matmul.api import grouped_swiglu, swiglu_rows
from pallas_kernels.grouped_matmul.glu import GLUS
from tests.more import more, mostly

CPU = Kernels("cpu")
DISTINCT = 8
"""Different rows; tiles larger than this hold them several times."""

OLMOE_1B_7B = {
    "model_type": "olmoe",
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
SMALL_MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 4000,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
SHIPPED = json.loads((Path(__file__).resolve().parents[2] / "checkpoints" / "default" / "config.json").read_text())
NARROW_EXPERTS = {
    **OLMOE_1B_7B,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_experts": 8,
    "vocab_size": 512,
    "num_attention_heads": 7,
    "num_key_value_heads": 7,
    "head_dim": 128,
}
"""Widths of 768 and 896, of which few rows are added up in orders that depend on how many they are."""
SPECS = [ModelSpec.from_hf(config) for config in (SHIPPED, OLMOE_1B_7B, SMALL_MIXTRAL, NARROW_EXPERTS)]


def dense_shapes(spec: ModelSpec) -> set[tuple[int, int, bool]]:
    """(K, N, whether the weights are transposed) of every dense dot; tied embeddings are multiplied with as they are, and as a transposed copy."""
    out = {(spec.width, spec.vocab, False), (spec.width, spec.vocab, spec.tied)}
    for layer in spec.layers:
        a = layer.attention
        q, k = a.heads * a.head_dim, a.kv_heads * a.head_dim
        out |= {(spec.width, q, False), (spec.width, k, False), (q, spec.width, False)}
        if layer.router is not None:
            out.add((spec.width, layer.router.experts, False))
        if layer.dense is not None:
            out |= {(spec.width, layer.dense.width, False), (layer.dense.width, spec.width, False)}
    return out


def sum_widths(spec: ModelSpec) -> set[int]:
    """Lengths of the rows that norms and the router's softmax add up."""
    out = {spec.width}
    for layer in spec.layers:
        a = layer.attention
        if a.qk_norm == "head":
            out.add(a.head_dim)
        elif a.qk_norm == "full":
            out |= {a.heads * a.head_dim, a.kv_heads * a.head_dim}
        if layer.router is not None:
            out.add(layer.router.experts)
    return out


def attention_shapes(spec: ModelSpec) -> set[tuple[int, int]]:
    """(KV heads, head width)."""
    return {(layer.attention.kv_heads, layer.attention.head_dim) for layer in spec.layers}


def expert_shapes(spec: ModelSpec) -> set[tuple[int, int]]:
    """(D, F)."""
    return {(spec.width, layer.experts.width) for layer in spec.layers if layer.experts is not None}


def union(shapes) -> list:
    return sorted(set().union(*(shapes(spec) for spec in SPECS)))


def name(shape) -> str:
    return "x".join(str(int(n)) for n in shape)


def always(shapes) -> set:
    """Those of the shipped model and of widths with orders of their own."""
    return set().union(*(shapes(SPECS[i]) for i in (0, 3)))


def by_dtype(shapes, large: tuple):
    """Every shape in float32; in bfloat16, which widens to the same dots, those of `always`. Without `--exhaustive` bfloat16 is the shipped model's,
    and one shape, `large`, is of other models."""
    few = always(shapes)
    cases = [(shape, dtype) for shape in union(shapes) for dtype in ("float32", "bfloat16") if dtype == "float32" or shape in few]
    here = [(shape, dtype) for shape, dtype in cases if shape in (few if dtype == "float32" else shapes(SPECS[0])) or shape == large]
    return pytest.mark.parametrize("shape, dtype", mostly(cases, here), ids=[f"{name(shape)}-{dtype}" for shape, dtype in cases])


PERIOD = 2**21 - 9
"""Random numbers that large weights repeat: a prime, so that columns differ from one another."""


def random(shape: tuple[int, ...], dtype: str, scale: float = 1.0, seed: int = 0) -> jax.Array:
    """Weights as they are held."""
    value = np.random.default_rng(seed).standard_normal(min(math.prod(shape), PERIOD), dtype=np.float32)
    return jnp.asarray(np.resize(store_numpy(value * np.float32(scale), dtype), shape))


def activations(rows: int, width: int, dtype: str) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((rows, width), dtype=np.float32)
    return np.asarray(jnp.asarray(x, dtype))


def bits(x) -> np.ndarray:
    x = np.ascontiguousarray(x)
    assert np.isfinite(x).all()
    return x.view(np.uint32)


LARGE = 2**18
"""Weights of more elements than this are tried in fewer ways: each takes tens of milliseconds, and what is left out is tried on smaller ones."""


HOSTILE = (0.0, 1e30, np.nan)
"""What the other rows hold."""


def places(rows: int, turn: int) -> list[tuple[int, float]]:
    """(row, what is around it): the first, middle and last row, each among one of `HOSTILE`, and with other turns among the others."""
    return [(at, HOSTILE[(i + turn) % len(HOSTILE)]) for i, at in enumerate((0, rows // 2, rows - 1))]


def check_rows(f, x: np.ndarray, large: bool) -> None:
    """Holds `f`, of any number of rows, to what it gives for each of the `DISTINCT` rows of x alone in the smallest tile."""
    first = ROW_TILES[0]
    zero = np.zeros((first - 1, x.shape[1]), x.dtype)
    alone = np.concatenate([bits(f(np.concatenate([row[None], zero]))[:1]) for row in x])
    assert len(np.unique(alone, axis=0)) == DISTINCT
    for turn, rows in enumerate((1, 8, 40) if large else (1, 3, *ROW_TILES, ROW_TILES[-1] + 8, 6 * ROW_TILES[-1])):
        shifts = {1} if large else range(rows) if rows <= ROW_TILES[0] and x.size < 2**14 else {0, 1, rows - 1}
        for shift in shifts:
            order = (np.arange(rows) + shift) % DISTINCT
            np.testing.assert_array_equal(bits(f(x[order])), alone[order], f"{rows} rows, turned by {shift}")
        same = np.zeros(rows, int)
        np.testing.assert_array_equal(bits(f(x[same])), alone[same], f"{rows} equal rows")
        for at, hostile in [(rows // 2, np.nan)] if large else places(rows, turn):
            filled = np.full((rows, x.shape[1]), hostile, x.dtype)
            filled[at] = x[0]
            np.testing.assert_array_equal(bits(f(filled)[at]), alone[0], f"row {at} of {rows} among {hostile}")


@by_dtype(dense_shapes, (2048, 2048, False))
def test_dense(shape, dtype):
    k, n, transposed = shape
    w = random((n, k) if transposed else (k, n), dtype, k**-0.5)
    step = jax.jit(lambda x, w: dense(x, w, CPU, jnp.float32, transposed))
    check_rows(lambda x: np.asarray(step(x, w)), activations(DISTINCT, k, dtype), k * n > LARGE)


@pytest.mark.parametrize("f", [row_sum, row_sum_of_squares])
@pytest.mark.parametrize("width", mostly(union(sum_widths), always(sum_widths)))
def test_row_sum(width, f):
    step = jax.jit(lambda x: f(x, CPU))
    x = activations(DISTINCT, width, "float32")
    check_rows(lambda x: np.asarray(step(x)), x, False)
    exact = x.astype(np.float64) ** (2 if f is row_sum_of_squares else 1)
    np.testing.assert_allclose(np.asarray(step(x))[:, 0], exact.sum(1), rtol=0, atol=1e-6 * np.abs(exact).sum(1).max())


def test_inverse_roots_are_rounded_alike_in_whole_registers_and_beside_them():
    """`jax.lax.rsqrt` isn't, with the options that steps are compiled with."""
    x = np.random.default_rng(6).random(4096, dtype=np.float32) + 1e-3
    step = jax.jit(formats.inverse_root, compiler_options=CPU.compiler_options())
    whole = np.asarray(step(x))
    assert np.abs(whole * np.sqrt(x.astype(np.float64)) - 1).max() < 2e-7
    for length in (1, 3, 8, 15, 33):
        parts = np.concatenate([np.asarray(step(x[i : i + length])) for i in range(0, 10 * length, length)])
        np.testing.assert_array_equal(bits(parts), bits(whole[: len(parts)]), f"{length} numbers")


@pytest.mark.parametrize("experts", sorted({layer.router.experts for spec in SPECS for layer in spec.layers if layer.router is not None}))
def test_softmax(experts):
    step = jax.jit(lambda x: softmax(x, CPU))
    x = np.random.default_rng(4).standard_normal((512, experts), dtype=np.float32) * 3
    whole = bits(step(x))
    for rows in (1, 3, 4, 8, 16, 32, 128):
        np.testing.assert_array_equal(bits(step(x[:rows])), whole[:rows], f"{rows} rows")


OTHER_HEADS = [(2, 16), (2, 80), (1, 576), (2, 256), (1, 512)]
"""(KV heads, head width) that no model here has: XLA adds up widths below 32 in another way, others that are no multiple of 64, and wide ones, as
those of latents are."""
HEADS = [*union(attention_shapes), *OTHER_HEADS]
ALWAYS = always(attention_shapes) | {*OTHER_HEADS[:3]}

SCORES, VALUES, SUMS = "kmc,kcs->kms", "kms,ksw->kmw", "kms,sn->kmn"


@pytest.mark.parametrize("einsum", [SCORES, VALUES, SUMS])
@pytest.mark.parametrize("shape", [shape if shape in ALWAYS else more(shape) for shape in HEADS], ids=name)
def test_attention(shape, einsum):
    """The rows of one KV head, up to those of a long run of a wide group, over one block of keys, of values, or of ones."""
    heads, c = shape
    sizes = {SCORES: (heads, c, KEY_BLOCK), VALUES: (heads, KEY_BLOCK, c), SUMS: (KEY_BLOCK, 8)}[einsum]
    block = random(sizes, "float32", seed=2)

    @jax.jit
    def step(rows, block):
        return {SCORES: scores, VALUES: weighted, SUMS: functools.partial(jnp.einsum, SUMS)}[einsum](rows, block)

    x = np.random.default_rng(3).standard_normal((heads, DISTINCT, c if einsum == SCORES else KEY_BLOCK), dtype=np.float32)
    alone = []
    for i in range(DISTINCT):
        rows = np.zeros((heads, ROW_TILES[0], x.shape[-1]), np.float32)
        rows[:, 0] = x[:, i]
        alone.append(bits(step(rows, block)[:, :1]))
    alone = np.concatenate(alone, axis=1)
    assert len(np.unique(alone.reshape(-1, alone.shape[-1]), axis=0)) == DISTINCT * heads
    for turn, m in enumerate((*ROW_TILES, 48, 64, 128, 256, 512)):
        for shift in {0, 1, m - 1}:
            order = (np.arange(m) + shift) % DISTINCT
            np.testing.assert_array_equal(bits(step(x[:, order], block)), alone[:, order], f"{m} rows, turned by {shift}")
        for at, hostile in places(m, turn):
            rows = np.full((heads, m, x.shape[-1]), hostile, np.float32)
            rows[:, at] = x[:, 0]
            np.testing.assert_array_equal(bits(step(rows, block)[:, at]), alone[:, 0], f"row {at} of {m} among {hostile}")


EXPERTS = 4


def group_sizes(rows: int) -> list[list[int]]:
    """Ways to spread at most `rows` rows over the experts; what is left over is padding."""
    rng = np.random.default_rng(rows)
    spread = [np.bincount(rng.integers(0, EXPERTS, n), minlength=EXPERTS).tolist() for n in (rows, rows, rows - 3)]
    return [[rows, 0, 0, 0], [0, 0, 0, rows], [1, 0, rows - 2, 1], [rows // EXPERTS] * EXPERTS, *spread]


@by_dtype(expert_shapes, (512, 1792))
def test_grouped_swiglu(shape, dtype):
    d, f = shape
    w_in, w_out = random((EXPERTS, d, 2, f), dtype, d**-0.5), random((EXPERTS, f, d), dtype, f**-0.5, seed=5)
    ids = jnp.arange(EXPERTS)
    grouped = jax.jit(lambda x, w_in, w_out, sizes: grouped_swiglu(x, w_in, w_out, ids, sizes, GLUS["silu"], CPU))
    alike = jax.jit(lambda x, w_in, w_out: swiglu_rows(x, w_in, w_out, ids, GLUS["silu"], CPU))

    def step(x, sizes):
        return grouped(x, w_in, w_out, sizes)

    def one(x):
        return alike(x, w_in, w_out)

    x = activations(DISTINCT, d, dtype)
    alone = np.stack([bits(step(np.repeat(row[None], EXPERTS, axis=0), np.ones(EXPERTS, np.int32))) for row in x])
    assert len(np.unique(alone.reshape(-1, d), axis=0)) == DISTINCT * EXPERTS
    for row, expected in zip(x, alone, strict=True):
        np.testing.assert_array_equal(bits(one(row[None])), expected)
    large = d * f * EXPERTS > LARGE
    for turn, average in enumerate((4, 32, 40) if large else (*ROW_TILES, 40, 70, 110)):
        rows = EXPERTS * average
        for i, sizes in enumerate(group_sizes(rows)):
            expert = np.repeat(np.arange(EXPERTS), sizes)
            shift = 1 if large else (0, 1, 5)[(turn + i) % 3]  # each with every number of rows, and with every way to spread them
            order = (np.arange(len(expert)) + shift) % DISTINCT
            padded = np.full((rows, d), np.nan, x.dtype)
            padded[: len(order)] = x[order]
            got = np.asarray(step(padded, np.asarray(sizes, np.int32)))[: len(order)]
            np.testing.assert_array_equal(bits(got), alone[order, expert], f"groups of {sizes}, turned by {shift}")
