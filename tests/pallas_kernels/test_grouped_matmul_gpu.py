"""The Hopper kernel's numbers against float64 loops, interpreted on the CPU; what it refuses; that it compiles for an H100 and copies no pool."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmoe import formats
from pallas_kernels.compat import interpret_gpu
from pallas_kernels.grouped_matmul import gpu, gpu_tiles
from pallas_kernels.grouped_matmul.glu import GLUS
from pallas_kernels.grouped_matmul.gpu import Config, Problem
from pallas_kernels.grouped_matmul.shapes import SHAPES
from sharding.compile_only import compile_for
from tests.more import more, mostly
from tests.quick import OPTIONS

SMALL = Config(rows=16, depth=64, stages=2)
IDS = np.array([4, 0, 3, 0, 1], np.int32)
"""Of a pool of 6: out of order, one of them twice; 2 and 5 are nobody's."""


def weights(shape, bits, group, used):
    """A pool, and its float64 values; matrices that no group uses are NaN, or have NaN for scales."""
    values = np.random.default_rng(1).normal(size=shape).astype(np.float32) / np.sqrt(shape[-1])
    unused = np.setdiff1d(np.arange(shape[0]), used)
    if bits == 16:
        values[unused] = np.nan
        pool = formats.store_numpy(values, "bfloat16")
        return jnp.asarray(pool), formats.load_numpy(pool).astype(np.float64)
    pool = formats.quantize(jnp.asarray(values), bits, group, -1)
    pool = pool.replace(scales=pool.scales.at[unused].set(np.nan))
    return pool, np.asarray(formats.dequantize(pool), np.float64)


def rows(m, k, sizes, starts):
    """bfloat16 rows; those of no group are NaN."""
    x = np.random.default_rng(2).normal(size=(m, k)).astype(ml_dtypes.bfloat16)
    mine = np.zeros(m, bool)
    for start, size in zip(starts, sizes, strict=True):
        mine[start : start + size] = True
    x[~mine] = np.nan
    return x


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def swiglu(g, u):
    return g * sigmoid(g) * u


def clamped_swiglu(g, u):
    g, u = np.minimum(g, 7), np.clip(u, -7, 7)
    return g * sigmoid(1.702 * g) * (u + 1)


@functools.lru_cache(maxsize=4)
def jitted(op, config, out_dtype, glu):
    """The kernel in interpret mode, as a function of everything that is traced."""

    def f(x, w, ids, sizes, starts, bias):
        if op == "glu":
            return gpu.grouped_glu(x, w, ids, sizes, GLUS[glu], starts, bias=bias, config=config, interpret=interpret_gpu())
        return gpu.grouped_matmul(x, w, ids, sizes, starts, out_dtype=out_dtype, config=config, interpret=interpret_gpu())

    return jax.jit(f, compiler_options=OPTIONS)


def check(sizes, config, *, m=40, k=128, n=64, bits=16, group=64, op="matmul", starts=None, out_dtype=jnp.float32, ids=IDS, glu="silu", biased=False):
    sizes = np.array(sizes, np.int32)
    begin = np.cumsum(sizes) - sizes if starts is None else np.array(starts)
    w, w64 = weights((6, *((2,) if op == "glu" else ()), n, k), bits, group, ids)
    x = rows(m, k, sizes, begin)
    given = None if starts is None else jnp.asarray(starts, jnp.int32)
    bias = np.random.default_rng(4).normal(size=(len(ids), 2, n)).astype(np.float32) * biased
    bias[sizes == 0] *= np.nan
    y = np.asarray(jitted(op, config, out_dtype, glu)(x, w, jnp.asarray(ids), jnp.asarray(sizes), given, bias if biased else None))
    assert y.shape == (m, n)
    assert y.dtype == (ml_dtypes.bfloat16 if op == "glu" else out_dtype)
    for i, start, size, b in zip(ids, begin, sizes, bias.astype(np.float64), strict=True):
        x64 = x[start : start + size].astype(np.float64)
        if op == "glu":
            want = {"silu": swiglu, "clamped_swiglu": clamped_swiglu}[glu](x64 @ w64[i, 0].T + b[0], x64 @ w64[i, 1].T + b[1])
        else:
            want = x64 @ w64[i].T
        rounding = 2**-8 if y.dtype == ml_dtypes.bfloat16 else 2e-6
        np.testing.assert_allclose(y[start : start + size].astype(np.float64), want, rtol=rounding, atol=2e-6)


