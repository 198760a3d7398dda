"""The body of `tpu`'s paged attention: what one step of its grid does with its queries, and how it fetches pages ahead of itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

CORES = 2
"""Halves of the grid that may run side by side."""
LANES = 128
FEW = 16
"""Rows of a tile that are computed alone where no more are live."""
TABLE, BEGIN, END, LOW, COUNT, KEYS, FIRST, NEXT = range(8)
"""Fields of a job: its sequence's place in the page table, pages from and to, position of its first row, live rows, keys, `first`, the next job."""
FIELDS = 8
PAGED = ("k", "v")
"""Of what is held in pages, what has heads and channels; the rest is a float32 per token."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes: `rows` of a sequence in a tile, `pages` and KV `heads` fetched and computed at once, `splits` of the keys."""

    rows: int
    pages: int
    heads: int
    splits: int = 1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The static numbers of a call; W tokens lie in `page_rows` rows of `tokens` tokens each."""

    heads: int
    group: int
    channels: int
    values: int
    width: int
    tokens: int
    page_rows: int
    table: int
    sequences: int
    n_rows: int
    most: int
    compute: Any
    itemsize: int
    own_values: bool
    words: int
    scales: int
    """Arrays of a float32 per token: scales of keys and of values, bias."""

    def tile(self, config: Config) -> int:
        """Rows of a tile times G, in whole sublanes."""
        return pl.cdiv(config.rows * self.group, 8) * 8

    def items(self, config: Config) -> int:
        """At most so many tiles have a live row."""
        return min(self.sequences * pl.cdiv(self.most, config.rows), self.n_rows // config.rows + self.sequences)

    def windows(self, channels: int, stride: int) -> list[tuple[int, int, int]]:
        """Per token of a row: the lanes (from, to) in whole registers that hold its `channels`, and how far into them it starts."""
        if self.tokens == 1:
            return [(0, channels, 0)]
        starts = [j * stride for j in range(self.tokens)]
        aligned = [s // LANES * LANES for s in starts]
        return [(a, min(pl.cdiv(s + channels, LANES) * LANES, stride * self.tokens), s - a) for a, s in zip(aligned, starts, strict=True)]

    @property
    def key_windows(self) -> list[tuple[int, int, int]]:
        return self.windows(self.channels, self.channels)

    @property
    def value_windows(self) -> list[tuple[int, int, int]]:
        return self.windows(self.values, self.values if self.own_values else self.channels)

    @property
    def q_width(self) -> int:
        return max(b - a for a, b, _ in self.key_windows)

    def vmem_bytes(self, config: Config) -> int:
        """An estimate, from above, of what a kernel holds."""

        def padded(n, to=LANES):
            return pl.cdiv(n, to) * to

        tile, heads = self.tile(config), config.heads
        columns = config.pages * self.page_rows
        row = padded(self.tokens * self.channels) + (padded(self.tokens * self.values) if self.own_values else 0)
        per_head = 2 * columns * row * self.itemsize
        if self.itemsize == 1:
            per_head += columns * row * 2
        per_head += tile * (2 * padded(self.channels) + self.tokens * padded(self.q_width)) * jnp.dtype(self.compute).itemsize
        accumulators = sum(padded(b - a) for a, b, _ in self.value_windows)
        per_head += tile * (2 * accumulators + 2 * padded(self.values) + 4 * LANES) * 4
        per_head += 3 * self.tokens * tile * padded(columns) * 4
        shared = 2 * self.scales * config.pages * padded(self.heads, 8) * padded(self.width) * 4 + 2 * tile * padded(self.words) * 4
        return heads * per_head + shared


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in a call."""

    sizes: Sizes
    config: Config
    scale: float
    window: int | None
    soft_cap: float | None


