"""One contract for every grouped matmul: each implementation, in the layout and formats it takes, against a loop over rows in float64.

The Pallas kernels run step by step on the CPU. Plain XLA takes every layout and format; that the dispatcher did not fall back to it is part of what
is tested. What each kernel does with unusual tiles is in its own test.
"""

import functools
import itertools
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmoe.formats import ExpertLayout, Quantized, dequantize, expert_axes, load_numpy, quantize, store_numpy
from pallas_kernels.dispatch import Kernels
from pallas_kernels.grouped_matmul.api import grouped_matmul, grouped_swiglu, swiglu_rows
from pallas_kernels.grouped_matmul.glu import GLUS
from tests.quick import QuickKernels

IMPLEMENTATIONS: dict[str, tuple[Kernels, ExpertLayout]] = {
    "reference": (QuickKernels("reference"), "2fd"),
    "cpu": (QuickKernels("cpu"), "d2f"),
    "xla d2f": (QuickKernels("gpu", pallas=False), "d2f"),
    "xla 2df": (QuickKernels("tpu", pallas=False), "2df"),
    "xla 2fd": (QuickKernels("gpu", pallas=False), "2fd"),
    "mosaic_gpu": (QuickKernels("gpu", interpret=True), "2fd"),
    "mosaic_tpu": (QuickKernels("tpu", interpret=True), "2df"),
}
ON_DEVICE = "on device"
"""The kernels of the GPU or TPU that jax finds."""
NAMES = (*IMPLEMENTATIONS, ON_DEVICE)
FORMATS = ("bfloat16", "int8", "int4")
POOL, D, F, ROWS = 6, 128, 128, 16

CASES = {
    "permuted ids, padding": ([5, 0, 3, 2], [3, 0, 8, 1]),
    "one group has all rows": ([1, 4, 2, 0], [0, ROWS, 0, 0]),
    "one row each, one id twice": ([2, 5, 2, 1], [1, 1, 1, 1]),
    "no row": ([0, 1, 2, 3], [0, 0, 0, 0]),
}


def implementation(name: str) -> tuple[Kernels, ExpertLayout]:
    """What runs under a name."""
    return (Kernels.default(), Kernels.default().expert_layout) if name == ON_DEVICE else IMPLEMENTATIONS[name]


def cases(names, *others) -> list:
    """Parameters: every name with every other thing; those on a device are marked so."""
    return [
        pytest.param(*combination, marks=pytest.mark.device if combination[0] == ON_DEVICE else ())
        for combination in itertools.product(names, *others)
    ]


def chosen(quantized: str) -> list:
    """(implementation, format, case): all of them, but of the GPU's kernel, where a program takes seconds, a quantized format and its first case."""
    first = next(iter(CASES))
    every = cases(NAMES, FORMATS, CASES)
    return [p for p in every if p.values[0] != "mosaic_gpu" or p.values[1] == "bfloat16" or p.values[1:] == (quantized, first)]


TOLERANCE = {"matmul": 2e-6, "swiglu": 1.2e-2, "matmul on device": 2e-5}
"""Of the largest output: sums are float32; between the two matmuls the hidden values are rounded to bfloat16, and by some also gate and up. Tensor
cores do not round each sum to the nearest."""


@functools.cache
def experts(form: str) -> tuple:
    """Held w_in [Z, D, 2, F] and w_out [Z, F, D], and their values in float64. Matrix 5 - that is, none that a case leaves out - has no NaN."""
    rng = np.random.default_rng(0)
    w_in, w_out = (rng.standard_normal(s, np.float32) * np.float32(s[1] ** -0.5) for s in ((POOL, D, 2, F), (POOL, F, D)))
    if form == "bfloat16":
        return tuple((held, load_numpy(held).astype(np.float64)) for held in (store_numpy(w, form) for w in (w_in, w_out)))
    rounded = jax.jit(quantize, static_argnums=(1, 2, 3))
    held = rounded(w_in, int(form[3:]), 128, -3), rounded(w_out, int(form[3:]), 64, -2)
    return tuple((jax.tree.map(np.asarray, q), np.asarray(jax.jit(dequantize)(q), np.float64)) for q in held)


def laid_out(leaf, axes: tuple[int, ...], k: int):
    """A pool with the axes after the first in another order, K being axis `k` of it; `axes` is how to undo that."""
    order = (0, *(1 + a for a in np.argsort(axes)))
    if not isinstance(leaf, Quantized):
        return leaf.transpose(order)
    return Quantized(leaf.values.transpose(order), leaf.scales, leaf.bits, leaf.group, k)


