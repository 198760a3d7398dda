"""The kernels measured on a GPU: right against float64, then their rates beside the machine's ceilings and beside others'.

    ceilings   what this card reads and multiplies at best; every rate below is a percentage of these
    matmul     grouped matmul and SwiGLU in bfloat16 at the shapes of `pallas_kernels.grouped_matmul.shapes`
    quantized  the same in int8 and int4, at decode sizes
    rivals     `jax.lax.ragged_dot`, and jax's own Mosaic kernel, at some of the shapes
    attention  paged attention in bfloat16 and int8, decoding and prefill, beside cuDNN's on a contiguous cache
    router     what XLA takes for routing and sorting, which a kernel of its own would have to beat
    torch      torch's grouped matmul and attention at the same shapes, in a process that loads no jax

A kernel's time is that of `times` calls in one program, each with other experts or pages than the last, so that nothing lies in a cache and the
host's dispatch is paid once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.experts.dispatch import dispatch
from jaxmoe.formats import Quantized, dequantize, load_numpy, quantize, store
from jaxmoe.report import record
from jaxmoe.report.device_bench import Found, attempt, compiled, seconds_of
from jaxmoe.routing.route import route
from jaxmoe.spec import RouterSpec
from pallas_kernels.compat import interpret_gpu
from pallas_kernels.dispatch import Kernels
from pallas_kernels.grouped_matmul import gpu, shapes
from pallas_kernels.grouped_matmul.glu import GLUS
from pallas_kernels.grouped_matmul.shapes import ExpertShape
from pallas_kernels.paged_attention import gpu as attention
from pallas_kernels.paged_attention import shapes as attention_shapes
from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.shapes import PAGE, AttentionShape
from pallas_kernels.paged_attention.types import Pages, Queries, finish

Form = Literal["bfloat16", "int8", "int4"]
COLUMNS_CHECKED = 256
ROWS_CHECKED = 6


@dataclasses.dataclass(frozen=True)
class KernelSizes:
    """What is measured.

    Attributes:
        models: of `shapes.SHAPES`, and their shapes.
        attention: likewise.
        tokens: in a step.
        quantized_tokens: in a step with quantized experts.
        rivals: (model, tokens) that others are timed at.
        decode: (sequences, keys of each) of attention.
        chunks: (rows, keys) of a piece of one prompt.
        repeats: samples of a timing.
        interpret: check the kernels step by step, on any device; something else is timed in their place.
    """

    tiny: bool
    models: Mapping[str, ExpertShape]
    attention: Mapping[str, AttentionShape]
    tokens: tuple[int, ...]
    quantized_tokens: tuple[int, ...]
    rivals: tuple[tuple[str, int], ...]
    decode: tuple[tuple[int, int], ...]
    chunks: tuple[tuple[int, int], ...]
    repeats: int
    interpret: bool = False


FULL = KernelSizes(
    False, shapes.SHAPES, attention_shapes.SHAPES, shapes.TOKENS, (1, 64), (("mixtral-8x7b", 8), ("mixtral-8x7b", 8192), ("qwen3-30b-a3b", 8192)),
    ((1, 4096), (1, 32768), (32, 4096)), ((512, 4096),), 10,
)  # fmt: skip
TINY = KernelSizes(
    True, {"tiny": ExpertShape(128, 64, 4, 2)}, {"tiny": AttentionShape(4, 2, 64, 64)}, (3,), (3,), (("tiny", 3),), ((2, 96),), ((5, 64),), 2, True
)
"""For a check of the code on any device; its numbers mean nothing."""


@dataclasses.dataclass
class Bench:
    """What a part works with: sizes, the records' folder, and the card's ceilings (GB/s and TFLOP/s) if they are known."""

    sizes: KernelSizes
    out: Path
    bandwidth: float | None = None
    rate: float | None = None

    def attempt(self, name: str, stem: str, settings: Mapping[str, Any], measure: Callable[[], Found], reason: str | None = None) -> Found | None:
        """See `device_bench.attempt`."""
        return attempt(self.out, self.sizes.tiny, name, stem, settings, measure, reason)

    def bound(self, nbytes: float, operations: float, seconds: float) -> dict[str, Any]:
        """What was reached of the ceiling that allows less, from the bytes that must be read and the operations that must be done."""
        assert self.bandwidth is not None and self.rate is not None
        if nbytes / (self.bandwidth * 1e9) >= operations / (self.rate * 1e12):
            return record.make_bound("bandwidth", self.bandwidth, nbytes / seconds / 1e9, "GB/s")
        return record.make_bound("compute", self.rate, operations / seconds / 1e12, "TFLOP/s")


def records_of(part: str, sizes: KernelSizes) -> list[tuple[str, str]]:
    """(name, file) of the records that a part writes."""
    ops = ("swiglu", "matmul")
    if part == "ceilings":
        return [("ceilings", "kernel-ceilings")]
    if part in ("matmul", "quantized"):
        forms: tuple[Form, ...] = ("bfloat16",) if part == "matmul" else ("int8", "int4")
        tokens = sizes.tokens if part == "matmul" else sizes.quantized_tokens
        return [("kernel_matmul", f"kernel-{op}-{form}-{m}-t{t}") for m in sizes.models for form in forms for t in tokens for op in ops]
    if part == "rivals":
        return [("kernel_rival", f"kernel-{rival}-{m}-t{t}") for m, t in sizes.rivals for rival in ("ragged_dot", "ragged_dot_mgpu")]
    if part == "attention":
        return [("kernel_attention", f"kernel-attention-{case.stem}") for case in attention_cases(sizes)]
    if part == "router":
        return [("kernel_router", f"kernel-router-{m}-t{t}") for m in sizes.models for t in sizes.tokens]
    matmuls = [("kernel_torch", f"kernel-torch-matmul-{m}-t{t}") for m, t in sizes.rivals]
    return matmuls + [("kernel_torch", f"kernel-torch-attention-{c.stem}") for c in attention_cases(sizes) if c.form == "bfloat16"]


# --- Ceilings


def ceilings(bench: Bench) -> None:
    """Writes the record of what the card can do."""

    def measure() -> Found:
        seconds, size = (0.1, 256) if bench.sizes.tiny else (1.0, None)
        bandwidth = record.measure_memory_bandwidth(seconds, 2**22 if bench.sizes.tiny else None)
        rate = record.measure_matmul_rate(jnp.bfloat16, seconds, size)
        counters = {"gbps": bandwidth, "tflops": rate}
        return Found({}, counters, record.make_bound("bandwidth", bandwidth, bandwidth, "GB/s"))

    bench.attempt("ceilings", "kernel-ceilings", {"bandwidth": record.MEMORY_BANDWIDTH_METHOD, "rate": record.MATMUL_RATE_METHOD}, measure)


# --- Grouped matmul


@dataclasses.dataclass(frozen=True)
class Routing:
    """Rows sorted by expert. Attributes: `ids` [G] of experts with rows, `sizes` [G]."""

    ids: np.ndarray
    sizes: np.ndarray


def random_routing(shape: ExpertShape, tokens: int) -> Routing:
    """Every token's experts drawn without preference."""
    rng = np.random.default_rng(tokens)
    chosen = np.argsort(rng.random((tokens, shape.experts)), axis=1)[:, : shape.active]
    sizes = np.bincount(chosen.reshape(-1), minlength=shape.experts)
    return Routing(np.arange(shape.experts, dtype=np.int32), sizes.astype(np.int32))


