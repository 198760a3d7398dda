"""Tiles of `tpu`'s grouped matmul: which sizes are legal and which to take, the bytes of VMEM that they need, and the list of work items."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxmoe.formats import PACK_BLOCK

VMEM = 56 * 2**20
"""Bytes of VMEM that the kernel may ask for. A core of v5p and of TPU7x has 64 MiB, one of v5e and of v6e 128."""
BLOCKS = 44 * 2**20
"""Bytes of it for blocks and scratch; the compiler's own temporaries take the rest."""
DECODE_BLOCK = 2 * 2**20
"""Bytes of weights in a step with few rows: long enough under way (0.6 us on TPU7x) to hide a step's overhead, and little to wait for at first."""
PREFILL_BLOCKS = 32 * 2**20
"""Bytes of weights with many rows, both buffers together."""
ONE_TILE = 64
"""Rows up to which all of them are one row tile, and average rows of a group up to which a step is bound by the weights' bytes."""
LANES = 128
SUBLANES = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """Rows of x, numbers along K, and columns of the output (of gate and of up each) in a step of the kernel."""

    rows: int
    k: int
    columns: int


@dataclasses.dataclass(frozen=True)
class Form:
    """What the kernel is built from: the problem's sizes and how its weights are held."""

    m: int
    k: int
    n: int
    groups: int
    parts: int  # matrices of an expert: 1, or gate and up
    kind: str  # "plain" bfloat16, "int8", "int4"
    group: int  # numbers that share a scale; 0 without scales
    out: jnp.dtype

    @property
    def weight_bytes(self) -> float:
        """Of one weight."""
        return {"plain": 2, "int8": 1, "int4": 0.5}[self.kind]


def heuristic(m: int, k: int, n: int, groups: int, *, parts: int = 1, kind: str = "plain", group: int = 0) -> Config:
    """Tile sizes by arithmetic on bytes; none of it is measured.

    Args:
        m, k, n, groups: rows, K, columns (of gate and of up each) and groups.
        parts: 1, or 2 with gate and up.
        kind: "plain" (bfloat16), "int8" or "int4".
        group: numbers that share a scale, of quantized weights.

    Raises:
        NotImplementedError: no tile fits into VMEM.
    """
    return choose(Form(m, k, n, groups, parts, kind, group, jnp.dtype(jnp.float32)))


def candidates(m: int, k: int, n: int, groups: int, *, parts: int = 1, kind: str = "plain", group: int = 0) -> list[Config]:
    """The tile sizes that are legal for these sizes and worth timing; arguments as in `heuristic`."""
    form = Form(m, k, n, groups, parts, kind, group, jnp.dtype(jnp.float32))
    average = m / min(groups, m)
    rows = [m] if m <= ONE_TILE else [r for r in (16, 32, 64, 128, 256, 512) if r <= min(m, max(8 * average, 64))]
    columns = sorted({min(n, c) for c in (128, 256, 384, 512, 768, 1024, 1536, 2048)})
    found = [Config(*sizes) for sizes in itertools.product(rows, legal_k(form), columns)]
    return [c for c in found if vmem_bytes(form, c) <= BLOCKS and c.k * c.columns * parts * form.weight_bytes >= 2**18]


