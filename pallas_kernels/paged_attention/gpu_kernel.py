"""The Mosaic GPU kernel behind `gpu.paged_attention`: one block attends with one tile of query rows over its share of a sequence's keys.

A block loops over tiles of `block_keys` keys. The copy engine (TMA) brings their pages into a ring of stages in shared memory; scores and
values are two tensor core products (wgmma) with an online softmax, in powers of two, between them. Two warpgroups share the stages in one of
two ways: each has 64 rows of its own, and a stage is read once for 128 rows ("rows"); or, where 64 rows of wide values (MLA) would not fit into
the registers of one, the first makes the scores and half of the value columns, the second the other half ("columns").

Weights of the values (p) pass through shared memory, and not as a product's operand in registers, because only references can be interpreted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import dot_with_rows

ROWS = 64
"""Rows of a warpgroup's tile: wgmma's M."""
SEQUENCE, POSITION, COUNT, KEYS, FIRST, BEGIN, END, LAST_PAGE = range(8)
"""What a tile's record of integers says: its sequence; the position of its first row; how many query rows it has; the keys of the sequence; the
position of the sequence's first row; its first key tile, and the one past its last; the sequence's last page (an index of the page table)."""
INPUTS = ("q", "k", "v", "k_scales", "v_scales", "bias", "tree", "table", "tiles")
"""Operands by name, in the kernel's order; those that are None are left out."""
NUMBERS = ("k_scales", "v_scales", "bias")
"""Those with one float32 a key; in shared memory they lie in one array, since each is aligned to 1024 bytes."""
COPIED = ("k", "v", *NUMBERS)
"""Those that are brought in page by page."""

_LOG2E = math.log2(math.e)
_WGMMA = plgpu.Layout.WGMMA
_PER_ROW, _PER_KEY = _WGMMA.reduce(1), _WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that is static about a call.

    Attributes:
        tiles, head_tiles, splits: the grid.
        kv_heads: of the pages; each has `head_tiles // kv_heads` head tiles.
        group: query heads in a tile.
        stored_rows: rows of a tile in the operands: all of its warpgroups', or a multiple of 8 below 64.
        channels, values: widths of keys and values.
        width: keys of a page.
        share: two warpgroups share a block by "rows" or by "columns"; None: there is one.
        tree_words: words of a row's tree mask; 0 for none.
    """

    tiles: int
    head_tiles: int
    splits: int
    kv_heads: int
    group: int
    stored_rows: int
    channels: int
    values: int
    width: int
    block_keys: int
    stages: int
    share: Literal["rows", "columns"] | None
    tree_words: int
    scale: float
    window: int | None
    soft_cap: float | None
    interpret: Any

    @property
    def warpgroups(self) -> int:
        return 2 if self.share else 1

    @property
    def tile_rows(self) -> int:
        """Rows of all warpgroups."""
        return 2 * ROWS if self.share == "rows" else ROWS

    @property
    def columns(self) -> int:
        """Value columns of a warpgroup."""
        return self.values // 2 if self.share == "columns" else self.values

    @property
    def chunk(self) -> int:
        """Value columns of one product."""
        return 128 if self.columns % 128 == 0 else 64

    @property
    def piece(self) -> int:
        """Keys of one copy."""
        return min(self.width, self.block_keys)


def _swizzled(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory for products: rows of 64 elements, of 128 or 64 bytes, such that neither product meets bank conflicts."""
    swizzle = 64 * jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(swizzle)))


