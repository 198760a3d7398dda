"""Grouped matmul on TPUs: a Mosaic kernel that walks the row tiles of the groups that have rows, each with its matrix streamed out of the flat pool.

A work item is a row tile and a group with rows in it. Which items there are is computed on the device by a few small XLA ops and handed to the
kernel ahead of its blocks (scalar prefetch), so that the pipeline knows every item's matrix early enough to fetch it. The grid is (column tiles,
items, K tiles). Row tiles lie on multiples of their size: a tile that several groups share is visited once for each, in a row, and merged by masks
in VMEM. There are at most `tiles + groups - 1` items; places past the last real one name its blocks again, which costs neither copies nor matmuls.
A matrix whose K is not cut stays in VMEM for all row tiles of its group, so prefill reads weights once too.

What bounds it: with few rows the weights' bytes, in blocks of about `DECODE_BLOCK` under way while the one before is multiplied; with many rows the
matrix unit. Quantized weights go to the matrix unit as whole numbers where there are few rows, and each group's sums are scaled, which is exact.
With many rows, or scales of fewer than 64 numbers, they are unpacked into a scratch in VMEM (rounded to bfloat16), once for all row tiles of a group
where K is not cut; so are gate and up in alternate rows. Everything here is compiled for v5e, v5p, v6e and TPU7x and interpreted on the CPU; speeds
and the choice of tiles are unmeasured.

Layouts of w_in: XLA keeps 16-bit [Z, K, 2, F] in tiles of two rows, so that a 32-bit word holds a gate and an up number, which the kernel has to
take apart; [Z, 2, K, F] needs none of that, and 8-bit numbers lie so whichever shape they have.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Num

from jaxmoe.formats import PACK_BLOCK, Quantized, pack_block
from pallas_kernels.grouped_matmul.glu import Glu

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
_SUBLANES = 16
_UNPACK_ROWS = 128

Weights = Num[Array, "Z ..."] | Quantized


@dataclasses.dataclass(frozen=True)
class Config:
    """Rows of x, numbers along K, and columns of the output (of gate and of up each) in a step of the kernel."""

    rows: int
    k: int
    columns: int


@dataclasses.dataclass(frozen=True)
class _Form:
    """What the kernel is built from: the problem's sizes and how its weights are held."""

    m: int
    k: int
    n: int
    groups: int
    parts: int  # matrices of an expert: 1, or gate and up
    kind: str  # "plain" rows of bfloat16, "pairs" of gate and up rows, "int8", "int4"
    group: int  # numbers that share a scale; 0 without scales
    out: jnp.dtype

    @property
    def weight_bytes(self) -> float:
        return {"plain": 2, "pairs": 2, "int8": 1, "int4": 0.5}[self.kind]


