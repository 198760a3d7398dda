"""What scripts that run a model begin with: the kernels of the device, and the checkpoint, converted if need be."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from checkpoints.load import Checkpoint, load_hf_or_checkpoint
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
