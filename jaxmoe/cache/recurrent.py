"""What gated delta-rule layers carry from token to token: a matrix per head, and the last inputs of the short convolution before it.

    S = exp(log_decay) S,   S = S + k (beta (v - S^T k))^T,   o = S^T q       (arXiv:2412.06464, eq. 10, in float32)

On the CPU one loop takes one token after another, the convolution with it, whatever the batch looks like: the same program for every token, so that
a token's bits depend on nothing but the tokens before it. On accelerators the tokens of a run go together, in the chunks of section 3.3 of the paper.
"""

from __future__ import annotations

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from jaxmoe import formats
from jaxmoe.cache.batch import Batch
from jaxmoe.spec import DeltaSpec, Precision
from pallas_kernels.dense.api import MIN_ROWS
from pallas_kernels.dispatch import Kernels

CHUNK = 64
"""Most tokens that accelerators take together, and tokens between the states that training keeps for its backward pass."""

_EPS = 1e-6


@flax.struct.dataclass
class RecurrentState:
    """Attributes: `conv` [L, B, W - 1, N], the last inputs of the N = 2 Kh dk + Vh dv convolved channels (queries, keys, values), latest last;
    `memory` float32 [L, B, Vh, dk, dv].

    L counts the layers that have this state. The inputs are activations, so they lose nothing in the activations' dtype, which they are held in
    (bfloat16 as uint16). The channels lie last: accelerators pad the last axis to 128.
    """

    conv: Num[Array, "L B W N"]
    memory: Float[Array, "L B Vh dk dv"]

    def logical_axes(self) -> dict[str, tuple[str | None, ...]]:
        """The logical name of every axis of every leaf."""
        head = ("layers", "batch")
        return {"conv": (*head, None, "heads"), "memory": (*head, "heads", None, None)}

    def delta(
        self,
        spec: DeltaSpec,
        layer: Int[Array, ""],
        q: Float[Array, "T Kh dk"],
        k: Float[Array, "T Kh dk"],
        v: Float[Array, "T Vh dv"],
        log_decay: Float[Array, "T Vh"],
        beta: Float[Array, "T Vh"],
        conv_kernels: tuple[jax.Array, jax.Array, jax.Array],
        batch: Batch,
        kernels: Kernels,
    ) -> tuple[Float[Array, "T Vh dv"], RecurrentState]:
        """Convolves the step's projections over their sequences' own pasts and runs the delta rule over them.

        A run that begins at position 0 begins with nothing, whatever its cache row held. Tokens of segment -1 change no state; they end their run.

        Args:
            spec: the layer's heads.
            layer: its number among the layers of this kind.
            q, k, v: projected inputs, not yet convolved.
            log_decay, beta: of each head and token.
            conv_kernels: of q, k and v: [Kh, dk, W] twice and [Vh, dv, W], as held; index W - 1 multiplies the present token.
            batch: the tokens.
            kernels: which implementation.

        Returns:
            Outputs in float32 (zeros in padding), and the state after the step.
        """
        x, taps = joined(q, k, v), _taps(conv_kernels, q.dtype)
        with jax.named_scope("delta"):
            if kernels.backend in ("gpu", "tpu"):
                return chunked(self, spec, layer, x, log_decay, beta, taps, batch)
            return sequential(self, spec, layer, x, log_decay, beta, taps, batch)


def init_recurrent(delta: DeltaSpec, layers: int, rows: int, precision: Precision) -> RecurrentState:
    """The empty state of `layers` layers and `rows` sequences."""
    channels = 2 * delta.k_heads * delta.k_dim + delta.v_heads * delta.v_dim
    conv = jnp.zeros((layers, rows, delta.conv - 1, channels), formats.leaf_dtype(precision.compute))
    return RecurrentState(conv, jnp.zeros((layers, rows, delta.v_heads, delta.k_dim, delta.v_dim), jnp.float32))


def delta_full(
    spec: DeltaSpec,
    rows: int,
    q: Float[Array, "T Kh dk"],
    k: Float[Array, "T Kh dk"],
    v: Float[Array, "T Vh dv"],
    log_decay: Float[Array, "T Vh"],
    beta: Float[Array, "T Vh"],
    conv_kernels: tuple[jax.Array, jax.Array, jax.Array],
) -> Float[Array, "T Vh dv"]:
    """`RecurrentState.delta` of `rows` whole sequences of equal length from position 0, with no state; differentiable."""
    x = joined(q, k, v).reshape(rows, -1, 2 * math.prod(q.shape[1:]) + math.prod(v.shape[1:]))
    taps = _taps(conv_kernels, q.dtype)
    past = jnp.zeros((rows, taps.shape[0] - 1, x.shape[-1]), jnp.float32)
    window = jnp.concatenate([past, x.astype(jnp.float32)], 1)
    q, k, v = _heads(spec, _convolve(window, taps, x.dtype))
    o = delta_rule(q, k, v, log_decay.reshape(rows, -1, spec.v_heads), beta.reshape(rows, -1, spec.v_heads))
    return o.reshape(-1, spec.v_heads, spec.v_dim)


