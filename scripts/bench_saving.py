"""Times steps beside `AsyncSaver`: blocks of a jitted step with a save in each, and without, in turn.

    python scripts/bench_saving.py [--pairs 40] [--megabytes 80] [--step-ms 80] [--interval 8] [--folder DIR] [--out benchmarks]

Two figures: what a save adds to the steps beside it, as a share of the `interval` between saves; and what saving continually adds, the next save
beginning as soon as the last one is done.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(ROOT))

from checkpoints.saver import AsyncSaver
from jaxmoe.report import record
from jaxmoe.report.command import run_command

WIDTH = 768
LEAVES = 20


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Benchmark saving beside steps."""

    pairs: int = 40
    """Pairs of blocks, one with saves and one without."""
    megabytes: int = 80
    """Size of the tree that is saved."""
    step_ms: float = 80
    """About how long a step takes."""
    interval: float = 8
    """Seconds of steps between two saves."""
    block: float = 2.5
    """About how many seconds a block of steps takes; one that saves goes on until the save is done."""
    host_megabytes: int = 32
    """Most that the saver holds on the host."""
    folder: Path | None = None
    """Where to save."""
    out: Path | None = None
    """Folder for records."""


class Bench:
    """A step, a tree and a saver."""

    def __init__(self, args: Arguments, root: Path):
        rng = np.random.default_rng(0)
        rows = args.megabytes * 1_000_000 // (4 * LEAVES * 1024)
        self.tree = {f"leaf_{i}": jnp.asarray(rng.normal(size=(rows, 1024)), jnp.float32) for i in range(LEAVES)}
        self.nbytes = sum(leaf.nbytes for leaf in self.tree.values())
        self._weights = jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5, jnp.float32)
        self._x = jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.float32)
        self._step = jax.jit(lambda x, w, n: jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ w), x))
        started = time.perf_counter()
        self._run(1)
        self.compile_seconds = time.perf_counter() - started
        for self._loops in (1, 4, 16):
            per_loop = float(np.median([self._seconds() for _ in range(15)])) / self._loops
        self._loops = max(1, round(args.step_ms / 1000 / per_loop))
        self.step_seconds = float(np.median([self._seconds() for _ in range(20)]))
        self._steps = max(1, round(args.block / self.step_seconds))
        self.saver, self._saves = AsyncSaver(root, keep=1, host_bytes=args.host_megabytes << 20), 0

    def block(self, mode: str) -> tuple[float, int]:
        """(seconds, steps) of a block: 'none', with 'one' whole save from its first step on, or saving 'continually'."""
        started, steps = time.perf_counter(), 0
        while steps < self._steps or (mode == "one" and self.saver.busy):
            if mode == "continually" or (mode == "one" and steps == 0):
                self._saves += self.saver.save(self._saves, self.tree, skip_if_busy=True)
            self._run(self._loops)
            steps += 1
        seconds = time.perf_counter() - started
        self.saver.wait()
        return seconds, steps

    def save_alone(self) -> tuple[float, float]:
        """(seconds, seconds of CPUs) of a save beside which nothing runs."""
        started, cpu = time.perf_counter(), time.process_time()
        self.saver.save(self._saves, self.tree)
        self.saver.wait()
        self._saves += 1
        return time.perf_counter() - started, time.process_time() - cpu

    @property
    def saves(self) -> int:
        return self._saves

    def _run(self, loops: int) -> None:
        self._x = jax.block_until_ready(self._step(self._x, self._weights, loops))

    def _seconds(self) -> float:
        started = time.perf_counter()
        self._run(self._loops)
        return time.perf_counter() - started


def compare(bench: Bench, mode: str, pairs: int, interval: float) -> dict[str, Any]:
    """Alternating blocks: seconds per step of both arms, and the overhead's median with its 95 % limits (bootstrap over pairs).

    For 'one' the overhead is the seconds that a save adds over `interval`, for 'continually' it is of the steps that were run.
    """
    found: dict[str, list[tuple[float, int]]] = {"none": [], mode: []}
    first = bench.saves
    for i in range(pairs):
        for arm in ("none", mode) if i % 2 else (mode, "none"):
            found[arm].append(bench.block(arm))
    without, steps = np.array([s / n for s, n in found["none"]]), np.array([n for _, n in found[mode]])
    added = np.array([s for s, _ in found[mode]]) - steps * without
    extra = added / (interval if mode == "one" else steps * without)
    picks = np.random.default_rng(0).integers(0, pairs, (10_000, pairs))
    low, high = np.percentile(np.median(extra[picks], axis=1), [2.5, 97.5])
    return {
        "without": list(without), "with": [s / n for s, n in found[mode]], "saves": bench.saves - first, "percent": 100 * float(np.median(extra)),
        "low": 100 * float(low), "high": 100 * float(high), "mean": 100 * float(np.mean(extra)),
        "every": sum(s for s, _ in found[mode]) / max(1, bench.saves - first),
    }  # fmt: skip


def write(args: Arguments, bench: Bench, found: dict[str, dict[str, Any]], alone: list[tuple[float, float]]) -> None:
    """One record."""
    counters = {f"{mode}_{key}": f[key] for mode, f in found.items() for key in ("percent", "low", "high", "mean", "saves", "every")}
    timings = {f"{mode}_{arm}": record.timing(f[arm]) for mode, f in found.items() for arm in ("without", "with")}
    timings |= {name: record.timing(seconds) for name, seconds in zip(("alone", "alone_cpu"), zip(*alone, strict=True), strict=True)}
    alone_rate = 1 / float(np.median(found["one"]["without"]))
    made = record.make_record(
        name="saving", spec_hash="",
        settings={
            "pairs": args.pairs, "interval_seconds": args.interval, "block_seconds": args.block, "step_seconds": bench.step_seconds,
            "leaves": LEAVES, "host_bytes": args.host_megabytes << 20,
        },
        seeds={"values": 0, "bootstrap": 0},
        timings=timings,
        compile_seconds=bench.compile_seconds,
        bytes={"tree": bench.nbytes, "peak_on_host": bench.saver.peak_bytes},
        counters=counters,
        bound=record.make_bound("compute", alone_rate, alone_rate / (1 + found["one"]["percent"] / 100), "steps/s"),
    )  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)  # type: ignore[union-attr]
    record.write_record(args.out / "saving-default.json", made)  # type: ignore[operator]


def run(args: Arguments) -> None:
    """Both comparisons."""
    root = Path(tempfile.mkdtemp(prefix="saving-", dir=args.folder))
    try:
        bench = Bench(args, root)
        alone = [bench.save_alone() for _ in range(10)]
        wall, cpu = np.median(alone, axis=0)
        print(f"step {1000 * bench.step_seconds:.0f} ms; tree {bench.nbytes / 1e6:.0f} MB; a save alone {wall:.2f} s, {cpu:.2f} s of CPUs")
        found = {}
        for mode in ("one", "continually"):
            f = found[mode] = compare(bench, mode, args.pairs, args.interval)
            every = args.interval if mode == "one" else f["every"]
            print(
                f"a save every {every:.1f} s of steps adds {f['percent']:+.2f} % to them (median of {args.pairs} pairs, "
                f"95 % limits {f['low']:+.2f} to {f['high']:+.2f} %; mean {f['mean']:+.2f} %)",
                flush=True,
            )
        bench.saver.close()
        if args.out is not None:
            write(args, bench, found, alone)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    parsed = tyro.cli(Arguments, description=__doc__)
    sys.exit(run_command(lambda: run(parsed)))