def scratch(plan: Plan, given: set[str]) -> dict[str, Any]:
    """Shared memory and barriers of a block that has the operands `given`; the large ones first, as each of those is aligned."""
    keys, stages, quantized = plan.block_keys, plan.stages, "k_scales" in given
    held = jnp.int8 if quantized else jnp.bfloat16
    out = {
        "q": _swizzled((plan.tile_rows // ROWS, ROWS, plan.channels)),
        "p": _swizzled((plan.tile_rows // ROWS, ROWS, keys)),
        "k": _swizzled((stages, keys, plan.channels), held),
    }
    if "v" in given:
        out["v"] = _swizzled((stages, keys, plan.values), held)
    if quantized:
        out["wide_k"] = _swizzled((keys, plan.channels))
        if "v" in given:
            out["wide_v"] = _swizzled((keys, plan.values))
    if plan.stored_rows < ROWS:
        out["o"] = plgpu.SMEM((ROWS, 64), jnp.float32)
    if plan.tree_words:
        out["tree"] = plgpu.SMEM((plan.tree_words, plan.tile_rows), jnp.int32)
    lines = len([name for name in NUMBERS if name in given]) * stages + (plan.share == "columns")
    if lines:
        out["numbers"] = plgpu.SMEM((lines, keys), jnp.float32)
    return out | _barriers(plan, given)


def _barriers(plan: Plan, given: set[str]) -> dict[str, Any]:
    copied = [name for name in COPIED if name in given]
    out = {
        "q_here": plgpu.Barrier(num_barriers=plan.tile_rows // ROWS),
        "here": plgpu.Barrier(num_arrivals=len(copied) * (plan.block_keys // plan.piece), num_barriers=plan.stages),
    }
    if plan.tree_words:
        out["tree_here"] = plgpu.Barrier()
    if plan.share:
        out["free"] = plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages)
        if "k_scales" in given:
            out["widened"] = plgpu.Barrier(num_arrivals=2)
        elif plan.share == "rows":
            out["cleared"] = plgpu.Barrier(num_arrivals=2)
    if plan.share == "columns":
        out["weighed"] = plgpu.Barrier()
    return out


def shared_bytes(plan: Plan, given: set[str]) -> int:
    """Bytes of shared memory that a block takes, with those for barriers; jax aligns each array to 1024."""
    refs = [ref for ref in scratch(plan, given).values() if not isinstance(ref, plgpu.Barrier)]
    return sum(-(-math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize // 1024) * 1024 for ref in refs) + 256


def run(plan: Plan, operands: dict[str, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel.

    Args:
        plan: what is static.
        operands: by the names of `INPUTS`. q bfloat16 [tiles, head_tiles, stored_rows, C]; k, v as in `types.Pages`, but bfloat16 where they are
            not int8, and their scales and bias; tree int32 [tiles, tree_words, tile_rows]; table int32 [B, X]; tiles int32 [tiles, 8].

    Returns:
        o float32 [splits, tiles, head_tiles, stored_rows, V] and, for all `tile_rows`, m and l as float32 [splits, tiles, head_tiles, 2, tile_rows].
        A block without key tiles writes 0, -inf and 0.
    """
    names = [name for name in INPUTS if operands.get(name) is not None]
    held = scratch(plan, set(names))

    def body(*refs):
        block = _Block(plan, dict(zip(names, refs, strict=False)), *refs[len(names) :])
        threads = {"collective_axes": "warpgroup"} if plan.share else {}
        pl.run_scoped(lambda *smem: block.attend(dict(zip(held, smem, strict=True))), *held.values(), **threads)

    lead = (plan.splits, plan.tiles, plan.head_tiles)
    threads: dict[str, Any] = {"num_threads": 2, "thread_name": "warpgroup"} if plan.share else {}
    kernel = pl.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((*lead, plan.stored_rows, plan.values), jnp.float32),
            jax.ShapeDtypeStruct((*lead, 2, plan.tile_rows), jnp.float32),
        ],
        # The head moves fastest: blocks of a latent head read the same keys at the same time.
        mesh=plgpu.Mesh(grid=lead, grid_names=("split", "tile", "head"), **threads),
        # No reduction crosses warps, so that none needs shared memory.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=plan.interpret,
        name="paged_attention",
    )
    return tuple(kernel(*(operands[name] for name in names)))


class _Block:
    """What a block knows while it is traced: its place in the grid, its share of the key tiles, its operands."""

    def __init__(self, plan: Plan, refs: dict[str, Any], o_ref: Any, ml_ref: Any):
        self.plan, self.refs, self.quantized = plan, refs, "k_scales" in refs
        self.split, self.head = lax.axis_index("split"), lax.axis_index("head")
        self.tile = plan.tiles - 1 - lax.axis_index("tile")  # a prompt's last rows see most keys, so they begin
        self.warpgroup = lax.axis_index("warpgroup") if plan.share else jnp.int32(0)
        self.kv_head = lax.div(self.head, jnp.int32(plan.head_tiles // plan.kv_heads))
        self.o_ref, self.ml_ref = o_ref.at[self.split, self.tile, self.head], ml_ref.at[self.split, self.tile, self.head]
        record = functools.partial(lambda tiles, field: tiles[self.tile, field], refs["tiles"])
        self.sequence, self.position, self.rows, self.keys = (record(field) for field in (SEQUENCE, POSITION, COUNT, KEYS))
        self.first_row, self.last_page = record(FIRST), record(LAST_PAGE)
        begin, end = _share(record(BEGIN), record(END), self.split, plan.splits)
        self.begin, self.count = begin, end - begin

    def _cast(self, x: jax.Array, layout: Any) -> jax.Array:
        """Layouts mean nothing to the interpreter, and jax 0.10.2's does not know how to ignore them."""
        return x if self.plan.interpret else plgpu.layout_cast(x, layout)

    def _full(self, shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
        return self._cast(jnp.full(shape, value, jnp.float32), layout)

    def _iota(self, shape: tuple[int, ...], axis: int, layout: Any) -> jax.Array:
        return self._cast(lax.broadcasted_iota(jnp.int32, shape, axis), layout)

    def _leading(self, f: Callable[[], None]) -> None:
        """`f()` by one warpgroup."""
        if self.plan.share:
            pl.when(self.warpgroup == 0)(f)
        else:
            f()

    def attend(self, smem: dict[str, Any]) -> None:
        self.smem = smem
        plan = self.plan
        pl.when(self.count > 0)(self._load_first)
        if plan.share == "columns":
            pl.when(self.warpgroup == 0)(lambda: self._weigh_and_sum(column=0))
            pl.when(self.warpgroup == 1)(lambda: self._sum(column=plan.columns))
        else:
            self._weigh_and_sum(column=0)

    def _load_first(self) -> None:
        """Starts the copies of what stays, and fills all stages."""
        plan, smem = self.plan, self.smem
        if plan.share == "columns":
            self._leading(self._load_q)
        else:
            self._load_q()
        if plan.tree_words:
            self._leading(lambda: plgpu.copy_gmem_to_smem(self.refs["tree"].at[self.tile], smem["tree"], smem["tree_here"]))
        for i in range(plan.stages):
            self._leading(functools.partial(self._load_if_any, jnp.int32(i)))

    def _load_if_any(self, i: jax.Array) -> None:
        pl.when(i < self.count)(lambda: self._load(i))

    def _wait_for_q(self) -> None:
        plgpu.barrier_wait(self.smem["q_here"].at[self._of_rows])
        if self.plan.tree_words:
            plgpu.barrier_wait(self.smem["tree_here"])

    @property
    def _of_rows(self) -> jax.Array | int:
        """Which rows of the tile are this warpgroup's."""
        return self.warpgroup if self.plan.share == "rows" else 0

    def _load_q(self) -> None:
        rows, at = min(self.plan.stored_rows, ROWS), self._of_rows
        source = self.refs["q"].at[self.tile, self.head, pl.ds(at * ROWS, rows)]
        plgpu.copy_gmem_to_smem(source, self.smem["q"].at[at, pl.ds(0, rows)], self.smem["q_here"].at[at])

    def _load(self, i: jax.Array) -> None:
        """Starts the copies of the block's key tile `i` into its stage."""
        plan, smem, stage = self.plan, self.smem, lax.rem(i, jnp.int32(self.plan.stages))
        for j in range(plan.block_keys // plan.piece):
            key = (self.begin + i) * plan.block_keys + j * plan.piece
            page = self.refs["table"][self.sequence, jnp.minimum(lax.div(key, jnp.int32(plan.width)), self.last_page)]
            keys = pl.ds(lax.rem(key, jnp.int32(plan.width)), plan.piece)
            for name in COPIED:
                if name in self.refs:
                    ref = self.refs[name]
                    head = self.kv_head if ref.shape[1] > 1 else 0
                    whole = self._numbers(name, stage) if name in NUMBERS else smem[name].at[stage]
                    target = whole.at[pl.ds(j * plan.piece, plan.piece)]
                    plgpu.copy_gmem_to_smem(ref.at[page, head, keys], target, smem["here"].at[stage])

    def _numbers(self, name: str, stage: jax.Array | int) -> Any:
        """Where a stage's scales or bias are; "alpha" comes last."""
        before = [n for n in NUMBERS if n in self.refs and name not in NUMBERS[: NUMBERS.index(n) + 1]]
        return self.smem["numbers"].at[len(before) * self.plan.stages + stage]

    def _weigh_and_sum(self, column: int) -> None:
        """Scores, softmax, and the value columns from `column` on, of this warpgroup's rows."""
        plan, smem = self.plan, self.smem
        bounds = self._bounds()
        pl.when(self.count > 0)(self._wait_for_q)

        def step(i, carry):
            sums, m, l = carry
            stage = lax.rem(i, jnp.int32(plan.stages))
            plgpu.barrier_wait(smem["here"].at[stage])
            k, v = self._widened(stage)
            s, seen = self._scores(i, stage, k, bounds)
            highest = jnp.maximum(m, s.max(axis=1))
            base = jnp.where(highest == -jnp.inf, 0.0, highest)
            alpha = jnp.exp2(m - base)
            p = jnp.exp2(s - self._per_row(base, s.shape))
            l = l * alpha + p.sum(axis=1)
            if self.quantized:
                scales = "v_scales" if "v_scales" in self.refs else "k_scales"
                p = jnp.where(seen, p * self._per_key(self._numbers(scales, stage), s.shape), 0.0)
            smem["p"].at[self._of_rows][...] = p.astype(jnp.bfloat16)
            if plan.share == "columns":
                self._numbers("alpha", 0)[...] = alpha
            plgpu.commit_smem()
            if plan.share == "columns":
                plgpu.barrier_arrive(smem["weighed"])
            sums = self._add_values(i, sums, alpha, v, column)
            self._leave(i, stage)
            return sums, highest, l

        start = self._full((ROWS,), -jnp.inf, _PER_ROW), self._full((ROWS,), 0.0, _PER_ROW)
        sums, m, l = lax.fori_loop(0, self.count, step, (self._no_sums(), *start))
        self._store(sums, column)
        rows = pl.ds(self._of_rows * ROWS, ROWS)
        self.ml_ref.at[0, rows][...] = m / _LOG2E
        self.ml_ref.at[1, rows][...] = l

    def _sum(self, column: int) -> None:
        """The value columns from `column` on, weighed by the other warpgroup."""
        smem = self.smem

        def step(i, sums):
            stage = lax.rem(i, jnp.int32(self.plan.stages))
            plgpu.barrier_wait(smem["here"].at[stage])
            _, v = self._widened(stage)
            plgpu.barrier_wait(smem["weighed"])
            alpha = self._cast(self._numbers("alpha", 0)[...], _PER_ROW)
            sums = self._add_values(i, sums, alpha, v, column)
            self._leave(i, stage)
            return sums

        self._store(lax.fori_loop(0, self.count, step, self._no_sums()), column)

    def _leave(self, i: jax.Array, stage: jax.Array) -> None:
        """This warpgroup has read key tile `i`; when all have, the stage is filled again."""
        plan, smem = self.plan, self.smem
        refill = functools.partial(self._load_if_any, i + plan.stages)
        if not plan.share:
            return refill()
        plgpu.barrier_arrive(smem["free"].at[stage])
        if self.quantized:  # both write the widened tile
            plgpu.barrier_wait(smem["free"].at[stage])
            return self._leading(refill)

        def wait_and_refill():
            plgpu.barrier_wait(smem["free"].at[stage])
            refill()

        self._leading(wait_and_refill)

    def _no_sums(self) -> tuple[jax.Array, ...]:
        return (self._full((ROWS, self.plan.chunk), 0.0, _WGMMA),) * (self.plan.columns // self.plan.chunk)

    def _per_row(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return lax.broadcast_in_dim(x, shape, [0])

    def _per_key(self, ref: Any, shape: tuple[int, ...]) -> jax.Array:
        return lax.broadcast_in_dim(self._cast(ref[...], _PER_KEY), shape, [1])

    def _bounds(self) -> tuple[jax.Array, jax.Array]:
        """By row: the first key that it sees, and the one past its last (with a tree: that it could see)."""
        plan = self.plan
        row = lax.div(self._iota((ROWS,), 0, _PER_ROW) + self._of_rows * ROWS, jnp.int32(plan.group))
        at = row + self.position
        past = jnp.minimum(self.first_row + 32 * plan.tree_words if plan.tree_words else at + 1, self.keys)
        low = at - plan.window + 1 if plan.window is not None else at * 0
        return low, jnp.where(row < self.rows, past, 0)

    def _scores(self, i: jax.Array, stage: jax.Array, k: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Scores of key tile `i` times log2(e), -inf where a key is not seen, and where it is."""
        plan, smem = self.plan, self.smem
        s = dot_with_rows(smem["q"].at[self._of_rows], k, plan.interpret)
        if self.quantized:
            s = s * self._per_key(self._numbers("k_scales", stage), s.shape)
        if plan.soft_cap is None:
            s = s * (plan.scale * _LOG2E)
        else:  # tanh by a power of two: the device's own is good to 11 bits only
            e = jnp.exp2(s * (2 * plan.scale / plan.soft_cap * _LOG2E))
            s = plan.soft_cap * _LOG2E * (1.0 - 2.0 / (e + 1.0))
        if "bias" in self.refs:
            s = s + self._per_key(self._numbers("bias", stage), s.shape) * _LOG2E
        low, past = (self._per_row(x, s.shape) for x in bounds)
        at = self._iota(s.shape, 1, _WGMMA) + (self.begin + i) * plan.block_keys
        seen = at < past
        if plan.window is not None:
            seen &= at >= low
        if plan.tree_words:
            seen &= self._in_tree(at)
        return jnp.where(seen, s, -jnp.inf), seen

    def _in_tree(self, at: jax.Array) -> jax.Array:
        """Whether a row has the bit of the key at `at`, or that lies before the tree."""
        j = at - self.first_row
        word = jnp.zeros_like(j)
        for u in range(self.plan.tree_words):
            mine = self._cast(self.smem["tree"].at[u, pl.ds(self._of_rows * ROWS, ROWS)][...], _PER_ROW)
            word = jnp.where(lax.shift_right_arithmetic(j, jnp.full_like(j, 5)) == u, self._per_row(mine, j.shape), word)
        bit = lax.shift_right_logical(word, j & 31) & 1
        return (j < 0) | (bit == 1)

    def _widened(self, stage: jax.Array) -> tuple[Any, Any]:
        """References to the stage's keys and values in bfloat16."""
        smem = self.smem
        k, v = smem["k"].at[stage], smem["v" if "v" in smem else "k"].at[stage]
        if not self.quantized:
            return k, v
        wide_k, wide_v = smem["wide_k"], smem["wide_v" if "wide_v" in smem else "wide_k"]
        pieces = [(k, wide_k, c) for c in range(0, self.plan.channels, 64)]
        pieces += [(v, wide_v, c) for c in range(0, self.plan.values, 64)] if "wide_v" in smem else []

        def widen(mine):
            for source, target, c in mine:
                target.at[:, pl.ds(c, 64)][...] = self._cast(source.at[:, pl.ds(c, 64)][...], _WGMMA).astype(jnp.bfloat16)
            plgpu.commit_smem()

        if self.plan.share:
            half = -(-len(pieces) // 2)
            pl.when(self.warpgroup == 0)(lambda: widen(pieces[:half]))
            pl.when(self.warpgroup == 1)(lambda: widen(pieces[half:]))
            plgpu.barrier_arrive(smem["widened"])
            plgpu.barrier_wait(smem["widened"])
        else:
            widen(pieces)
        return wide_k, wide_v

    def _add_values(self, i: jax.Array, sums: tuple[jax.Array, ...], alpha: jax.Array, v: Any, column: int) -> tuple[jax.Array, ...]:
        """`sums * alpha + p @ v`, for value columns from `column` on."""
        chunk = self.plan.chunk
        values = [v.at[:, pl.ds(column + c * chunk, chunk)] for c in range(len(sums))]
        if not self.quantized:  # an int8 is a number, whatever lies there
            self._clear_past_end(i, values)
        p = self.smem["p"].at[self._of_rows]

        def product(b, acc):
            plgpu.wgmma(acc, p, b)
            return acc[...]

        def add(total, b):
            return total * self._per_row(alpha, total.shape) + pl.run_scoped(functools.partial(product, b), plgpu.ACC((ROWS, chunk), jnp.float32))

        return tuple(add(total, b) for total, b in zip(sums, values, strict=True))

    def _clear_past_end(self, i: jax.Array, values: list[Any]) -> None:
        """Values past the last key, and before a window's first, become zeros: no weight, not even 0, makes a number of a NaN that may lie there."""
        plan = self.plan
        start = (self.begin + i) * plan.block_keys
        low = None if plan.window is None else self.position - plan.window + 1

        def clear():
            for ref in values:
                at = self._per_row(self._iota((plan.block_keys,), 0, _PER_ROW), ref.shape) + start
                here = at < self.keys if low is None else (at < self.keys) & (at >= low)
                ref[...] = jnp.where(here, self._cast(ref[...], _WGMMA), jnp.zeros((), jnp.bfloat16))
            plgpu.commit_smem()

        def clear_for_both():
            self._leading(clear)
            plgpu.barrier_arrive(self.smem["cleared"])
            plgpu.barrier_wait(self.smem["cleared"])

        partly = start + plan.block_keys > self.keys
        pl.when(partly if low is None else partly | (start < low))(clear_for_both if plan.share == "rows" else clear)

    def _store(self, sums: tuple[jax.Array, ...], column: int) -> None:
        plan, chunk = self.plan, self.plan.chunk
        if plan.stored_rows >= ROWS:
            for c, total in enumerate(sums):
                self.o_ref.at[pl.ds(self._of_rows * ROWS, ROWS), pl.ds(column + c * chunk, chunk)][...] = total
            return
        for c, total in enumerate(sums):
            for part in range(0, chunk, 64):
                self.smem["o"][...] = total[:, part : part + 64]
                plgpu.commit_smem()
                target = self.o_ref.at[:, pl.ds(column + c * chunk + part, 64)]
                plgpu.copy_smem_to_gmem(self.smem["o"].at[pl.ds(0, plan.stored_rows)], target)
                plgpu.wait_smem_to_gmem(0)


def _share(begin: jax.Array, end: jax.Array, split: jax.Array, splits: int) -> tuple[jax.Array, jax.Array]:
    """The key tiles from `begin` to before `end` that the `split`-th of `splits` blocks visits: first, and one past the last."""
    each = lax.div(jnp.maximum(end - begin, 0) + splits - 1, jnp.int32(splits))
    first = begin + split * each
    return first, jnp.minimum(first + each, end)
