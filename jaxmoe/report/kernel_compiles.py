"""What every kernel compiles to for real devices that need not be there: whether it does, and the bytes it needs beside its arguments.

Shapes are those of real models (`shapes.py` of each kernel). Compiling proves lowering, layouts and memory; it proves no speed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.formats import Quantized, expert_shapes
from pallas_kernels.dispatch import Kernels
from pallas_kernels.grouped_matmul import gpu as matmul_gpu
from pallas_kernels.grouped_matmul import shapes as expert_table
from pallas_kernels.grouped_matmul import tpu as matmul_tpu
from pallas_kernels.grouped_matmul.glu import GLUS
from pallas_kernels.paged_attention import gpu as attention_gpu
from pallas_kernels.paged_attention import shapes as attention_table
from pallas_kernels.paged_attention import tpu as attention_tpu
from pallas_kernels.paged_attention.types import Pages, Queries, packed
from sharding.compile_only import compile_for, on_device

TARGETS = ("h100", "v5e:2x2", "v5p:2x2x1", "v6e:4x4", "tpu7x:2x2x1")
FORMS = ("bfloat16", "int8", "int4")
ATTENTION_FORMS = ("bfloat16", "int8")
TILES, SOME = 8, 16 * 2**20
KEYS, PAGES = 8192, 16384
"""Keys that a sequence's page table has room for, and pages of the pool."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One program. Attributes: `op` 'glu', 'matmul' or 'attention'; `step` how many tokens, of attention which regime; `form` of weights or keys."""

    target: str
    op: str
    model: str
    step: str
    form: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.target} {self.op} {self.form} {self.model} {self.step}"


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a case: `temporaries` and `weights` in bytes (of the pool, or of the pages), or why it `failed`."""

    case: Case
    seconds: float
    temporaries: int = 0
    weights: int = 0
    failed: str | None = None


def cases() -> list[Case]:
    """All of them: targets, ops, models, tokens, forms."""
    experts = [
        Case(target, op, model, str(tokens), form)
        for target in TARGETS for op in ("glu", "matmul") for model in expert_table.SHAPES for tokens in expert_table.TOKENS for form in FORMS
    ]  # fmt: skip
    attention = [
        Case(target, "attention", model, regime, form)
        for target in TARGETS for model in attention_table.SHAPES for regime in attention_table.REGIMES for form in ATTENTION_FORMS
    ]  # fmt: skip
    return experts + attention


def compile_case(case: Case) -> Result:
    """Compiles one, by the kernel itself: plain XLA is never taken in its place."""
    began = time.perf_counter()
    try:
        f, args, weights = _attention(case) if case.op == "attention" else _experts(case)
        program = compile_for(case.target, f, *args, options=Kernels("tpu").compiler_options())  # those of any accelerator
    except Exception as error:  # the compilers raise whatever they like
        return Result(case, time.perf_counter() - began, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    stats = program.memory_analysis()
    # Tiles have at least 8 rows and 128 lanes, may be half empty, and are written by several splits; all of it is rows, not weights or pages.
    rows, temporaries = stats.argument_size_in_bytes - weights + stats.output_size_in_bytes, stats.temp_size_in_bytes
    copied = f"{temporaries} bytes of temporaries beside rows and results of {rows}" if temporaries > TILES * rows + SOME else None
    return Result(case, time.perf_counter() - began, temporaries, weights, copied)


def _shape(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _experts(case: Case) -> tuple[Callable, tuple, int]:
    """`f(x, pool, ids, sizes)`, its abstract arguments, and the pool's bytes."""
    shape, kernel = expert_table.SHAPES[case.model], matmul_gpu if case.target == "h100" else matmul_tpu
    layout = Kernels("gpu" if case.target == "h100" else "tpu").expert_layout
    w_in, w_out = expert_shapes(shape.width, shape.hidden, layout)
    matrix, k = (w_in, layout.index("d") - 3) if case.op == "glu" else (w_out, -1 if layout == "2fd" else -2)
    pool = abstract_pool(case.form, (shape.experts, *matrix), k)
    if case.target != "h100":
        formats = matmul_tpu.pool_formats(pool, on_device(case.target))
        pool = jax.tree.map(lambda leaf, held: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=held), pool, formats)
    rows, ints = int(case.step) * shape.active, _shape(jnp.int32, shape.experts)
    args = (_shape(jnp.bfloat16, rows, matrix[k]), pool, ints, ints)

    def f(x, pool, ids, sizes):
        if case.op == "glu":
            return kernel.grouped_glu(x, pool, ids, sizes, GLUS["silu"])
        return kernel.grouped_matmul(x, pool, ids, sizes)

    return f, args, _nbytes(pool)


def abstract_pool(form: str, shape: tuple[int, ...], axis: int) -> Any:
    """A pool without values; K is axis `axis`."""
    if form == "bfloat16":
        return _shape(jnp.uint16, *shape)
    bits, at, k = int(form[3:]), len(shape) + axis, shape[axis]
    group = next(g for g in (128, 64, 32) if k % g == 0)
    values = tuple(n * bits // 8 if i == at else n for i, n in enumerate(shape))
    scales = (shape[0], k // group, *(n for i, n in enumerate(shape) if i not in (0, at)))
    return Quantized(_shape(jnp.int8, *values), _shape(jnp.float32, *scales), bits, group, axis)  # type: ignore[arg-type]


def _attention(case: Case) -> tuple[Callable, tuple, int]:
    """`f(q, pages, queries)`, its abstract arguments, and the pages' bytes; on TPUs pages are packed."""
    shape, regime, page = attention_table.SHAPES[case.model], attention_table.REGIMES[case.step], attention_table.PAGE
    pages = abstract_pages(shape, case.form, PAGES, page)
    if case.target != "h100":
        pages = jax.eval_shape(packed, pages)
    ints = _shape(jnp.int32, regime.sequences)
    tree = _shape(jnp.uint32, regime.rows, regime.words) if regime.words else None
    queries = Queries(_shape(jnp.int32, regime.sequences, KEYS // page), ints, ints, ints, ints, tree, regime.most)  # type: ignore[arg-type]
    kernel = attention_gpu if case.target == "h100" else attention_tpu

    def f(q, pages, queries):
        return kernel.paged_attention(q, pages, queries, shape.head_dim**-0.5, shape.window)

    return f, (_shape(jnp.bfloat16, regime.rows, shape.heads, shape.head_dim), pages, queries), _nbytes(pages)


def abstract_pages(shape: attention_table.AttentionShape, form: str, count: int, page: int) -> Pages:
    """Pages without values."""
    dtype = jnp.uint16 if form == "bfloat16" else jnp.int8
    head: Any = (count, shape.kv_heads, page)
    k, scales = _shape(dtype, *head, shape.head_dim), _shape(jnp.float32, *head) if form == "int8" else None
    v = None if shape.latent else _shape(dtype, *head, shape.value_dim)
    return Pages(k, v, scales, None if shape.latent else scales, None, shape.value_dim if shape.latent else None)  # type: ignore[arg-type]


def _nbytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
