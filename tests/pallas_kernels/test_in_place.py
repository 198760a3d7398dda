"""Few rows times matrices that are read in place: the values, the bits of dots of few rows, and that nothing is copied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.formats import load_numpy, store_numpy
from pallas_kernels.dense.cpu import few_rows, few_rows_dot
from pallas_kernels.dispatch import Kernels
from pallas_kernels.grouped_matmul.api import grouped_swiglu, swiglu_rows
from pallas_kernels.grouped_matmul.glu import GLUS
from pallas_kernels.grouped_matmul.in_place import in_place_parts, times
from pallas_kernels.one_kernel import one_kernel
from tests.quick import QuickKernels

POOL, K, N = 5, 48, 40
SIZES = {
    "none": [0, 0, 0],
    "one row each": [1, 1, 1],
    "a tile of every size": [8, 4, 3],
    "tiles that overhang": [5, 7, 3],
    "one group": [0, 21, 0],
    "gaps": [13, 0, 6],
}


def case(dtype: str, sizes: list[int], rows: int = 24, k: int = K, n: int = N) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows, a pool whose unused matrices are NaN, ids and sizes."""
    rng = np.random.default_rng(7)
    ids = np.asarray([4, 0, 3][: len(sizes)])
    pool = rng.standard_normal((POOL, k, n), dtype=np.float32)
    pool[[i for i in range(POOL) if i not in ids[np.asarray(sizes) > 0]]] = np.nan
    return rng.standard_normal((rows, k), dtype=np.float32), store_numpy(pool, dtype), ids, np.asarray(sizes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SIZES)
def test_each_row_is_multiplied_with_its_matrix_to_the_bits_of_few_rows(name, dtype):
    x, pool, ids, sizes = case(dtype, SIZES[name])
    parts = in_place_parts(K, N)
    assert parts is not None
    found = np.asarray(jax.jit(times, static_argnums=4)(x, pool, ids, sizes, parts))[: sizes.sum()]
    of_row = np.repeat(ids, sizes)
    weights = load_numpy(pool)
    exact = np.einsum("mk,mkn->mn", x[: len(of_row)].astype(np.float64), weights[of_row].astype(np.float64))
    np.testing.assert_allclose(found, exact, atol=1e-5)
    tile = few_rows(K, N).tiles[-1]
    dot = jax.jit(few_rows_dot)
    for z in set(of_row.tolist()):
        rows = x[: len(of_row)][of_row == z]
        assert (found[of_row == z] == np.asarray(dot(np.pad(rows, ((0, tile - len(rows)), (0, 0))), weights[z]))[: len(rows)]).all()


def test_given_starts_leave_rows_before_them_alone():
    x, pool, ids, sizes = case("float32", [2, 5, 1])
    starts = np.asarray([3, 9, 14])
    parts = in_place_parts(K, N)
    found = np.asarray(jax.jit(times, static_argnums=4)(x, pool, ids, sizes, parts, starts))
    for z, first, size in zip(ids, starts, sizes, strict=True):
        np.testing.assert_allclose(found[first : first + size], x[first : first + size] @ pool[z], atol=1e-5)
    assert (found[:3] == 0).all()


@pytest.mark.parametrize(("pool", "rows", "groups"), [(1, 1, 1), (1, 9, 1), (3, 1, 1), (2, 1, 4)])
def test_the_smallest_of_everything(pool, rows, groups):
    """XLA of jax 0.11.2 ends the process where a kernel is handed an array that it never looks at, as sizes of 1 can make of any."""
    x = np.random.default_rng(0).standard_normal((rows, K), dtype=np.float32)
    w = np.random.default_rng(1).standard_normal((pool, K, N), dtype=np.float32)
    sizes = np.asarray([rows] + [0] * (groups - 1))
    found = jax.jit(times, static_argnums=4)(x, w, np.zeros(groups, np.int32), sizes, in_place_parts(K, N))
    np.testing.assert_allclose(np.asarray(found), x @ w[0], atol=1e-5)


@pytest.mark.parametrize(("k", "n"), [(128, 256), (256, 256), (1024, 512), (2048, 256)])
def test_sizes_of_real_experts_are_read_in_place(k, n):
    assert in_place_parts(k, n) is not None


def test_sizes_that_cannot_be_tried_or_cut_are_not_read_in_place():
    assert in_place_parts(2**13, 2**12) is None  # more numbers than a probe is run for
    assert in_place_parts(15, 40) is None  # an odd K


def test_nothing_is_copied_and_it_is_one_kernel():
    x, pool, ids, sizes = case("float32", [1, 1, 1], rows=3, k=256, n=256)
    step = jax.jit(times, static_argnums=4).lower(x, pool, ids, sizes, 2).compile()
    stats = step.memory_analysis()
    assert stats.temp_size_in_bytes < pool[0].nbytes / 2
    text = step.as_text()
    entry = text[text.index("ENTRY") :]
    assert "xla_cpu_small_call" in entry and " while(" not in entry


@pytest.mark.parametrize(("rows", "kernels", "in_place"), [(1, Kernels("cpu"), True), (9, Kernels("cpu"), True), (11, Kernels("cpu"), False),
                                                          (9, QuickKernels("cpu"), False)])  # fmt: skip
def test_experts_of_few_rows_are_read_in_place_and_of_many_are_not(rows, kernels, in_place):
    """Of five groups; nor where programs are compiled otherwise than by default."""
    w_in, w_out = jnp.zeros((POOL, K, 2, N)), jnp.zeros((POOL, N, K))
    if rows == 1:
        step = jax.jit(lambda x: swiglu_rows(x, w_in, w_out, jnp.arange(5), GLUS["silu"], kernels))
    else:
        step = jax.jit(lambda x: grouped_swiglu(x, w_in, w_out, jnp.arange(5), jnp.full(5, rows // 5), GLUS["silu"], kernels))
    text = step.lower(jnp.zeros((rows, K))).as_text()
    assert (text.count("@_sums") > 0) == in_place


def test_one_kernel_is_a_call_like_any_other():
    @one_kernel(static=("by",))
    def scaled(x, *, by: int):
        return jax.lax.fori_loop(0, 3, lambda i, y: y + x * by, jnp.zeros_like(x))

    x = jnp.arange(5.0)
    assert (scaled(x, by=2) == 6 * x).all() and (jax.jit(lambda x: scaled(x, by=3))(x) == 9 * x).all()
