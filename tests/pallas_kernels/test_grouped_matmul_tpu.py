"""The TPU kernels of the grouped matmul: interpreted on the CPU against a loop over groups in float64, and compiled at the shapes of real models.

Whatever no valid row may see is NaN: rows of no group, and matrices that no group with rows names. What every grouped matmul has to do is in
`tests/contracts/test_grouped_matmul.py`; here is what tiles can get wrong.
"""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxmoe import formats
from jaxmoe.formats import Quantized
from jaxmoe.report.kernel_compiles import abstract_pool
from pallas_kernels.grouped_matmul import tpu, tpu_tiles
from pallas_kernels.grouped_matmul.glu import GLUS, swiglu
from pallas_kernels.grouped_matmul.shapes import SHAPES
from pallas_kernels.grouped_matmul.tpu import Config
from sharding.compile_only import compile_for, on_device
from tests.more import more, mostly
from tests.quick import OPTIONS

M, K, N, POOL, GROUPS = 70, 256, 200, 7, 6

CASES = {
    "back to back, padding behind": ([4, 1, 2, 5, 0, 3], [3, 9, 20, 16, 1, 11], None),
    "all rows, straddling every tile": ([5, 4, 3, 2, 1, 0], [15, 2, 16, 16, 14, 7], None),
    "one id many times": ([1, 1, 4, 1, 1, 1], [3, 8, 1, 11, 14, 20], None),
    "all in one": ([0, 6, 2, 4, 5, 1], [0, 0, 0, M, 0, 0], None),
    "all empty but one row": ([0, 6, 2, 4, 5, 1], [0, 0, 0, 0, 1, 0], None),
    "one row each": ([3, 6, 0, 5, 2, 1], [1, 1, 1, 1, 1, 1], None),
    "no rows": ([3, 6, 0, 5, 2, 1], [0, 0, 0, 0, 0, 0], None),
    "gaps": ([3, 0, 1, 2, 4, 6], [5, 0, 13, 1, 20, 2], [2, 9, 14, 31, 33, 66]),
    "gaps, last tile full": ([2, 0, 2, 2, 4, 2], [1, 1, 0, 30, 7, 3], [0, 16, 17, 18, 49, 67]),
}
"""(pool ids, sizes, starts) of `GROUPS` groups in `M` rows; all of one shape, so that they share a program."""

FORMS = ("plain", "int8", "int4")


@dataclasses.dataclass(frozen=True)
class Pool:
    """Matrices as they are held, and what they stand for in float64: [Z, K, N], or [Z, K, 2, F]."""

    held: object
    values: np.ndarray


@functools.cache
def pool(form: str, parts: int, k: int = K, n: int = N, group: int = 128, z: int = POOL) -> Pool:
    """Random matrices with columns of about unit length."""
    shape = (z, k, n) if parts == 1 else (z, 2, k, n)
    w = np.random.default_rng(parts).standard_normal(shape, dtype=np.float32) * np.float32(k**-0.5)
    if form == "plain":
        held = formats.store_numpy(w, "bfloat16")
        values = formats.load_numpy(held)
    else:
        held = formats.quantize(jnp.asarray(w), int(form[3:]), group, -2)
        values = np.asarray(formats.dequantize(held))
    return Pool(held, np.moveaxis(values.astype(np.float64), -2, 1))