def delta_rule(
    q: Float[Array, "B S Kh dk"],
    k: Float[Array, "B S Kh dk"],
    v: Float[Array, "B S Vh dv"],
    log_decay: Float[Array, "B S Vh"],
    beta: Float[Array, "B S Vh"],
) -> Float[Array, "B S Vh dv"]:
    """The delta rule over whole sequences from an empty state, one token after another; pure and differentiable.

    Args:
        q, k, v: convolved; queries and keys normalised, queries also scaled.
        log_decay, beta: of each head and token.

    Returns:
        Outputs in float32.
    """
    b, s, heads, dv = v.shape
    blocks = -(-s // CHUNK)

    def in_blocks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, blocks * CHUNK - s)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x, 1, 0).reshape(blocks, CHUNK, b, *x.shape[2:])

    def token(memory, x):
        q, k, v, log_decay, beta = x
        memory, o = jax.vmap(_token)(memory, q, k, v, jnp.exp(log_decay), beta)
        return memory, o

    @jax.checkpoint  # a state per token would be kept for the backward pass: dk times the outputs
    def block(memory, xs):
        return jax.lax.scan(token, memory, xs)

    zero = jnp.zeros((b, heads, k.shape[-1], dv), jnp.float32)
    _, o = jax.lax.scan(block, zero, tuple(map(in_blocks, (q, k, v, log_decay, beta))))
    return jnp.moveaxis(o.reshape(blocks * CHUNK, b, heads, dv)[:s], 0, 1)


def joined(q: jax.Array, k: jax.Array, v: jax.Array) -> Float[Array, "T N"]:
    """All convolved channels on one axis."""
    return jnp.concatenate([x.reshape(x.shape[0], -1) for x in (q, k, v)], 1)


def _taps(conv_kernels, dtype) -> Float[Array, "W N"]:
    """The convolutions' weights in float32, rounded to `dtype` as all weights are."""
    return jnp.concatenate([formats.load(w, dtype).astype(jnp.float32).reshape(-1, w.shape[-1]) for w in conv_kernels]).T


def _convolve(window: Float[Array, "... S N"], taps: Float[Array, "W N"], dtype) -> Float[Array, "... S N"]:
    """SiLU of the causal convolution of all but the first W - 1 inputs; float32, rounded to `dtype` before and after the SiLU."""
    width, tokens = taps.shape[0], window.shape[-2] - taps.shape[0] + 1
    terms = [jax.lax.slice_in_dim(window, w, w + tokens, axis=-2) * taps[w] for w in range(width)]
    y = functools.reduce(jnp.add, terms).astype(dtype).astype(jnp.float32)
    return jax.nn.silu(y).astype(dtype).astype(jnp.float32)