@pytest.mark.parametrize(
    "sizes", [(0, 0, 37, 0, 0), (1, 1, 1, 1, 1), (7, 9, 0, 16, 8), (0, 3, 14, 0, 20), (0, 0, 0, 0, 0)], ids=lambda sizes: "-".join(map(str, sizes))
)
def test_matmul_of_any_groups(sizes):
    check(sizes, SMALL)


def test_groups_that_start_where_they_are_told():
    check((5, 0, 9, 1, 3), SMALL, starts=(2, 7, 11, 25, 37))


@pytest.mark.parametrize(
    "config, more",
    [
        (Config(rows=8, depth=128, stages=2, per_sm=2), {"n": 128}),
        (Config(rows=8, cols=128, depth=64, stages=3), {"n": 128, "m": 5, "k": 192}),
        (Config(rows=16, depth=64, stages=2, splits=2), {"k": 256, "n": 128}),
        (Config(rows=64, warpgroups=2, depth=64, stages=2, band=1), {"m": 83, "n": 256}),
        (Config(rows=128, depth=64, stages=2), {"m": 131, "k": 64}),
    ],
    ids=["8 rows, two blocks", "5 rows, 128 columns", "split K", "two warpgroups, bands", "results by chunks"],
)
def test_matmul_of_any_tiles(config, more):
    m = more.setdefault("m", 40)
    sizes = (2, 0, 0, 1, 1) if m == 5 else (1, 0, m - 11, 3, 4)
    check(sizes, config, **more)


def test_matmul_rounds_once_to_bfloat16():
    check((3, 0, 14, 1, 9), SMALL, out_dtype=jnp.bfloat16)


def test_what_the_heuristic_chooses():
    check((1, 0, 3, 2, 1), None, m=9, k=192)


@pytest.mark.parametrize(
    "config, more",
    [
        (SMALL, {"glu": "silu"}),
        (Config(rows=32, warpgroups=2, depth=64, stages=2), {"glu": "clamped_swiglu", "n": 128, "k": 192, "biased": True}),
    ],
    ids=["silu", "clamped, biases"],
)
def test_glu(config, more):
    check((3, 0, 22, 0, 9), config, op="glu", **more)


@pytest.mark.parametrize(
    "bits, config, more",
    [
        more(8, Config(rows=16, depth=128, stages=2), {"group": 128, "k": 256}),
        (8, Config(rows=16, depth=64, stages=2, splits=2), {"group": 32}),
        (4, Config(rows=16, depth=128, stages=2), {"group": 128, "k": 256}),
        (4, Config(rows=16, cols=128, depth=128, stages=2), {"group": 32, "n": 128}),
        (4, Config(rows=8, depth=192, stages=2, warpgroups=2), {"group": 64, "k": 192, "n": 128}),
        (8, Config(rows=8, depth=64, stages=2), {"op": "glu", "group": 128}),
        more(4, Config(rows=8, depth=64, stages=2), {"op": "glu", "group": 64, "k": 192}),
    ],
)
def test_quantized(bits, config, more):
    check((3, 0, 14, 1, 9), config, bits=bits, **more)


