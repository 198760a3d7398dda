"""Slices of quantized experts as they lie on disk, and the float32 numbers that they stand for, in numpy.

The format is `jaxmoe.formats.Quantized` with K before the last axis; this file knows no folders.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from checkpoints.reading import Box, covered, volume
from jaxmoe import formats


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a leaf [..., K, N] is held: `bits` 8 or 4, a scale for `group` numbers along K, of which there are `k`."""

    bits: int
    group: int
    k: int

    @property
    def block(self) -> int:
        """Numbers along K that are packed together."""
        return formats.pack_block(self.k) if self.bits == 4 else 1

    def widened(self, box: Box) -> Box:
        """The smallest box around one of the weights that has whole groups and whole packed blocks along K."""
        step = math.lcm(self.group, self.block)
        start, stop = box[-2]
        return (*box[:-2], (start // step * step, min(self.k, -(-stop // step) * step)), box[-1])

    def values_box(self, box: Box) -> Box:
        """Where the numbers of a widened box lie in the array of values."""
        return (*box[:-2], (box[-2][0] * self.bits // 8, box[-2][1] * self.bits // 8), box[-1])

    def scales_box(self, box: Box) -> Box:
        """Where the scales of a box lie; those of groups that it has a part of as well."""
        return (*box[:-2], (box[-2][0] // self.group, -(-box[-2][1] // self.group)), box[-1])

    def nbytes(self, boxes: Sequence[Box]) -> int:
        """Bytes on disk of some boxes' own numbers, which don't overlap, and of their scales, which may: those count once."""
        return sum(map(volume, boxes)) * self.bits // 8 + 4 * covered([self.scales_box(box) for box in boxes if volume(box)])

    def dequantize(self, values: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """The float32 weights of a widened box, as `formats.dequantize` computes them.

        Args:
            values: int8 [..., K, N], or [..., K / 2, N] with 4 bits.
            scales: float32 [..., K / group, N].
        """
        numbers = self._unpacked(values) if self.bits == 4 else values
        return numbers.astype(np.float32) * np.repeat(scales, self.group, axis=-2)

    def _unpacked(self, values: np.ndarray) -> np.ndarray:
        """int8 [..., K / 2, N] to [..., K, N]; K is whole blocks of the leaf's, whose size doesn't follow from a slice."""
        *outer, half_k, n = values.shape
        blocks = values.reshape(*outer, 2 * half_k // self.block, self.block // 2, n)
        return np.asarray(formats.unpack_int4(blocks, blocks.ndim - 2)).reshape(*outer, 2 * half_k, n)
