"""Tries tile sizes on the device at hand and keeps the fastest of each shape, for `pallas_kernels.tuned`."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.manifest import write_text
from jaxmoe.report import record
from jaxmoe.report.device_bench import seconds_of
from jaxmoe.report.kernel_bench import (
    AttentionArguments,
    AttentionCase,
    Form,
    KernelSizes,
    Routing,
    attention_arguments,
    attention_cases,
    attention_error,
    attention_in_a_row,
    in_a_row,
    matmul_error,
    random_pool,
    random_routing,
)
from pallas_kernels.compat import interpret_gpu
from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.grouped_matmul.glu import GLUS
from pallas_kernels.paged_attention import gpu as attention
from pallas_kernels.paged_attention.shapes import PAGE
from pallas_kernels.paged_attention.types import finish

NEVER = float("inf")
CALLS = 10
ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The fastest config of a problem: `seconds` of a call, of `tried` configs, of which `failed` did not run."""

    problem: dict[str, Any]
    config: dict[str, Any]
    seconds: float
    tried: int
    failed: int


def tune_matmul(sizes: KernelSizes, forms: Iterable[Form], most: int, say: Callable[[str], None], until: float) -> list[Tuned]:
    """The grouped matmul and its gated form at all shapes of `sizes`.

    Args:
        sizes: models and tokens.
        forms: of the weights.
        most: configs tried at a shape: the heuristic's, and others evenly chosen from all that fit.
        say: is told each result.
        until: `time.monotonic()` after which no other shape is begun.
    """
    out: list[Tuned] = []
    for form in forms:
        for shape in sizes.models.values():
            for op in ("swiglu", "matmul"):
                matrix = (2, shape.hidden, shape.width) if op == "swiglu" else (shape.width, shape.hidden)
                pool = random_pool(form, shape.experts, matrix, 0)
                for tokens in sizes.tokens:
                    if time.monotonic() > until:
                        return out
                    x = jax.random.normal(jax.random.key(1), (tokens * shape.active, matrix[-1]), jnp.bfloat16)
                    routing = random_routing(shape, tokens)
                    problem = gpu.Problem.of(x, pool, jnp.asarray(routing.sizes), x.dtype if op == "swiglu" else jnp.float32)
                    configs = some_of(problem, most)
                    times = [_seconds(op, config, x, pool, routing, sizes) for config in configs]
                    right = functools.partial(_right, op, x=x, pool=pool, routing=routing, sizes=sizes)
                    if (found := fastest(times, configs, right)) is not None:
                        seconds, best = found
                        asked, taken = gpu.tuning_key(problem), dataclasses.asdict(best)
                        out.append(Tuned(asked, taken, seconds, len(times), times.count(NEVER)))
                        say(f"{op} {form} {problem}: {seconds * 1e6:.1f} us by {best}; the heuristic's {times[0] * 1e6:.1f} us")
                jax.tree.map(lambda leaf: leaf.delete(), pool)
    return out


def tune_attention(sizes: KernelSizes, say: Callable[[str], None], until: float) -> list[Tuned]:
    """Paged attention at all cases of `sizes`; see `tune_matmul`."""
    out: list[Tuned] = []
    for case in attention_cases(sizes):
        if time.monotonic() > until:
            return out
        arguments = attention_arguments(case, 32 if sizes.tiny else PAGE, 1 if sizes.tiny else 3)
        queries, window = arguments.queries(arguments.tables[0]), case.shape.window
        first = attention.heuristic(arguments.q, arguments.pages, queries, window)
        configs = [first, *(c for c in attention.candidates(arguments.q, arguments.pages, queries, window) if c != first)]
        times = [_attention_seconds(case, config, arguments, sizes) for config in configs]
        right = functools.partial(_attention_right, case, arguments=arguments, sizes=sizes)
        if (found := fastest(times, configs, right)) is not None:
            seconds, best = found
            asked = attention.problem_of(arguments.q, arguments.pages, queries, window)
            out.append(Tuned(asked, dataclasses.asdict(best), seconds, len(times), times.count(NEVER)))
            say(f"attention {case.stem}: {seconds * 1e6:.1f} us by {best}; the heuristic's {times[0] * 1e6:.1f} us")
    return out


