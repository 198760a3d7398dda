"""The contract of the grouped matmul and of the grouped feed-forward: every implementation against a loop over rows in float64.

That a row's bits depend on nothing around it is tested in `test_row_invariance.py`; here the values have to be right.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.formats import load_numpy, store_numpy
from pallas_kernels.dispatch import Kernels
from pallas_kernels.grouped_matmul.api import grouped_matmul, grouped_swiglu, swiglu_rows
from pallas_kernels.grouped_matmul.glu import GLUS
from tests.quick import OPTIONS

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference", "gpu", "tpu"])
DTYPES = pytest.mark.parametrize(("weights", "activations"), [(w, x) for w in ("float32", "bfloat16") for x in ("float32", "bfloat16")])

POOL, D, F, N = 7, 24, 12, 20

ROWS, GROUPS = 37, 5
CASES = {
    "permuted ids with gaps": ([5, 0, 6, 2, 3], [7, 9, 4, 12, 5]),
    "one id several times": ([4, 1, 4, 4, 1], [3, 8, 1, 11, 14]),
    "empty groups": ([2, 6, 0, 1, 5], [0, 20, 0, 17, 0]),
    "one group has all rows": ([3, 6, 2, 1, 0], [0, 0, ROWS, 0, 0]),
    "one valid row": ([6, 5, 4, 3, 2], [0, 0, 0, 1, 0]),
    "full tiles, then padding": ([1, 0, 3, 2, 6], [4, 8, 4, 0, 16]),
    "groups of one row, then padding": ([6, 6, 0, 3, 1], [1, 1, 1, 1, 1]),
    "no valid row": ([0, 1, 2, 3, 4], [0, 0, 0, 0, 0]),
}
"""(pool ids, group sizes) for `ROWS` rows; all of one shape, so that they share a program."""

SHAPES = {
    "one row": (1, [3, 0, 5, 6], [0, 0, 1, 0]),
    "more groups than rows": (3, [6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4, 5], [0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]),
    "more groups than rows, all in one": (3, [6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4, 5], [0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0]),
    "many rows a group": (150, [4, 2, 0], [33, 65, 50]),
    "many rows in one group": (150, [1, 6, 3], [0, 150, 0]),
}
"""(rows, pool ids, group sizes) of other shapes."""


SWIGLU_TOLERANCE = {"float32": 5e-6, "bfloat16": 1.5e-2}
"""By the activations' dtype, relative to the largest output: bfloat16 is rounded by up to 2^-9 several times between the two matmuls."""


def weights_of(name: str, *shape: int, seed: int) -> np.ndarray:
    """A pool as it is held; each matrix keeps the size of what it is applied to."""
    value = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return store_numpy(value * np.float32(shape[1] ** -0.5), name)


def rows_of(name: str, rows: int) -> np.ndarray:
    x = 2 * np.random.default_rng(1).standard_normal((rows, D), dtype=np.float32)
    return x.astype(jnp.dtype(name))


def exact(leaf: np.ndarray) -> np.ndarray:
    return load_numpy(leaf).astype(np.float64)


def matmul_loop(x, w, ids, sizes) -> np.ndarray:
    """float64 [valid rows, N]."""
    group = np.repeat(np.asarray(ids), sizes)
    return np.stack([x[m].astype(np.float64) @ exact(w)[i] for m, i in enumerate(group)])


def swiglu_loop(x, w_in, w_out, ids, sizes, act) -> np.ndarray:
    """float64 [valid rows, D], nothing rounded on the way."""
    out = []
    for m, i in enumerate(np.repeat(np.asarray(ids), sizes)):
        row = x[m].astype(np.float64)
        gate, up = row @ exact(w_in)[i, :, 0], row @ exact(w_in)[i, :, 1]
        out.append(act(gate, up) @ exact(w_out)[i])
    return np.stack(out)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    """With the tanh, as jax.nn.gelu has it."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def square(x):
    return x * x


def clamped(g: np.ndarray, u: np.ndarray) -> np.ndarray:
    """gpt-oss's."""
    g, u = np.minimum(g, 7.0), np.clip(u, -7.0, 7.0)
    return g / (1 + np.exp(-1.702 * g)) * (u + 1)