def random_pool(form: Form, experts: int, matrix: tuple[int, ...], seed: int) -> Any:
    """Experts of normal weights, the last axis being K, made one after another so that little else is needed beside them."""
    group = next(g for g in (128, 64, 32) if matrix[-1] % g == 0)

    def one(key):
        w = jax.random.normal(key, matrix) * matrix[-1] ** -0.5
        if form == "bfloat16":
            return store(w, form)
        q = quantize(w[None], int(form[3:]), group, -1)
        return q.values[0], q.scales[0]

    made = jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(seed), experts))
    return made if form == "bfloat16" else Quantized(made[0], made[1], int(form[3:]), group, -1)


def matmul(bench: Bench, forms: Iterable[Form] = ("bfloat16",)) -> None:
    """Writes the records of parts `matmul` and `quantized`."""
    for model, shape in bench.sizes.models.items():
        for form in forms:
            for op in ("swiglu", "matmul"):
                matrix = (2, shape.hidden, shape.width) if op == "swiglu" else (shape.width, shape.hidden)
                pool = random_pool(form, shape.experts, matrix, 0)
                for tokens in bench.sizes.tokens if form == "bfloat16" else bench.sizes.quantized_tokens:
                    settings = {"op": op, "model": model, "tokens": tokens, "form": form, **dataclasses.asdict(shape)}
                    stem = f"kernel-{op}-{form}-{model}-t{tokens}"
                    bench.attempt("kernel_matmul", stem, settings, lambda t=tokens, s=shape, o=op, p=pool: time_matmul(bench, o, s, t, p))  # type: ignore[misc]
                jax.tree.map(lambda leaf: leaf.delete(), pool)