def fastest(times: Sequence[float], configs: Sequence[Any], right: Callable[[Any], bool]) -> tuple[float, Any] | None:
    """The fastest config that gives right results; None if there is none."""
    ran = sorted((pair for pair in zip(times, configs, strict=True) if pair[0] < NEVER), key=lambda pair: pair[0])
    return next((pair for pair in ran if right(pair[1])), None)


def _attention_call(case: AttentionCase, config: attention.Config, arguments: AttentionArguments, sizes: KernelSizes) -> Callable:
    how = interpret_gpu() if sizes.interpret else False

    def run(q, pages, table):
        scale = case.shape.head_dim**-0.5
        partial = attention.paged_attention(q, pages, arguments.queries(table), scale, case.shape.window, config=config, interpret=how)
        return finish(partial, None, q.dtype)

    return run


def _attention_right(case: AttentionCase, config: attention.Config, arguments: AttentionArguments, sizes: KernelSizes) -> bool:
    a = arguments
    got = np.asarray(jax.jit(_attention_call(case, config, a, sizes))(a.q, a.pages, a.tables[0]), np.float64)
    try:
        attention_error(case, a.q, a.pages, a.tables[0], got, case.shape.head_dim**-0.5)
    except ValueError:
        return False
    return True


def _attention_seconds(case: AttentionCase, config: attention.Config, arguments: AttentionArguments, sizes: KernelSizes) -> float:
    calls = 1 if sizes.tiny else CALLS
    try:
        call, _, _ = attention_in_a_row(_attention_call(case, config, arguments, sizes), calls, arguments)
        return min(seconds_of(call, 1 if sizes.tiny else ROUNDS)) / calls
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError):
        return NEVER


def some_of(problem: gpu.Problem, most: int) -> list[gpu.Config]:
    """The heuristic's config, then at most `most - 1` others, evenly chosen."""
    first = gpu.heuristic(problem)
    others = [config for config in gpu.candidates(problem) if config != first]
    step = max(1, -(-len(others) // max(1, most - 1)))
    return [first, *others[::step]]


def _call(op: str, config: gpu.Config, sizes: KernelSizes) -> Callable:
    how = interpret_gpu() if sizes.interpret else False

    def kernel(x, pool, ids, group_sizes):
        if op == "swiglu":
            return gpu.grouped_glu(x, pool, ids, group_sizes, GLUS["silu"], config=config, interpret=how)
        return gpu.grouped_matmul(x, pool, ids, group_sizes, config=config, interpret=how)

    return kernel


def _right(op: str, config: gpu.Config, x, pool, routing: Routing, sizes: KernelSizes) -> bool:
    try:
        matmul_error(op, x, pool, routing, jax.jit(_call(op, config, sizes))(x, pool, routing.ids, routing.sizes))
    except ValueError:
        return False
    return True


def _seconds(op: str, config: gpu.Config, x, pool, routing: Routing, sizes: KernelSizes) -> float:
    """Seconds of a call, the best of a few rounds; infinite where it does not run."""
    calls = 1 if sizes.tiny else CALLS
    try:
        call, _, _ = in_a_row(_call(op, config, sizes), calls, x, pool, routing)
        return min(seconds_of(call, 1 if sizes.tiny else ROUNDS)) / calls
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError):
        return NEVER


def write(folder: Path, tuned: list[Tuned]) -> Path:
    """Adds results to the device's file; those of the same problem take the place of older ones."""
    kind = jax.devices()[0].device_kind
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', kind.lower()).strip('-')}.json"
    held = json.loads(path.read_text(encoding="utf-8"))["measured"] if path.exists() else []
    new = [dataclasses.asdict(t) for t in tuned]
    measured = [entry for entry in held if entry["problem"] not in [t["problem"] for t in new]] + new
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"device": kind, "versions": record.versions(), "measured": measured}, indent=1) + "\n")
    return path