@dataclasses.dataclass(frozen=True)
class Refs:
    """What a step reads and writes."""

    jobs: Any
    """int32 [J * 8] in scalar memory."""
    chains: Any
    """int32 [CORES] in scalar memory: each core's first job with keys, or -1."""
    table: Any
    """int32 [B * X] in scalar memory."""
    q: Any
    """[1, heads, 1, R, C]."""
    tree: Any
    """int32 [1, R, U] or None."""
    held: dict[str, Any]
    """The leaves of `Pages`, in HBM."""
    o: Any
    """[1, heads, R, V]."""
    ml: Any
    """[1, heads, 8, R]: m and l in the first two rows."""
    buffers: dict[str, Any]
    """Two blocks of pages: [2, heads, n, W / f, f * C], or [2, n, ...] of what there is per token."""
    slot: Any
    """int32 [1] in scalar memory: the buffer whose block is next; it outlives a step, as the block already under way does."""
    sems: Any
    m: Any
    """[heads, R, 128], alike in all lanes; so is `l`."""
    l: Any
    acc: tuple[Any, ...]
    """Per token of a row: [heads, R, lanes of its window]."""
    shifted: Any
    """[heads, f, R, C'] or None, see `_shift`."""

    def of(self, job: jax.Array, *fields: int) -> tuple[jax.Array, ...]:
        """Fields of a job."""
        return tuple(self.jobs[job * FIELDS + field] for field in fields)


def scratch(call: Call, held: dict[str, jax.Array]) -> list[Any]:
    """The kernel's memory, in the order in which `kernel` takes it."""
    sizes, config = call.sizes, call.config
    tile = sizes.tile(config)
    buffers = [
        pltpu.VMEM((2, config.heads, config.pages, *x.shape[2:]) if name in PAGED else (2, config.pages, *x.shape[1:]), x.dtype)
        for name, x in held.items()
    ]
    softmax = [pltpu.VMEM((config.heads, tile, LANES), jnp.float32)] * 2
    acc = [pltpu.VMEM((config.heads, tile, b - a), jnp.float32) for a, b, _ in sizes.value_windows]
    shifted = [pltpu.VMEM((config.heads, sizes.tokens, tile, sizes.q_width), sizes.compute)] if sizes.tokens > 1 else []
    return [*buffers, pltpu.SMEM((1,), jnp.int32), pltpu.SemaphoreType.DMA((2,)), *softmax, *acc, *shifted]


def kernel(call: Call, names: tuple[str, ...], *refs: Any) -> None:
    """One job's attention for one block of heads; its first keys are under way already, and it leaves with those of the next job under way.

    Args:
        call: static.
        names: of the leaves of `Pages` that there are.
        refs: scalars, queries, tree, leaves, results, `scratch`.
    """
    it = iter(refs)
    jobs, chains, table, q = (next(it) for _ in range(4))
    tree = next(it) if call.sizes.words else None
    held = {name: next(it) for name in names}
    o, ml = next(it), next(it)
    buffers = {name: next(it) for name in names}
    slot, sems, m, l = (next(it) for _ in range(4))
    acc = tuple(next(it) for _ in range(call.sizes.tokens))
    at = Refs(jobs, chains, table, q, tree, held, o, ml, buffers, slot, sems, m, l, acc, next(it, None))

    core, step, head_block = (pl.program_id(axis) for axis in range(3))
    job = step * CORES + core
    pl.when((step == 0) & (head_block == 0))(lambda: _begin(call, at, at.chains[core]))
    at.m[...] = jnp.full_like(at.m, -jnp.inf)
    at.l[...] = jnp.zeros_like(at.l)
    for acc_ref in at.acc:
        acc_ref[...] = jnp.zeros_like(acc_ref)
    if at.shifted is not None:
        _shift(call.sizes, at)
    begin, end = at.of(job, BEGIN, END)

    def block(i, _):
        _visit(call, at, job, head_block, begin + i * call.config.pages, end)
        return 0

    lax.fori_loop(0, pl.cdiv(end - begin, call.config.pages), block, 0)
    _store(call, at)


def _begin(call: Call, at: Refs, job: jax.Array) -> None:
    """Starts a core's first copies."""
    at.slot[0] = 0
    pl.when(job >= 0)(lambda: _fetch(call, at, job, at.of(job, BEGIN)[0], jnp.int32(0), jnp.int32(0)))


def _copies(call: Call, at: Refs, page: Any, place: jax.Array, slot: jax.Array, head_block: Any) -> list[Any]:
    """The copies of one page to its place in a block."""
    heads, out = call.config.heads, []
    for name, ref in at.held.items():
        if name in PAGED:
            source, target = ref.at[page, pl.ds(head_block * heads, heads)], at.buffers[name].at[slot, :, place]
        else:
            source, target = ref.at[page], at.buffers[name].at[slot, place]
        out.append(pltpu.make_async_copy(source, target, at.sems.at[slot]))
    return out


