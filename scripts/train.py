"""Trains the small model: `train.py corpus OUT` gathers text, `train.py model CORPUS OUT` trains and resumes, `train.py export` writes the result.

`train.py pregate MODEL CORPUS OUT` tunes a model whose routers choose a layer ahead.
`train.py predictor TRACE... --out FILE` trains a predictor of routing on recorded traces (scripts/trace.py record, scripts/bench_policies.py record).
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxmoe.report import record  # noqa: E402
from jaxmoe.report.command import run_command  # noqa: E402
from jaxmoe.spec import ModelSpec  # noqa: E402
from jaxmoe.train import card, loop, path_predictor, pregate  # noqa: E402
from jaxmoe.train.corpus import build_corpus, load_corpus  # noqa: E402


@dataclasses.dataclass
class Corpus:
    """Gathers the text, trains the tokenizer and writes token streams."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write."""


@dataclasses.dataclass
class Model:
    """Trains a model on a corpus; a second call with the same folder goes on where the first stopped."""

    corpus: Annotated[Path, tyro.conf.Positional]
    """Folder that `train.py corpus` wrote."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder for checkpoints and metrics."""
    config: Path = Path(__file__).resolve().parents[1] / "checkpoints/default/config.json"
    """config.json of the model."""
    train: Annotated[loop.TrainConfig, tyro.conf.arg(name="")] = loop.TrainConfig()
    minutes: float | None = None
    """Stop and save after this long."""
    save_every: int = 100
    """Steps between checkpoints."""


@dataclasses.dataclass
class Export:
    """Writes a trained model as a Hugging Face folder with a card that says what it is worth."""

    corpus: Annotated[Path, tyro.conf.Positional]
    """The corpus it was trained on."""
    run: Annotated[Path, tyro.conf.Positional]
    """Folder that `train.py model` wrote."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write."""
    config: Path = Path(__file__).resolve().parents[1] / "checkpoints/default/config.json"
    """config.json of the model."""
    train: Annotated[loop.TrainConfig, tyro.conf.arg(name="")] = loop.TrainConfig()


def bar() -> Progress:
    """Shows how far a training is, where somebody looks; an error is then the only line."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@dataclasses.dataclass
class Pregate:
    """Tunes a model whose routers choose one layer ahead (Pre-gated MoE), and says what that costs in held-out loss."""

    model: Annotated[Path, tyro.conf.Positional]
    """Hugging Face folder of the trained model."""
    corpus: Annotated[Path, tyro.conf.Positional]
    """Folder that `train.py corpus` wrote."""
    out: Annotated[Path, tyro.conf.Positional]
    """Hugging Face folder to write."""
    tune: Annotated[pregate.PregateConfig, tyro.conf.arg(name="")] = pregate.PregateConfig()
    minutes: float | None = None
    """Stop after this long."""
    json: Path | None = None
    """Write what was measured to this file."""


def pregate_model(args: Pregate) -> None:
    import tempfile

    from checkpoints.load import load_hf_or_checkpoint
    from jaxmoe.engine.model import load_model
    from pallas_kernels.dispatch import Kernels

    if args.json is not None:
        record.check_path(args.json)
    if not (args.model / "config.json").is_file():
        raise ValueError(f"{args.model}: no Hugging Face folder: it has no config.json")
    data = load_corpus(args.corpus)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_model(load_hf_or_checkpoint(args.model, Path(folder)), "float32", Kernels.default(), unroll=False)
    weights, spec = pregate.of_resident(loaded.spec, loaded.params, loaded.bank), pregate.pregated(loaded.spec)
    before, untuned = pregate.nats(pregate.pregated(spec, False), weights, data)["mean"], pregate.nats(spec, weights, data)["mean"]
    with bar() as progress:
        task = progress.add_task("tuning", total=args.tune.steps)
        for state, row in pregate.tune(spec, *weights, data, args.tune, args.minutes):
            last = state  # the next step takes its arrays
            progress.update(task, completed=row["step"], description=f"loss {row['nll']:.3f}")
    tuned = pregate.joined(last)
    after = pregate.nats(spec, tuned, data)["mean"]
    pregate.export(spec, tuned, args.model, args.out)
    print(f"{args.out}: held-out nats per token {before:.4f} as it was, {untuned:.4f} with routers that choose ahead, {after:.4f} tuned")
    if args.json is not None:
        found = {"as it was": before, "routers choose a layer ahead": untuned, f"the same after {row['step']} steps of tuning": after}
        rows = [{"name": name, "nats": nats, "change": math.expm1(nats - before)} for name, nats in found.items()]
        settings = {"model": args.model.name, **dataclasses.asdict(args.tune)}
        made = record.make_record(
            name="pregate", spec_hash=spec.hash(), settings=settings, seeds={"all": args.tune.seed}, timings={}, compile_seconds=0.0,
            bytes={}, counters={"rows": rows}, bound=record.make_bound("capacity", 1.0, math.exp(before - after), "of the likelihood a token had"),
        )  # fmt: skip
        record.write_record(args.json, made)


@dataclasses.dataclass
class Predictor:
    """Trains a predictor of routing on recorded traces, for generate.py --expert-predictor."""

    traces: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Traces of one model that hold token ids; a folder stands for all traces in it."""
    out: Path
    """File to write, .npz."""
    kind: Literal["path", "readme"] = "path"
    """ExpertFlow's routing-path predictor, or Read-ME's router outside the backbone."""
    steps: int = path_predictor.FitSettings().steps
    """Of the optimizer."""
    seed: int = 0
    """Of parameters and order."""


