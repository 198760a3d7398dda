"""Benchmarks what can be switched on beside a policy: prefetching in the running engine, the precision ladder, and regrouping of requests.

    python scripts/bench_offload.py prefetch --corpus FOLDER [--predictor-file FILE] [--speeds 0.1 0.3 1] [--rounds 3] --out benchmarks
    python scripts/bench_offload.py quality --corpus FOLDER --out benchmarks
    python scripts/bench_offload.py regroup --traces FOLDER --fit FOLDER [--orders 4] --out benchmarks

Links are emulated: every expert byte is paced against real time. Texts are held-out ones of the corpus (scripts/train.py corpus); `regroup` works on
traces that scripts/bench_policies.py record made, and learns from those in `--fit`, which are of other text.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(ROOT))

from jaxmoe.report.command import run_command

DOMAINS = ("austen", "bible_web", "wordnet", "python_code", "go_code", "rust_docs")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Benchmark prefetching, the precision ladder, or regrouping."""

    what: tyro.conf.Positional[Literal["prefetch", "quality", "regroup"]]
    """What to measure."""
    model: Path = ROOT / "checkpoints" / "default"
    """Hugging Face folder or converted folder."""
    corpus: Path | None = None
    """A corpus, for its held-out text."""
    predictor_file: Path | None = None
    """prefetch: a trained path predictor; the ways that need one are left out without."""
    slots: int = 8
    """Slots a layer."""
    speeds: Annotated[tuple[float, ...], tyro.conf.arg(help="prefetch: emulated links, 10^9 bytes per second.")] = (0.1, 0.3, 1.0)
    rounds: int = 3
    """prefetch: how often every way runs, in turn with the others."""
    prompts: int = 2
    """prefetch: prompts of a run, each by itself."""
    new: int = 48
    """prefetch: tokens to decode of each."""
    tokens: int = 96
    """quality: of a text."""
    per_domain: int = 6
    """quality: texts of a domain; of three one is for calibrating."""
    traces: Path | None = None
    """regroup: folder of a trace a domain."""
    fit: Path | None = None
    """regroup: folder of traces of other text, from which tokens and profiles are learned."""
    orders: int = 4
    """regroup: shuffles of the queue."""
    out: Path | None = None
    """Folder for records."""


def opened(args: Arguments):
    """The model, converted if need be."""
    from checkpoints.load import load_hf_or_checkpoint

    return load_hf_or_checkpoint(args.model, Path(tempfile.gettempdir()) / "jaxmoe-bench")


def needed(args: Arguments, name: str) -> Path:
    """An option that this benchmark can't do without."""
    value = getattr(args, name)
    if value is None:
        raise ValueError(f"{args.what} needs --{name}")
    return value


def write(args: Arguments, name: str, settings: dict[str, Any], rows: list[dict[str, Any]], figures: dict[str, Any], bound: tuple) -> None:
    """One record of all rows; `bound` is what `record.make_bound` takes: the best that could be had, and what was."""
    from jaxmoe.report import record

    if args.out is None:
        return
    made = record.make_record(
        name=name, spec_hash="", settings={"model": args.model.name, **settings}, seeds={"all": 0}, timings={}, compile_seconds=0.0, bytes={},
        counters=figures | {"rows": rows}, bound=record.make_bound(*bound),
    )  # fmt: skip
    record.write_record(args.out / f"{name}-{args.model.name}.json", made)


def prefetch(args: Arguments, console) -> None:
    """Runs all ways in turn over emulated links."""
    from jaxmoe.report import offload_tables, prefetch_bench
    from jaxmoe.train.corpus import load_corpus, windows

    if len(set(args.speeds)) < 2 or min(args.speeds) <= 0:
        raise ValueError("--speeds: give at least two different ones above 0")
    corpus = load_corpus(needed(args, "corpus"))
    domains = list(corpus.streams["held_out"])
    prompts = [tuple(map(int, windows(corpus, domains[i % len(domains)], 64, most=4)[0, :32])) for i in range(0, 5 * args.prompts, 5)]
    with console.status("loading"):
        bench = prefetch_bench.Bench(opened(args), args.slots, prompts, args.new, args.predictor_file)
    runs: dict[tuple[str, float], list] = {}
    for arm, gbps, sample in prefetch_bench.rounds(bench, args.speeds, args.rounds):
        runs.setdefault((arm.name, gbps), []).append(sample)
        console.print(f"[dim]{arm.name} over an EMULATED link of {gbps:g} GB/s: {1e3 * sample.seconds / sample.steps:.1f} ms a token[/dim]")
    rows = prefetch_bench.summarize(bench, runs, args.speeds)
    best = {row["way"]: row["tokens_per_second"] for row in rows if row["gbps"] == min(args.speeds)}
    bound = ("link", best.pop("lfu + oracle"), max(best.values()), "tok/s")
    console.print(offload_tables.terminal(offload_tables.PREFETCH, rows))
    settings = {"slots": args.slots, "rounds": args.rounds, "prompts": len(prompts), "new": args.new, "link_emulated": True}
    predictor = None if args.predictor_file is None else f"{args.predictor_file.name}, crc32 {zlib.crc32(args.predictor_file.read_bytes()):08x}"
    write(args, "prefetch", settings | {"predictor_file": predictor}, rows, {}, bound)


def quality(args: Arguments, console) -> None:
    """Measures all settings of the ladder."""
    from jaxmoe.report import offload_tables, quality_bench

    with console.status("") as status:
        rows, figures = quality_bench.run(opened(args), needed(args, "corpus"), DOMAINS, args.per_domain, args.tokens, args.slots, status.update)
    console.print(offload_tables.terminal(offload_tables.QUALITY, rows))
    least = min(row["ratio"] for row in rows)
    write(args, "quality", {"slots": args.slots, "domains": list(DOMAINS), "policy": "lfu"}, rows, figures, ("link", 1.0, least, "times the bytes"))


def regroup(args: Arguments, console) -> None:
    """Simulates queues on recorded routing."""
    from jaxmoe.report import domain_traces, offload_tables, regroup_bench

    if needed(args, "traces").resolve() == needed(args, "fit").resolve():
        raise ValueError("--fit has to be of other text than --traces")
    traces, fit = domain_traces.load_domains(needed(args, "traces")), domain_traces.load_domains(needed(args, "fit"))
    with console.status("grouping"):
        arms = [arm for batch in (8, 16) for arm in regroup_bench.arms(batch)]
        rows = regroup_bench.compare(regroup_bench.learn(fit), traces, arms, orders=args.orders)
    console.print(offload_tables.terminal(offload_tables.REGROUP, rows))
    best = {source: max(row["reduction"] for row in rows if row["source"] == source) for source in ("token", "oracle")}
    write(args, "regroup", {"orders": args.orders}, rows, {}, ("link", 100 * best["oracle"], 100 * best["token"], "% fewer experts"))


def check(args: Arguments) -> None:
    """Refuses numbers with which nothing could be measured."""
    for name, least in (("rounds", 1), ("prompts", 1), ("new", 2), ("orders", 1), ("per_domain", 3), ("tokens", 2)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least {least}")


def main() -> int:
    """Runs; gives the exit code."""
    args = tyro.cli(Arguments, description=__doc__)

    def run() -> None:
        from rich.console import Console

        check(args)
        {"prefetch": prefetch, "quality": quality, "regroup": regroup}[args.what](args, Console(stderr=True, width=160))

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