def _fetch(call: Call, at: Refs, job: jax.Array, page: jax.Array, slot: jax.Array, head_block: jax.Array) -> None:
    """Starts to copy a job's block of pages, from its page number `page` on."""
    entry, end = at.of(job, TABLE, END)

    def one(p, _):
        for copy in _copies(call, at, at.table[entry + page + p], p, slot, head_block):
            copy.start()
        return 0

    lax.fori_loop(0, jnp.minimum(call.config.pages, end - page), one, 0)


def _wait(call: Call, at: Refs, count: jax.Array, slot: jax.Array) -> None:
    """Until `count` pages have come."""

    def one(p, _):
        for copy in _copies(call, at, 0, p, slot, 0):
            copy.wait()
        return 0

    lax.fori_loop(0, count, one, 0)


def _visit(call: Call, at: Refs, job: jax.Array, head_block: jax.Array, page: jax.Array, end: jax.Array) -> None:
    """Attention over the block from `page` on, while the next one is fetched: of this job, of its next heads, or of the next job."""
    sizes, config, slot = call.sizes, call.config, at.slot[0]
    more_keys = page + config.pages < end
    more_heads = head_block + 1 < sizes.heads // config.heads
    next_job = jnp.where(more_keys | more_heads, job, at.of(job, NEXT)[0])

    @pl.when(next_job >= 0)
    def _():
        next_page = jnp.where(more_keys, page + config.pages, at.of(next_job, BEGIN)[0])
        next_heads = jnp.where(more_keys, head_block, jnp.where(more_heads, head_block + 1, 0))
        _fetch(call, at, next_job, next_page, 1 - slot, next_heads)

    _wait(call, at, jnp.minimum(config.pages, end - page), slot)
    attend = functools.partial(_attend, call, at, job, head_block, page, slot)
    partly, tile = _partly_seen(call, at, job, page), sizes.tile(config)
    if tile > FEW >= sizes.group:
        few = at.of(job, COUNT)[0] * sizes.group <= FEW
        pl.when(few)(lambda: attend(FEW, True))
        partly, wholly = ~few & partly, ~few & ~partly
    else:
        wholly = ~partly
    pl.when(partly)(lambda: attend(tile, True))
    pl.when(wholly)(lambda: attend(tile, False))
    at.slot[0] = 1 - slot


def _store(call: Call, at: Refs) -> None:
    """Writes the job's results: the tokens' accumulators together, m and l as rows, because columns would take 128 lanes each."""
    sizes = call.sizes
    parts = [ref[...][:, :, start : start + sizes.values] for ref, (_, _, start) in zip(at.acc, sizes.value_windows, strict=True)]
    at.o[0] = functools.reduce(jnp.add, parts)
    lane = lax.broadcasted_iota(jnp.int32, at.m.shape[1:], 1)
    for h in range(call.config.heads):
        at.ml[0, h] = jnp.where(lane == 0, at.m[h], at.l[h]).T[:8]


def _shift(sizes: Sizes, at: Refs) -> None:
    """Copies of the queries, one per token of a row: channels where that token's are, zeros where the others' are."""
    q = at.q[0, :, 0].astype(jnp.float32)
    for j, (_, _, start) in enumerate(sizes.key_windows):
        before, after = (jnp.zeros((*q.shape[:2], n), q.dtype) for n in (start, sizes.q_width - start - sizes.channels))
        at.shifted[:, j] = jnp.concatenate([x for x in (before, q, after) if x.shape[-1]], -1).astype(sizes.compute)


def _partly_seen(call: Call, at: Refs, job: jax.Array, page: jax.Array) -> Bool[Array, ""]:
    """Whether some row of the tile may not see some key of the block from `page` on."""
    low, count, keys, first, end = at.of(job, LOW, COUNT, KEYS, FIRST, END)
    stop = (page + call.config.pages) * call.sizes.width
    partly = (stop > keys) | (page + call.config.pages > end) | (stop > first if call.sizes.words else stop > low + 1)
    if call.window is not None:
        partly |= page * call.sizes.width <= low + count - 1 - call.window
    return partly