def pools_for(form: str, layout: ExpertLayout, spoil: tuple[int, ...] = ()) -> tuple:
    (w_in, _), (w_out, _) = experts(form)
    first, second = expert_axes(layout)
    pools = laid_out(w_in, first, layout.index("d") - 3), laid_out(w_out, second, -1 if layout == "2fd" else -2)
    nan = {np.dtype(np.float32): np.nan, np.dtype(np.uint16): 0x7FC0, np.dtype(np.int8): 99}

    def spoilt(leaf: np.ndarray) -> jax.Array:
        leaf = leaf.copy()
        leaf[list(spoil)] = nan[leaf.dtype]
        return jnp.asarray(leaf)

    return jax.tree.map(spoilt, pools)


def rows(valid: int) -> jax.Array:
    x = np.random.default_rng(1).standard_normal((ROWS, D), np.float32)
    x[valid:] = np.nan
    return jnp.asarray(x.astype(ml_dtypes.bfloat16))


@pytest.fixture
def no_fallback(caplog):
    """Fails a test in which the first implementation refused."""
    from pallas_kernels import dispatch

    dispatch._say.cache_clear()
    with caplog.at_level(logging.WARNING, "pallas_kernels"):
        yield
    assert not [record.getMessage() for record in caplog.get_records("call")]


def check(got, expected: np.ndarray, tolerance: float) -> None:
    got = np.asarray(got)[: len(expected)]
    assert got.dtype == np.float32
    if len(expected):
        assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def ints(values) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


@functools.cache
def program(op: str, name: str):
    """Traced once for an implementation and kind of weights."""
    kernels, layout = implementation(name)
    matmul_layout = "nk" if layout == "2fd" else "kn"
    ops = {
        "matmul": lambda x, w, ids, sizes: grouped_matmul(x, w, ids, sizes, kernels, matmul_layout),
        "swiglu": lambda x, w_in, w_out, ids, sizes: grouped_swiglu(x, w_in, w_out, ids, sizes, GLUS["silu"], kernels, layout=layout),
        "swiglu biased": lambda x, w_in, w_out, ids, sizes, biases: grouped_swiglu(
            x, w_in, w_out, ids, sizes, GLUS["clamped_swiglu"], kernels, layout=layout, biases=biases
        ),
        "rows biased": lambda x, w_in, w_out, ids, biases: swiglu_rows(x, w_in, w_out, ids, GLUS["clamped_swiglu"], kernels, layout, biases),
        "rows": lambda x, w_in, w_out, ids: swiglu_rows(x, w_in, w_out, ids, GLUS["silu"], kernels, layout),
    }
    return jax.jit(ops[op], compiler_options=kernels.compiler_options())


def silu_loop(x: np.ndarray, group: np.ndarray, w_in: np.ndarray, w_out: np.ndarray) -> np.ndarray:
    out = np.zeros((len(group), D))
    for m, z in enumerate(group):
        gate, up = x[m] @ w_in[z, :, 0], x[m] @ w_in[z, :, 1]
        out[m] = (gate / (1 + np.exp(-gate)) * up) @ w_out[z]
    return out


@pytest.mark.parametrize(("name", "form", "case"), chosen("int8"))
def test_matmul(name, form, case, no_fallback):
    ids, sizes = CASES[case]
    unused = tuple(set(range(POOL)) - {z for z, n in zip(ids, sizes, strict=True) if n})
    _, w_out = pools_for(form, implementation(name)[1], unused)
    x, group = rows(sum(sizes))[:, :F], np.repeat(ids, sizes)
    expected = np.array([np.asarray(x[m], np.float64) @ experts(form)[1][1][z] for m, z in enumerate(group)]).reshape(-1, D)
    check(program("matmul", name)(x, w_out, ints(ids), ints(sizes)), expected, TOLERANCE["matmul on device" if name == ON_DEVICE else "matmul"])


@pytest.mark.parametrize(("name", "form", "case"), chosen("int4"))
def test_swiglu(name, form, case, no_fallback):
    ids, sizes = CASES[case]
    unused = tuple(set(range(POOL)) - {z for z, n in zip(ids, sizes, strict=True) if n})
    pools = pools_for(form, implementation(name)[1], unused)
    x, group = rows(sum(sizes)), np.repeat(ids, sizes)
    expected = silu_loop(np.asarray(x, np.float64), group, experts(form)[0][1], experts(form)[1][1])
    check(program("swiglu", name)(x, *pools, ints(ids), ints(sizes)), expected, TOLERANCE["swiglu"])


