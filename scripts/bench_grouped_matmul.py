"""Times one MoE layer's experts (grouped SwiGLU) against the bytes it must read and the operations it must do.

    python scripts/bench_grouped_matmul.py [--tokens 1 8 512] [--ragged] [--out benchmarks]

Experts are chosen at random, as many a token as the model has active. The bound is the larger of the bytes of the distinct experts at the measured
bandwidth and the operations at the measured matmul rate. --ragged times `jax.lax.ragged_dot` beside it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxmoe.experts import ResidentBank
from jaxmoe.formats import expert_axes, expert_shapes, load, store
from jaxmoe.report import record
from jaxmoe.report.command import run_command
from pallas_kernels.dispatch import Kernels


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Benchmark a layer of experts."""

    tokens: Annotated[tuple[int, ...], tyro.conf.arg(help="Tokens in a step.")] = (1, 4, 8, 512)
    experts: int = 64
    """Experts."""
    active: int = 8
    """Experts a token."""
    width: int = 1024
    """Model width."""
    hidden: int = 512
    """Width of an expert."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """How weights are held."""
    layers: int = 4
    """Layers timed in turn, so that no expert lies in a cache from the step before."""
    fast: bool = False
    """Give up row invariance."""
    ragged: bool = False
    """Also time jax.lax.ragged_dot."""
    runs: int = 9
    """Counted runs."""
    out: Path | None = None
    """Folder for records."""


def make_bank(args: Arguments) -> ResidentBank:
    """Random experts, as this device's kernels want them."""
    keys, layout = jax.random.split(jax.random.key(0)), Kernels.default().expert_layout

    def random(key, matrix: tuple[int, ...], k: int) -> jax.Array:
        return store(jax.random.normal(key, (args.layers, args.experts, *matrix)) / np.sqrt(k), args.dtype)

    w_in, w_out = expert_shapes(args.width, args.hidden, layout)
    return ResidentBank(random(keys[0], w_in, args.width), random(keys[1], w_out, args.hidden), layout=layout)


def ragged(bank: ResidentBank, layer, x, ids, weights):
    """The same layer by `jax.lax.ragged_dot`."""
    order = jnp.argsort(ids.reshape(-1), stable=True)
    sizes = jnp.bincount(ids.reshape(-1), length=bank.w_in.shape[1])
    turned = (w[layer].transpose(0, *(1 + a for a in axes)) for w, axes in zip((bank.w_in, bank.w_out), expert_axes(bank.layout), strict=True))
    w_in, w_out = (load(w, jnp.float32) for w in turned)
    e, d, _, f = w_in.shape
    both = jax.lax.ragged_dot(x[order // ids.shape[1]], w_in.reshape(e, d, 2 * f), sizes)
    y = jax.lax.ragged_dot(jax.nn.silu(both[:, :f]) * both[:, f:], w_out, sizes)
    return jnp.zeros_like(x).at[order // ids.shape[1]].add(y * weights.reshape(-1)[order][:, None])


def seconds(step, args: Arguments, *arrays) -> list[float]:
    """Wall time of one layer, from runs over all layers."""
    jax.block_until_ready(step(*arrays))
    out = []
    for _ in range(args.runs):
        began = time.perf_counter()
        jax.block_until_ready(step(*arrays))
        out.append((time.perf_counter() - began) / args.layers)
    return out


def run(args: Arguments) -> None:
    """Times every size, prints a table and writes records."""
    kernels = Kernels.default(row_invariant=not args.fast)
    bank = make_bank(args)
    bandwidth, rate = record.measure_memory_bandwidth(0.5), record.measure_matmul_rate(jnp.float32, 0.5)
    table = Table("tokens", "op", "distinct experts", "ms", "bound ms", "x bound", "GB/s", "TFLOP/s", "of read bandwidth", "of matmul rate")
    for tokens in args.tokens:
        rng = np.random.default_rng(tokens)
        shape = (args.layers, tokens)
        ids = np.stack([rng.permutation(args.experts)[: args.active] for _ in range(args.layers * tokens)]).reshape(*shape, args.active)
        x = jnp.asarray(rng.standard_normal((tokens, args.width), dtype=np.float32))
        weights = jnp.full((tokens, args.active), 1 / args.active, jnp.float32)
        distinct = float(np.mean([len(np.unique(chosen)) for chosen in ids]))
        expert_bytes = (bank.w_in.nbytes + bank.w_out.nbytes) / args.layers / args.experts
        moved, done = distinct * expert_bytes, 6 * tokens * args.active * args.width * args.hidden

        def ours(bank, x, ids, weights):
            def one(i, x):
                return x + bank.expert_ffn(i, x, ids[i], weights, jnp.ones(x.shape[0], bool), kernels)[0]

            return jax.lax.fori_loop(0, args.layers, one, x)

        def theirs(bank, x, ids, weights):
            return jax.lax.fori_loop(0, args.layers, lambda i, x: x + ragged(bank, i, x, ids[i], weights), x)

        bound_seconds = max(moved / bandwidth / 1e9, done / rate / 1e12)
        compute = done / rate / 1e12 > moved / bandwidth / 1e9
        for op, step in ({"grouped_swiglu": ours} | ({"ragged_dot": theirs} if args.ragged else {})).items():
            took = seconds(jax.jit(step), args, bank, x, jnp.asarray(ids), weights)
            median = float(np.median(took))
            achieved = {"GB/s": moved / median / 1e9, "TFLOP/s": done / median / 1e12}
            unit, ceiling = ("TFLOP/s", rate) if compute else ("GB/s", bandwidth)
            table.add_row(
                str(tokens), op, f"{distinct:.1f}", f"{1e3 * median:.3f}", f"{1e3 * bound_seconds:.3f}", f"{median / bound_seconds:.2f}",
                f"{achieved['GB/s']:.1f}", f"{achieved['TFLOP/s']:.3f}", f"{100 * achieved['GB/s'] / bandwidth:.0f} %",
                f"{100 * achieved['TFLOP/s'] / rate:.0f} %",
            )  # fmt: skip
            if args.out is not None:
                settings = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name not in ("out", "tokens", "ragged", "fast")}
                made = record.make_record(
                    name="grouped_matmul", spec_hash="",
                    settings=settings | {"tokens": tokens, "op": op, "backend": kernels.backend, "row_invariant": not args.fast},
                    seeds={"weights": 0, "routing": tokens}, timings={"layer": record.timing(took)}, compile_seconds=0.0,
                    bytes={"moved": round(moved)}, counters={"distinct_experts": distinct, "flops": done, "x_bound": median / bound_seconds},
                    bound=record.make_bound("compute" if compute else "bandwidth", ceiling, achieved[unit], unit),
                )  # fmt: skip
                mode = "-fast" if args.fast else ""
                record.write_record(args.out / f"grouped_matmul-{op}-{args.dtype}-t{tokens}{mode}.json", made)
    Console().print(table)


if __name__ == "__main__":
    parsed = tyro.cli(Arguments, description=__doc__)
    sys.exit(run_command(lambda: run(parsed)))