def grouped_matmul(
    x_MK: Float[Array, "M K"],
    w: Weights,
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    starts: Int[Array, "G"] | None = None,
    *,
    out_dtype: Any = jnp.float32,
    config: Config | None = None,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """`y[m] = x[m] @ w[group_ids[g(m)]]` for rows sorted by group; sums in float32.

    Args:
        x_MK: bfloat16 rows.
        w: the pool [Z, K, N]: bfloat16 held as uint16, or `Quantized` with `axis` -2.
        group_ids: which matrix of the pool each group uses; any order, repeats allowed.
        group_sizes: rows of each group; zeros are allowed and cost nothing.
        starts: first row of each group, ascending, groups disjoint; None: they lie back to back from row 0.
        out_dtype: float32 or bfloat16.
        config: tile sizes; None: `heuristic`.
        interpret: as in `pallas_call`.

    Returns:
        [M, N]; rows of no group hold anything.

    Raises:
        NotImplementedError: a dtype or size that the kernel cannot take; the message says which.
    """
    _check_x(x_MK)
    if w.ndim != 3 or w.shape[1] != x_MK.shape[1]:
        raise NotImplementedError(f"the kernel takes a pool [Z, K, N] with K = {x_MK.shape[1]}, not {list(w.shape)}")
    if jnp.dtype(out_dtype) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        raise NotImplementedError(f"the kernel writes float32 or bfloat16, not {jnp.dtype(out_dtype)}")
    form = _form(x_MK, w, group_ids, w.shape[2], 1, -2, "plain", out_dtype)
    return _call(form, x_MK, w, group_ids, group_sizes, starts, None, config, interpret)


def grouped_glu(
    x_MK: Float[Array, "M K"],
    w_in: Weights,
    group_ids: Int[Array, "G"],
    group_sizes: Int[Array, "G"],
    glu: Glu,
    starts: Int[Array, "G"] | None = None,
    *,
    config: Config | None = None,
    interpret: Any = False,
) -> Float[Array, "M F"]:
    """`glu(x @ gate, x @ up)` with each group's own gate and up; `glu` is applied to the float32 sums.

    Args:
        x_MK, group_ids, group_sizes, starts, config, interpret: see `grouped_matmul`.
        w_in: the pool of gate (index 0 of the axis of two) and up (index 1), bfloat16 held as uint16 or `Quantized`: [Z, 2, K, F] (`axis` -2)
            or [Z, K, 2, F] (`axis` -3), which is slower to unpack in bfloat16. Scales are [Z, K/group, 2, F] in both.
        glu: `glu(gate, up)`, elementwise.

    Returns:
        [M, F] in x's dtype; rows of no group hold anything.

    Raises:
        NotImplementedError: see `grouped_matmul`.
    """
    _check_x(x_MK)
    k = x_MK.shape[1]
    if w_in.ndim != 4 or w_in.shape[1:3] not in ((k, 2), (2, k)):
        raise NotImplementedError(f"the kernel takes a pool [Z, 2, K, F] or [Z, K, 2, F] with K = {k}, not {list(w_in.shape)}")
    pairs = w_in.shape[2] == 2
    form = _form(x_MK, w_in, group_ids, w_in.shape[3], 2, -3 if pairs else -2, "pairs" if pairs else "plain", x_MK.dtype)
    if isinstance(w_in, Quantized) and pairs:
        # Bytes lie as [Z, 2, K, F] already: this is a bitcast.
        w_in = dataclasses.replace(w_in, values=jnp.swapaxes(w_in.values, 1, 2), axis=-2)
    return _call(form, x_MK, w_in, group_ids, group_sizes, starts, glu, config, interpret)


def pool_formats(w: Any, sharding: jax.sharding.Sharding) -> Any:
    """How the leaves of a pool have to lie in memory for the kernel to read them in place, as a pytree of `Format`s like `w`.

    XLA lays an array out such that it pads least. Where N is no multiple of 128 and Z is one (gpt-oss), the pool's axis comes last; where K/group is
    no multiple of 8, the pool's axis comes second to last in scales [Z, K/group, N]. Such a leaf would be copied whole at every call. Put it on the
    device with its format instead, or give it another shape: N padded to 128, scales as [Z, K/group, 1, N].

    Args:
        w: the pool, as arrays or shapes, in the layout "kn".
        sharding: the sharding of all leaves.
    """

    def of(leaf):
        pairs = leaf.dtype == jnp.int8 and leaf.ndim == 4 and leaf.shape[2] == 2
        return Format(Layout((0, 2, 1, 3) if pairs else tuple(range(leaf.ndim))), sharding)

    return jax.tree.map(of, w)


def heuristic(m: int, k: int, n: int, groups: int, *, parts: int = 1, kind: str = "plain", group: int = 0) -> Config:
    """Tile sizes by arithmetic on bytes; none of it is measured.

    Args:
        m, k, n, groups: rows, K, columns (of gate and of up each) and groups.
        parts: 1, or 2 with gate and up.
        kind: "plain", "pairs" (uint16 [Z, K, 2, F]), "int8" or "int4".
        group: numbers that share a scale, of quantized weights.

    Raises:
        NotImplementedError: no tile fits into VMEM.
    """
    return _choose(_Form(m, k, n, groups, parts, kind, group, jnp.dtype(jnp.float32)))


def candidates(m: int, k: int, n: int, groups: int, *, parts: int = 1, kind: str = "plain", group: int = 0) -> list[Config]:
    """The tile sizes that are legal for these sizes and worth timing; arguments as in `heuristic`."""
    form = _Form(m, k, n, groups, parts, kind, group, jnp.dtype(jnp.float32))
    average = m / min(groups, m)
    rows = [m] if m <= ONE_TILE else [r for r in (16, 32, 64, 128, 256, 512) if r <= min(m, max(8 * average, 64))]
    columns = sorted({min(n, c) for c in (128, 256, 384, 512, 768, 1024, 1536, 2048)})
    found = [Config(*sizes) for sizes in itertools.product(rows, _k_tiles(form), columns)]
    return [c for c in found if _vmem(form, c) <= BLOCKS and c.k * c.columns * parts * form.weight_bytes >= 2**18]


def _choose(form: _Form) -> Config:
    if form.m <= ONE_TILE and (config := _one_tile(form)) is not None:
        return config
    average = form.m / min(form.groups, form.m)
    few = average <= ONE_TILE
    rows = form.m if form.m <= ONE_TILE else ONE_TILE if few else 128 if average <= 512 else 256
    # All of K, so that a matrix stays for all row tiles of its group. Half of the bytes are for each buffer.
    most = (DECODE_BLOCK if few else PREFILL_BLOCKS // 2) / (form.k * form.parts * form.weight_bytes)
    columns = max(LANES, min(int(most) // LANES * LANES, 1024 // form.parts))
    config = Config(rows, form.k, _even(form.n, columns))
    while _vmem(form, config) > BLOCKS and config.columns > LANES:
        config = dataclasses.replace(config, columns=_even(form.n, (config.columns - 1) // LANES * LANES))
    for k in _k_tiles(form):
        if _vmem(form, dataclasses.replace(config, k=k)) <= BLOCKS:
            return dataclasses.replace(config, k=k)
    raise NotImplementedError(f"K = {form.k} has no tile that fits into {BLOCKS} bytes of VMEM: {_vmem(form, config)} with all of K at once")


def _one_tile(form: _Form) -> Config | None:
    """Tiles for rows that make one row tile: no matrix is used twice, so K may be cut, and long rows of weights are read in one piece.

    Two column tiles at least, for the two cores of a v5p.
    """
    columns = _even(form.n, max(LANES, min(form.n // 2, 2048 // form.parts) // LANES * LANES))
    for k in _k_tiles(form):
        config = Config(form.m, k, columns)
        if k * columns * form.parts * form.weight_bytes <= DECODE_BLOCK and _vmem(form, config) <= BLOCKS:
            return config
    return None


def _even(n: int, most: int) -> int:
    """Columns of a tile, at most `most` (a multiple of 128), such that the tiles are about equally wide."""
    if n <= most:
        return n
    return _round_up(-(-n // -(-n // most)), LANES)


def _k_tiles(form: _Form) -> list[int]:
    """Numbers along K that a step may take: all, or a divisor in whole lanes of x and whole sublanes of scales; large ones first."""
    step = LANES if not form.group else math.lcm(LANES, form.group * (8 if form.parts == 1 else 1))
    return [form.k] + [k for k in range(form.k - form.k % step, 511, -step) if form.k % k == 0 and k != form.k]


def _vmem(form: _Form, c: Config) -> int:
    """Bytes of blocks (two of each) and scratch."""
    lanes = _round_up(c.columns, LANES)
    weights = c.k * lanes * form.parts * form.weight_bytes
    scales = 4 * lanes * form.parts * _round_up(c.k // form.group, 8) if form.group else 0
    rows = _round_up(c.rows, _SUBLANES)
    blocks = weights + scales + 2 * rows * _round_up(c.k, LANES) + 4 * rows * lanes
    # A dot's result is held beside the sum that it is added to.
    return int(2 * blocks + (form.parts + 1) * 4 * rows * lanes + 2 * math.prod(_scratch(form, c) or (0,)))


def _scratch(form: _Form, c: Config) -> tuple[int, ...] | None:
    """The shape of a step's unpacked weights, or of x in another order."""
    if _direct(form, c):
        return (c.rows, c.k) if form.kind == "int4" else None
    return None if form.kind == "plain" else (form.parts, c.k, c.columns)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _check_x(x: jax.Array) -> None:
    if x.ndim != 2 or x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the kernel takes bfloat16 rows [M, K], not {x.dtype} {list(x.shape)}")


def _form(x: jax.Array, w: Weights, group_ids: jax.Array, n: int, parts: int, axis: int, kind: str, out: Any) -> _Form:
    """The sizes, checked.

    Raises:
        NotImplementedError: see `grouped_matmul`.
    """
    m, k = x.shape
    if k % _SUBLANES:
        raise NotImplementedError(f"the kernel takes K in multiples of {_SUBLANES}, not {k}")
    common = (m, k, n, group_ids.shape[0], parts)
    if not isinstance(w, Quantized):
        if w.dtype != jnp.uint16:
            raise NotImplementedError(f"the kernel takes bfloat16 held as uint16, or quantized weights, not {w.dtype}")
        return _Form(*common, kind, 0, jnp.dtype(out))
    if w.axis != axis or w.bits not in (4, 8):
        raise NotImplementedError(f"the kernel takes 8 or 4 bits with K on axis {axis}, not {w.bits} bits with K on axis {w.axis}")
    if w.group % 32 or k % w.group:
        raise NotImplementedError(f"the kernel takes groups of a multiple of 32 that divide K = {k}, not groups of {w.group}")
    if w.bits == 4 and (pack_block(k) < 64 or math.gcd(w.group, pack_block(k) // 2) % 32):
        raise NotImplementedError(f"the kernel takes 4 bits with K in multiples of 64, not {k}")
    return _Form(*common, f"int{w.bits}", w.group, jnp.dtype(out))


def _check_config(form: _Form, c: Config) -> None:
    """Raises NotImplementedError for tile sizes that don't suit the shapes."""
    if c.rows != form.m and (c.rows % _SUBLANES or c.rows > form.m):
        raise NotImplementedError(f"row tiles are all of M = {form.m} or multiples of {_SUBLANES} up to it, not {c.rows}")
    if c.k not in _k_tiles(form):
        raise NotImplementedError(f"K = {form.k} is cut into one of {_k_tiles(form)}, not {c.k}")
    if c.columns != form.n and (c.columns % LANES or c.columns > form.n):
        raise NotImplementedError(f"column tiles are multiples of {LANES} or all of N = {form.n}, not {c.columns}")


def _items(group_ids: jax.Array, sizes: jax.Array, starts: jax.Array | None, tile: int, count: int) -> tuple[jax.Array, ...]:
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
    of_item = (jnp.sum(jnp.where(mine, values, 0), axis=1).astype(jnp.int32) for values in (group_ids, row_tile, low, high))
    return ends.astype(jnp.int32), *of_item


def _call(form: _Form, x, w, group_ids, group_sizes, starts, glu: Glu | None, config: Config | None, interpret: Any) -> jax.Array:
    """The kernel around the pipeline's blocks."""
    c = _choose(form) if config is None else config
    _check_config(form, c)
    row_tiles, k_tiles = pl.cdiv(form.m, c.rows), form.k // c.k
    items = row_tiles + min(form.groups, form.m) - 1
    scalars = _items(group_ids, group_sizes, starts, c.rows, items)

    def place(i, k, ends):
        """The item and the K tile of a step; past the last item they stay at its last step's."""
        total = ends[form.groups - 1]
        return jnp.minimum(i, jnp.maximum(total - 1, 0)), jnp.where(i < total, k, k_tiles - 1)

    def x_map(n, i, k, ends, ids, tiles, low, high):
        i, k = place(i, k, ends)
        return tiles[i], k

    def w_map(n, i, k, ends, ids, *_):
        i, k = place(i, k, ends)
        return ids[i], *((k, 0) if form.kind == "pairs" else (k,) if form.parts == 1 else (0, k)), n

    def scale_map(n, i, k, ends, ids, *_):
        i, k = place(i, k, ends)
        return ids[i], k, *((0,) if w.scales.ndim == 4 else ()), n

    def out_map(n, i, k, ends, ids, tiles, *_):
        return tiles[place(i, k, ends)[0]], n

    rows_k = c.k // 2 if form.kind == "int4" else c.k
    w_block = (rows_k, 2) if form.kind == "pairs" else (rows_k,) if form.parts == 1 else (2, rows_k)
    in_specs = [pl.BlockSpec((c.rows, c.k), x_map), pl.BlockSpec((1, *w_block, c.columns), w_map)]
    operands: tuple[jax.Array, ...] = (x, w) if not isinstance(w, Quantized) else (x, w.values, w.scales)
    if isinstance(w, Quantized):
        scale_block = (1, c.k // form.group, *w.scales.shape[2:-1], c.columns)
        in_specs.append(pl.BlockSpec(scale_block, scale_map))
    scratch = [pltpu.VMEM((form.parts, c.rows, c.columns), jnp.float32)]
    if shape := _scratch(form, c):
        scratch.append(pltpu.VMEM(shape, jnp.bfloat16))

    return pl.pallas_call(
        functools.partial(_body, form, c, glu),
        out_shape=jax.ShapeDtypeStruct((form.m, form.n), form.out),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(pl.cdiv(form.n, c.columns), items, k_tiles),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((c.rows, c.columns), out_map),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM),
        cost_estimate=_cost(form, c),
        interpret=interpret,
        name="grouped_glu" if form.parts == 2 else "grouped_matmul",
    )(*scalars, *operands)


def _cost(form: _Form, c: Config) -> pl.CostEstimate:
    """What the compiler may plan with: every row real, and as many groups as can have rows."""
    weights = min(form.groups, form.m) * form.k * form.n * form.parts * form.weight_bytes
    rows = form.m * (2 * form.k * pl.cdiv(form.n, c.columns) + form.out.itemsize * form.n)
    return pl.CostEstimate(
        flops=2 * form.m * form.k * form.n * form.parts, bytes_accessed=int(weights + rows), transcendentals=form.m * form.n * (form.parts - 1)
    )


def _body(form: _Form, c: Config, glu: Glu | None, ends, ids, tiles, low, high, x_ref, w_ref, *refs) -> None:
    """One step: this K tile's part of an item's sums; at the last K tile its rows are stored."""
    *scales, y_ref, sums_ref, scratch_ref = refs if _scratch(form, c) else (*refs, None)
    item, k = pl.program_id(1), pl.program_id(2)
    k_tiles = form.k // c.k

    def changed(of_item):
        """Whether a block is another than in the step before; with all of K in a block, it need not be."""
        return (k_tiles > 1) | (item == 0) | (of_item[item] != of_item[jnp.maximum(item - 1, 0)])

    @pl.when(item < ends[form.groups - 1])
    def _():
        if _direct(form, c):
            if form.kind == "int4":
                pl.when(changed(tiles))(lambda: _reorder(c, x_ref, scratch_ref))
            pl.when(k == 0)(lambda: sums_ref.__setitem__(..., jnp.zeros_like(sums_ref)))
            _add_direct(form, c, scratch_ref if form.kind == "int4" else x_ref, w_ref, scales[0], sums_ref)
        else:
            if form.kind != "plain":
                pl.when(changed(ids))(lambda: _unpack(form, c, w_ref, *scales, scratch_ref))
            for part in range(form.parts):
                weights = scratch_ref[part] if form.kind != "plain" else _as_bfloat16(w_ref[0, part] if form.parts == 2 else w_ref[0])
                dot = jnp.dot(x_ref[...], weights, preferred_element_type=jnp.float32)
                sums_ref[part] = dot if k_tiles == 1 else jnp.where(k == 0, 0.0, sums_ref[part]) + dot

        @pl.when(k == k_tiles - 1)
        def _():
            y = sums_ref[0] if glu is None else glu(sums_ref[0], sums_ref[1])
            row = jax.lax.broadcasted_iota(jnp.int32, y_ref.shape, 0)
            mine = (row >= low[item]) & (row < high[item])
            y_ref[...] = jnp.where(mine, y.astype(y_ref.dtype), y_ref[...])


def _as_bfloat16(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def _unpack(form: _Form, c: Config, w_ref, *refs) -> None:
    """Fills the scratch [parts, K, columns] with this block's weights in bfloat16."""
    *scales, out_ref = refs
    if form.kind == "pairs":
        _unpack_pairs(c, w_ref, out_ref)
    elif form.kind == "int8":
        _unpack_int8(form, c, w_ref, scales[0], out_ref)
    else:
        _unpack_int4(form, c, w_ref, scales[0], out_ref)


def _unpack_pairs(c: Config, w_ref, out_ref) -> None:
    """Words of a gate and an up number: each half, shifted up, is a float32 with its value."""
    rows = math.gcd(c.k, _UNPACK_ROWS)
    words_ref = w_ref.bitcast(jnp.uint32)

    def step(i, _):
        at = pl.ds(pl.multiple_of(i * rows, rows), rows)
        words = words_ref[0, at, 0, :]
        for part, bits in enumerate((words << 16, words & jnp.uint32(0xFFFF0000))):
            out_ref[part, at, :] = jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)

    jax.lax.fori_loop(0, c.k // rows, step, None)


def _direct(form: _Form, c: Config) -> bool:
    """Whether quantized weights go to the matrix unit as whole numbers, and their sums are scaled: with few rows that is fewer operations."""
    return form.kind in ("int8", "int4") and c.rows <= ONE_TILE and form.k % PACK_BLOCK == 0 and form.group % (PACK_BLOCK // 2) == 0


def _reorder(c: Config, x_ref, out_ref) -> None:
    """Puts x into the order in which `_whole_numbers` has 4-bit numbers, by a dot with zeros and ones."""
    number = jax.lax.broadcasted_iota(jnp.int32, (PACK_BLOCK, PACK_BLOCK), 0)
    place = jax.lax.broadcasted_iota(jnp.int32, (PACK_BLOCK, PACK_BLOCK), 1)
    half, quarter = PACK_BLOCK // 2, PACK_BLOCK // 4
    here = number == (place & half) + 2 * (place & (quarter - 1)) + jnp.where((place & quarter) != 0, 1, 0)
    order = jnp.where(here, 1.0, 0.0).astype(jnp.bfloat16)

    def step(i, _):
        at = pl.ds(pl.multiple_of(i * PACK_BLOCK, PACK_BLOCK), PACK_BLOCK)
        out_ref[:, at] = jnp.dot(x_ref[:, at], order, preferred_element_type=jnp.float32).astype(jnp.bfloat16)

    jax.lax.fori_loop(0, c.k // PACK_BLOCK, step, None)


def _add_direct(form: _Form, c: Config, x_ref, w_ref, scales_ref, sums_ref) -> None:
    """Adds this block's part to the sums, `PACK_BLOCK` numbers along K at a time.

    Args:
        x_ref: the rows, of 4-bit numbers in the order of `_reorder`.
    """
    step_rows = min(form.group, PACK_BLOCK)

    def step(i, _):
        x = x_ref[:, pl.ds(pl.multiple_of(i * PACK_BLOCK, PACK_BLOCK), PACK_BLOCK)]
        for part in range(form.parts):
            w, offset = _whole_numbers(form, w_ref, part, i)
            for first in range(0, PACK_BLOCK, step_rows):
                here = slice(first, first + step_rows)
                dot = jnp.dot(x[:, here], w[here], preferred_element_type=jnp.float32)
                if offset:
                    dot -= offset * jnp.sum(x[:, here].astype(jnp.float32), axis=1, keepdims=True)
                scale = _scale(form, scales_ref, part, jax.lax.div(i * PACK_BLOCK + first, form.group))
                sums_ref[part] += dot * scale

    jax.lax.fori_loop(0, c.k // PACK_BLOCK, step, None)


def _whole_numbers(form: _Form, w_ref, part: int, i) -> tuple[jax.Array, float]:
    """Block i's numbers in bfloat16 [PACK_BLOCK, columns], and what each has been raised by.

    Words of four bytes hold eight 4-bit numbers. Two at a time become two bfloat16 of 16 + (number xor 8), which is 24 more than the number. As VMEM
    packs rows, that gives the even and the odd numbers of a block's first half, then of its second.
    """
    rows = PACK_BLOCK if form.kind == "int8" else PACK_BLOCK // 2
    at = pl.ds(pl.multiple_of(i * rows, rows), rows)
    numbers = w_ref[0, part, at, :] if form.parts == 2 else w_ref[0, at, :]
    if form.kind == "int8":
        return numbers.astype(jnp.bfloat16), 0.0
    words = pltpu.bitcast(numbers, jnp.int32)
    pieces = [(moved & 0x00780078) ^ 0x41C041C0 for moved in (words << 3, words >> 5, words >> 1, words >> 9)]
    return jnp.concatenate([pltpu.bitcast(piece, jnp.bfloat16) for piece in pieces]), 24.0


def _scale(form: _Form, scales_ref, part: int, i) -> jax.Array:
    """The scales [1, columns] of group i of this block."""
    return scales_ref[0, i, part : part + 1, :] if len(scales_ref.shape) == 4 else scales_ref[0, pl.ds(i, 1), :]


def _part(form: _Form, w_ref, part: int, at) -> jax.Array:
    """Rows of gate or up, or of the one matrix, as float32's whole numbers."""
    return (w_ref[0, part, at, :] if form.parts == 2 else w_ref[0, at, :]).astype(jnp.int32)


def _unpack_int8(form: _Form, c: Config, w_ref, scales_ref, out_ref) -> None:
    def step(i, _):
        at = pl.ds(pl.multiple_of(i * form.group, form.group), form.group)
        for part in range(form.parts):
            numbers = _part(form, w_ref, part, at).astype(jnp.float32)
            out_ref[part, at, :] = (numbers * _scale(form, scales_ref, part, i)).astype(jnp.bfloat16)

    jax.lax.fori_loop(0, c.k // form.group, step, None)


def _unpack_int4(form: _Form, c: Config, w_ref, scales_ref, out_ref) -> None:
    """A packed row of a block holds two rows of it, half a block apart."""
    half = pack_block(form.k) // 2
    rows = math.gcd(form.group, half)

    def step(i, _):
        first = i * 2 * half
        for part, j in itertools.product(range(form.parts), range(0, half, rows)):
            packed = _part(form, w_ref, part, pl.ds(pl.multiple_of(i * half + j, rows), rows))
            for at, numbers in ((first + j, (packed << 28) >> 28), (first + half + j, packed >> 4)):
                scale = _scale(form, scales_ref, part, jax.lax.div(at, form.group))
                out_ref[part, pl.ds(pl.multiple_of(at, rows), rows), :] = (numbers.astype(jnp.float32) * scale).astype(jnp.bfloat16)

    jax.lax.fori_loop(0, c.k // (2 * half), step, None)
