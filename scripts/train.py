"""Trains the small model: `train.py corpus OUT` gathers text, `train.py model CORPUS OUT` trains and resumes, `train.py export` writes the result."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxmoe.spec import ModelSpec  # noqa: E402
from jaxmoe.train import card, loop  # noqa: E402
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


if __name__ == "__main__":
    chosen = tyro.cli(
        Annotated[Corpus, tyro.conf.subcommand("corpus")]
        | Annotated[Model, tyro.conf.subcommand("model")]
        | Annotated[Export, tyro.conf.subcommand("export")],  # type: ignore[arg-type]
        description=__doc__,
    )
    {Corpus: corpus, Model: model, Export: export}[type(chosen)](chosen)