def _heads(spec: DeltaSpec, x: Float[Array, "... N"]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and keys of unit length, the queries times dk^-0.5, and values, from convolved channels in float32."""
    keys = spec.k_heads * spec.k_dim
    q, k, v = jnp.split(x, (keys, 2 * keys), axis=-1)
    q, k = (t.reshape(*t.shape[:-1], spec.k_heads, spec.k_dim) for t in (q, k))
    q, k = (t * formats.inverse_root((t * t).sum(-1, keepdims=True) + _EPS) for t in (q, k))
    return q * spec.k_dim**-0.5, k, v.reshape(*v.shape[:-1], spec.v_heads, spec.v_dim)


def _token(memory, q, k, v, decay, beta):
    """One token of one sequence: memory [Vh, dk, dv], q and k [Kh, dk], v [Vh, dv], decay and beta [Vh]; the memory after it, and its output.

    Query and key read the memory as it was, in one dot; what the token adds to it is added to what the query read.
    """
    group = v.shape[0] // k.shape[0]
    overlap = jnp.repeat((q * k).sum(-1), group)[:, None]
    rows = jnp.repeat(jnp.stack([k, q], 1), group, 0)
    of_k, of_q = jnp.moveaxis(jnp.einsum("hrc,hcd->hrd", rows, memory) * decay[:, None, None], 1, 0)
    new = (v - of_k) * beta[:, None]
    return memory * decay[:, None, None] + rows[:, 0, :, None] * new[:, None, :], of_q + overlap * new


def _live(batch: Batch) -> tuple[Bool[Array, "T"], Int[Array, "n"], Bool[Array, "n"]]:
    """Which tokens are real, how many of each run are, and which runs begin a sequence."""
    n = batch.run_positions.shape[0]
    live = jnp.asarray(batch.segments).reshape(n, -1) >= 0
    live &= (jnp.arange(batch.run) < batch.run_lengths[:, None]) & (jnp.arange(n) < batch.n_runs)[:, None]
    lengths = live.sum(1)
    return live.reshape(-1), lengths, (batch.run_positions == 0) & (lengths > 0)


def _row(leaf: jax.Array, layer, row, fresh) -> jax.Array:
    """What a cache row of a layer holds, in float32; zeros if `fresh`."""
    held = jax.lax.dynamic_slice(leaf, (layer, row) + (0,) * (leaf.ndim - 2), (1, 1, *leaf.shape[2:]))[0, 0]
    return jnp.where(fresh, 0.0, formats.load(held, jnp.float32))


def _with_row(leaf: jax.Array, layer, row, new: jax.Array) -> jax.Array:
    new = formats.store(new, "bfloat16" if leaf.dtype == jnp.uint16 else "float32")
    return jax.lax.dynamic_update_slice(leaf, new[None, None], (layer, row) + (0,) * new.ndim)


def sequential(
    state: RecurrentState,
    spec: DeltaSpec,
    layer,
    x: Float[Array, "T N"],
    log_decay: Float[Array, "T Vh"],
    beta: Float[Array, "T Vh"],
    taps: Float[Array, "W N"],
    batch: Batch,
) -> tuple[Float[Array, "T Vh dv"], RecurrentState]:
    """One run after another, and in it one token after another; see `RecurrentState.delta`."""
    run, tokens = batch.run, x.shape[0]
    rows, (_, lengths, fresh) = jnp.asarray(batch.run_segments), _live(batch)
    # A single token comes twice: XLA would take what it can of it out of the loop, and round it otherwise than in the loop. Not padded, because of
    # exponentials that it fuses with a padding, or with the products of a single row, some have other bits.
    each = [jnp.broadcast_to(t.astype(jnp.float32), (max(tokens, 2), t.shape[1])) for t in (x, log_decay, beta)]

    def one_token(t, carry):
        past, memory, out = carry
        now, decay, rate = (jax.lax.dynamic_index_in_dim(a, t, keepdims=False) for a in each)
        window = jnp.concatenate([past, now[None]])
        q, k, v = _heads(spec, _convolve(window, taps, x.dtype)[0])
        memory, o = _token(memory, q, k, v, jnp.exp(decay), rate)
        return window[1:], memory, jax.lax.dynamic_update_index_in_dim(out, o, t, 0)

    def one_run(r, carry):
        conv, memory, out = carry
        row = rows[r]
        own = (_row(conv, layer, row, fresh[r]), _row(memory, layer, row, fresh[r]), out)
        past, new, out = jax.lax.fori_loop(r * run, r * run + lengths[r], one_token, own)
        return _with_row(conv, layer, row, past), _with_row(memory, layer, row, new), out

    out = jnp.zeros((each[0].shape[0], spec.v_heads, spec.v_dim), jnp.float32)
    conv, memory, out = jax.lax.fori_loop(0, batch.n_runs, one_run, (state.conv, state.memory, out))
    return out[:tokens], RecurrentState(conv, memory)


def chunked(
    state: RecurrentState,
    spec: DeltaSpec,
    layer,
    x: Float[Array, "T N"],
    log_decay: Float[Array, "T Vh"],
    beta: Float[Array, "T Vh"],
    taps: Float[Array, "W N"],
    batch: Batch,
) -> tuple[Float[Array, "T Vh dv"], RecurrentState]:
    """Chunks of up to `CHUNK` tokens, all that needs no state at once and then one chunk after another; see `RecurrentState.delta`.

    No loop's length depends on values, which a GPU would have to ask the host about.
    """
    run, tokens = batch.run, x.shape[0]
    size = run if run <= CHUNK else math.gcd(run, CHUNK)
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.HIGH
    rows, (live, lengths, fresh) = jnp.asarray(batch.run_segments), _live(batch)
    conv, pasts = _pasts(state.conv, layer, rows, x.reshape(-1, run, x.shape[1]), lengths, fresh)
    window = jnp.concatenate([pasts, x.astype(jnp.float32).reshape(-1, run, x.shape[1])], 1)
    log_decay, beta = (jnp.where(live[:, None], t.astype(jnp.float32), 0.0) for t in (log_decay, beta))
    each = (*_heads(spec, _convolve(window, taps, x.dtype).reshape(x.shape)), log_decay, beta)
    q, k, v, log_decay, beta = (t.reshape(tokens // size, size, *t.shape[1:]).swapaxes(1, 2) for t in each)
    parts = _within_chunks(q, k, v, log_decay, beta, exact)
    first = fresh[:, None] & (jnp.arange(run // size) == 0)
    memory, out = _across_chunks(state.memory, layer, jnp.repeat(rows, run // size), first.reshape(-1), parts, exact)
    return jnp.where(live[:, None, None], out.swapaxes(1, 2).reshape(tokens, spec.v_heads, spec.v_dim), 0.0), RecurrentState(conv, memory)


def _pasts(conv, layer, rows, x: Float[Array, "n run N"], lengths, fresh) -> tuple[jax.Array, Float[Array, "n W N"]]:
    """The inputs before each run, and the inputs carried on after all of them."""
    keep = conv.shape[2]

    def one_run(r, carry):
        conv, pasts = carry
        past = _row(conv, layer, rows[r], fresh[r])
        window = jnp.concatenate([past, x[r].astype(jnp.float32)])
        last = jax.lax.dynamic_slice_in_dim(window, lengths[r], keep)
        return _with_row(conv, layer, rows[r], last), jax.lax.dynamic_update_index_in_dim(pasts, past, r, 0)

    return jax.lax.fori_loop(0, x.shape[0], one_run, (conv, jnp.zeros((x.shape[0], keep, x.shape[2]), jnp.float32)))


def _within_chunks(q, k, v, log_decay, beta, exact):
    """What the chunks' tokens do to each other, whatever the state before them.

    With g the decays multiplied up from the chunk's start, token i's new value is beta_i (v_i - g_i S^T k_i - sum_{j<i} g_i/g_j (k_i.k_j) new_j): a
    unit triangular system, whose solution is linear in the state S before the chunk, new = u - w S.

    Args:
        q, k: [n, Kh, C, dk].
        v: [n, Vh, C, dv].
        log_decay, beta: [n, Vh, C]; 0 in padding.
        exact: precision of the dots.

    Returns:
        u [n, Vh, C, dv]; w and the decayed queries on one axis [n, Vh, 2 C, dk]; the queries' weights of new values [n, Vh, C, C]; the keys decayed
        up to the chunk's end [n, Vh, C, dk]; the chunk's whole decay [n, Vh].
    """
    group, size = v.shape[1] // k.shape[1], k.shape[2]
    dot = functools.partial(jnp.einsum, "nhic,nhjc->nhij", precision=exact, preferred_element_type=jnp.float32)
    of_keys, of_queries = (jnp.repeat(dot(t, k), group, 1) for t in (k, q))
    q, k = (jnp.repeat(t, group, 1) for t in (q, k))
    total = jnp.cumsum(log_decay, -1)
    at = jnp.arange(size)
    between = jnp.exp(jnp.where(at[:, None] >= at, total[..., :, None] - total[..., None, :], -jnp.inf))
    g = jnp.exp(total)[..., None]
    u_w = jnp.concatenate([v, k * g], -1) * beta[..., None]
    if size > 1:
        system = of_keys * between * beta[..., None]
        u_w = jax.lax.linalg.triangular_solve(system, u_w, left_side=True, lower=True, unit_diagonal=True)
    u, w = jnp.split(u_w, (v.shape[-1],), -1)
    return u, jnp.concatenate([w, q * g], 2), of_queries * between, k * jnp.exp(total[..., -1:] - total)[..., None], g[:, :, -1, 0]


def _across_chunks(memory, layer, rows: Int[Array, "n"], first: Bool[Array, "n"], parts, exact):
    """Takes the state through the chunks, in order; the state after them, and outputs [n, Vh, C, dv]."""
    n, heads, size, dv = parts[0].shape
    dot = functools.partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)
    few = max(MIN_ROWS - 2 * size, 0)

    def one_chunk(i, carry):
        memory, out = carry
        u, w_q, weights, k, decay = (jax.lax.dynamic_index_in_dim(t, i, keepdims=False) for t in parts)
        old = _row(memory, layer, rows[i], first[i])
        read = dot("hic,hcd->hid", jnp.pad(w_q, ((0, 0), (0, few), (0, 0))), old)
        new = u - read[:, :size]
        o = read[:, size : 2 * size] + dot("hij,hjd->hid", weights, new)
        memory = _with_row(memory, layer, rows[i], old * decay[:, None, None] + dot("hjc,hjd->hcd", k, new))
        return memory, jax.lax.dynamic_update_index_in_dim(out, o, i, 0)

    return jax.lax.fori_loop(0, n, one_chunk, (memory, jnp.zeros((n, heads, size, dv), jnp.float32)))
