"""Times generation against a peer: same weights, same machine, runs in turn, each engine in a process of its own.

    python scripts/bench_generate.py [MODEL] [--peer transformers] [--peer llama.cpp] [--batches 1 8] [--out benchmarks]

MODEL is a Hugging Face folder; `random-olmoe` makes a random OLMoE-shaped one of about 1 GB. Writes one record per engine, dtype and batch.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(ROOT))

from rich.console import Console
from rich.table import Table

import jaxmoe
from jaxmoe.report.peers import PEERS, Opened, Ran
from jaxmoe.report.random_model import random_olmoe


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Benchmark generation."""

    model: tyro.conf.Positional[str] = str(ROOT / "checkpoints" / "default")
    """Hugging Face folder, or random-olmoe."""
    peer: Annotated[tuple[Literal["transformers", "llama.cpp"], ...], tyro.conf.UseAppendAction] = ()
    """An engine to alternate with (repeatable; extra `bench`)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """How weights are held."""
    batches: Annotated[tuple[int, ...], tyro.conf.arg(help="Sequences decoded together.")] = (1, 8)
    new: int = 128
    """Tokens to decode per sequence."""
    prefill: int = 512
    """Prompt length of the prefill measurement."""
    runs: int = 5
    """Counted runs of each engine, in turn."""
    fast: bool = False
    """Also give up row invariance."""
    out: Path | None = None
    """Folder for records."""


PROMPT = 32


def open_jaxmoe(folder: Path, dtype: str, fast: bool) -> tuple[Opened, Callable[[int], dict]]:
    """jaxmoe as a peer of itself, and `facts(batch)` of its model for the record."""
    from checkpoints.load import load_hf_or_checkpoint
    from jaxmoe.engine.generate import Engine, Request
    from jaxmoe.engine.model import load_model
    from pallas_kernels.dispatch import Kernels

    checkpoint = load_hf_or_checkpoint(folder, Path(tempfile.gettempdir()) / "jaxmoe-bench")
    model = load_model(checkpoint, dtype, Kernels.default(row_invariant=not fast))
    engines: dict[tuple[int, int], Engine] = {}
    compiled = [0.0]

    def run(ids: np.ndarray, new: int) -> Ran:
        key = (ids.shape[0], ids.shape[1] + new)
        if key not in engines:
            engines[key] = Engine(model, *key, greedy=True)
            compiled[0] += engines[key].warm_up()
        results, t = engines[key].generate([Request(tuple(map(int, row)), new) for row in ids])
        return Ran(t.prefill_seconds, t.decode_seconds, np.asarray([r.ids for r in results]))

    def facts(batch: int) -> dict:
        return {
            "spec_hash": model.spec.hash(), "vocab": model.spec.vocab, "bytes": model.bytes(),
            "bytes_per_step": model.bytes_per_token(batch), "compile_seconds": compiled[0],
        }  # fmt: skip

    return Opened(run, jaxmoe.__version__), facts


def serve(name: str, folder: Path, dtype: str, fast: bool, pipe) -> None:
    """A worker: answers `(ids, new)` with what ran, an int with the facts for that batch, 'version' with the version; ends at None."""
    if name == "jaxmoe":
        opened, facts = open_jaxmoe(folder, dtype, fast)
    else:
        opened, facts = PEERS[name](folder, dtype), lambda batch: {}
    while (job := pipe.recv()) is not None:
        pipe.send(opened.version if job == "version" else facts(job) if isinstance(job, int) else opened.run(*job))


class Worker:
    """An engine in its own process."""

    def __init__(self, name: str, folder: Path, dtype: str, fast: bool):
        context = multiprocessing.get_context("spawn")
        self.name, (self._pipe, theirs) = name, context.Pipe()
        self._process = context.Process(target=serve, args=(name, folder, dtype, fast, theirs), daemon=True)
        self._process.start()

    def ask(self, job):
        """Sends a job and waits for its answer."""
        self._pipe.send(job)
        return self._pipe.recv()

    def close(self) -> None:
        """Ends the process."""
        self._pipe.send(None)
        self._process.join()


def measure(workers: list[Worker], batch: int, vocab: int, args: Arguments, console: Console) -> dict[str, dict]:
    """Prefill (of batch 1) and decode rates of every worker, in turn, and the tokens it chose; the first round is not counted."""
    rng = np.random.default_rng(batch)
    prompts, long = rng.integers(3, vocab, (batch, PROMPT)), rng.integers(3, vocab, (1, args.prefill))
    rates: dict[str, dict] = {w.name: {"prefill": [], "decode": []} for w in workers}
    for i in range(args.runs + 1):
        for w in workers:
            ran = w.ask((prompts, args.new))
            rates[w.name]["ids"] = ran.ids
            if i:
                rates[w.name]["decode"].append(batch * (args.new - 1) / ran.decode_seconds)
            if batch == 1:
                ran = w.ask((long, 2))
                if i:
                    rates[w.name]["prefill"].append(args.prefill / ran.prefill_seconds)
        console.print(f"[dim]batch {batch}, round {i} of {args.runs}[/dim]")
    return rates


def agreement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of greedy tokens that come before the first difference in their row: near 1 where the engines compute the same model."""
    same = np.cumprod(ours == theirs, axis=1)
    return float(same.mean())