def time_matmul(bench: Bench, op: str, shape: ExpertShape, tokens: int, pool: Any) -> Found:
    """One op at one shape: how far it is from float64, and how long it takes."""
    routing = random_routing(shape, tokens)
    k = shape.width if op == "swiglu" else shape.hidden
    x = jax.random.normal(jax.random.key(1), (tokens * shape.active, k), jnp.bfloat16)
    kernel: Callable = kernel_of(op, bench.sizes.interpret)
    error = matmul_error(op, x, pool, routing, jax.jit(kernel)(x, pool, routing.ids, routing.sizes))
    asked = int((routing.sizes > 0).sum())
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(pool)) / shape.experts * asked
    operations = 2 * tokens * shape.active * shape.width * shape.hidden * (2 if op == "swiglu" else 1)
    if bench.sizes.interpret:
        kernel = _nothing
    times = 1 if bench.sizes.tiny else max(2, min(50, int(2e-2 / (weights / (bench.bandwidth or 1) / 1e9 + operations / (bench.rate or 1) / 1e12))))
    call, seconds, nbytes = in_a_row(kernel, times, x, pool, routing)
    timing = record.timing([s / times for s in seconds_of(call, bench.sizes.repeats)])
    moved = weights + x.nbytes + operations / k / 2 * (2 if op == "swiglu" else 4)
    bound = bench.bound(moved, operations, timing["median"])
    return Found({"call": timing}, error | {"experts": asked, "calls_in_a_program": times}, bound, seconds, nbytes)


def kernel_of(op: str, interpret: bool) -> Callable:
    """`(x, pool, ids, sizes) -> y`."""
    how = interpret_gpu() if interpret else False
    if op == "swiglu":
        return lambda x, pool, ids, sizes: gpu.grouped_glu(x, pool, ids, sizes, GLUS["silu"], interpret=how)
    return lambda x, pool, ids, sizes: gpu.grouped_matmul(x, pool, ids, sizes, interpret=how)


def _nothing(x, pool, ids, sizes):
    return x * ids[0].astype(x.dtype)


