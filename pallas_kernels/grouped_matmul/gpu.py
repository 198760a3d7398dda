"""Grouped matmul and gated feed-forward on a Hopper GPU: one Mosaic kernel for few rows and for many, layout "nk" (weights [Z, N, K]).

The weights are wgmma's left side and the rows its right side: a block computes `w[id][columns] @ x[rows]^T`, so that 8 rows cost 8 columns of the
tensor core and not 64. With few rows the time is that of streaming each used matrix once; with many it is the tensor core's. Both are this
kernel with another `Config`: rows per tile, columns per block and how many copies are under way.

The grid stays (`per_sm` blocks on each of the 132 multiprocessors); blocks take the tiles of a work list in turn. One warpgroup copies
(TMA), running ahead into the next tile while the others multiply and store; stages of shared memory go round between them by two barriers. XLA
makes the list (`gpu_tiles.work_list`) in two or three reductions over groups; its length is read in the kernel, so that groups without rows cost
nothing. Copies of tiled shared memory go by slabs of 8 rows, so a group's tiles start at the slab of its first row. Rows of other groups that come
along are multiplied and not stored: whole slabs are stored as they are, a group's first and last slab by single rows where they are not whole.

Quantized weights come to registers as bytes, become bfloat16 there (exactly) and are multiplied from registers. The float32 sum over each group
along K is multiplied by its scale before it is added up, so that nothing is rounded that the weights' own rounding left. Of two 4-bit numbers in
a byte the kernel takes 16 times each and divides the scale by 16, which is exact too.

Compiled for H100 and interpreted on the CPU, by jax 0.10.2 and 0.11.2. Interpret mode does not know wgmma with a transposed right side (0.10.2) or
with a left side in registers, stores to transposed references, loads from global memory to registers that say how, nor layouts of registers: these
operations, and no others, are written otherwise there (`_Ops`). Compiled by ptxas without spills; never run on a GPU. Unmeasured: everything about
speed, the heuristic too. Known to cost: Mosaic's own barriers around every store to shared memory, some 40 in a tile of 128 rows;
`unsafe_no_auto_barriers` seems safe here, and is to be tried where numbers can be checked.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Int, Num

from jaxmoe.formats import Quantized, load
from pallas_kernels.compat import row_by_row
from pallas_kernels.grouped_matmul.biases import add_to_rows
from pallas_kernels.grouped_matmul.glu import Glu
from pallas_kernels.grouped_matmul.gpu_tiles import (
    HELD,
    MULTIPROCESSORS,
    PRODUCER_REGISTERS,
    SLAB,
    Config,
    Pool,
    Problem,
    candidates,
    choose,
    heuristic,
    most_tiles,
    moves_registers,
    thread_registers,
    tiles_of,
    tuning_key,
    work_list,
)

__all__ = ["Config", "Problem", "candidates", "choose", "config_for", "grouped_glu", "grouped_matmul", "heuristic", "tuning_key"]


def grouped_matmul(
    x_MK: BFloat16[Array, "M K"],
    w: Pool,
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    starts: Int[Array, "G"] | None = None,
    *,
    bias: Num[Array, "G N"] | None = None,
    out_dtype: Any = jnp.float32,
    config: Config | None = None,
    interpret: Any = False,
) -> Num[Array, "M N"]:
    """`y[m] = w[group_ids[g(m)]] @ x[m]`, summed in float32.

    Args:
        x_MK: rows sorted by group.
        w: the pool [Z, N, K].
        group_ids: which matrix of the pool each group uses; repeats are allowed.
        group_sizes: rows of each group; zeros are allowed and cost nothing.
        starts: first row of each group; without it groups lie back to back from row 0.
        bias: added to each group's sums, outside of the kernel, which may sum parts of K; float32, or bfloat16 held as uint16.
        out_dtype: float32 or bfloat16.
        config: sizes of tiles; without it `choose` does.
        interpret: `pallas_kernels.compat.interpret_gpu()` to run on the CPU.

    Returns:
        [M, N]; rows of no group are not written.

    Raises:
        NotImplementedError: no tile fits; the message says which size is in the way.
    """
    problem = Problem.of(x_MK, w, group_sizes, out_dtype if bias is None else jnp.float32)
    if problem.parts != 1:
        raise ValueError(f"expected a pool [Z, N, K], got {list(w.shape)}")
    config = config or choose(problem)
    problem.check(config)
    parts = _run(_one, problem, config, (x_MK, w, group_ids, group_sizes, starts, None), interpret)
    y = parts[0] if config.splits == 1 else parts.sum(0)
    return (y if bias is None else add_to_rows(y, bias, group_sizes, starts)).astype(out_dtype)


def grouped_glu(
    x_MK: BFloat16[Array, "M K"],
    w_in: Pool,
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    glu: Glu,
    starts: Int[Array, "G"] | None = None,
    *,
    bias: Num[Array, "G two F"] | None = None,
    config: Config | None = None,
    interpret: Any = False,
) -> BFloat16[Array, "M F"]:
    """`glu(w_in[id, 0] @ x[m], w_in[id, 1] @ x[m])` of float32 sums, for gate (0) and up (1).

    Args:
        x_MK, group_ids, group_sizes, starts, config, interpret: see `grouped_matmul`.
        w_in: the pool [Z, 2, F, K].
        glu: elementwise, float32 to float32; traced into the kernel.
        bias: added to each group's sums before `glu`; float32, or bfloat16 held as uint16.

    Returns:
        [M, F]; rows of no group are not written.

    Raises:
        NotImplementedError: no tile fits; the message says which size is in the way.
    """
    problem = Problem.of(x_MK, w_in, group_sizes, x_MK.dtype)
    if problem.parts != 2:
        raise ValueError(f"expected a pool [Z, 2, F, K], got {list(w_in.shape)}")
    config = config or choose(problem)
    problem.check(config)
    return _run(glu, problem, config, (x_MK, w_in, group_ids, group_sizes, starts, bias), interpret)[0]


def config_for(x_MK: BFloat16[Array, "M K"], w: Pool, rows: int, groups: int, out_dtype: Any) -> Config:
    """The config for `x_MK`, which has some of `groups` groups with `rows` rows in all, with which it gets the bits of a call for all of them.

    Raises:
        NotImplementedError, ValueError: see `Problem.of` and `choose`.
    """
    x, sizes = jax.ShapeDtypeStruct((rows, x_MK.shape[1]), x_MK.dtype), jax.ShapeDtypeStruct((groups,), jnp.int32)
    return choose(Problem.of(x, w, sizes, out_dtype))  # type: ignore[arg-type]


def _one(x: jax.Array) -> jax.Array:
    return x


@dataclasses.dataclass(frozen=True)
class _Ops:
    """The operations that interpret mode doesn't know, and what stands for them there: plain transposes, and copies to `spare` shared memory."""

    interpret: bool
    spare: tuple[Any, ...] = ()

    def multiply(self, acc: Any, w: Any, x_ref: Any) -> None:
        """`acc += w @ x^T` for w in shared memory or in registers."""
        if not self.interpret:
            plgpu.wgmma(acc, w, _transposed(x_ref))
            return
        x_spare, *w_spare = (ref.at[lax.axis_index("warpgroup")] for ref in self.spare)
        x_spare[...] = x_ref[...].T
        if w_spare:
            w_spare[0][...] = w
            w = w_spare[0]
        plgpu.wgmma(acc, w, x_spare)

    def store_transposed(self, ref: Any, x: jax.Array) -> None:
        """`ref[...] = x^T`."""
        if self.interpret:
            ref[...] = x.T
        else:
            _transposed(ref)[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)

    def from_global(self, ref: Any, at: tuple) -> jax.Array:
        """`ref[at]`, of an array in global memory."""
        return ref[at] if self.interpret else plgpu.load(ref, at, optimized=False)

    def as_sums(self, x: jax.Array) -> jax.Array:
        """`x` laid out in registers like wgmma's sums."""
        return x if self.interpret else plgpu.layout_cast(x, plgpu.Layout.WGMMA)


