"""What scripts that run a model begin with: prompts, the kernels of the device, and the checkpoint, converted if need be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from checkpoints.load import Checkpoint, load_hf_or_checkpoint, read_spec
from jaxmoe import formats
from jaxmoe.engine import steps
from jaxmoe.engine.generate import Request, check_requests
from jaxmoe.engine.model import Model, load_model
from jaxmoe.engine.observing import check_room
from jaxmoe.engine.text import Tokenizer
from pallas_kernels.dispatch import Kernels


def find_kernels(fast: bool = False, pallas: bool = True) -> Kernels:
    """The kernels of the default device.

    Args:
        fast: let results depend in their last bits on what is around them, on the CPU.
        pallas: our own kernels, on GPUs and TPUs.

    Raises:
        ValueError: JAX_PLATFORMS names a device that is not there.
    """
    try:
        return Kernels.default(row_invariant=not fast, pallas=pallas)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def open_model(folder: Path, cache: Path, console: Console) -> Checkpoint:
    """Opens a converted folder, or a Hugging Face folder that is converted into `cache` first, showing how far that is."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("converting", total=None, visible=False)

        def show(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, visible=True)

        return load_hf_or_checkpoint(folder, cache / "converted", None, show)


def model_dtype(folder: Path, asked: str | None) -> str:
    """In which a folder's model runs: as asked, or float32 on the CPU and the checkpoint's own elsewhere.

    Raises:
        ValueError: a dtype that there isn't.
    """
    if asked is not None:
        formats.leaf_dtype(asked)
        return asked
    return "float32" if jax.default_backend() == "cpu" else read_spec(folder).precision.params


def open_resident(folder: Path, dtype: str | None, cache: Path) -> Model:
    """A folder's model with all experts on the device; converted, and programs kept, in `cache`.

    Raises:
        ValueError: a dtype that there isn't, or experts that don't fit.
    """
    kernels, dtype = find_kernels(), model_dtype(folder, dtype)
    check_room(read_spec(folder).with_precision(dtype))
    jax.config.update("jax_compilation_cache_dir", str(cache / "compiled"))
    return load_model(load_hf_or_checkpoint(folder, cache / "converted", None), dtype, kernels)


def prompt_lines(path: Path) -> list[str]:
    """A file's prompts, one a line; empty lines are none.

    Raises:
        ValueError: it isn't UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    return [line for line in text.split("\n") if line]  # not splitlines, which also splits at form feeds and at U+2028


def prompt_requests(folder: Path, prompts: Sequence[str], new_tokens: int) -> tuple[Tokenizer, list[Request]]:
    """The tokenizer of a folder's model, and a request for every prompt.

    Raises:
        ValueError: no model, no tokenizer, or a prompt that the model can't read.
    """
    spec = read_spec(folder)  # first, so that a folder that holds no model is refused as such, not for its lack of a tokenizer
    tokenizer = Tokenizer(folder)
    requests = [Request(tuple(tokenizer.encode(prompt)), new_tokens) for prompt in prompts]
    check_requests(spec, requests)
    return tokenizer, requests


def check_rows(count: int) -> None:
    """Refuses more prompts than one run takes. Raises ValueError."""
    if count > steps.ROW_BUCKETS[-1]:
        raise ValueError(f"{count} prompts are more than the {steps.ROW_BUCKETS[-1]} that one run takes: split the file")