def in_a_row(kernel: Callable, times: int, x: jax.Array, pool: Any, routing: Routing) -> tuple[Callable, float, dict[str, int]]:
    """A program of `times` calls, each with the groups at other experts than the last; seconds to compile it, and its bytes."""
    experts, step = len(routing.ids), max(1, len(routing.ids) // 3)

    def run(x, pool, ids, sizes):
        def one(i, total):
            y = kernel(x, pool, (ids + i * step) % experts, sizes)
            return total + y[0, 0].astype(jnp.float32)

        return jax.lax.fori_loop(0, times, one, jnp.float32(0))

    args = (x, pool, jnp.asarray(routing.ids), jnp.asarray(routing.sizes))
    program, seconds, nbytes = compiled(jax.jit(run), *args)
    return lambda: program(*args), seconds, nbytes


def matmul_error(op: str, x: jax.Array, pool: Any, routing: Routing, y: jax.Array) -> dict[str, float]:
    """The largest error of some rows and columns against float64, of the largest value among them."""
    ends = np.cumsum(routing.sizes)
    some = np.unique(np.linspace(0, ends[-1] - 1, ROWS_CHECKED).astype(int))
    worst = largest = 0.0
    for m in some:
        z = int(routing.ids[np.searchsorted(ends, m, side="right")])
        w = matrix_of(pool, z)[..., :COLUMNS_CHECKED, :]
        row = np.asarray(x[m], np.float64)
        both = w @ row
        want = both if op == "matmul" else both[0] / (1 + np.exp(-both[0])) * both[1]
        worst = max(worst, float(np.abs(np.asarray(y[m, : len(want)], np.float64) - want).max()))  # few of them: y may have 2 GB
        largest = max(largest, float(np.abs(want).max()))
    # Hidden values are rounded to bfloat16, sums are float32.
    allowed = 2**-8 if op == "swiglu" else 2e-5
    if not worst <= allowed * largest:
        raise ValueError(f"an error of {worst:.3g} beside values of {largest:.3g}: more than {allowed:.1g} of them")
    return {"relative_error": worst / largest, "rows_checked": len(some)}


def matrix_of(pool: Any, z: int) -> np.ndarray:
    """An expert's matrix, float64."""
    one = jax.tree.map(lambda leaf: leaf[z : z + 1], pool)
    if isinstance(one, Quantized):
        return np.asarray(dequantize(one)[0], np.float64)
    return load_numpy(np.asarray(one[0])).astype(np.float64)


def rivals(bench: Bench) -> None:
    """Writes the records of part `rivals`: the matmul of hidden to model width."""
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot as ragged_dot_mgpu

    def xla(x, w, ids, sizes):
        return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32)

    def mosaic(x, w, ids, sizes):
        rows = 64 if x.shape[0] < 64 * w.shape[0] else 128
        return ragged_dot_mgpu(x, w, group_sizes=sizes, block_m=rows, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=1)

    for model, tokens in bench.sizes.rivals:
        shape, routing = bench.sizes.models[model], random_routing(bench.sizes.models[model], tokens)
        w = jax.lax.bitcast_convert_type(random_pool("bfloat16", shape.experts, (shape.hidden, shape.width), 0), jnp.bfloat16)
        x = jax.random.normal(jax.random.key(1), (tokens * shape.active, shape.hidden), jnp.bfloat16)
        for name, kernel in (("ragged_dot", xla), ("ragged_dot_mgpu", mosaic)):

            def measure(kernel=kernel, x=x, w=w, routing=routing, shape=shape, tokens=tokens) -> Found:
                call, seconds, nbytes = in_a_row(kernel, 1 if bench.sizes.tiny else 10, x, w, routing)
                timing = record.timing([s / (1 if bench.sizes.tiny else 10) for s in seconds_of(call, bench.sizes.repeats)])
                moved = shape.width * shape.hidden * 2 * int((routing.sizes > 0).sum())
                bound = bench.bound(moved, 2 * tokens * shape.active * shape.width * shape.hidden, timing["median"])
                return Found({"call": timing}, {}, bound, seconds, nbytes)

            settings = {"op": name, "model": model, "tokens": tokens, "form": "bfloat16", **dataclasses.asdict(shape)}
            needs_gpu = name == "ragged_dot_mgpu" and jax.devices()[0].platform != "gpu"
            reason = "jax's Mosaic kernel needs an NVIDIA GPU" if needs_gpu else None
            bench.attempt("kernel_rival", f"kernel-{name}-{model}-t{tokens}", settings, measure, reason)


# --- Attention


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Sequences of equal lengths: `rows` queries each, the last of `keys` keys."""

    model: str
    shape: AttentionShape
    sequences: int
    rows: int
    keys: int
    form: Literal["bfloat16", "int8"]

    @property
    def settings(self) -> dict[str, Any]:
        """What its records say of it."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "shape"} | dataclasses.asdict(self.shape)

    @property
    def stem(self) -> str:
        """What its records are called by."""
        return f"{self.form}-{self.model}-b{self.sequences}-r{self.rows}-s{self.keys}"


def attention_cases(sizes: KernelSizes) -> list[AttentionCase]:
    """All cases: decoding with either kind of keys, prompts with bfloat16 ones."""
    out = []
    for model, shape in sizes.attention.items():
        for form in ("bfloat16", "int8"):
            out += [AttentionCase(model, shape, b, 1, s, form) for b, s in sizes.decode]  # type: ignore[arg-type]
        out += [AttentionCase(model, shape, 1, rows, s, "bfloat16") for rows, s in sizes.chunks]
    return out