def predictor(args: Predictor) -> None:
    from jaxmoe.offload.trace import load_or_import

    record.check_path(args.out, "a predictor", ".npz")
    files = [file for path in args.traces for file in (sorted(path.glob("*.npz")) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"{', '.join(map(str, args.traces))}: no traces there")
    traces = [load_or_import(file) for file in files]
    with bar() as progress:
        task = progress.add_task("training", total=args.steps)

        def show(step: int, steps: int, loss: float) -> None:
            progress.update(task, completed=step, description=f"{loss:.1f} nats a token")

        settings = dataclasses.replace(path_predictor.FitSettings(), steps=args.steps)
        found = path_predictor.train(traces, args.kind, settings, args.seed, show)
    path_predictor.save(args.out, found, traces[0].meta)
    tokens = sum(len(trace.ids) for trace in traces)
    print(f"{args.out}: {args.kind} predictor of {traces[0].meta['model']}, trained on {tokens:,} tokens, {found.bytes / 1e6:.2f} MB")


def export(args: Export) -> None:
    config = json.loads(args.config.read_text())
    card.export(ModelSpec.from_hf(config), config, load_corpus(args.corpus), args.run, args.out, args.train)


def corpus(args: Corpus) -> None:
    build_corpus(args.out)


def model(args: Model) -> None:
    spec = ModelSpec.from_hf(json.loads(args.config.read_text()))
    data = load_corpus(args.corpus)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=args.train.steps)
        smooth = None
        for _, row in loop.train(spec, data, args.train, args.out, args.save_every, args.minutes):
            smooth = row["nll"] if smooth is None else 0.98 * smooth + 0.02 * row["nll"]
            rate = args.train.batch * args.train.length / row["seconds"]
            what = f"loss {row['nll']:.3f} (mean {smooth:.3f})  busiest {row['busiest']:.1f}x  {rate:.0f} tok/s"
            progress.update(task, completed=row["step"], description=what)


def main() -> int:
    """Runs; gives the exit code."""
    parsed = tyro.cli(
        Annotated[Corpus, tyro.conf.subcommand("corpus")]
        | Annotated[Model, tyro.conf.subcommand("model")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Pregate, tyro.conf.subcommand("pregate")]
        | Annotated[Predictor, tyro.conf.subcommand("predictor")],  # type: ignore[arg-type]
        description=__doc__,
    )
    commands = {Corpus: corpus, Model: model, Export: export, Predictor: predictor, Pregate: pregate_model}
    return run_command(lambda: commands[type(parsed)](parsed))


if __name__ == "__main__":
    sys.exit(main())