@pytest.mark.parametrize(("name", "form"), [p for p in cases(NAMES, FORMATS) if p.values[0] != "mosaic_gpu" or p.values[1] == "bfloat16"])
def test_one_row_through_several_matrices(name, form, no_fallback):
    x = rows(1)[:1]
    expected = silu_loop(np.repeat(np.asarray(x, np.float64), 3, axis=0), np.array([4, 1, 1]), experts(form)[0][1], experts(form)[1][1])
    check(program("rows", name)(x, *pools_for(form, implementation(name)[1]), ints([4, 1, 1])), expected, TOLERANCE["swiglu"])


@functools.cache
def biases_of(groups: int, dtype: str, spoil: tuple[int, ...] = ()) -> tuple:
    """Held biases by group, NaN for some groups; and their values in float64."""
    rng = np.random.default_rng(groups)
    held = [store_numpy(rng.standard_normal(s, np.float32), dtype) for s in ((groups, 2, F), (groups, D))]
    values = [load_numpy(b).astype(np.float64) for b in held]
    for b in held:
        b[np.array(spoil, int)] = 0x7FC0 if dtype == "bfloat16" else np.nan
    return tuple(jnp.asarray(b) for b in held), values


def clamped_loop(x: np.ndarray, group: np.ndarray, ids: list[int], biases: list[np.ndarray]) -> np.ndarray:
    """gpt-oss's experts in float64; `group` [M] of each row."""
    (_, w_in), (_, w_out) = experts("bfloat16")
    out = np.zeros((len(group), D))
    for m, g in enumerate(group):
        gate, up = (x[m] @ w_in[ids[g], :, i] + biases[0][g, i] for i in range(2))
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        out[m] = (gate / (1 + np.exp(-1.702 * gate)) * (up + 1)) @ w_out[ids[g]] + biases[1][g]
    return out


def chosen_biased() -> list:
    """(implementation, dtype of biases, case): each dtype with a case; of the GPU's kernel one, a slow one."""
    one, *others = CASES
    every = cases(NAMES, ["float32"], [one]) + cases(NAMES, ["bfloat16"], others[1:2])
    gpu = pytest.param("mosaic_gpu", "float32", one, marks=pytest.mark.slow)
    return [p for p in every if p.values[0] != "mosaic_gpu"] + [gpu]


@pytest.mark.parametrize(("name", "dtype", "case"), chosen_biased())
def test_swiglu_with_biases(name, dtype, case, no_fallback):
    """By group, not by matrix: two groups of one matrix have each their own."""
    ids, sizes = CASES[case]
    biases, exact = biases_of(len(ids), dtype, tuple(g for g, n in enumerate(sizes) if not n))
    x, group = rows(sum(sizes)), np.repeat(np.arange(len(ids)), sizes)
    got = program("swiglu biased", name)(x, *pools_for("bfloat16", implementation(name)[1]), ints(ids), ints(sizes), biases)
    check(got, clamped_loop(np.asarray(x, np.float64), group, ids, exact), TOLERANCE["swiglu"])


@pytest.mark.parametrize("name", cases([name for name in NAMES if name != "mosaic_gpu"]))
def test_one_row_through_several_matrices_with_biases(name, no_fallback):
    x, ids = rows(1)[:1], [4, 1, 1]
    biases, exact = biases_of(3, "bfloat16")
    expected = clamped_loop(np.repeat(np.asarray(x, np.float64), 3, axis=0), np.arange(3), ids, exact)
    check(program("rows biased", name)(x, *pools_for("bfloat16", implementation(name)[1]), ints(ids), biases), expected, TOLERANCE["swiglu"])


