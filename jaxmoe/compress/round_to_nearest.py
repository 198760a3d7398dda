"""The plainest quantizer: every number to the nearest of its group's steps, symmetric about zero. What others are compared with."""

from __future__ import annotations

import numpy as np

from checkpoints.quantizer import Quantizer

METHOD = "round_to_nearest"


def quantize_columns(w: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounds columns, as `jaxmoe.formats.quantize` does (whose scales XLA may round otherwise in their last bit).

    Args:
        w: [K, n] float32, finite; K a multiple of `group`.
        bits: 8 or 4.
        group: numbers along K that share a scale.

    Returns:
        `(numbers [K, n] int8, scales [K / group, n] float32)`; a group of zeros has the scale 0.
    """
    k, n = w.shape
    grouped = w.reshape(k // group, group, n)
    largest = np.float32(2 ** (bits - 1) - 1)
    scales = np.maximum(grouped.max(1), -grouped.min(1)) / largest
    steps = np.where(scales == 0, np.float32(1), scales)
    numbers = np.empty((k, n), np.int8)
    np.rint(grouped / steps[:, None], out=numbers.reshape(grouped.shape), casting="unsafe")
    return numbers, scales


def quantizer(bits: int, group: int = 128) -> Quantizer:
    """For `checkpoints.convert`.

    Raises:
        ValueError: bits other than 8 and 4, or a group that isn't positive.
    """
    if bits not in (4, 8):
        raise ValueError(f"weights are quantized to 4 or 8 bits, not {bits}")
    if group < 1:
        raise ValueError(f"a group of {group} numbers: at least one is needed")
    return Quantizer(METHOD, bits, group, lambda path, expert, w, columns: quantize_columns(w, bits, group))
