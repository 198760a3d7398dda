"""Times blocks of a jitted step beside `AsyncSaver`: with one whole save from the block's first step on, saving continually, and without, in turn.

Blocks of both arms alternate, so that what else the machine does falls on both alike; the overhead is the median over pairs of blocks.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.saver import AsyncSaver

WIDTH = 768
LEAVES = 20
ROW = 1024


class Bench:
    """A step, a tree and a saver.

    Attributes:
        tree, nbytes: what is saved, and its bytes.
        saver: saves it.
        saves: how many there have been.
        compile_seconds, step_seconds: of the step's first call, and the median of later ones beside nothing.

    Args:
        root: where to save.
        nbytes: about the size of the tree.
        step: about how many seconds a step takes.
        block: about how many seconds a block takes; one that saves goes on until the save is done.
        host_bytes: most that the saver holds on the host.
    """

    def __init__(self, root: Path, nbytes: int, step: float, block: float, host_bytes: int):
        rng = np.random.default_rng(0)
        rows = nbytes // (4 * LEAVES * ROW)
        self.tree = {f"leaf_{i}": jnp.asarray(rng.normal(size=(rows, ROW)), jnp.float32) for i in range(LEAVES)}
        self.nbytes = sum(leaf.nbytes for leaf in self.tree.values())
        self._weights = jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5, jnp.float32)
        self._x = jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.float32)
        self._step = jax.jit(lambda x, w, n: jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ w), x))
        started = time.perf_counter()
        self._run(1)
        self.compile_seconds = time.perf_counter() - started
        for self._loops in (1, 4, 16):
            per_loop = float(np.median([self._seconds() for _ in range(15)])) / self._loops
        self._loops = max(1, round(step / per_loop))
        self.step_seconds = float(np.median([self._seconds() for _ in range(20)]))
        self._steps = max(1, round(block / self.step_seconds))
        self.saver, self.saves = AsyncSaver(root, keep=1, host_bytes=host_bytes), 0

    def block(self, mode: str) -> tuple[float, int]:
        """(seconds, steps) of a block: 'none', with 'one' whole save from its first step on, or saving 'continually'."""
        started, steps = time.perf_counter(), 0
        while steps < self._steps or (mode == "one" and self.saver.busy):
            if mode == "continually" or (mode == "one" and steps == 0):
                self.saves += self.saver.save(self.saves, self.tree, skip_if_busy=True)
            self._run(self._loops)
            steps += 1
        seconds = time.perf_counter() - started
        self.saver.wait()
        return seconds, steps

    def save_alone(self) -> tuple[float, float]:
        """(seconds, seconds of CPUs) of a save beside which nothing runs."""
        started, cpu = time.perf_counter(), time.process_time()
        self.saver.save(self.saves, self.tree)
        self.saver.wait()
        self.saves += 1
        return time.perf_counter() - started, time.process_time() - cpu

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
