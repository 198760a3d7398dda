"""Benchmarks residency policies and routing predictors on recorded routing, beside their bounds; all on the processor, the same in every run.

    python scripts/bench_policies.py record --corpus FOLDER --out FOLDER
    python scripts/bench_policies.py policies|predictors|batches|events|all --traces FOLDER [--more TRACE ...] [--fitted FOLDER] --out benchmarks

`record` makes the traces: a model continues held-out text of every domain. Predictors that are trained are kept in the folder `--fitted`.
`docs` draws the plots of docs/offloading.md from the records.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(ROOT))

from jaxmoe.report.command import run_command

SHARED = (ROOT / "tests/offload/data/qwen3_30b_a3b.npz", ROOT / "tests/offload/data/gemma4_26b_a4b.npz")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Benchmark policies and predictors."""

    what: tyro.conf.Positional[Literal["record", "policies", "predictors", "batches", "events", "all", "docs"]]
    """What to do; all is all four benchmarks."""
    traces: Path | None = None
    """Folder of a trace a domain, as `record` writes them."""
    more: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """Further traces of one prompt each; the two that come with the tests if not given."""
    fitted: Path | None = None
    """Folder of trained predictors, which are trained and kept there if they aren't; trained for this run alone if not given."""
    steps: int = 300
    """Of the training of a predictor."""
    seed: int = 0
    """Of halves of domains, training and recording."""
    out: Path = ROOT / "benchmarks"
    """Folder for records, or for traces."""
    model: Path = ROOT / "checkpoints" / "default"
    """To record: a checkpoint or a Hugging Face folder."""
    corpus: Path | None = None
    """To record: a corpus, whose held-out text is taken, or a folder of token streams by domain, such as its folder `train`."""
    prompts: int = 20
    """To record: of each domain; at most 128."""


def record_traces(args: Arguments) -> None:
    """Writes a trace a domain."""
    import tempfile

    from rich.console import Console

    from checkpoints.load import load_hf_or_checkpoint
    from jaxmoe.engine.model import load_model
    from jaxmoe.report.domain_traces import record_domains, save_domains
    from pallas_kernels.dispatch import Kernels

    if args.corpus is None:
        raise ValueError("record needs text: give --corpus")
    model = load_model(load_hf_or_checkpoint(args.model, Path(tempfile.gettempdir()) / "jaxmoe-bench"), "float32", Kernels.default())
    screen = Console(stderr=True)
    with screen.status("") as status:
        found = record_domains(model, args.corpus, args.prompts, seed=args.seed, progress=lambda domain: status.update(domain))
    save_domains(args.out, found)
    screen.print(f"{len(found)} traces written to {args.out}")


def measure(args: Arguments) -> None:
    """Runs the benchmarks that were asked for and writes a record of each."""
    from rich.console import Console

    from jaxmoe.offload.trace import load
    from jaxmoe.report import policy_records
    from jaxmoe.report.domain_traces import load_domains

    if args.traces is None:
        raise ValueError("give --traces: a folder of traces by domain, as `record` writes them")
    given = policy_records.Given(load_domains(args.traces), [load(path) for path in args.more or SHARED], args.fitted, args.steps, args.seed)
    screen, began = Console(stderr=True), time.perf_counter()
    with screen.status("") as status:
        for name in policy_records.BENCHES if args.what == "all" else (args.what,):
            for path in policy_records.write(name, given, args.out, tell=lambda what: status.update(what)):
                screen.print(f"[dim]{time.perf_counter() - began:.0f} s[/dim] {path}")


def run(args: Arguments) -> None:
    """What was asked for."""
    if args.what == "record":
        record_traces(args)
    elif args.what == "docs":
        from jaxmoe.report import policy_tables, record

        for path in policy_tables.plots(record.load_records(args.out), ROOT / "docs"):
            print(path)
    else:
        measure(args)


if __name__ == "__main__":
    parsed = tyro.cli(Arguments, description=__doc__)
    sys.exit(run_command(lambda: run(parsed)))