def main() -> int:
    """Runs the benchmark, prints a table, writes records."""
    args = tyro.cli(Arguments, description=__doc__)
    console = Console(stderr=True)
    from jaxmoe.report import record

    folder = random_olmoe(Path(tempfile.gettempdir()) / "jaxmoe-random-olmoe") if args.model == "random-olmoe" else Path(args.model)
    workers = [Worker(name, folder, args.dtype, args.fast) for name in dict.fromkeys(("jaxmoe", *args.peer))]
    versions = {w.name: w.ask("version") for w in workers}
    table = Table("engine", "batch", "decode tok/s", "prefill tok/s", "GB/s", "% of read bandwidth", "same tokens")
    ceiling = record.measure_memory_bandwidth(0.5)
    for batch in args.batches:
        rates = measure(workers, batch, workers[0].ask(batch)["vocab"], args, console)
        facts = workers[0].ask(batch)
        for w in workers:
            decode, prefill = rates[w.name]["decode"], rates[w.name]["prefill"]
            rate = float(np.median(decode))
            same = agreement(rates["jaxmoe"]["ids"], rates[w.name]["ids"])
            bound = record.make_bound("bandwidth", ceiling, facts["bytes_per_step"] * rate / batch / 1e9, "GB/s")
            shown = f"{np.median(prefill):,.0f}" if prefill else "-"
            table.add_row(w.name, str(batch), f"{rate:,.0f}", shown, f"{bound['achieved']:.1f}", f"{bound['percent']:.0f}", f"{same:.2f}")
            if args.out is None:
                continue
            timings = {"decode_token": record.timing([1 / r for r in decode])}
            if prefill:
                timings["prefill_token"] = record.timing([1 / r for r in prefill])
            made = record.make_record(
                name="generate", spec_hash=facts["spec_hash"],
                settings={
                    "engine": w.name, "engine_version": versions[w.name], "model": folder.name, "dtype": args.dtype, "batch": batch,
                    "new": args.new, "prompt": PROMPT, "prefill": args.prefill, "row_invariant": not args.fast,
                    "alternating_with": [n.name for n in workers if n is not w],
                },
                seeds={"prompts": batch}, timings=timings, compile_seconds=facts["compile_seconds"] if w.name == "jaxmoe" else 0.0,
                bytes=facts["bytes"],
                counters={"decode_tokens_per_second": rate, "same_tokens": same}
                | ({"prefill_tokens_per_second": float(np.median(prefill))} if prefill else {}),
                bound=bound,
            )  # fmt: skip
            mode = "-fast" if args.fast else ""
            record.write_record(args.out / f"generate-{folder.name}-{w.name}-{args.dtype}-b{batch}{mode}.json", made)
    for w in workers:
        w.close()
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