def _transposed(ref: Any) -> Any:
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def _swizzled(row_bytes: int, dtype: Any) -> tuple[Any, ...]:
    """The layout of a tile in shared memory that copies, wgmma and registers all take; rows are cut in pieces of the widest swizzle."""
    swizzle = next(s for s in (128, 64, 32) if row_bytes % s == 0)
    return plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)


def _run(glu: Callable, problem: Problem, config: Config, operands: tuple, interpret: Any) -> jax.Array:
    """The kernel [splits, M, N] around `_produce` and `_consume`."""
    x_MK, w, group_ids, group_sizes, starts, bias = operands
    c, p = config, problem
    work = work_list(group_ids, group_sizes, starts, c.rows, most_tiles(p, c.rows))
    if interpret:
        # TMA fills rows past the end with zeros; interpret mode of jax 0.10.2 refuses them unless it is told to fill them with NaN.
        interpret = dataclasses.replace(interpret, out_of_bounds_reads="uninitialized")
    # Copies go by slabs of 8 rows, but for results of fewer, which go by single rows.
    rows = p.m if p.m < SLAB else -(-p.m // SLAB) * SLAB
    if max(rows, c.rows) != p.m:
        x_MK = jnp.pad(x_MK, ((0, max(rows, c.rows) - p.m), (0, 0)))
    out_dtype = jnp.float32 if p.out_bytes == 4 else jnp.bfloat16
    # Interpreted, blocks follow each other, and each is compiled anew by jax 0.10.2: one multiprocessor is enough.
    blocks = c.per_sm * (1 if interpret else MULTIPROCESSORS)
    copied = (x_MK, *_flat(p, w))
    inputs = (*work, *copied, *(() if bias is None else (load(bias, jnp.float32),)))

    def body(*refs):
        *in_refs, y_ref = refs[: len(inputs) + 1]
        stages, full, free, out, spare = refs[len(inputs) + 1 :]
        tiles = _Tiles(p, c, blocks, *in_refs[: len(work)])
        copied_refs, bias_refs = in_refs[len(work) : len(work) + len(copied)], in_refs[len(work) + len(copied) :]
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == c.warpgroups)
        def _():
            if moves_registers(c):
                plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            _produce(p, c, tiles, copied_refs, stages, full, free)

        @pl.when(warpgroup < c.warpgroups)
        def _():
            if moves_registers(c):
                plgpu.set_max_registers(thread_registers(c), action="increase")
            ops = _Ops(bool(interpret), spare)
            multiply = _multiply_quantized if p.group else _multiply
            store = functools.partial(_store, p, c, ops, glu, out, y_ref, bias_refs)
            _consume(tiles, functools.partial(multiply, p, c, ops, stages, full, free), store)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((c.splits, rows, p.n), out_dtype),
        scratch_types=_scratch(p, c, out_dtype, bool(interpret)),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=c.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    return kernel(*inputs)[:, : p.m]


