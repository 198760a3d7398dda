"""Measures the grouped matmul and paged attention on a GPU, in under ten minutes: right against float64, then beside the card's ceilings and others.

    python scripts/bench_kernels_device.py [--out benchmarks] [--only matmul,attention]      on an H100 or H200
    python scripts/bench_kernels_device.py --tiny --out /tmp/records                         the same code, anywhere, in a minute

Each part runs in a process of its own and writes records as it goes; what fails, and what time ran out for, gets a record that says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(ROOT))

import jax

from jaxmoe.report import device_driver, kernel_bench, kernel_torch

PARTS = {
    "ceilings": kernel_bench.ceilings, "matmul": kernel_bench.matmul, "attention": kernel_bench.paged,
    "quantized": lambda bench: kernel_bench.matmul(bench, ("int8", "int4")), "rivals": kernel_bench.rivals, "torch": kernel_torch.peers,
    "router": kernel_bench.router,
}  # fmt: skip
SECONDS = {"ceilings": 30, "matmul": 200, "attention": 120, "quantized": 110, "rivals": 50, "torch": 50, "router": 40}
"""What each part may take; together with what is left of the time for all."""


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = device_driver.parser_of(__doc__, PARTS, ROOT / "benchmarks")
    parser.add_argument("--bandwidth", type=float, help="with --part: GB/s that the card reads")
    parser.add_argument("--rate", type=float, help="with --part: TFLOP/s that the card multiplies")
    return parser.parse_args()


def run_part(args: argparse.Namespace) -> int:
    """One part, in this process."""
    sizes = kernel_bench.TINY if args.tiny else kernel_bench.FULL
    if args.part != "torch":  # in whose process jax keeps off the GPU
        device_driver.need_gpu(args.tiny)
    PARTS[args.part](kernel_bench.Bench(sizes, args.out, args.bandwidth, args.rate))
    return 0


def main() -> int:
    """Runs the parts; 0 if every record came and none says that it failed."""
    args = arguments()
    if args.part:
        return run_part(args)
    jax.config.update("jax_platforms", "cpu")  # the driver keeps off the GPU, of whose memory jax would take most
    sizes = kernel_bench.TINY if args.tiny else kernel_bench.FULL
    began, made = time.monotonic(), dict[str, dict[str, Any]]()
    for part in dict.fromkeys(("ceilings", *args.only)):
        found = made.get("kernel-ceilings", {}).get("counters") or {"gbps": 1.0, "tflops": 1.0}
        command = [sys.executable, __file__, "--part", part, "--out", str(args.out), *["--tiny"] * args.tiny]
        command += ["--bandwidth", str(found["gbps"]), "--rate", str(found["tflops"])]
        environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if part == "torch" else {})
        left = min(SECONDS[part], 60 * args.minutes - (time.monotonic() - began))
        device_driver.run_one(
            args.out, kernel_bench.records_of(part, sizes), {"part": part, "tiny": args.tiny}, left,
            lambda seconds, c=command, e=environment: device_driver.start_process(c, e, seconds), made,  # type: ignore[misc]
        )  # fmt: skip
    return 1 if any("failed" in r["settings"] for r in made.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