def _attend(call: Call, at: Refs, job: jax.Array, head_block: jax.Array, page: jax.Array, slot: jax.Array, rows: int, masked: bool) -> None:
    """Attention of the tile's first `rows` rows over a block of keys; `masked` if some may not be seen or are not there."""
    sizes, soft_cap = call.sizes, call.soft_cap
    (end, keys), base = at.of(job, END, KEYS), page * sizes.width
    limit = jnp.minimum(keys, end * sizes.width)
    there = functools.partial(_there, jnp.int32(0) if call.window is None else at.of(job, LOW)[0] - call.window + 1, limit)
    k, v = _keys_and_values(call, at, slot, base, there, masked)
    of_tokens = functools.partial(_of_tokens, call, head_block, base, there)
    scores, seen = [], []
    for j, (a, b, _) in enumerate(sizes.key_windows):
        q = at.q[0, :, 0, :rows] if at.shifted is None else at.shifted[:, j, :rows, : b - a]
        s = _dot(q, k[:, :, a:b], 2) * call.scale
        if "k_scales" in at.buffers:
            s = s * of_tokens(at.buffers["k_scales"], slot, j)
        if soft_cap is not None:
            s = soft_cap * jnp.tanh(s / soft_cap)
        if "bias" in at.buffers:
            s = s + of_tokens(at.buffers["bias"], slot, j)
        if masked:
            seen.append(_seen(call, at, job, rows, k.shape[1], base + j, limit))
            s = jnp.where(seen[j][None], s, -jnp.inf)
        scores.append(s)

    m_old = at.m[:, :rows, :1]
    m = functools.reduce(jnp.maximum, [s.max(-1, keepdims=True) for s in scores], m_old)
    m_finite = jnp.where(m == -jnp.inf, 0.0, m)
    fade = jnp.exp(m_old - m_finite)
    l = at.l[:, :rows, :1] * fade
    value_scales = at.buffers.get("v_scales" if sizes.own_values else "k_scales")
    for j, (s, acc, (a, b, _)) in enumerate(zip(scores, at.acc, sizes.value_windows, strict=True)):
        p = jnp.exp(s - m_finite)
        l = l + p.sum(-1, keepdims=True)
        if value_scales is not None:
            p = p * of_tokens(value_scales, slot, j)
            p = jnp.where(seen[j][None], p, 0.0) if masked else p
        acc[:, :rows] = acc[:, :rows] * fade + _dot(p.astype(sizes.compute), v[:, :, a:b], 1)
    at.m[:, :rows] = jnp.broadcast_to(m, (*m.shape[:2], LANES))
    at.l[:, :rows] = jnp.broadcast_to(l, (*l.shape[:2], LANES))


def _there(bottom: jax.Array, limit: jax.Array, token: jax.Array) -> jax.Array:
    """Whether some row of the tile may see a token: from its first row's window on, to the last key."""
    return (token >= bottom) & (token < limit)


def _keys_and_values(call: Call, at: Refs, slot: jax.Array, base: jax.Array, there: Callable, masked: bool):
    """Keys and values of a block, [heads, rows, f * C or f * V], to be multiplied with; int8 not yet scaled.

    What no row sees may be NaN, and even a probability of zero would let it through: those values become zeros. So do such keys where
    they share their row with keys that are seen.
    """
    sizes = call.sizes
    columns = call.config.pages * sizes.page_rows

    def load(name, channels, clean):
        x = at.buffers[name][slot]
        if x.dtype == jnp.uint16:
            x = pltpu.bitcast(x, jnp.bfloat16)
        elif x.dtype == jnp.int8:
            x = x.astype(jnp.float32)
        x = x.astype(sizes.compute).reshape(call.config.heads, columns, x.shape[-1])
        if not clean:
            return x
        token = base + lax.broadcasted_iota(jnp.int32, (columns, 1), 0) * sizes.tokens
        if sizes.tokens > 1:
            lane = lax.broadcasted_iota(jnp.int32, (columns, x.shape[-1]), 1)
            token = token + sum((lane >= j * channels).astype(jnp.int32) for j in range(1, sizes.tokens))
        return jnp.where(there(token)[None], x, jnp.zeros((), x.dtype))

    if not sizes.own_values:
        k = load("k", sizes.channels, masked)
        return k, k
    return load("k", sizes.channels, masked and sizes.tokens > 1), load("v", sizes.values, masked)