def paged(bench: Bench) -> None:
    """Writes the records of part `attention`."""
    for case in attention_cases(bench.sizes):
        bench.attempt("kernel_attention", f"kernel-attention-{case.stem}", case.settings | {"page": PAGE}, lambda c=case: time_attention(bench, c))  # type: ignore[misc]


@dataclasses.dataclass(frozen=True)
class AttentionArguments:
    """Queries, a pool of pages, and page tables of one call after another, each of other pages: more of them than a cache holds."""

    case: AttentionCase
    q: jax.Array
    pages: Pages
    tables: np.ndarray

    def queries(self, table: Any) -> Queries:
        """The queries of a call with this page table."""
        case = self.case
        lengths, keys = jnp.full(case.sequences, case.rows), jnp.full(case.sequences, case.keys)
        return Queries(table, jnp.arange(case.sequences) * case.rows, lengths, keys, keys - lengths, None, case.rows)


def attention_arguments(case: AttentionCase, page: int, copies: int) -> AttentionArguments:
    """Random ones."""
    per = -(-case.keys // page)
    count = case.sequences * per * copies
    tables = np.random.default_rng(0).permutation(count).reshape(copies, case.sequences, per).astype(np.int32)
    q = jax.random.normal(jax.random.key(2), (case.sequences * case.rows, case.shape.heads, case.shape.head_dim), jnp.bfloat16)
    return AttentionArguments(case, q, random_pages(case, count, page), tables)


def attention_in_a_row(run: Callable, times: int, arguments: AttentionArguments) -> tuple[Callable, float, dict[str, int]]:
    """A program of `times` calls of `run(q, pages, table)`; seconds to compile it, and its bytes."""

    def repeated(q, pages, tables):
        def one(i, total):
            return total + run(q, pages, tables[i % len(tables)])[0, 0, 0].astype(jnp.float32)

        return jax.lax.fori_loop(0, times, one, jnp.float32(0))

    args = (arguments.q, arguments.pages, jnp.asarray(arguments.tables))
    program, seconds, nbytes = compiled(jax.jit(repeated), *args)
    return lambda: program(*args), seconds, nbytes


def time_attention(bench: Bench, case: AttentionCase) -> Found:
    """One case: how far the first sequence is from float64, and how long it takes."""
    shape, tiny = case.shape, bench.sizes.tiny
    given = attention_arguments(case, 32 if tiny else PAGE, 1 if tiny else 3)
    how, scale = interpret_gpu() if bench.sizes.interpret else False, shape.head_dim**-0.5

    def run(q, pages, table):
        return finish(attention.paged_attention(q, pages, given.queries(table), scale, shape.window, interpret=how), None, q.dtype)

    def plain(q, pages, table):
        return finish(xla.paged_attention(q, pages, given.queries(table), scale, shape.window), None, q.dtype)

    got = np.asarray(jax.jit(run)(given.q, given.pages, given.tables[0]), np.float64)
    error = attention_error(case, given.q, given.pages, given.tables[0], got, scale)
    times, timed = (1, plain) if bench.sizes.interpret else (12, run)
    call, seconds, nbytes = attention_in_a_row(timed, times, given)
    timing = record.timing([s / times for s in seconds_of(call, bench.sizes.repeats)])
    seen = min(case.keys, (shape.window or case.keys) + case.rows - 1)
    moved = sum(leaf.nbytes for leaf in jax.tree.leaves(given.pages)) / len(given.tables) * seen / case.keys
    pairs = case.sequences * case.rows * min(seen, (shape.window or case.keys) - (case.rows - 1) / 2 * (shape.window is None))
    operations = 2 * pairs * shape.heads * (shape.head_dim + shape.value_dim)
    return Found({"call": timing}, error, bench.bound(moved, operations, timing["median"]), seconds, nbytes)


def random_pages(case: AttentionCase, count: int, page: int) -> Pages:
    """Pages of normal keys and values."""
    shape = case.shape

    def leaf(seed: int, width: int) -> tuple:
        def one(key):
            x = jax.random.normal(key, (shape.kv_heads, page, width))
            if case.form == "bfloat16":
                return store(x, "bfloat16"), jnp.zeros(())
            scales = jnp.abs(x).max(-1) / 127
            return jnp.round(x / scales[..., None]).astype(jnp.int8), scales

        return jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(seed), count))

    (k, k_scales), (v, v_scales) = leaf(0, shape.head_dim), (None, None) if shape.latent else leaf(1, shape.value_dim)
    if case.form == "bfloat16":
        k_scales = v_scales = None
    return Pages(k, v, k_scales, v_scales, None, shape.value_dim if shape.latent else None)


