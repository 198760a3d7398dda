"""Times streamed experts over an emulated link beside loading on demand and whole resident layers, at equal bytes, in turn.

    python scripts/bench_streaming.py [MODEL] [--slots 8] [--speeds 0.02 0.05 0.1] [--rounds 3] [--out benchmarks]
    python scripts/bench_streaming.py --recorder [--pairs 40] [--out benchmarks]

MODEL is a Hugging Face folder, or random-olmoe for a random one of 1.3 GB. Links are emulated: every expert byte is paced against real time.
--recorder times the trace recorder instead.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(ROOT))

from rich.console import Console
from rich.table import Table

from checkpoints.load import load_hf_or_checkpoint
from jaxmoe.engine.generate import Engine, Request
from jaxmoe.engine.model import Offload, load_model
from jaxmoe.report import record, streaming_bench
from jaxmoe.report.command import run_command
from pallas_kernels.dispatch import Kernels


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Benchmark streamed experts."""

    model: tyro.conf.Positional[str] = str(ROOT / "checkpoints" / "default")
    """Hugging Face folder, or random-olmoe."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """How weights are held."""
    slots: int = 8
    """Slots a layer; other arms get the same bytes."""
    speeds: Annotated[tuple[float, ...], tyro.conf.arg(help="Emulated links, 10^9 bytes per second.")] = (0.02, 0.05, 0.1)
    rounds: int = 3
    """How often every arm runs, in turn with the others."""
    new: int = 32
    """Tokens to decode."""
    prefill: int = 256
    """Length of the long prompt."""
    recorder: bool = False
    """Time the trace recorder instead."""
    pairs: int = 40
    """Alternating pairs, with --recorder."""
    out: Path | None = None
    """Folder for records."""


def compare(args: Arguments, folder: Path, checkpoint, console: Console) -> None:
    """Runs all arms, prints a table, writes a record an arm and speed."""
    bench = streaming_bench.Bench(checkpoint, args.dtype, args.slots, args.new, args.prefill, (ROOT / "LICENSE").read_text())
    samples: dict[tuple[str, float | None], list] = {}
    for name, gbps, sample in streaming_bench.rounds(bench, args.speeds, args.rounds):
        samples.setdefault((name, gbps), []).append(sample)
        link = "" if gbps is None else f" over an EMULATED link of {gbps:g} GB/s"
        console.print(f"[dim]{name}{link}: decode {sample.decode_seconds:.2f} s, prefill {sample.prefill_seconds:.2f} s[/dim]")
    resident = samples.pop(("resident", None))
    table = Table("EMULATED GB/s", "arm", "hits %", "decode tok/s", "% serial", "% overlapped", "prefill s", "% serial", "% overlapped", "same ids")
    pace = {gbps: streaming_bench.link_only(gbps, bench.resident.spec.expert_bytes()[0], 50) for gbps in args.speeds}
    for (name, gbps), runs in samples.items():
        assert gbps is not None
        s = streaming_bench.summary(runs, resident, gbps)
        same = all(run.ids == resident[0].ids for run in runs)
        percent = [f"{100 * s[f'{p}_{kind}_fraction']:.0f}" for p in ("decode", "prefill") for kind in ("serial", "overlapped")]
        table.add_row(
            f"{gbps:g}", name, f"{100 * s['hit_rate']:.1f}", f"{s['decode_tokens_per_second']:.1f}", *percent[:2], f"{s['prefill_seconds']:.2f}",
            *percent[2:], str(same),
        )  # fmt: skip
        if args.out is not None:
            write(args, folder, bench, name, gbps, runs, s, same, pace[gbps])
    Console().print(table)


def write(args: Arguments, folder: Path, bench, name: str, gbps: float, runs: list, found: dict[str, Any], same: bool, pace: float) -> None:
    """One arm at one speed."""
    arm = next(a for a in bench.arms if a.name == name)
    made = record.make_record(
        name="streaming", spec_hash=bench.resident.spec.hash(),
        settings={
            "model": folder.name, "dtype": args.dtype, "arm": name, "slots": list(arm.slots), "policy": arm.policy, "link_gbps": gbps,
            "link_emulated": True, "new": args.new, "prompt": streaming_bench.PROMPT, "prefill": args.prefill, "rounds": args.rounds,
            "temperature": streaming_bench.SAMPLING.temperature,
            "in_turn_with": [a.name for a in bench.arms if a is not arm],
        },
        seeds={"prompts": 0},
        timings={phase: record.timing([getattr(run, f"{phase}_seconds") for run in runs]) for phase in ("decode", "prefill")},
        compile_seconds=0.0,
        bytes={"decode_link": int(found["decode_bytes"]), "prefill_link": int(found["prefill_bytes"])},
        counters={k: v for k, v in found.items() if not k.endswith("_bytes")} | {"same_ids": same, "link_alone": pace},
        bound=record.make_bound("serial", found["decode_link_seconds"] + found["decode_compute_seconds"], found["decode_seconds"], "s"),
    )  # fmt: skip
    label = name.replace(", ", "-").replace(" ", "-")
    record.write_record(args.out / f"streaming-{folder.name}-{label}-{gbps:g}.json", made)  # type: ignore[operator]


def time_recorder(args: Arguments, folder: Path, checkpoint) -> None:
    """What recording costs a decode step: mean and upper 95 % limit over alternating pairs."""
    kernels = Kernels.default()
    model = load_model(checkpoint, args.dtype, kernels, offload=Offload(args.slots))
    rng = np.random.default_rng(0)
    request = Request(tuple(map(int, rng.integers(3, model.spec.vocab, streaming_bench.PROMPT))), args.new)
    extra = streaming_bench.recorder_cost(lambda on: Engine(model, 1, 256, True, record=on), request, args.pairs)
    mean, error = float(np.mean(extra)), float(np.std(extra, ddof=1) / len(extra) ** 0.5)
    upper = mean + 1.645 * error
    print(f"recording costs {100 * mean:+.2f} % of a decode step, at most {100 * upper:.2f} % (upper 95 % limit of the mean, {len(extra)} pairs)")
    if args.out is not None:
        made = record.make_record(
            name="recorder", spec_hash=model.spec.hash(), settings={"model": folder.name, "dtype": args.dtype, "slots": args.slots, "new": args.new},
            seeds={"prompts": 0}, timings={"relative_extra": record.timing([1 + e for e in extra])}, compile_seconds=0.0, bytes={},
            counters={"mean_percent": 100 * mean, "upper_95_percent": 100 * upper, "pairs": len(extra)},
            bound=record.make_bound("serial", 1.0, 1.0 + mean, "decode steps"),
        )  # fmt: skip
        record.write_record(args.out / f"recorder-{folder.name}.json", made)


def run(args: Arguments) -> None:
    """Either benchmark."""
    temporary = Path(tempfile.gettempdir())
    folder = streaming_bench.default_folder(args.model, temporary)
    checkpoint = load_hf_or_checkpoint(folder, temporary / "jaxmoe-bench")
    if args.recorder:
        time_recorder(args, folder, checkpoint)
    else:
        compare(args, folder, checkpoint, Console(stderr=True))


if __name__ == "__main__":
    parsed = tyro.cli(Arguments, description=__doc__)
    sys.exit(run_command(lambda: run(parsed)))
