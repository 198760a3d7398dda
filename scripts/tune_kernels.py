"""Tries tile sizes of the kernels on the GPU at hand and writes the fastest of each shape to where the kernels look for them.

    python scripts/tune_kernels.py [--minutes 9] [--ops grouped_matmul paged_attention] [--forms bfloat16 int8 int4] [--most 12]
    python scripts/tune_kernels.py --tiny --out /tmp/tuned            the same code, anywhere; its numbers mean nothing
"""

from __future__ import annotations

import argparse  # and not tyro: where the GPU is, there may be jax and what a model needs, and little else
import importlib.util
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(ROOT))

import jax

from jaxmoe.report import kernel_bench, kernel_tuning

OPS = ("grouped_matmul", "paged_attention")


def main() -> int:
    """Tunes and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no other shape is begun")
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS, help="what is tuned")
    parser.add_argument("--forms", nargs="+", default=["bfloat16", "int8", "int4"], choices=["bfloat16", "int8", "int4"], help="of experts' weights")
    parser.add_argument("--most", type=int, default=12, help="configs tried at a shape")
    parser.add_argument("--out", type=Path, default=ROOT / "pallas_kernels", help="in whose folders OP/tuned the results go")
    parser.add_argument("--tiny", action="store_true", help="small sizes, step by step, for a check of the code")
    args = parser.parse_args()
    platform = jax.devices()[0].platform
    if platform != "gpu" and not args.tiny:
        parser.error(f"this needs a GPU, and jax found a {platform}; --tiny checks the code without one")
    sizes = kernel_bench.TINY if args.tiny else kernel_bench.FULL
    began = time.monotonic()

    def say(line: str) -> None:
        print(line, flush=True)

    for i, op in enumerate(args.ops):
        until = began + 60 * args.minutes * (i + 1) / len(args.ops)
        if op == "grouped_matmul":
            found = kernel_tuning.tune_matmul(sizes, args.forms, args.most, say, until)
        else:
            found = kernel_tuning.tune_attention(sizes, say, until)
        say(f"{op}: {len(found)} shapes in {kernel_tuning.write(args.out / op / 'tuned', found).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
