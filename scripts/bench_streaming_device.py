"""Measures expert streaming on a GPU, in under ten minutes: the link, the ways to fill slots, decoding beside its bounds, bits, and a profile.

    python scripts/bench_streaming_device.py [--out benchmarks] [--only link,fills,bits,decode,profile]      on an H100 or H200
    python scripts/bench_streaming_device.py --tiny --out /tmp/records                                      the same code, anywhere, in a minute

Each part runs in a process of its own and writes records as it goes; what fails, and what time ran out for, gets a record that says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(ROOT))

import jax

from jaxmoe.report import device_bench, device_driver, device_fills, device_steps

PARTS = {
    "link": device_fills.link, "fills": device_fills.fills, "bits": device_steps.bits, "decode": device_steps.decode,
    "profile": device_steps.profiled,
}  # fmt: skip
HOST_MEMORY_GB = "100"
"""Of pinned memory, at most: jax allows 64 otherwise."""


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = device_driver.parser_of(__doc__, PARTS, ROOT / "benchmarks")
    parser.add_argument("--trace", type=Path, default=ROOT / "tests" / "offload" / "data" / "qwen3_30b_a3b.npz", help="routing that decoding follows")
    parser.add_argument("--method", help="how slots are filled in decode and profile; by default the fastest fill of this run")
    parser.add_argument("--kernels", choices=("pallas", "xla"), default="pallas", help="what experts are multiplied with")
    parser.add_argument("--link-gbps", type=float, help="with --part: the link's best rate so far")
    return parser.parse_args()


def run_part(args: argparse.Namespace) -> int:
    """One part, in this process."""
    sizes = device_bench.TINY if args.tiny else device_bench.FULL
    device_driver.need_gpu(args.tiny)
    PARTS[args.part](device_bench.Part(sizes, args.out, args.method, args.link_gbps, args.trace, args.kernels == "pallas"))
    return 0


def start(args: argparse.Namespace, job: device_driver.Job, method: str, link_gbps: float | None, seconds: float) -> device_driver.Ended:
    """A process for one job, ended when its time is over."""
    command = [sys.executable, __file__, "--part", job.part, "--method", method, "--out", str(args.out), "--trace", str(args.trace)]
    command += ["--kernels", args.kernels, *["--tiny"] * args.tiny, *(["--link-gbps", str(link_gbps)] if link_gbps else [])]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {job.flags}".strip()
    environment = {"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": HOST_MEMORY_GB} | os.environ | {"XLA_FLAGS": flags}  # jax reads both when it starts
    return device_driver.start_process(command, environment, seconds)


def main() -> int:
    """Runs the parts; 0 if every record came and none says that it failed."""
    args = arguments()
    if args.part:
        return run_part(args)
    jax.config.update("jax_platforms", "cpu")  # the driver keeps off the GPU, of whose memory jax would take most
    sizes = device_bench.TINY if args.tiny else device_bench.FULL
    good = device_driver.drive(args.only, args.out, sizes, 60 * args.minutes, lambda *job: start(args, *job), args.method)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