def _dot(a: Float[Array, "K R X"], b: jax.Array, axis: int) -> Float[Array, "K R Y"]:
    """Per head, over a's last axis and b's given one, in float32; float32 operands at full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((2,), (axis,)), ((0,), (0,))), precision=precision, preferred_element_type=jnp.float32)


def _of_tokens(call: Call, head_block: jax.Array, base: jax.Array, there: Callable, buffer: Any, slot: jax.Array, j: int):
    """What belongs to the tokens j, j + f, j + 2f, ... of the block: [heads or 1, 1, columns], from a buffer [2, n, K or 1, W] or a flat one."""
    sizes, heads, parts = call.sizes, call.config.heads, []
    for p in range(call.config.pages):
        x = buffer[slot, p]
        if x.shape[1] > sizes.width:
            x = jnp.concatenate([x[:, lane : lane + sizes.width] for lane in range(0, x.shape[1], sizes.width)])
        if sizes.tokens > 1:
            # Every f-th lane, by a matmul with zeros and ones, which is exact; it must meet no NaN and no infinity.
            token = base + p * sizes.width + lax.broadcasted_iota(jnp.int32, x.shape, 1)
            x = jnp.where(there(token), jnp.maximum(x, -1e30), 0.0)
            of, to = (lax.broadcasted_iota(jnp.int32, (sizes.width, sizes.page_rows), axis) for axis in (0, 1))
            pick = jnp.where(of == to * sizes.tokens + j, 1.0, 0.0)
            x = lax.dot_general(x, pick, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
            x = jnp.where(x <= -1e30, -jnp.inf, x)
        parts.append(x)
    x = jnp.concatenate(parts, -1) if len(parts) > 1 else parts[0]
    if x.shape[0] == 1:
        return x[None]
    if heads == sizes.heads:
        return jnp.stack([x[h : h + 1] for h in range(heads)])
    head = lax.broadcasted_iota(jnp.int32, x.shape, 0) - head_block * heads
    return jnp.stack([jnp.where(head == h, x, 0.0).sum(0, keepdims=True) for h in range(heads)])


def _seen(call: Call, at: Refs, job: jax.Array, rows: int, columns: int, base: jax.Array, limit: jax.Array) -> Bool[Array, "R S"]:
    """Which of the keys `base + column * f` the tile's rows see."""
    sizes, (low, first) = call.sizes, at.of(job, LOW, FIRST)
    key = base + lax.broadcasted_iota(jnp.int32, (1, columns), 1) * sizes.tokens
    position = low + lax.div(lax.broadcasted_iota(jnp.int32, (rows, 1), 0), jnp.int32(sizes.group))
    if at.tree is None:
        seen = (key <= position) & (key < limit)
    else:
        seen = ((key < first) | _in_tree(sizes, at.tree, rows, columns, base - first)) & (key < limit)
    return seen if call.window is None else seen & (key > position - call.window)


def _in_tree(sizes: Sizes, tree_ref: Any, rows: int, columns: int, start: jax.Array) -> Bool[Array, "R S"]:
    """The rows' bits number `start + column * f`; False before the first and past the last."""
    words = tree_ref[0, :rows]
    lane = lax.broadcasted_iota(jnp.int32, words.shape, 1)
    bit = start + lax.broadcasted_iota(jnp.int32, (rows, columns), 1) * sizes.tokens

    def word(u, held):
        one = jnp.where(lane == u, words, 0).sum(1, keepdims=True)
        return jnp.where(bit >> 5 == u, one, held)

    low = jnp.clip(start >> 5, 0, sizes.words)
    high = jnp.clip(((start + (columns - 1) * sizes.tokens) >> 5) + 1, 0, sizes.words)
    held = lax.fori_loop(low, high, word, jnp.zeros((rows, columns), jnp.int32))
    return (lax.shift_right_logical(held, bit & 31) & 1) == 1
