"""One contract for every paged attention: each implementation against a loop over queries in float64, one key after another.

The Pallas kernels run step by step on the CPU. Pages that no sequence uses hold NaN, and so do slots past a sequence's last key, and slots before the
windows of all of its rows.
"""

import dataclasses
import functools
import logging
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmoe.formats import load_numpy, store_numpy
from pallas_kernels.dispatch import Kernels
from pallas_kernels.paged_attention.api import paged_attention, partial_attention
from pallas_kernels.paged_attention.types import Pages, Partial, Queries, finish, merge, merge_axis, packed, unpacked
from tests.quick import QuickKernels

IMPLEMENTATIONS = {
    "reference": QuickKernels("reference"),
    "xla": QuickKernels("cpu"),
    "mosaic_gpu": QuickKernels("gpu", interpret=True),
    "mosaic_tpu": QuickKernels("tpu", interpret=True),
}
ON_DEVICE = "on device"
"""The kernels of the GPU or TPU that jax finds."""
NAMES = [*IMPLEMENTATIONS, pytest.param(ON_DEVICE, marks=pytest.mark.device)]
EXACT = ("reference", "xla")
TOLERANCE = {name: 2e-6 if name in EXACT else 1e-2 for name in (*IMPLEMENTATIONS, ON_DEVICE)}
"""Of the largest output: kernels round probabilities to bfloat16 before they multiply values with them."""

W = 16
"""Tokens of a page."""


def implementation(name: str) -> Kernels:
    """What runs under a name."""
    return Kernels.default() if name == ON_DEVICE else IMPLEMENTATIONS[name]


@dataclasses.dataclass(frozen=True)
class Case:
    """Sequences as (keys, rows), and how they are attended to. `rows` of a sequence are the last of its keys."""

    sequences: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    tree: bool = False
    bias: str = ""
    """'heads' for a bias of each KV head's own, 'shared' for one of all."""
    int8: bool = False
    latent: int = 0
    """Values are so many first channels of the keys."""
    padding: int = 0
    """Rows of no sequence, before and after the others."""
    page: int = W
    """The GPU's kernel copies scales and biases by 32."""