def test_work_list_covers_every_row_once():
    rng = np.random.default_rng(3)
    g, m = 12, 90
    for rows_ in (8, 16, 64):
        most = gpu_tiles.most_tiles(Problem(m, 64, 64, g, 1, 16, 0, 4), rows_)
        f = jax.jit(functools.partial(gpu_tiles.work_list, rows=rows_, most=most))
        for _ in range(30):
            sizes = rng.multinomial(rng.integers(0, m + 1), rng.dirichlet(np.full(g, rng.choice([0.05, 1.0])))).astype(np.int32)
            starts = np.cumsum(sizes) - sizes
            _, begin, _, ends, groups = map(np.asarray, f(jnp.arange(g), sizes, None))
            tiles = [-(-(s % 8 + n) // rows_) if n else 0 for s, n in zip(starts, sizes, strict=True)]
            np.testing.assert_array_equal(ends, np.cumsum(tiles))
            assert ends[-1] <= most
            np.testing.assert_array_equal(groups[: ends[-1]], np.repeat(np.arange(g), tiles))
            np.testing.assert_array_equal(begin[sizes > 0], starts[sizes > 0])


def test_most_tiles_can_be_reached():
    # Groups of two rows that lie across slabs' borders: as many tiles of 8 rows as rows.
    sizes, starts = np.full(4, 2), np.arange(4) * 8 + 7
    ends = gpu_tiles.work_list(jnp.arange(4), jnp.asarray(sizes), jnp.asarray(starts), 8, 8)[3]
    assert int(ends[-1]) == 8
    assert gpu_tiles.most_tiles(Problem(33, 64, 64, 4, 1, 16, 0, 4), 8) >= 8


@pytest.mark.parametrize(
    "more, message",
    [
        ({"x": jnp.float32}, "float32"),
        ({"n": 96}, "96"),
        ({"k": 96}, "K = 96"),
        ({"dtype": jnp.float32}, "float32"),
        ({"bits": 8, "group": 16}, "it is 16"),
        ({"bits": 8, "axis": -2}, "at -2"),
        ({"config": Config(rows=12)}, "not 12"),
        ({"config": Config(rows=16, depth=128)}, "K = 64"),
        ({"config": Config(rows=16, depth=64, warpgroups=2)}, "64 columns"),
        ({"config": Config(rows=16, depth=64, stages=99)}, "bytes of shared memory"),
        ({"config": Config(rows=256, cols=128, depth=64, stages=2), "n": 128}, "registers"),
        ({"out_dtype": jnp.float16}, "float16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(more, message):
    n, k = more.get("n", 64), more.get("k", 64)
    if "bits" in more:
        w = formats.quantize(jnp.ones((2, n, k)), more["bits"], more.get("group", 64), -1)
        w = dataclasses.replace(w, axis=more.get("axis", -1))
    else:
        w = jnp.zeros((2, n, k), more.get("dtype", jnp.uint16))
    x, one = jnp.ones((9, k), more.get("x", jnp.bfloat16)), jnp.ones(1, jnp.int32)
    with pytest.raises(NotImplementedError, match=message):
        gpu.grouped_matmul(x, w, one, one, config=more.get("config"), out_dtype=more.get("out_dtype", jnp.float32), interpret=interpret_gpu())


def problems(tokens, bits=16):
    for name, shape in SHAPES.items():
        group = 0 if bits == 16 else 128 if shape.width % 128 == 0 else 64
        m = tokens * shape.active
        yield name, Problem(m, shape.width, shape.hidden, shape.experts, 1, bits, group, 4)
        yield name, Problem(m, shape.hidden, shape.width, shape.experts, 2, bits, group, 2)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("tokens", [1, 8, 64, 512, 8192])
def test_heuristic_fits_every_model(tokens, bits):
    for name, problem in problems(tokens, bits):
        config = gpu.heuristic(problem)
        assert not problem.why_not(config), name
        assert problem.shared_bytes(config) * config.per_sm <= 227 * 1024, name
        assert config.rows <= 16 or tokens > 8, name


def test_candidates_are_legal_and_hold_the_heuristic():
    for name, problem in problems(8):
        found = gpu.candidates(problem)
        assert all(not problem.why_not(c) for c in found), name
        assert len(set(found)) == len(found)
        chosen = gpu.heuristic(problem)
        assert any(dataclasses.replace(c, stages=chosen.stages) == chosen for c in found), name


def abstract(problem, bits):
    """Shapes of x, of a pool of as many matrices as groups, and of ids."""
    p, shape = problem, jax.ShapeDtypeStruct
    lead = (p.groups, 2, p.n) if p.parts == 2 else (p.groups, p.n)
    if bits == 16:
        w = shape((*lead, p.k), jnp.uint16)
    else:
        scales = shape((p.groups, p.k // p.group, *lead[1:]), jnp.float32)
        w = formats.Quantized(shape((*lead, p.k * bits // 8), jnp.int8), scales, bits, p.group, -1)
    return shape((p.m, p.k), jnp.bfloat16), w, shape((p.groups,), jnp.int32)


# Few groups and many, and sizes that tiles do not divide; the other models' kernels are these (`scripts/compile_kernels.py` compiles all of them).
COMPILED = [("mixtral-8x7b", 8, 16), ("deepseek-v3", 512, 16), ("gpt-oss-120b", 8, 16), ("gpt-oss-120b", 512, 16)]
# A K of 128s and one of 64s.
COMPILED += [("mixtral-8x7b", 8, 8), ("gpt-oss-120b", 8, 4)]
# Their configs with more and with fewer groups, and in the other number of bits.
AGAIN = [("deepseek-v3", 8, 16), ("mixtral-8x7b", 512, 16), ("mixtral-8x7b", 8, 4), ("gpt-oss-120b", 8, 8)]


def test_what_is_compiled_has_the_config_of_every_model():
    for tokens in (8, 512):
        some = {name for name, n, bits in COMPILED if (n, bits) == (tokens, 16)}
        every = [(name, (p.parts, gpu.heuristic(p))) for name, p in problems(tokens)]
        assert {config for name, config in every if name in some} == {config for _, config in every}


@pytest.mark.compile_only
@pytest.mark.parametrize("tokens", [8, 512])
def test_biases_compile_for_h100(tokens, monkeypatch, tmp_path):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    (problem,) = (p for n, p in problems(tokens) if n == "gpt-oss-120b" and p.parts == 2)
    x, w, ids = abstract(problem, 16)
    bias = jax.ShapeDtypeStruct((problem.groups, 2, problem.n), jnp.uint16)
    program = compile_for("h100", lambda x, w, i, s, b: gpu.grouped_glu(x, w, i, s, GLUS["clamped_swiglu"], bias=b), x, w, ids, ids, bias)
    assert "mosaic_gpu" in program.as_text()
    # The work list, and the biases in float32.
    lists = 32 * (problem.groups + gpu_tiles.most_tiles(problem, 8)) + 4096
    assert program.memory_analysis().temp_size_in_bytes <= lists + 8 * problem.groups * problem.n
    (log,) = (log.read_text() for log in tmp_path.glob("*.ptxas"))
    assert "0 bytes spill stores" in log and "serialized" not in log, log


@pytest.mark.compile_only
@pytest.mark.parametrize("name, tokens, bits", mostly(COMPILED + AGAIN, COMPILED))
def test_compiles_for_h100(name, tokens, bits, monkeypatch, tmp_path):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    for problem in (p for n, p in problems(tokens, bits) if n == name):
        x, w, ids = abstract(problem, bits)
        if problem.parts == 2:
            program = compile_for("h100", lambda x, w, i, s: gpu.grouped_glu(x, w, i, s, GLUS["silu"]), x, w, ids, ids)
        else:
            program = compile_for("h100", gpu.grouped_matmul, x, w, ids, ids)
        assert "mosaic_gpu" in program.as_text()
        # The work list: five numbers for each group and tile.
        assert program.memory_analysis().temp_size_in_bytes <= 32 * (problem.groups + gpu_tiles.most_tiles(problem, 8)) + 4096, problem
    logs = [log.read_text() for log in tmp_path.glob("*.ptxas")]
    assert len(logs) == 2
    assert all("0 bytes spill stores" in log and "serialized" not in log for log in logs), logs
