"""What a conversion asks of whoever quantizes weights on the way: a callable over columns, and what its numbers look like on disk.

How to round is not decided here: `jaxmoe.compress` has quantizers. Numbers lie as `jaxmoe.formats.Quantized` describes them, with K as the axis
before the last.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from checkpoints.errors import CheckpointError
from jaxmoe import formats
from jaxmoe.spec import Leaf

VALUES, SCALES = "values", "scales"
"""What a quantized leaf's two arrays are called, below the leaf's own path."""

Rounding = Callable[[str, int, np.ndarray, slice], tuple[np.ndarray, np.ndarray]]
"""`(leaf path, expert, w [K, n] float32, which columns these are) -> (numbers [K, n] int8, scales [K / group, n] float32)`: columns are given in
pieces, and must not depend on each other. It is called from one thread, which is not the one that called `convert`."""


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How routed experts are quantized.

    Attributes:
        method: a name for the manifest; folders of another method are other conversions.
        bits: 8 or 4.
        group: numbers along K that share a scale.
        round: see `Rounding`.
    """

    method: str
    bits: int
    group: int
    round: Rounding = dataclasses.field(compare=False)

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.group < 1:
            raise ValueError(f"{self.bits} bits in groups of {self.group}: 8 or 4 bits, and groups of at least one number, can be stored")

    def describe(self) -> dict:
        """For the manifest."""
        return {"method": self.method, "bits": self.bits, "group": self.group}

    @property
    def per_byte(self) -> int:
        """Numbers in a byte."""
        return 8 // self.bits

    def step(self, k: int) -> int:
        """Numbers along K that can't be told apart: chunks along K hold whole multiples of this."""
        return math.lcm(self.group, formats.pack_block(k)) if self.bits == 4 else self.group

    def leaves(self, leaf: Leaf) -> tuple[Leaf, Leaf]:
        """The arrays of values and scales that stand for a plain leaf [E, K, N]."""
        e, k, n = leaf.shape
        return (
            Leaf((e, k // self.per_byte, n), np.dtype(np.int8), leaf.axes),
            Leaf((e, k // self.group, n), np.dtype(np.float32), leaf.axes),
        )

    def chunks(self, chunk: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """The parts of values and scales that stand for [K, N] weights."""
        k, n = chunk
        return (k // self.per_byte, n), (k // self.group, n)

    def check(self, path: str, leaf: Leaf) -> str | None:
        """What keeps a leaf from being quantized so, if anything does."""
        k = leaf.shape[1]
        if k % self.group:
            fitting = [g for g in (16, 32, 64, 128, 256) if k % g == 0]
            return f"leaf {path} has {k} numbers along K, no whole number of groups of {self.group}: {_choices(fitting)}"
        if self.bits == 4 and k % 2:
            return f"leaf {path} has {k} numbers along K, which 4-bit weights can't pair"
        return None

    def apply(self, path: str, expert: int, w: np.ndarray, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        """Columns of an expert's matrix as they are stored.

        Args:
            w: [K, n] float32.

        Returns:
            `(values [K, n] or [K / 2, n] int8, scales [K / group, n] float32)`.

        Raises:
            CheckpointError: weights that aren't finite, or a quantizer that breaks its contract.
        """
        if not np.isfinite(w).all():
            raise CheckpointError(f"leaf {path}, expert {expert}: has weights that are not finite, which can't be quantized")
        try:
            numbers, scales = self.round(path, expert, w, columns)
        except (OSError, ValueError) as error:  # which would otherwise be taken for the disk's
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"the quantizer {self.method!r} failed at {path}, expert {expert}: {error}") from error
        k, n = w.shape
        shapes = numbers.shape == (k, n) and scales.shape == (k // self.group, n)
        if not shapes or numbers.dtype != np.int8 or scales.dtype != np.float32:
            raise CheckpointError(
                f"the quantizer {self.method!r} gave {numbers.dtype}{list(numbers.shape)} and {scales.dtype}{list(scales.shape)} for {path} {[k, n]}"
            )
        most = 2 ** (self.bits - 1)
        if self.bits < 8 and numbers.size and not (-most <= numbers.min() and numbers.max() < most):
            raise CheckpointError(
                f"the quantizer {self.method!r} gave {numbers.min()} to {numbers.max()} for {path}: {self.bits} bits hold {-most} to {most - 1}"
            )
        if not np.isfinite(scales).all():
            raise CheckpointError(f"the quantizer {self.method!r} gave scales that are not finite for {path}, expert {expert}")
        # copies: chunks are still being written when a quantizer that keeps its arrays fills them again
        return (formats.pack_int4(numbers[None], 1)[0] if self.bits == 4 else numbers.copy()), scales.copy()


def _choices(groups: list[int]) -> str:
    return f"groups of {', '.join(map(str, groups))} would do" if groups else "no usual group would do"
