"""How arrays lie in a TPU's memory: in tiles, so that the last two axes are filled up, and with that axis last that fills up least.

The rules are XLA's for TPUs, found by asking its compiler for the default layout of some thousand shapes (`get_default_layout` of compile-only v5e,
v5p, v6e and TPU7x devices, which agree; jax 0.10.2), and for the argument bytes of programs of one array. On CPUs and GPUs nothing is filled up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

LANES = 128
"""Numbers in the last axis of a tile."""


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _rows(n: int, itemsize: int) -> int:
    """Rows of a tile for an axis of n, the last but one: 8, or as few as hold n and fill a 32-bit word; bytes that divide so go by 32."""
    if itemsize == 1 and n % 32 == 0:
        return 32
    fewest = max(1, 4 // itemsize)
    return next((rows for rows in (1, 2, 4, 8) if rows >= fewest and n <= rows), 8)


def _vector(n: int, itemsize: int) -> int:
    """Numbers in a tile of an array of one axis: a power of two from 512 bytes to 1,024 numbers."""
    return next((size for size in (128, 256, 512, 1024) if size * itemsize >= 512 and n <= size), 1024)


@functools.lru_cache(maxsize=65536)
def padded_size(shape: tuple[int, ...], itemsize: int, order: tuple[int, ...] | None = None) -> int:
    """Numbers that an array takes on a TPU, those that fill its tiles up included.

    Args:
        shape: of the array.
        itemsize: bytes of a number.
        order: its axes from the outermost to the last in memory; None for `default_order`.
    """
    if len(shape) < 2:
        n = shape[0] if shape else 1
        return _up(n, _vector(n, itemsize))
    order = default_order(shape, itemsize) if order is None else order
    *outer, second, last = (shape[axis] for axis in order)
    return math.prod(outer) * _up(second, _rows(second, itemsize)) * _up(last, LANES)


@functools.lru_cache(maxsize=65536)
def default_order(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The order of axes, outermost first, that XLA for TPUs gives an array about which nothing is said.

    The last two axes are those that fill up least; of equal ones the last as they are written, first for the last place, then for the one before.
    """
    if len(shape) < 2:
        return tuple(range(len(shape)))
    axes = range(len(shape))
    total = math.prod(shape)
    if total == 0:
        return tuple(axes)

    def cost(pair: tuple[int, int]) -> int:
        last, second = pair
        outer = total // (shape[last] * shape[second])
        return outer * _up(shape[last], LANES) * _up(shape[second], _rows(shape[second], itemsize))

    pairs = [(last, second) for last in reversed(axes) for second in reversed(axes) if last != second]
    last, second = min(pairs, key=cost)
    return (*(axis for axis in axes if axis not in (last, second)), second, last)


def held_order(shape: Sequence[int], axes: Sequence[str | None], itemsize: int = 2) -> tuple[int, ...]:
    """The order of axes in which a TPU's steps take a weight without copying it, nearly as XLA chooses where it may (`Layout.AUTO`).

    Experts, embeddings and output matrices stay as they are written: the kernels and the look-up read them in place, and another order would be
    undone by a copy of all of them. So do the hidden widths of dense networks, unless they are less than a row of a tile. Projections to heads
    [..., D, H, C], which are multiplied with as [D, H * C], stay too where whole tiles of H rows and C columns exist; else D goes last. All others,
    and those to one head, have `default_order`.

    Args:
        shape: of one device's part.
        axes: logical names (`jaxmoe.spec.Leaf.axes`), with or without that of layers.
        itemsize: bytes of a number.
    """
    n, shape = len(shape), tuple(shape)
    written = tuple(range(n))
    if "experts" in axes or "vocab" in axes or (axes and axes[-1] in ("mlp_hidden", "shared_hidden") and shape[-1] >= LANES):
        return written
    if len(axes) >= 3 and axes[-2] in ("heads", "kv_heads") and axes[-3] != "layers" and shape[-2] > 1:
        whole = padded_size(shape, itemsize, written) == math.prod(shape)
        return written if whole else (*written[:-3], n - 2, n - 1, n - 3)
    return default_order(shape, itemsize)