CASES = {
    "decoding": Case(((1, 1), (W, 1), (W + 1, 1), (70, 1))),
    "decoding, one sequence without rows": Case(((20, 1), (5, 0), (33, 1)), padding=2),
    "every head its own keys": Case(((40, 1), (3, 1)), heads=2, kv_heads=2),
    "eight queries a key": Case(((40, 1), (90, 1)), heads=8, kv_heads=1),
    "five queries a key": Case(((40, 3), (7, 1)), heads=5, kv_heads=1),
    "a prompt, a piece of one, decoding": Case(((21, 21), (60, 13), (50, 1)), padding=3),
    "window": Case(((80, 9), (12, 12), (70, 1)), window=20),
    "soft cap": Case(((30, 4),), soft_cap=0.7),
    "sinks and window": Case(((50, 2), (3, 3)), sinks=True, window=8),
    "trees": Case(((40, 9), (70, 5), (6, 6)), tree=True),
    "bias of each head": Case(((40, 2), (20, 1)), bias="heads", page=32),
    "bias of a slot": Case(((40, 2), (20, 1)), bias="shared", page=32),
    "int8": Case(((40, 2), (90, 1)), int8=True, page=32),
    "latent": Case(((40, 2), (90, 1)), heads=8, kv_heads=1, head_dim=192, latent=128),
    "wide heads": Case(((40, 1), (20, 3)), head_dim=128),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    q: np.ndarray
    pages: Pages
    queries: Queries
    keys: list
    """float64 [K, S, C] of every sequence, and its values and bias."""
    sinks: np.ndarray | None


@functools.cache
def problem(name: str) -> Problem:
    case, rng = CASES[name], np.random.default_rng(sum(map(ord, name)))
    b, table_len = len(case.sequences), max(-(-n // case.page) for n, _ in case.sequences) + 1
    n_pages = b * table_len + 3
    k_shape, v_width = (n_pages, case.kv_heads, case.page, case.head_dim), case.latent or case.head_dim
    table = rng.permutation(n_pages)[: b * table_len].reshape(b, table_len).astype(np.int32)
    used = np.zeros((n_pages, case.page), bool)
    for i, (n, rows) in enumerate(case.sequences):
        at = np.arange(max(0, n - rows - case.window + 1) if case.window else 0, n)
        used[table[i, at // case.page], at % case.page] = True
    k, k_scales = held(rng.standard_normal(k_shape, np.float32), case.int8, used)
    v, v_scales = (None, None) if case.latent else held(rng.standard_normal((*k_shape[:3], v_width), np.float32), case.int8, used)
    bias = None
    if case.bias:
        bias = rng.standard_normal((n_pages, case.kv_heads if case.bias == "heads" else 1, case.page)).astype(np.float32)
        bias[rng.random(bias.shape) < 0.2] = -np.inf
        bias[~np.broadcast_to(used[:, None], bias.shape)] = np.nan
    pages = Pages(k, v, k_scales, v_scales, bias, case.latent or None)
    total = sum(n for _, n in case.sequences) + 2 * case.padding
    q = rng.standard_normal((total, case.heads, case.head_dim)).astype(ml_dtypes.bfloat16)
    lengths = np.array([n for _, n in case.sequences], np.int32)
    starts = case.padding + np.cumsum(lengths) - lengths
    n_keys = np.array([n for n, _ in case.sequences], np.int32)
    tree = trees(case, starts, total, rng) if case.tree else None
    queries = Queries(table, starts.astype(np.int32), lengths, n_keys, n_keys - lengths, tree, int(max(lengths)))

    def values_of(leaf, scales, i):
        x = load_numpy(leaf[table[i]]).astype(np.float64) if scales is None else leaf[table[i]] * scales[table[i]][..., None].astype(np.float64)
        return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1, *x.shape[3:])[:, : n_keys[i]]

    exact = []
    for i in range(b):
        keys = values_of(k, k_scales, i)
        values = keys[..., : case.latent] if v is None else values_of(v, v_scales, i)
        exact.append((keys, values, None if bias is None else values_of(bias, None, i)))
    return Problem(q, pages, queries, exact, rng.standard_normal(case.heads).astype(np.float32) if case.sinks else None)


def held(x: np.ndarray, int8: bool, used: np.ndarray) -> tuple:
    """Keys or values as pages hold them, and their scales; NaN where nothing belongs."""
    there = used[:, None, :, None]
    if not int8:
        return store_numpy(np.where(there, x, np.nan).astype(ml_dtypes.bfloat16), "bfloat16"), None
    scales = np.abs(x).max(-1) / 127
    return np.round(x / scales[..., None]).astype(np.int8), np.where(there[..., 0], scales, np.nan).astype(np.float32)


def trees(case: Case, starts, total: int, rng) -> np.ndarray:
    """Each row sees itself, its parent (a random row before it) and its parent's parents."""
    bits = np.zeros((total, 1), np.uint32)
    for start, (_, n) in zip(starts, case.sequences, strict=True):
        for i in range(n):
            parent = bits[start + rng.integers(i), 0] if i else np.uint32(0)
            bits[start + i, 0] = parent | np.uint32(1 << i)
    return bits


def loop(p: Problem, case: Case) -> np.ndarray:
    """float64 [T, H, V]."""
    _, values, _ = p.keys[0]
    out = np.zeros((len(p.q), case.heads, values.shape[-1]))
    scale, group = case.head_dim**-0.5, case.heads // case.kv_heads
    for i, (n, rows) in enumerate(case.sequences):
        keys, values, bias = p.keys[i]
        for r in range(rows):
            t, pos = int(p.queries.rows[i]) + r, n - rows + r
            for h in range(case.heads):
                scores, at = [], []
                for s in range(n):
                    seen = s <= pos
                    if case.tree:
                        seen = s < n - rows or (int(p.queries.tree[t, 0]) >> (s - (n - rows))) & 1
                    if not seen or (case.window is not None and s <= pos - case.window):
                        continue
                    score = float(p.q[t, h].astype(np.float64) @ keys[h // group, s]) * scale
                    if case.soft_cap:
                        score = case.soft_cap * math.tanh(score / case.soft_cap)
                    if bias is not None:
                        score += bias[min(h // group, len(bias) - 1), s]
                    scores.append(score)
                    at.append(s)
                extra = [p.sinks[h]] if p.sinks is not None else []
                weights = np.exp(np.array(scores + extra) - max(scores + extra))
                weights /= weights.sum()
                out[t, h] = weights[: len(at)] @ values[h // group, at]
    return out


@functools.cache
def expected(name: str) -> np.ndarray:
    return loop(problem(name), CASES[name])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_attention(name, case, caplog):
    from pallas_kernels import dispatch

    dispatch._say.cache_clear()
    p, c = problem(case), CASES[case]
    with caplog.at_level(logging.WARNING, "pallas_kernels"):
        options = {"scale": c.head_dim**-0.5, "kernels": implementation(name), "window": c.window, "soft_cap": c.soft_cap}
        q = p.q.astype(np.float32) if name in EXACT else p.q
        run = functools.partial(paged_attention, **options)
        got = jax.jit(run, compiler_options=implementation(name).compiler_options())(q, p.pages, p.queries, sinks_H=p.sinks)
    assert not caplog.messages
    got, want = np.asarray(got, np.float64), expected(case)
    assert np.abs(got - want).max() <= TOLERANCE[name] * np.abs(want).max()
    of_no_sequence = np.ones(len(got), bool)
    for start, n in zip(p.queries.rows, p.queries.lengths, strict=True):
        of_no_sequence[start : start + n] = False
    assert (got[of_no_sequence] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_the_keys_merge(name):
    """A sequence's first two pages and the rest of them, attended to by themselves."""
    case = "decoding"
    p = problem(case)
    q = p.q.astype(np.float32) if name in EXACT else p.q
    step = functools.partial(partial_attention, scale=0.125, kernels=implementation(name))
    run = functools.partial(jax.jit(step, compiler_options=implementation(name).compiler_options()), q, p.pages)
    split = 2 * W
    first = dataclasses.replace(p.queries, page_table=p.queries.page_table[:, :2], keys=np.minimum(p.queries.keys, split))
    rest = dataclasses.replace(
        p.queries, page_table=p.queries.page_table[:, 2:], keys=np.maximum(p.queries.keys - split, 0), first=p.queries.first - split
    )
    parts = run(first), run(rest)
    assert np.asarray(parts[1].m[0] == -np.inf).all() and np.asarray(parts[1].l[0] == 0).all()
    got = np.asarray(finish(merge(*parts), None, jnp.float32))
    want = expected(case)
    assert np.abs(got - want).max() <= TOLERANCE[name] * np.abs(want).max()
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), *parts)
    np.testing.assert_allclose(np.asarray(finish(merge_axis(stacked), None, jnp.float32)), got, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", ["int8", "latent"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_pages_are_the_same_pages(name, case):
    p, c = problem(case), CASES[case]
    plain = jax.tree.map(jnp.asarray, p.pages)
    folded = packed(plain)
    assert folded.k.shape[-1] % 128 == 0
    jax.tree.map(np.testing.assert_array_equal, unpacked(folded, c.head_dim), plain)
    q = p.q.astype(np.float32) if name in EXACT else p.q
    run = functools.partial(paged_attention, scale=c.head_dim**-0.5, kernels=implementation(name))
    got = np.asarray(jax.jit(run, compiler_options=implementation(name).compiler_options())(q, folded, p.queries), np.float64)
    assert np.abs(got - expected(case)).max() <= TOLERANCE[name] * np.abs(expected(case)).max()


def test_parts_without_keys_are_zeros():
    nothing = Partial(jnp.zeros((1, 2, 4)), jnp.full((1, 2), -jnp.inf), jnp.zeros((1, 2)))
    merged = merge(nothing, nothing)
    assert np.asarray(merged.m == -np.inf).all()
    for sinks in (None, jnp.zeros(2)):
        assert not np.asarray(finish(merged, sinks, jnp.bfloat16), np.float32).any()


def test_wrong_shapes_are_refused():
    p = problem("decoding")
    kernels = Kernels("cpu")

    def run(pages=p.pages, queries=p.queries, q=p.q, **options):
        return paged_attention(q, pages, queries, 0.125, kernels, **options)

    change = dataclasses.replace
    for pages, message in [
        (change(p.pages, k=p.pages.k[..., :32]), r"\[P, K, W, C\] or, packed, .* for C = 64, got \[27, 2, 16, 32\]"),
        (change(p.pages, v=p.pages.v[:, :1]), r"values \[P, K, W, V\] held as the keys are"),
        (change(p.pages, v=None), "values are the first channels of the keys, of 64, but value_width is None"),
        (change(p.pages, k=p.pages.k.view(np.int16).astype(np.int8), v=p.pages.v.astype(np.int8)), "k_scales are missing for int8"),
        (change(p.pages, k_scales=np.ones(p.pages.k.shape[:3], np.float32)), "k_scales are given for uint16"),
        (change(p.pages, bias=np.zeros((3, 1, W), np.float32)), r"a bias \[P, 1 or K, W\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(pages)
    for queries, message in [
        (change(p.queries, keys=p.queries.keys[:1]), r"expected keys \[B\], got int32 \[1\]"),
        (change(p.queries, page_table=p.queries.page_table.astype(np.float32)), r"a page table \[B, X\] of whole numbers, got float32"),
        (change(p.queries, tree=np.zeros((2, 1), np.uint32)), r"tree masks uint32 \[T, U\]"),
        (change(p.queries, most=0), "at most 0 rows a sequence"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(queries=queries)
    with pytest.raises(ValueError, match="multiple of KV heads"):
        run(q=np.concatenate([p.q, p.q[:, :1]], axis=1))
    with pytest.raises(ValueError, match="a window of 0 keys"):
        run(window=0)
    with pytest.raises(ValueError, match=r"expected sinks \[H\], got \[3\]"):
        run(sinks_H=np.zeros(3, np.float32))
