"""Downloads a model from the Hugging Face hub, where the user asks for it by `hub:ORG/NAME[@REVISION]`; nothing else here uses the network."""

from __future__ import annotations

import os
import re
from pathlib import Path

from checkpoints.errors import CheckpointError

PREFIX = "hub:"
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def is_hub(source: str | os.PathLike) -> bool:
    """Whether a source is meant to be downloaded."""
    return str(source).startswith(PREFIX)


def download(source: str) -> Path:
    """The local folder of a hub model; files that are there already aren't fetched again, and half-fetched ones go on.

    Args:
        source: 'hub:ORG/NAME', or 'hub:ORG/NAME@REVISION' for a branch, tag or commit.

    Returns:
        The snapshot's folder in the hub's cache, whose name is the commit.

    Raises:
        CheckpointError: a malformed name, no `huggingface_hub`, no such model or revision, or no connection.
    """
    match = _ID.fullmatch(source.removeprefix(PREFIX))
    if match is None:
        raise CheckpointError(f"{source}: not a hub model: write {PREFIX}ORG/NAME or {PREFIX}ORG/NAME@REVISION")
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(f"{source}: downloading needs huggingface_hub: pip install 'jaxmoe[hub]'") from None
    try:
        folder = huggingface_hub.snapshot_download(
            match["name"], revision=match["revision"], allow_patterns=_PATTERNS, ignore_patterns=["*/*"]
        )
    except Exception as error:  # the hub's errors have no base of their own, and those of its transport show through
        raise CheckpointError(f"{source}: could not be downloaded: {' '.join(str(error).split())}") from error
    return Path(folder)
