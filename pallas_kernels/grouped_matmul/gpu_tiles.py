"""Tiles of the Hopper kernel (`gpu.py`): their sizes, what fits a multiprocessor, a choice by sizes alone, and the list of the tiles of a call."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, UInt16

from jaxmoe.formats import Quantized, pack_block
from pallas_kernels import tuned

MULTIPROCESSORS = 132
"""Of an H100 SXM."""
SHARED_BYTES = 233472
"""Shared memory of a multiprocessor; each block on it takes 1 KB more than it asks for."""
REGISTERS = 65536
"""32-bit registers of a multiprocessor."""
PRODUCER_REGISTERS = 40
"""Of a thread that only copies."""
SLAB = 8
"""Rows of a store: those of one tile of swizzled shared memory."""
HELD = 64
"""Rows of results that wait in shared memory at a time."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of tiles.

    Attributes:
        rows: rows of x in a tile, wgmma's N: 8 to 256, in steps of 8.
        cols: columns of the result per multiplying warpgroup, 64 or 128.
        warpgroups: warpgroups that multiply.
        depth: numbers along K in a stage.
        stages: stages of shared memory.
        band: tiles of columns that all tiles of rows go through before the next ones, so that both sides' tiles are found in L2.
        splits: parts of K, summed outside of the kernel; for few tiles.
        per_sm: blocks on a multiprocessor.
    """

    rows: int
    cols: int = 64
    warpgroups: int = 1
    depth: int = 128
    stages: int = 4
    band: int = 16
    splits: int = 1
    per_sm: int = 1

    @property
    def width(self) -> int:
        """Columns of the result in a block's tile."""
        return self.cols * self.warpgroups