def rows_of(m: int, k: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((m, k), dtype=np.float32).astype(jnp.bfloat16)


def poisoned(held, ids: list[int], sizes: list[int]):
    """The pool with NaN in the matrices that no group with rows uses."""
    unused = sorted(set(range(POOL)) - {i for i, n in zip(ids, sizes, strict=True) if n})
    if isinstance(held, Quantized):
        scales = np.array(held.scales)
        scales[unused] = np.nan
        return held.replace(scales=scales)
    held = held.copy()
    held[unused] = 0x7FC0
    return held


def starts_of(sizes: list[int], starts: list[int] | None) -> list[int]:
    return list(np.cumsum(sizes) - sizes) if starts is None else starts


def expected(x: np.ndarray, values: np.ndarray, ids, sizes, starts) -> tuple[np.ndarray, np.ndarray]:
    """float64 [M, N], or [M, 2, F], NaN in rows of no group; and the sums of magnitudes, of which rounding takes its share."""
    y = np.full((x.shape[0], *values.shape[2:]), np.nan)
    size = np.zeros_like(y)
    for i, n, at in zip(ids, sizes, starts_of(sizes, starts), strict=True):
        rows = x[at : at + n].astype(np.float64)
        y[at : at + n] = np.tensordot(rows, values[i], 1)
        size[at : at + n] = np.tensordot(abs(rows), abs(values[i]), 1)
    return y, size


def scattered(rows: np.ndarray, sizes: list[int], starts: list[int] | None) -> np.ndarray:
    """The rows, NaN where they belong to no group."""
    x = np.full_like(rows, np.nan)
    for n, at in zip(sizes, starts_of(sizes, starts), strict=True):
        x[at : at + n] = rows[at : at + n]
    return x


@functools.partial(jax.jit, static_argnames=("config", "back_to_back", "dtype"), compiler_options=OPTIONS)
def matmul(x, w, ids, sizes, starts, config=None, back_to_back=True, dtype=jnp.float32):
    starts = None if back_to_back else starts
    return tpu.grouped_matmul(x, w, ids, sizes, starts, out_dtype=dtype, config=config, interpret=True)


@functools.partial(jax.jit, static_argnames=("glu", "config", "back_to_back"), compiler_options=OPTIONS)
def glu_of(x, w, ids, sizes, starts, glu=swiglu, config=None, back_to_back=True):
    return tpu.grouped_glu(x, w, ids, sizes, glu, None if back_to_back else starts, config=config, interpret=True)


def arguments(ids, sizes, starts):
    return [np.array(a, np.int32) for a in (ids, sizes, sizes if starts is None else starts)]


def share(form: str) -> float:
    """How much of the sum of magnitudes may be off: float32 sums, and quantized weights rounded to bfloat16."""
    return 2.0**-20 if form == "plain" else 2.0**-9


def check_matmul(form: str, ids, sizes, starts, config: Config | None, p: Pool, m: int = M) -> None:
    x = scattered(rows_of(m, p.values.shape[1]), sizes, starts)
    y = matmul(x, poisoned(p.held, ids, sizes), *arguments(ids, sizes, starts), config=config, back_to_back=starts is None)
    want, size = expected(x, p.values, ids, sizes, starts)
    valid = ~np.isnan(want)
    assert valid.sum() == sum(sizes) * p.values.shape[-1]
    assert y.dtype == jnp.float32 and y.shape == want.shape
    assert (abs(np.asarray(y) - want) <= share(form) * size)[valid].all()


def check_glu(form: str, ids, sizes, starts, config: Config | None, p: Pool, m: int = M) -> None:
    x = scattered(rows_of(m, p.values.shape[1]), sizes, starts)
    held = poisoned(p.held, ids, sizes)
    y = glu_of(x, held, *arguments(ids, sizes, starts), config=config, back_to_back=starts is None)
    both, size = expected(x, p.values, ids, sizes, starts)
    gate, up = both[:, 0], both[:, 1]
    want = gate / (1 + np.exp(-gate)) * up
    # silu's slope is at most 1.1; the result is rounded to bfloat16.
    error = share(form) * 1.1 * (size[:, 0] * abs(up) + size[:, 1] * abs(gate) + size[:, 0] * size[:, 1] * share(form)) + 2.0**-8 * abs(want) + 1e-6
    valid = ~np.isnan(want)
    assert valid.sum() == sum(sizes) * p.values.shape[-1]
    assert y.dtype == jnp.bfloat16 and y.shape == want.shape
    assert (abs(np.asarray(y, np.float64) - want) <= error)[valid].all()


@pytest.mark.parametrize("case", CASES)
def test_work_items_are_the_groups_in_each_tile_and_no_others(case):
    ids, sizes, starts = CASES[case]
    tile, tiles = 16, -(-M // 16)
    given = arguments(ids, sizes, starts)
    ends, *items = tpu_tiles.work_items(*map(jnp.asarray, given[:2]), None if starts is None else jnp.asarray(given[2]), tile, tiles + GROUPS - 1)
    groups = zip(ids, sizes, starts_of(sizes, starts), strict=True)
    every = [(i, t, max(at - t * tile, 0), min(at + n - t * tile, tile)) for i, n, at in groups for t in range(tiles)]
    want = [item for item in every if item[2] < item[3]]
    assert np.stack(items, 1)[: ends[-1]].tolist() == [list(item) for item in want]


def test_matmul_is_right_for_every_way_of_grouping():
    for ids, sizes, starts in CASES.values():
        check_matmul("plain", ids, sizes, starts, Config(16, K, 128), pool("plain", 1))


@pytest.mark.parametrize("case", ["back to back, padding behind", "gaps"])
def test_buffers_that_hold_what_was_there_before(case):
    """Interpreted as a TPU's pipeline: blocks are copied when their place changes, also past the last item, and memory is NaN until written."""
    ids, sizes, starts = CASES[case]
    x, p = scattered(rows_of(M, K), sizes, starts), pool("plain", 1)
    interpret = pltpu.InterpretParams(uninitialized_memory="nan")
    given = arguments(ids, sizes, starts)

    @functools.partial(jax.jit, compiler_options=OPTIONS)
    def run(x, w, ids, sizes, places):
        return tpu.grouped_matmul(x, w, ids, sizes, None if starts is None else places, config=Config(16, K, 128), interpret=interpret)

    y = run(x, p.held, *given)
    want, size = expected(x, p.values, ids, sizes, starts)
    valid = ~np.isnan(want)
    assert valid.sum() == sum(sizes) * N
    assert (abs(np.asarray(y) - want) <= share("plain") * size)[valid].all()


@pytest.mark.parametrize("form", FORMS)
def test_unpacked_weights_stay_for_the_row_tiles_of_a_group(form):
    """Row tiles too large to multiply whole numbers: weights are unpacked once for those that use them in a row."""
    ids, sizes, starts = [2, 5, 5, 2], [150, 0, 45, 3], None
    check_glu(form, ids, sizes, starts, Config(80, 128, 128), pool(form, 2, 128, 128), 200)


@pytest.mark.parametrize("form", FORMS)
def test_glu_is_right_for_every_way_of_grouping(form):
    for ids, sizes, starts in CASES.values():
        check_glu(form, ids, sizes, starts, Config(16, K, 128), pool(form, 2))


@pytest.mark.parametrize("form", FORMS)
def test_cut_k_and_tiles_of_several_groups(form):
    """K in two steps, and row tiles that no group fills; scales of 32 numbers, which are multiplied with before the dot."""
    ids, sizes, starts = CASES["all rows, straddling every tile"]
    check_matmul(form, ids, sizes, starts, Config(32, 512, 128), pool(form, 1, 1024, 128, 32))
    check_glu(form, ids, sizes, starts, Config(32, 512, 128), pool(form, 2, 1024, 128, 32))


@pytest.mark.parametrize(
    ("form", "k", "group"),
    [("int4", 192, 96), ("int8", 96, 96), ("plain", 144, 0), more("int8", 256, 64), ("int4", 256, 64), ("int4", 512, 256)],
)
def test_unusual_k_and_groups_of_scales(form, k, group):
    ids, sizes, starts = CASES["gaps"]
    p = pool(form, 1, k, 128, group or 128)
    check_matmul(form, ids, sizes, starts, None, p)


def test_random_groups():
    """More groups than rows, and rows of few tiles; ids in any order."""
    rng = np.random.default_rng(0)
    groups, m = 90, 40
    for _ in range(4):
        ids = rng.integers(0, POOL, groups).tolist()
        sizes = np.bincount(rng.integers(0, groups, rng.integers(0, m + 1)), minlength=groups).tolist()
        check_matmul("plain", ids, sizes, None, None, pool("plain", 1), m)
        check_matmul("plain", ids, sizes, None, Config(16, K, 128), pool("plain", 1), m)


def test_one_row():
    check_glu("plain", [6, 3], [0, 1], None, None, pool("plain", 2), 1)


def test_scales_with_an_axis_of_one():
    """[Z, K/group, 1, N] is laid out row by row for any number of groups."""
    p = pool("int8", 1)
    ids, sizes, starts = CASES["back to back, padding behind"]
    check_matmul("int8", ids, sizes, starts, None, Pool(p.held.replace(scales=p.held.scales[:, :, None]), p.values))


@pytest.mark.parametrize("name", sorted(set(GLUS) - {"silu"}))
def test_every_glu_is_applied_to_float32_sums(name):
    ids, sizes, starts = CASES["all rows, straddling every tile"]
    p, x = pool("plain", 2), rows_of(M, K)
    both, _ = expected(x, p.values, ids, sizes, starts)
    y = glu_of(x, p.held, *arguments(ids, sizes, starts), glu=GLUS[name])
    want = GLUS[name](jnp.asarray(both[:, 0], jnp.float32), jnp.asarray(both[:, 1], jnp.float32))
    assert np.abs(np.asarray(y, np.float32) - want).max() <= 2.0**-8 * np.abs(want).max()


def test_nan_stays_in_its_rows():
    """Rows of one group are NaN; the group shares tiles with its neighbours."""
    ids, sizes, starts = CASES["all rows, straddling every tile"]
    x = rows_of(M, K)
    args = arguments(ids, sizes, starts)
    p = pool("plain", 1)
    clean = matmul(x, p.held, *args)
    x[17:33] = np.nan
    y = np.asarray(matmul(x, p.held, *args))
    others = np.r_[:17, 33:M]
    assert (y[others] == clean[others]).all() and np.isnan(y[17:33]).all()


def test_output_dtype():
    ids, sizes, starts = CASES["all in one"]
    args = rows_of(M, K), pool("plain", 1).held, *arguments(ids, sizes, starts)
    assert (matmul(*args, dtype=jnp.bfloat16) == matmul(*args).astype(jnp.bfloat16)).all()


def refuse(match: str, x, w, op=tpu.grouped_matmul, **more) -> None:
    some = np.ones(2, np.int32)
    with pytest.raises(NotImplementedError, match=match):
        op(x, w, some, some, *((swiglu,) if op is tpu.grouped_glu else ()), interpret=True, **more)


def test_refusals_name_the_number():
    x, w = rows_of(M, K), pool("plain", 1).held

    def quantized(bits, group, axis=-2, k=K):
        return Quantized(np.zeros((POOL, k * bits // 8, N), np.int8), np.zeros((POOL, k // group, N), np.float32), bits, group, axis)

    refuse(r"float32 \[70, 256\]", x.astype(np.float32), w)
    refuse("float32", x, w.astype(np.float32))
    refuse(r"K = 256, not \[7, 128, 200\]", x, w[:, :128])
    refuse("multiples of 16, not 100", x[:, :100], w[:, :100])
    refuse("float16", x, w, out_dtype=jnp.float16)
    refuse("groups of 16", x, quantized(8, 16))
    refuse("multiples of 64, not 160", x[:, :160], quantized(4, 160, k=160))
    refuse("axis -2, not 8 bits with K on axis -1", x, quantized(8, 128, -1))
    refuse("row tiles .* multiples of 16 .* not 24", x, w, config=Config(24, K, 128))
    refuse("row tiles .* M = 70 .* not 96", x, w, config=Config(96, K, 128))
    refuse(r"K = 256 .* not 128", x, quantized(4, 128), config=Config(16, 128, 128))
    refuse("column tiles .* not 192", x, w, config=Config(16, K, 192))
    refuse(r"\[Z, 2, K, F\] with K = 256, not \[7, 2, 128, 200\]$", x, pool("plain", 2).held[:, :, :128], tpu.grouped_glu)


@pytest.mark.parametrize("form", FORMS)
def test_gate_and_up_in_alternate_rows_are_refused(form):
    held = pool(form, 2).held
    pairs = held.swapaxes(1, 2) if form == "plain" else held.replace(values=held.values.swapaxes(1, 2), axis=-3)
    refuse(r"\[Z, 2, K, F\] with K = 256, not \[7, 256, 2, 200\] in the order \[Z, K, 2, F\]", rows_of(M, K), pairs, tpu.grouped_glu)


@pytest.mark.parametrize("model", sorted(SHAPES))
@pytest.mark.parametrize("parts", [1, 2])
def test_candidates_are_legal_and_hold_the_heuristics_budget(model, parts):
    shape = SHAPES[model]
    k, n = (shape.width, shape.hidden) if parts == 2 else (shape.hidden, shape.width)
    for tokens, (kind, group) in itertools.product((1, 8, 8192), (("plain", 0), ("int8", 32))):
        sizes = (tokens * shape.active, k, n, shape.experts)
        form = tpu_tiles.Form(*sizes, parts, kind, group, jnp.dtype(jnp.float32))
        found = tpu.candidates(*sizes, parts=parts, kind=kind, group=group)
        for config in [*found, tpu.heuristic(*sizes, parts=parts, kind=kind, group=group)]:
            tpu_tiles.check_config(form, config)
            assert tpu_tiles.vmem_bytes(form, config) <= tpu_tiles.BLOCKS
        assert len(found) == len(set(found)) >= 2


# Compiled for real TPUs

TARGETS = ("v5e:2x2", "v5p:2x2x1", "v6e:4x4", "tpu7x:2x2x1")
TOKENS = (1, 8192)
"""The ends of `shapes.TOKENS`."""


@dataclasses.dataclass(frozen=True)
class Case:
    target: str
    model: str
    tokens: int
    parts: int
    form: str


def cover() -> list[Case]:
    """Every model with few rows and with many, with both ops; targets and forms go round."""
    cases = []
    for i, (model, tokens, parts) in enumerate(itertools.product(sorted(SHAPES), TOKENS, (1, 2))):
        cases.append(Case(TARGETS[(i + i // 4) % 4], model, tokens, parts, FORMS[(i // 2 + i // 8) % 3]))
    return cases


ALWAYS = ("deepseek-v3", "gpt-oss-120b", "olmoe-1b-7b")
"""Models that have every target and form between them."""


def check_compiles(case: Case, biased: bool = False) -> None:
    """The case compiles, reads the pool where it lies and needs temporaries of a small part of it, or of x and the result."""
    shape = SHAPES[case.model]
    m, z = case.tokens * shape.active, shape.experts
    k, n = (shape.width, shape.hidden) if case.parts == 2 else (shape.hidden, shape.width)
    w = abstract_pool("bfloat16" if case.form == "plain" else case.form, (z, *(2,) * (case.parts - 1), k, n), -2)
    placed = jax.tree.map(lambda x, f: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=f), w, tpu.pool_formats(w, on_device(case.target)))
    x, ints = jax.ShapeDtypeStruct((m, k), jnp.bfloat16), jax.ShapeDtypeStruct((z,), jnp.int32)

    bias = [jax.ShapeDtypeStruct((z, *(2,) * (case.parts - 1), n), jnp.uint16)] if biased else []

    def op(x, w, ids, sizes, bias=None):
        if case.parts == 2:
            return tpu.grouped_glu(x, w, ids, sizes, swiglu, bias=bias)
        return tpu.grouped_matmul(x, w, ids, sizes, bias=bias)

    program = compile_for(case.target, op, x, placed, ints, ints, *bias)
    rows = m * 2 * k + m * n * (4 if case.parts == 1 else 2)
    assert program.memory_analysis().temp_size_in_bytes <= 2**20 + (rows * 1.1 if k % 128 or n % 128 else 0)
    # A copy can also hide in VMEM, where it is no temporary.
    made = [line for leaf in jax.tree.leaves(w) for line in _results_of(program.as_text(), math.prod(leaf.shape))]
    assert not made, made


def _results_of(text: str, size: int) -> list[str]:
    """Lines of the program that make an array of so many numbers, other than by naming one."""
    found = re.finditer(r"^.* = \(?\w+\[([\d,]+)\]\S* ([\w-]+)\(.*$", text, re.MULTILINE)
    names = ("parameter", "bitcast", "custom-call")
    return [m[0] for m in found if m[2] not in names and math.prod(int(n) for n in m[1].split(",")) == size]


@pytest.mark.compile_only
@pytest.mark.parametrize("model", mostly(sorted(SHAPES), ALWAYS))
def test_compiles_for_tpus(model):
    for case in cover():
        if case.model == model:
            check_compiles(case)


@pytest.mark.compile_only
@pytest.mark.parametrize("tokens", mostly(TOKENS, TOKENS[:1]))
def test_biases_compile_for_tpus(tokens):
    for i, parts in enumerate((1, 2)):
        check_compiles(Case(TARGETS[2 * i + (tokens > 1)], "gpt-oss-120b", tokens, parts, "plain"), biased=True)


def test_the_cover_has_every_target_and_form():
    cases = cover()
    assert {(c.model, c.tokens) for c in cases} == {(m, t) for m in SHAPES for t in TOKENS}
    always = [c for c in cases if c.model in ALWAYS]
    for some, parts in itertools.product((cases, always), (1, 2)):
        assert {c.target for c in some if c.parts == parts} == set(TARGETS)
        assert {(c.tokens, c.form) for c in some if c.parts == parts} == set(itertools.product(TOKENS, FORMS))
