"""The one error that everything here raises for files that are missing, damaged or of another model."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A folder of weights that cannot be used as asked; the message is one line that names the file or the tensor."""