ACTS = {
    "silu": (GLUS["silu"], lambda g, u: silu(g) * u),
    "gelu": (GLUS["gelu"], lambda g, u: gelu(g) * u),
    "clamped_swiglu": (GLUS["clamped_swiglu"], clamped),
    "square": (lambda g, u: square(g) * u, lambda g, u: square(g) * u),
}


compiled = functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False, **OPTIONS})
"""As the engine's steps are in what matters to values: XLA otherwise leaves out roundings to bfloat16 that are part of the meaning."""


@functools.cache
def matmul_program(backend: str):
    return compiled(lambda *args: grouped_matmul(*args, Kernels(backend, pallas=False)))


@functools.cache
def swiglu_program(backend: str, act: str = "silu"):
    return compiled(lambda *args: grouped_swiglu(*args, ACTS[act][0], Kernels(backend, pallas=False)))


@functools.cache
def rows_program(backend: str, act: str = "silu"):
    return compiled(lambda *args: swiglu_rows(*args, ACTS[act][0], Kernels(backend, pallas=False)))


def ints(values) -> np.ndarray:
    return np.asarray(values, np.int32)


def check(run, x: np.ndarray, sizes: list[int], expected, tolerance: float) -> None:
    """Holds `run(x)` to the loop's rows with three kinds of padding. Padding may cost no valid row a bit, and gives finite values if it is finite."""
    valid, rows = sum(sizes), len(x)
    first = None
    for padding in (0.0, 1e4, np.nan):
        padded = x.copy()
        padded[valid:] = padding
        got = np.asarray(run(padded))
        assert got.dtype == np.float32 and len(got) == rows
        if valid:
            assert got.shape[1:] == expected.shape[1:]
            assert np.abs(got[:valid] - expected).max() <= tolerance * np.abs(expected).max(), padding
        if np.isfinite(padding):
            assert np.isfinite(got).all(), padding
        first = got[:valid] if first is None else first
        np.testing.assert_array_equal(got[:valid].view(np.uint32), first.view(np.uint32), f"padding of {padding}")


def check_matmul(backend, weights, activations, rows, ids, sizes) -> None:
    # Sums are float32 whatever the inputs are: bfloat16 values are widened, and nothing is rounded again.
    x, w = rows_of(activations, rows), weights_of(weights, POOL, D, N, seed=2)
    expected = matmul_loop(x, w, ids, sizes) if sum(sizes) else None
    check(lambda x: matmul_program(backend)(x, w, ints(ids), ints(sizes)), x, sizes, expected, 2e-6)


def check_swiglu(backend, weights, activations, rows, ids, sizes, act="silu") -> None:
    x = rows_of(activations, rows)
    w_in, w_out = weights_of(weights, POOL, D, 2, F, seed=3), weights_of(weights, POOL, F, D, seed=4)
    expected = swiglu_loop(x, w_in, w_out, ids, sizes, ACTS[act][1]) if sum(sizes) else None
    check(lambda x: swiglu_program(backend, act)(x, w_in, w_out, ints(ids), ints(sizes)), x, sizes, expected, SWIGLU_TOLERANCE[activations])


@BACKENDS
@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_matmul(backend, weights, activations, case):
    check_matmul(backend, weights, activations, ROWS, *CASES[case])


@BACKENDS
@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_swiglu(backend, weights, activations, case):
    check_swiglu(backend, weights, activations, ROWS, *CASES[case])


@BACKENDS
@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes(backend, shape):
    check_matmul(backend, "float32", "float32", *SHAPES[shape])
    check_swiglu(backend, "float32", "float32", *SHAPES[shape])


@BACKENDS
@pytest.mark.parametrize("act", ["gelu", "clamped_swiglu"])
def test_another_activation(backend, act):
    check_swiglu(backend, "float32", "float32", ROWS, *CASES["permuted ids with gaps"], act)