def attention_error(case: AttentionCase, q, pages: Pages, table: np.ndarray, got: np.ndarray, scale: float) -> dict[str, float]:
    """The largest error of the first sequence's first and last rows, two heads each, against float64."""

    def held(leaf, scales, head: int, channels: int) -> np.ndarray:
        x = load_numpy(np.asarray(leaf[table[0], head])).astype(np.float64)
        x = x if scales is None else x * np.asarray(scales[table[0], head], np.float64)[..., None]
        return x.reshape(-1, x.shape[-1])[: case.keys, :channels]

    worst = largest = 0.0
    group = case.shape.heads // case.shape.kv_heads
    for r in sorted({0, case.rows - 1}):
        for h in sorted({0, case.shape.heads - 1}):
            keys = held(pages.k, pages.k_scales, h // group, case.shape.head_dim)
            values = keys[:, : case.shape.value_dim] if pages.v is None else held(pages.v, pages.v_scales, h // group, case.shape.value_dim)
            pos, at = case.keys - case.rows + r, np.arange(case.keys)
            seen = (at <= pos) & (at > pos - (case.shape.window or case.keys + 1))
            s = keys[seen] @ np.asarray(q[r, h], np.float64) * scale
            p = np.exp(s - s.max())
            want = p @ values[seen] / p.sum()
            worst = max(worst, float(np.abs(got[r, h] - want).max()))
            largest = max(largest, float(np.abs(want).max()))
    if not worst <= 2e-2 * largest:
        raise ValueError(f"an error of {worst:.3g} beside values of {largest:.3g}")
    return {"relative_error": worst / largest}


# --- Router


def router(bench: Bench) -> None:
    """Writes the records of part `router`."""
    for model, shape in bench.sizes.models.items():
        for tokens in bench.sizes.tokens:
            settings = {"op": "route and sort", "model": model, "tokens": tokens, **dataclasses.asdict(shape)}
            bench.attempt("kernel_router", f"kernel-router-{model}-t{tokens}", settings, lambda s=shape, t=tokens: time_router(bench, s, t))  # type: ignore[misc]


def time_router(bench: Bench, shape: ExpertShape, tokens: int) -> Found:
    """Logits to experts, weights, counts and the order of rows, by XLA."""
    spec = RouterSpec(experts=shape.experts, active=shape.active)
    kernels = Kernels("gpu")
    kernel = store(jax.random.normal(jax.random.key(0), (shape.width, shape.experts)), "bfloat16")
    x = jax.random.normal(jax.random.key(1), (tokens, shape.width), jnp.bfloat16)
    times = 1 if bench.sizes.tiny else 20

    def run(x, kernel):
        def one(i, x):
            valid = jnp.ones(tokens, bool)
            out, _ = route(spec, {"kernel": kernel}, x, (), valid, kernels)
            plan = dispatch(out.ids, valid, shape.experts)
            # Of all that came out a little goes into the next one, so that none of it is left out.
            little = (plan.token_M.sum() + plan.row_TA.sum() + plan.sizes_E[0]).astype(jnp.float32) * 1e-20 + out.weights.sum() * 1e-20
            return (x + little).astype(x.dtype)

        return jax.lax.fori_loop(0, times, one, x)

    program, seconds, nbytes = compiled(jax.jit(run), x, kernel)
    timing = record.timing([s / times for s in seconds_of(lambda: program(x, kernel), bench.sizes.repeats)])
    bound = bench.bound(kernel.nbytes + x.nbytes, 2 * tokens * shape.width * shape.experts, timing["median"])
    return Found({"call": timing}, {}, bound, seconds, nbytes)