Pool = UInt16[Array, "Z ..."] | Quantized
"""bfloat16 bits, or whole numbers with scales."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the choice of tiles depends on.

    Attributes:
        m, n, k: rows, columns and the length of the sums.
        groups: groups given.
        parts: matrices that share a tile of x: 1, or 2 for gate and up.
        bits: of a weight: 16, 8 or 4.
        group: numbers along K that share a scale; 0 without scales.
        out_bytes: of a number of the result.
    """

    m: int
    n: int
    k: int
    groups: int
    parts: int
    bits: int
    group: int
    out_bytes: int

    @staticmethod
    def of(x_MK: jax.Array, w: Pool, group_sizes: jax.Array, out_dtype: Any = jnp.float32) -> Problem:
        """The problem of a call: of `grouped_matmul` with a pool [Z, N, K], of `grouped_glu` with [Z, 2, F, K]. Abstract arrays will do.

        Raises:
            NotImplementedError: no config would do for it.
            ValueError: shapes that don't belong together.
        """
        if x_MK.dtype != jnp.bfloat16:
            raise NotImplementedError(f"the kernel multiplies bfloat16 rows; these are {x_MK.dtype}")
        if isinstance(w, Quantized):
            bits, group = w.bits, w.group
            if w.axis != -1:
                raise NotImplementedError(f"the kernel reads weights with K last (axis -1); these have it at {w.axis}")
        else:
            bits, group = 16, 0
            if w.dtype != jnp.uint16:
                raise NotImplementedError(f"the kernel reads bfloat16 weights held as uint16, or quantized ones; these are {w.dtype}")
        if jnp.dtype(out_dtype) not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(f"the kernel stores float32 or bfloat16, not {jnp.dtype(out_dtype)}")
        m, k = x_MK.shape
        parts, n = w.shape[1:-1] if w.ndim == 4 else (1, w.shape[1])
        if w.ndim not in (3, 4) or w.shape[-1] != k or (w.ndim == 4 and parts != 2):
            raise ValueError(f"expected a pool [Z, N, K] or [Z, 2, F, K] with K = {k}, got {list(w.shape)}")
        if n % 64:
            raise NotImplementedError(f"the kernel makes 64 columns at a time, and {n} is not a multiple of it")
        if k % 64:
            raise NotImplementedError(f"the kernel sums 64 numbers at a time, and K = {k} is not a multiple of it")
        problem = Problem(m, n, k, group_sizes.shape[0], parts, bits, group, jnp.dtype(out_dtype).itemsize)
        if group and (unit := problem.unit(64)) % 32:
            raise NotImplementedError(f"scales must hold for a multiple of 32 numbers in a row; with groups of {group} and K = {k} it is {unit}")
        return problem

    @property
    def block(self) -> int:
        """Numbers along K that lie in a piece of their own: a block of packed numbers, or one."""
        return pack_block(self.k) if self.bits == 4 else 1

    def unit(self, depth: int) -> int:
        """The longest run of weights' bytes with one scale (for each half of the bytes), at most 128: what one wgmma from registers sums over."""
        half = self.block // 2 if self.bits == 4 else 128
        return math.gcd(half, self.group, depth)

    def scales_in_stage(self, config: Config) -> int:
        """Groups along K that a stage holds the scales of."""
        return max(1, config.depth // self.group)

    def stage_bytes(self, config: Config) -> int:
        """Bytes of shared memory of one stage."""
        scales = self.scales_in_stage(config) * config.width * 4 if self.group else 0
        return self.parts * (config.width * config.depth * self.bits // 8 + scales) + config.rows * config.depth * 2

    def shared_bytes(self, config: Config) -> int:
        """Bytes of shared memory of a block."""
        out = config.warpgroups * (min(config.rows, HELD) + 2 * SLAB) * config.cols * self.out_bytes
        return config.stages * (self.stage_bytes(config) + 16) + out

    def registers(self, config: Config) -> int:
        """32-bit registers that a thread needs for sums and operands and some more: a little above what ptxas was seen to take."""
        tile = config.cols * config.rows // 128
        if not self.group:
            return self.parts * tile + 40
        operands = config.cols * self.unit(config.depth) // 256 * (8 // self.bits)
        held = self.parts * config.cols * config.depth * self.bits // 8 // 512
        return (self.parts + 1) * tile + operands + held + 24

    def why_not(self, config: Config) -> str:
        """What keeps `config` from being used; empty where nothing does."""
        c = config
        grouped = self.group and c.depth % self.group and self.group % c.depth
        checks = (
            (c.rows % SLAB or not 8 <= c.rows <= 256, f"tiles have 8 to 256 rows, in steps of 8, not {c.rows}"),
            (c.cols not in (64, 128), f"a warpgroup makes 64 or 128 columns, not {c.cols}"),
            (not 1 <= c.warpgroups <= 4, f"a block has 1 to 4 warpgroups that multiply, not {c.warpgroups}"),
            (c.width > 256, f"a block makes at most 256 columns, not {c.width}"),
            (self.n % c.width != 0, f"{self.n} columns are not a multiple of the tile's {c.width}"),
            (c.depth % 64 != 0 or c.depth > 256, f"a stage has 64 to 256 numbers along K in steps of 64, not {c.depth}"),
            (self.k % (c.depth * c.splits) != 0, f"K = {self.k} is not a multiple of {c.splits} x {c.depth}"),
            (c.depth % self.block != 0, f"a stage of {c.depth} numbers is not a multiple of the {self.block} that are packed together"),
            (grouped, f"a stage of {c.depth} cuts scales' groups of {self.group}"),
            (c.splits > 1 and (self.parts != 1 or self.out_bytes != 4), "K is split only for float32 results of one matrix"),
            (c.stages < 2, f"at least 2 stages, not {c.stages}"),
        )
        for bad, message in checks:
            if bad:
                return message
        if (size := self.shared_bytes(c)) > SHARED_BYTES // c.per_sm - 2048:
            return f"{size} bytes of shared memory are more than a multiprocessor has for each of {c.per_sm} blocks"
        if (size := self.registers(c)) > thread_registers(c):
            return f"{size} registers are more than the {thread_registers(c)} that a thread can have"
        return ""

    def check(self, config: Config) -> None:
        """Refuses a config that doesn't fit.

        Raises:
            NotImplementedError: with the number that is in the way.
        """
        if why := self.why_not(config):
            raise NotImplementedError(why)


def thread_registers(config: Config) -> int:
    """Registers of a thread that multiplies."""
    at_launch = min(255, REGISTERS // (128 * (config.warpgroups + 1) * config.per_sm)) // 8 * 8
    if not moves_registers(config):
        return at_launch
    return min(240, (at_launch * (config.warpgroups + 1) - PRODUCER_REGISTERS) // config.warpgroups // 8 * 8)


def moves_registers(config: Config) -> bool:
    """Whether the copying warpgroup hands registers to the others: only where they are alone on the multiprocessor and too many for a full share."""
    return config.warpgroups > 1 and config.per_sm == 1


def tuning_key(problem: Problem) -> dict[str, int]:
    """By what a measured config is looked up. Groups count that can have rows: a token's experts take the same tiles, alone or among all."""
    return dataclasses.asdict(problem) | {"groups": min(problem.groups, problem.m)}


def choose(problem: Problem) -> Config:
    """The config that was fastest where this problem, or one of about as many rows, was measured on this device; else the heuristic's.

    Raises:
        NotImplementedError: nothing fits.
    """
    measured = tuned.find("grouped_matmul", tuning_key(problem), ("m", "groups"))
    if measured is not None and not problem.why_not(config := Config(**measured)):
        return config
    return heuristic(problem)


def candidates(problem: Problem) -> list[Config]:
    """Configs that fit a problem, for a tuner: the legal ones of a coarse grid around the heuristic's rows, with as many stages as fit, up to 8."""
    middle = heuristic(problem).rows
    found = []
    for rows in (r for r in (middle // 2, middle, middle * 2) if 8 <= r <= 256):
        for cols, warpgroups, per_sm in ((c, g, s) for c in (64, 128) for g in (1, 2, 3, 4) for s in (1, 2, 3) if g * s <= 4):
            for depth, splits in ((d, s) for d in (64, 128, 192, 256) for s in (1, 2, 4)):
                config = _with_stages(problem, Config(rows, cols, warpgroups, depth, splits=splits, per_sm=per_sm))
                if config is not None and (splits == 1 or rows <= 16):
                    found.append(config)
    return found


def _with_stages(problem: Problem, config: Config) -> Config | None:
    """`config` with as many stages as fit, from 2 to 8; None if it isn't legal with any."""
    for stages in range(8, 1, -1):
        if not problem.why_not(staged := dataclasses.replace(config, stages=stages)):
            return staged
    return None


def heuristic(problem: Problem) -> Config:
    """A config by sizes alone.

    Rows for four times the mean group (and for where it starts), so that nearly every group is one tile, up to 128. Few rows: small blocks, two on a
    multiprocessor, that together keep well over 64 KB of copies under way, and K in parts where there would be less than one block for each
    multiprocessor. Many: two or three warpgroups that share a tile.

    Raises:
        NotImplementedError: nothing fits.
    """
    p, used = problem, min(problem.groups, problem.m)
    likely = min(p.m, 4 * p.m // used + SLAB - 1)
    rows = 8 if p.m <= SLAB else min(128, 1 << (likely - 1).bit_length())
    few = rows < 64
    if few:
        shapes = ((1, 2), (1, 1)) if p.bits == 16 else ((2, 2), (2, 1), (1, 2), (1, 1))
        tiles = [(g, d, s) for g, s in shapes for d in (128, 192, 256, 64)]
    else:
        tiles = [(g, d, 1) for g in (2, 3, 1) for d in (64, 128, 192)]
    for r in (r for r in (rows, 64, 32, 16, 8) if r <= rows):
        for warpgroups, depth, per_sm in tiles:
            config = _with_stages(p, Config(r, 64, warpgroups, depth, per_sm=per_sm))
            if config is None or (config.stages < 3 and p.k > 2 * depth):
                continue
            while few and used * (p.n // config.width) * config.splits < MULTIPROCESSORS:
                more = dataclasses.replace(config, splits=2 * config.splits)
                if p.why_not(more):
                    break
                config = more
            return config
    raise NotImplementedError(f"no tile fits {p}: {p.why_not(Config(8, depth=64, stages=2))}")


def most_tiles(problem: Problem, rows: int) -> int:
    """How many tiles of `rows` rows there can be: a group of s rows that starts at an odd place has up to (s + 6) // rows + 1 of them."""
    groups = min(problem.groups, problem.m)
    return groups + (problem.m + (SLAB - 2) * groups) // rows


def work_list(
    group_ids: jax.Array, group_sizes: jax.Array, starts: jax.Array | None, rows: int, most: int
) -> tuple[Int[Array, "G"], Int[Array, "G"], Int[Array, "G"], Int[Array, "G"], Int[Array, "T"]]:
    """Groups' matrices, first rows, sizes and how many tiles of rows they and those before have; and the group of each of `most` tiles.

    Two or three reductions over masks of [G, G] and [T, G]: cumulative sums, sorts and gathers are chains of kernels on a GPU. Tiles past the last
    one have no group.
    """
    g = group_sizes.shape[0]
    if starts is None:
        earlier_GG = jnp.arange(g)[:, None] > jnp.arange(g)[None, :]
        starts = jnp.where(earlier_GG, group_sizes[None, :], 0).sum(1)
    not_later_GG = jnp.arange(g)[:, None] >= jnp.arange(g)[None, :]
    ends_G = jnp.where(not_later_GG, tiles_of(starts, group_sizes, rows)[None, :], 0).sum(1)
    group_T = (ends_G[None, :] <= jnp.arange(most)[:, None]).sum(1)
    ids, starts, sizes, ends, groups = (a.astype(jnp.int32) for a in (group_ids, starts, group_sizes, ends_G, group_T))
    return ids, starts, sizes, ends, groups


def tiles_of(start: jax.Array, size: jax.Array, rows: int) -> jax.Array:
    """Tiles of `rows` rows of a group: from the slab that its first row lies in."""
    return jnp.where(size > 0, lax.div(lax.rem(start, SLAB) + size + (rows - 1), rows), 0)