def _flat(p: Problem, w: Pool) -> tuple[jax.Array, ...]:
    """The pool [Z, parts, N, K], and scales [Z, K / group, parts, N] if it has them; no bytes move."""
    if not isinstance(w, Quantized):
        return (lax.bitcast_convert_type(w, jnp.bfloat16).reshape(-1, p.parts, p.n, p.k),)
    return w.values.reshape(-1, p.parts, p.n, w.values.shape[-1]), w.scales.reshape(-1, p.k // p.group, p.parts, p.n)


def _scratch(p: Problem, c: Config, out_dtype: Any, interpret: bool) -> list[Any]:
    """Shared memory: stages (x, weights, scales), the barriers between copying and multiplying, and the results on their way out."""
    w_dtype = jnp.int8 if p.group else jnp.bfloat16
    w_bytes = p.unit(c.depth) if p.group else c.depth * 2
    x_bytes = 2 * (p.unit(c.depth) if p.group else c.depth)
    numbers = c.depth * p.bits // 8 // jnp.dtype(w_dtype).itemsize
    stages = [
        plgpu.SMEM((c.stages, c.rows, c.depth), jnp.bfloat16, transforms=_swizzled(x_bytes, jnp.bfloat16)),
        plgpu.SMEM((c.stages, p.parts, c.width, numbers), w_dtype, transforms=_swizzled(w_bytes, w_dtype)),
    ]
    if p.group:
        stages.append(plgpu.SMEM((c.stages, p.parts, p.scales_in_stage(c), c.width), jnp.float32))
    slabs = (c.warpgroups, min(c.rows, HELD) // SLAB, SLAB, c.cols)
    ends = plgpu.SMEM((c.warpgroups, 2, SLAB, c.cols), out_dtype, transforms=row_by_row(c.cols))
    out = (plgpu.SMEM(slabs, out_dtype, transforms=_swizzled(128, out_dtype)), ends)
    spare: tuple[Any, ...] = ()
    if interpret:
        length = p.unit(c.depth) if p.group else c.depth
        spare = (plgpu.SMEM((c.warpgroups, length, c.rows), jnp.bfloat16),)
        if p.group:
            spare += (plgpu.SMEM((c.warpgroups, c.cols, length), jnp.bfloat16),)
    full = plgpu.Barrier(num_arrivals=1 + p.parts * (2 if p.group else 1), num_barriers=c.stages)
    return [tuple(stages), full, plgpu.Barrier(num_arrivals=c.warpgroups, num_barriers=c.stages), out, spare]


@dataclasses.dataclass(frozen=True)
class _Tile:
    """What a block does at a time: which matrix, which rows (from `start` to `stop` from `row` on), which columns, which part of K."""

    group: jax.Array
    matrix: jax.Array
    row: jax.Array
    start: jax.Array
    stop: jax.Array
    col: jax.Array
    split: jax.Array


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """A block's share of the work list (see `work_list`): every `blocks`th tile."""

    problem: Problem
    config: Config
    blocks: int
    ids_ref: Any
    starts_ref: Any
    sizes_ref: Any
    ends_ref: Any
    groups_ref: Any

    @property
    def steps(self) -> int:
        """Stages that a tile takes."""
        return self.problem.k // (self.config.depth * self.config.splits)

    def of_rows(self) -> jax.Array:
        """How many tiles of rows there are."""
        return jnp.minimum(self.ends_ref[self.problem.groups - 1], self.groups_ref.shape[0])  # sizes that add up to too much end here

    def mine(self) -> jax.Array:
        """How many tiles are this block's."""
        tiles = self.of_rows() * (self.problem.n // self.config.width * self.config.splits)
        return lax.div(tiles - lax.axis_index("block") + (self.blocks - 1), self.blocks)

    def at(self, i: jax.Array) -> _Tile:
        """This block's tile `i`: bands of columns outermost, then rows, then the columns of the band, then parts of K."""
        c, across, of_rows = self.config, self.problem.n // self.config.width, self.of_rows()
        item = lax.axis_index("block") + i * self.blocks
        split, item = lax.rem(item, c.splits), lax.div(item, c.splits)
        band = lax.div(item, of_rows * c.band)
        item = item - band * (of_rows * c.band)
        width = jnp.minimum(c.band, across - band * c.band)
        tile, col = lax.div(item, width), band * c.band + lax.rem(item, width)
        group = self.groups_ref[tile]
        first, size = self.starts_ref[group], self.sizes_ref[group]
        tile = tile - (self.ends_ref[group] - tiles_of(first, size, c.rows))
        row = (lax.div(first, SLAB) + tile * (c.rows // SLAB)) * SLAB
        start, stop = jnp.maximum(first - row, 0), jnp.minimum(first + size - row, c.rows)
        return _Tile(group, self.ids_ref[group], row, start, stop, col * c.width, split)


def _produce(p: Problem, c: Config, tiles: _Tiles, in_refs: Any, stages: tuple, full: Any, free: Any) -> None:
    """Copies every stage of every tile of this block, as soon as there is room."""
    x_ref, w_ref, *scales_ref = in_refs
    x_smem, w_smem, *scales_smem = stages
    numbers = w_smem.shape[-1]

    def tile(i, copied):
        t = tiles.at(i)

        def stage(k, copied):
            s = lax.rem(copied, c.stages)
            pl.when(copied >= c.stages)(lambda: plgpu.barrier_wait(free.at[s]))
            k = k + t.split * tiles.steps
            columns = pl.ds(t.col, c.width)
            for part in range(p.parts):
                plgpu.copy_gmem_to_smem(w_ref.at[t.matrix, part, columns, pl.ds(k * numbers, numbers)], w_smem.at[s, part], full.at[s])
            plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(t.row, c.rows), pl.ds(k * c.depth, c.depth)], x_smem.at[s], full.at[s])
            if p.group:
                count = p.scales_in_stage(c)
                along = pl.ds(k * count if c.depth >= p.group else lax.div(k * c.depth, p.group), count)
                for part in range(p.parts):
                    plgpu.copy_gmem_to_smem(scales_ref[0].at[t.matrix, along, part, columns], scales_smem[0].at[s, part], full.at[s])
            return copied + 1

        return lax.fori_loop(0, tiles.steps, stage, copied)

    copied = lax.fori_loop(0, tiles.mine(), tile, jnp.int32(0))
    # Nothing may be under way when the block ends.
    for s in range(c.stages):
        pl.when(copied > s)(functools.partial(plgpu.barrier_wait, free.at[s]))


def _consume(tiles: _Tiles, multiply: Callable, store: Callable) -> None:
    """Multiplies and stores every tile of this block; `multiply` is given the number of the tile's first stage."""

    def tile(i, taken):
        t = tiles.at(i)  # read before the products, which nothing is moved across
        store(multiply(tiles.steps, taken), t)
        return taken + tiles.steps

    lax.fori_loop(0, tiles.mine(), tile, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _multiply(p: Problem, c: Config, ops: _Ops, stages: tuple, full: Any, free: Any, steps: int, first: jax.Array) -> tuple[jax.Array, ...]:
    """A tile's float32 sums [cols, rows] with each matrix, of bfloat16 weights straight from shared memory."""
    x_smem, w_smem = stages
    mine = pl.ds(lax.axis_index("warpgroup") * c.cols, c.cols)

    def scoped(*accs):
        def step(k, _):
            s = lax.rem(first + k, c.stages)
            plgpu.barrier_wait(full.at[s])
            for part, acc in enumerate(accs):
                ops.multiply(acc, w_smem.at[s, part, mine], x_smem.at[s])
            # This stage's products are under way; those of the one before are done.
            plgpu.wgmma_wait(len(accs))
            pl.when(k > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(first + k - 1, c.stages)]))
            return ()

        lax.fori_loop(0, steps, step, ())
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(free.at[lax.rem(first + steps - 1, c.stages)])
        return tuple(acc[...] for acc in accs)

    return pl.run_scoped(scoped, *(plgpu.ACC((c.cols, c.rows), jnp.float32) for _ in range(p.parts)))


def _pieces(p: Problem, c: Config) -> dict[int, list[tuple[int, int, int]]]:
    """What a stage's quantized weights are multiplied in: by scale, (half, first byte, first number) of runs of `p.unit(c.depth)`.

    `half` is 0 for the low half of the bytes and 1 for the high one; bytes of 8 bits are all low.
    """
    per_byte = 8 // p.bits
    pieces: dict[int, list[tuple[int, int, int]]] = {}
    for byte in range(0, c.depth // per_byte, p.unit(c.depth)):
        for half in range(per_byte):
            block, within = divmod(byte, p.block // 2) if p.bits == 4 else (0, byte)
            number = block * p.block + half * (p.block // 2) + within
            pieces.setdefault(number // p.group, []).append((half, byte, number))
    return pieces


def _multiply_quantized(p: Problem, c: Config, ops: _Ops, stages: tuple, full: Any, free: Any, steps: int, first: jax.Array) -> tuple[jax.Array, ...]:
    """The same with quantized weights: the sum over each group of K by itself, times its scale."""
    x_smem, w_smem, scales_smem = stages
    unit = p.unit(c.depth)
    mine = pl.ds(lax.axis_index("warpgroup") * c.cols, c.cols)

    def numbers(w, half):
        if p.bits == 4:
            # Bytes know only bitwise operations here: the high number is read in its place, the low one with 8 added to it.
            return (w & jnp.int8(-16)).astype(jnp.bfloat16) if half else ((w & jnp.int8(15)) ^ jnp.int8(8)).astype(jnp.bfloat16) * 16 - 128
        return w.astype(jnp.bfloat16)

    def step(k, sums):
        s = lax.rem(first + k, c.stages)
        plgpu.barrier_wait(full.at[s])
        held: dict[tuple[int, int], jax.Array] = {}
        for scale, pieces in _pieces(p, c).items():
            for part in range(p.parts):
                for _, byte, _ in pieces:
                    if (part, byte) not in held:
                        held[part, byte] = w_smem[s, part, mine, pl.ds(byte, unit)]

                def scoped(acc, part=part, pieces=pieces):
                    for half, byte, number in pieces:
                        ops.multiply(acc, numbers(held[part, byte], half), x_smem.at[s, :, pl.ds(number, unit)])
                    return acc[...]

                sum_ = pl.run_scoped(scoped, plgpu.ACC((c.cols, c.rows), jnp.float32))
                times = scales_smem[s, part, scale, mine] * (1 / 16 if p.bits == 4 else 1)
                sums = (*sums[:part], sums[part] + sum_ * lax.broadcast_in_dim(times, sum_.shape, (0,)), *sums[part + 1 :])
        plgpu.barrier_arrive(free.at[s])
        return sums

    zeros = tuple(ops.as_sums(jnp.zeros((c.cols, c.rows), jnp.float32)) for _ in range(p.parts))
    return lax.fori_loop(0, steps, step, zeros)


def _store(p: Problem, c: Config, ops: _Ops, glu: Callable, out: tuple, y_ref: Any, bias_refs: Any, sums: tuple[jax.Array, ...], t: _Tile) -> None:
    """Writes the tile's own rows, and no others: whole slabs of 8 rows as they are, the first and the last row by row where they are not whole."""
    slabs, ends = (ref.at[lax.axis_index("warpgroup")] for ref in out)
    columns = pl.ds(t.col + lax.axis_index("warpgroup") * c.cols, c.cols)
    biases = [ops.from_global(bias_ref, (t.group, part, columns)) for bias_ref in bias_refs for part in range(p.parts)]
    last = lax.div(t.stop, SLAB)
    cut_first = (t.start > 0) | (t.stop < SLAB)
    cut_last = (last > 0) & (lax.rem(t.stop, SLAB) > 0)

    def put(source, row, rows):
        plgpu.copy_smem_to_gmem(source, y_ref.at[t.split, pl.ds(row, rows), columns])

    def put_rows(end, row, start, stop):
        lax.fori_loop(start, stop, lambda i, _: put(ends.at[end, pl.ds(i, 1)], row + i, 1), None)

    for chunk in range(0, c.rows // SLAB, held := slabs.shape[0]):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for j in range(chunk, min(chunk + held, c.rows // SLAB)):
            # Slab by slab: of whole tiles at once, results beside sums need more registers than there are.
            parts = [part[:, j * SLAB : (j + 1) * SLAB] for part in sums]
            if biases:
                parts = [part + lax.broadcast_in_dim(b, part.shape, (0,)) for part, b in zip(parts, biases, strict=True)]
            slab = glu(*parts).astype(y_ref.dtype)
            ops.store_transposed(slabs.at[j - chunk], slab)
            cut, end = (cut_last & (last == j), 1) if j else (cut_first, 0)
            pl.when(cut)(functools.partial(ops.store_transposed, ends.at[end], slab))
        plgpu.commit_smem()
        # Fewer than 8 rows in all have no whole slab, nor could a copy of one be described.
        for j in range(chunk, min(chunk + held, c.rows // SLAB) if p.m >= SLAB else 0):
            whole = (last > j) if j else (last > 0) & (t.start == 0)
            pl.when(whole)(functools.partial(put, slabs.at[j - chunk], t.row + j * SLAB, SLAB))
    pl.when(cut_first)(lambda: put_rows(0, t.row, t.start, jnp.minimum(t.stop, SLAB)))
    pl.when(cut_last)(lambda: put_rows(1, t.row + last * SLAB, 0, lax.rem(t.stop, SLAB)))
