"""Counts what attention over a divided sequence sends, for the attention of released models, on virtual devices of the CPU.

    python scripts/bench_ring.py [--models olmoe_1b_7b qwen3_30b_a3b] [--devices 8] [--out benchmarks]

Bytes are read from the compiled programs, and stand beside the formulas that the planner uses; with them the evenness of the work, and errors.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import tyro

from jaxmoe.report import record, ring_bench
from jaxmoe.report.command import run_command


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Count what attention over a divided sequence sends."""

    models: Annotated[tuple[str, ...], tyro.conf.arg(help="Released models, as jaxmoe.spec.published names them.")] = (
        "olmoe_1b_7b", "qwen3_30b_a3b", "gpt_oss_120b", "deepseek_v3",
    )  # fmt: skip
    devices: int = 8
    """Devices in the ring, up to 8."""
    ways: tuple[ring_bench.ring.Way, ...] = ring_bench.WAYS
    """What is compared: keys travel, queries travel, or queries travel and results go straight home."""
    tokens: int = 16
    """Queries, and keys, on each device."""
    positions: int = 4096
    """Length of the prompt whose work is dealt out."""
    out: Path | None = None
    """Folder for records, one a model."""


def run(args: Arguments) -> None:
    """One line of output, and one record, a model."""
    if not 2 <= args.devices <= len(jax.devices()):
        raise ValueError(f"--devices {args.devices}: choose from 2 to {len(jax.devices())}")
    if args.tokens < 2 or args.positions < 2 * args.devices:
        raise ValueError(f"--tokens {args.tokens} --positions {args.positions}: at least 2 tokens and {2 * args.devices} positions")
    for model in args.models:
        made = ring_bench.measure(model, args.devices, args.tokens, args.positions, ways=args.ways)
        b, c = made["bytes"], made["counters"]
        print(f"{model}: {c['group']:g} queries a key head; keys travel where a device holds up to {c['keys_a_query_even']:.1f} keys for each query")
        for way in args.ways:
            forward, backward = (b[f"{way}_{side}_formula"] / 1e3 for side in ("forward", "backward"))
            share = 100 * b[f"{way}_sent"] / (b[f"{way}_forward_formula"] + b[f"{way}_backward_formula"])
            print(f"  {way:7} {forward:10.1f} kB on, {backward:10.1f} kB back ({share:.2f} % of that as compiled), error {c[f'{way}_error']:.1e}")
        names = [name.removesuffix("_work") for name in c if name.endswith("_work")]
        print("  most work over mean: " + ", ".join(f"{name} {c[f'{name}_work']:.3f} (by hop {c[f'{name}_work_by_hop']:.3f})" for name in names))
        if args.out is not None:
            record.write_record(args.out / f"ring_attention-{model.replace('_', '-')}.json", made)


def main() -> int:
    """Parses the command line and runs it."""
    parsed = tyro.cli(Arguments, description=__doc__)
    return run_command(lambda: run(parsed))


if __name__ == "__main__":
    sys.exit(main())