def check_one_row(backend, weights, activations, ids) -> None:
    x = rows_of(activations, 1)
    w_in, w_out = weights_of(weights, POOL, D, 2, F, seed=3), weights_of(weights, POOL, F, D, seed=4)
    expected = swiglu_loop(np.repeat(x, len(ids), axis=0), w_in, w_out, ids, [1] * len(ids), ACTS["silu"][1])
    got = np.asarray(rows_program(backend)(x, w_in, w_out, ints(ids)))
    assert got.dtype == np.float32 and got.shape == expected.shape
    assert np.abs(got - expected).max() <= SWIGLU_TOLERANCE[activations] * np.abs(expected).max()


@BACKENDS
@DTYPES
def test_one_row_through_several_matrices(backend, weights, activations):
    for ids in ([6, 0, 2, 4], [5, 5, 1, 5]):
        check_one_row(backend, weights, activations, ids)


@BACKENDS
@pytest.mark.parametrize("ids", [[3], [5, 5, 5, 1, 0, 2, 3, 4, 6]], ids=len)
def test_one_row_through_one_matrix_and_through_more_than_the_pool_has(backend, ids):
    check_one_row(backend, "float32", "float32", ids)


@BACKENDS
def test_bfloat16_is_rounded_between_ops(backend):
    """Gate, up, activation and hidden values are each rounded to bfloat16: seen with an activation of one multiplication, which numpy can follow."""
    ids, sizes = CASES["permuted ids with gaps"]
    x, w_in, w_out = rows_of("bfloat16", ROWS), weights_of("bfloat16", POOL, D, 2, F, seed=3), weights_of("bfloat16", POOL, F, D, seed=4)

    def rounded(value):
        return value.astype(np.float32).astype(x.dtype).astype(np.float64)

    expected = []
    for m, i in enumerate(np.repeat(ids, sizes)):
        row = x[m].astype(np.float64)
        gate, up = rounded(row @ exact(w_in)[i, :, 0]), rounded(row @ exact(w_in)[i, :, 1])
        expected.append(rounded(rounded(gate * gate) * up) @ exact(w_out)[i])
    got = np.asarray(swiglu_program(backend, "square")(x, w_in, w_out, ints(ids), ints(sizes)))
    worst = np.abs(got - np.stack(expected)).max(axis=1) / np.abs(expected).max()
    # float32 sums may put a value that lies between two bfloat16 numbers on the other side: one row may differ, by one rounding.
    assert np.sort(worst)[-2] < 2e-6, np.sort(worst)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@BACKENDS
def test_wrong_shapes_are_refused(backend):
    ids, sizes, x = ints([0, 1, 2]), ints([2, 2, 2]), zeros(6, D)
    gate_up, down = zeros(POOL, D, 2, F), zeros(POOL, F, D)
    with pytest.raises(ValueError, match=rf"{D + 1}.* beside \[6, {D}\]"):
        jax.eval_shape(matmul_program(backend), x, zeros(POOL, D + 1, N), ids, sizes)
    for w_in, w_out in [
        (zeros(POOL, D + 1, 2, F), down),
        (zeros(POOL, D, 3, F), down),
        (gate_up, zeros(POOL, F + 1, D)),
        (gate_up, zeros(POOL, F, D - 1)),
        (gate_up, zeros(POOL - 1, F, D)),
    ]:
        with pytest.raises(ValueError, match=r"expected a pool \[Z, .* beside"):
            jax.eval_shape(swiglu_program(backend), x, w_in, w_out, ids, sizes)
        with pytest.raises(ValueError, match=r"expected a pool \[Z, .* beside"):
            jax.eval_shape(rows_program(backend), zeros(1, D), w_in, w_out, ids)
    for some_ids, some_sizes in [(ids[:2], sizes), (ids, sizes[:2]), (ids[:0], sizes[:0])]:
        with pytest.raises(ValueError, match=r"group ids and sizes \[G\], at least one, got"):
            jax.eval_shape(swiglu_program(backend), x, gate_up, down, some_ids, some_sizes)
    with pytest.raises(ValueError, match=r"one row \[1, D\], got \[2, "):
        jax.eval_shape(rows_program(backend), zeros(2, D), gate_up, down, ids)