def choose(form: Form) -> Config:
    """See `heuristic`."""
    if form.m <= ONE_TILE and (config := _one_tile(form)) is not None:
        return config
    average = form.m / min(form.groups, form.m)
    few = average <= ONE_TILE
    rows = form.m if form.m <= ONE_TILE else ONE_TILE if few else 128 if average <= 512 else 256
    # All of K, so that a matrix stays for all row tiles of its group. Half of the bytes are for each buffer.
    most = (DECODE_BLOCK if few else PREFILL_BLOCKS // 2) / (form.k * form.parts * form.weight_bytes)
    columns = max(LANES, min(int(most) // LANES * LANES, 1024 // form.parts))
    config = Config(rows, form.k, _even(form.n, columns))
    while vmem_bytes(form, config) > BLOCKS and config.columns > LANES:
        config = dataclasses.replace(config, columns=_even(form.n, (config.columns - 1) // LANES * LANES))
    for k in legal_k(form):
        if vmem_bytes(form, dataclasses.replace(config, k=k)) <= BLOCKS:
            return dataclasses.replace(config, k=k)
    raise NotImplementedError(f"K = {form.k} has no tile that fits into {BLOCKS} bytes of VMEM: {vmem_bytes(form, config)} with all of K at once")


def _one_tile(form: Form) -> Config | None:
    """Tiles for rows that make one row tile: no matrix is used twice, so K may be cut, and long rows of weights are read in one piece.

    Two column tiles at least, for the two cores of a v5p.
    """
    columns = _even(form.n, max(LANES, min(form.n // 2, 2048 // form.parts) // LANES * LANES))
    for k in legal_k(form):
        config = Config(form.m, k, columns)
        if k * columns * form.parts * form.weight_bytes <= DECODE_BLOCK and vmem_bytes(form, config) <= BLOCKS:
            return config
    return None


def _even(n: int, most: int) -> int:
    """Columns of a tile, at most `most` (a multiple of 128), such that the tiles are about equally wide."""
    if n <= most:
        return n
    return _round_up(-(-n // -(-n // most)), LANES)


def legal_k(form: Form) -> list[int]:
    """Numbers along K that a step may take: all, or a divisor in whole lanes of x and whole sublanes of scales; large ones first."""
    step = LANES if not form.group else math.lcm(LANES, form.group * (8 if form.parts == 1 else 1))
    return [form.k] + [k for k in range(form.k - form.k % step, 511, -step) if form.k % k == 0 and k != form.k]


def vmem_bytes(form: Form, c: Config) -> int:
    """Bytes of blocks (two of each) and scratch."""
    lanes = _round_up(c.columns, LANES)
    weights = c.k * lanes * form.parts * form.weight_bytes
    scales = 4 * lanes * form.parts * _round_up(c.k // form.group, 8) if form.group else 0
    rows = _round_up(c.rows, SUBLANES)
    blocks = weights + scales + 2 * rows * _round_up(c.k, LANES) + 4 * rows * lanes
    # A dot's result is held beside the sum that it is added to.
    return int(2 * blocks + (form.parts + 1) * 4 * rows * lanes + 2 * math.prod(scratch_shape(form, c) or (0,)))


def scratch_shape(form: Form, c: Config) -> tuple[int, ...] | None:
    """The shape of a step's unpacked weights, or of x in another order."""
    if direct(form, c):
        return (c.rows, c.k) if form.kind == "int4" else None
    return None if form.kind == "plain" else (form.parts, c.k, c.columns)


def direct(form: Form, c: Config) -> bool:
    """Whether quantized weights go to the matrix unit as whole numbers, and their sums are scaled: with few rows that is fewer operations."""
    return form.kind != "plain" and c.rows <= ONE_TILE and form.k % PACK_BLOCK == 0 and form.group % (PACK_BLOCK // 2) == 0


def check_config(form: Form, c: Config) -> None:
    """Refuses tile sizes that don't suit the shapes.

    Raises:
        NotImplementedError: with the number that is in the way.
    """
    if c.rows != form.m and (c.rows % SUBLANES or c.rows > form.m):
        raise NotImplementedError(f"row tiles are all of M = {form.m} or multiples of {SUBLANES} up to it, not {c.rows}")
    if c.k not in legal_k(form):
        raise NotImplementedError(f"K = {form.k} is cut into one of {legal_k(form)}, not {c.k}")
    if c.columns != form.n and (c.columns % LANES or c.columns > form.n):
        raise NotImplementedError(f"column tiles are multiples of {LANES} or all of N = {form.n}, not {c.columns}")


def work_items(
    group_ids: Int[Array, "G"], sizes: Int[Array, "G"], starts: Int[Array, "G"] | None, tile: int, count: int
) -> tuple[Int[Array, "G"], Int[Array, "T"], Int[Array, "T"], Int[Array, "T"], Int[Array, "T"]]:
    """The work items in the order of their rows.

    Sums over masks instead of scans and gathers: XLA makes them a few fusions, each of which costs it about a microsecond.

    Returns:
        How many items there are up to and with each group, [G]; and for up to `count` items, [count] each: pool id, row tile, first row of the group
        in it, and the last plus 1.
    """
    group = jnp.arange(sizes.shape[0])
    starts = jnp.sum(jnp.where(group[:, None] < group, sizes[:, None], 0), axis=0) if starts is None else starts
    first = starts // tile
    tiles = jnp.where(sizes > 0, (starts + sizes - 1) // tile - first + 1, 0)
    ends = jnp.sum(jnp.where(group[:, None] <= group, tiles[:, None], 0), axis=0)
    item = jnp.arange(count)[:, None]
    mine = (item >= ends - tiles) & (item < ends)
    row_tile = first + item - (ends - tiles)
    low = jnp.clip(starts - row_tile * tile, 0, tile)
    high = jnp.clip(starts + sizes - row_tile * tile, 0, tile)
    ids, tiles, lows, highs = (jnp.sum(jnp.where(mine, values, 0), axis=1).astype(jnp.int32) for values in (group_ids, row_tile, low, high))
    return ends.astype(jnp.int32), ids, tiles, lows, highs


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