@pytest.mark.parametrize("name", cases([name for name in NAMES if name != "cpu"]))
def test_some_of_the_groups_into_a_given_array(name):
    """Rows before the first group given are kept, whatever was there."""
    kernels, layout = implementation(name)
    x = np.pad(rows(ROWS), ((0, 128), (0, 0)))
    into = np.full(x.shape, 7.0, np.float32)
    ids, sizes, starts = [3, 1], [2, 6], [5, 11]
    pools = pools_for("bfloat16", layout)
    run = functools.partial(grouped_swiglu, glu=GLUS["silu"], kernels=kernels, layout=layout)
    got = jax.jit(run, compiler_options=kernels.compiler_options())(x, *pools, ints(ids), ints(sizes), starts=ints(starts), into=into)
    wide = np.asarray(x, np.float64)
    for z, n, at in zip(ids, sizes, starts, strict=True):
        check(got[at : at + n], silu_loop(wide[at:], np.full(n, z), experts("bfloat16")[0][1], experts("bfloat16")[1][1]), TOLERANCE["swiglu"])
    assert (np.asarray(got)[:5] == 7.0).all() and (np.asarray(got)[7:11] == 7.0).all()


@pytest.mark.parametrize("rows_of_all", [4, 40])
def test_rows_before_the_first_group_that_has_any_are_kept(rows_of_all):
    """On the CPU, whether its matrices are read in place, as for few rows, or copied."""
    x = np.pad(rows(ROWS)[:rows_of_all], ((0, 128), (0, 0)))
    into = np.full(x.shape, 7.0, np.float32)
    ids, starts, sizes = [4, 3, 1], [0, 1, 3], [0, 2, 1]
    pools, run = pools_for("bfloat16", "d2f"), functools.partial(grouped_swiglu, glu=GLUS["silu"], kernels=Kernels("cpu"))
    got = np.asarray(jax.jit(run)(x, *pools, ints(ids), ints(sizes), starts=ints(starts), into=into))
    wide = np.asarray(x, np.float64)
    for z, n, at in zip(ids[1:], sizes[1:], starts[1:], strict=True):
        check(got[at : at + n], silu_loop(wide[at:], np.full(n, z), experts("bfloat16")[0][1], experts("bfloat16")[1][1]), TOLERANCE["swiglu"])
    assert (got[0] == 7.0).all()


def test_biases_of_other_sizes_are_refused():
    args = rows(1), *pools_for("bfloat16", "d2f"), ints([0, 1])
    for b_in, b_out in (((3, 2, F), (2, D)), ((2, 2, F), (2, D + 1)), ((2, F, 2), (2, D))):
        biases = jnp.zeros(b_in), jnp.zeros(b_out)
        with pytest.raises(ValueError, match=r"expected biases \[G, 2, F\] and \[G, D\] of 2 groups, D = 128, F = 128, got"):
            grouped_swiglu(*args, ints([1, 1]), GLUS["silu"], Kernels("cpu"), biases=biases)
        with pytest.raises(ValueError, match="of 2 groups"):
            swiglu_rows(args[0][:1], *args[1:], GLUS["silu"], Kernels("cpu"), biases=biases)


def test_the_dispatcher_says_what_it_chose_and_why(caplog):
    from pallas_kernels import dispatch

    dispatch._say.cache_clear()
    pools = pools_for("bfloat16", "d2f")
    with caplog.at_level(logging.WARNING, "pallas_kernels"):
        jax.eval_shape(lambda x: grouped_swiglu(x, *pools, ints([0]), ints([1]), GLUS["silu"], Kernels("gpu")), rows(1))
    (message,) = caplog.messages
    assert message.startswith("grouped_swiglu runs as xla, because others refuse (mosaic_gpu: it takes weights in the layout '2fd', these are 'd2f'")


def test_what_nobody_takes_is_an_error_with_all_reasons():
    with pytest.raises(NotImplementedError, match="no implementation of op takes these arguments: one: 3 is odd; two: 3 is small"):
        from pallas_kernels.dispatch import first_that_takes

        def refuse(reason):
            raise NotImplementedError(reason)

        first_that_takes("op", [("one", lambda: refuse("3 is odd")), ("two", lambda: refuse("3 is small"))])


def test_quantized_weights_of_another_layout_are_refused():
    q = quantize(jnp.ones((2, 128, 64)), 8, 64, -2)
    args = rows(1)[:, :128], q, ints([0]), ints([1]), Kernels("cpu")
    with pytest.raises(ValueError, match="K is axis -1 of this layout, the quantized weights have it at -2"):
        grouped_matmul(jnp.ones((1, 64), ml_dtypes.bfloat16), *args[1:], "nk")
    with pytest.raises(ValueError, match=r"scales \[2, 2, 64\] for groups of 64, got \[2, 1, 64\]"):
        grouped_matmul(args[0], Quantized(q.values, q.scales[:, :1], 8, 64, -2), *args[2:])
