"""The jitted steps: prefill and decode, pure functions of `(params, bank, state, ...)` with the state donated.

`bank` is the fixed part of the expert bank; its moving part is in the `EngineState`.

Sizes come in buckets, so that a run compiles a handful of programs at warm-up and nothing afterwards. Decoding runs several tokens in one program:
the step's cost on the host is paid once per chunk, and text still streams.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxmoe.cache.batch import Batch
from jaxmoe.decode.sampling import SamplingParams
from jaxmoe.engine.coherent import coherent_forward, moves
from jaxmoe.engine.mesh import HERE, Devices, anywhere, chosen_tokens, on_mesh, whole_logits
from jaxmoe.nn.transformer import chosen_experts, forward
from jaxmoe.routing.ahead import AHEAD, WIDTH, Gates, stack_gates
from jaxmoe.spec import ModelSpec
from pallas_kernels.dispatch import Kernels
from sharding.split import ALONE, Layout, SplitError, local_spec
from sharding.workload import TOKEN_BUCKETS as TOKEN_BUCKETS  # prefill steps are planned with them too

ROW_BUCKETS = (1, 4, 8, 16, 32, 64, 128)
"""Sequences in a decode step; few rows because a CPU dot's cost grows with them even when they are padding."""

LOGIT_ROWS = 8
"""Sequences whose prompt may end in one prefill step."""

CHUNK = 16
"""Tokens that one call of the decode program can produce."""

EOS_SLOTS = 8
"""How many end-of-text ids a program can watch for."""


def run_length(tokens: int) -> int:
    """Tokens in a run of a prefill bucket: long enough that attention is few large steps, short enough that ragged prompts pad little."""
    return min(tokens, 64 if tokens > 128 else 32)


def bucket(n: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds n.

    Raises:
        ValueError: n is larger than the largest.
    """
    for b in buckets:
        if n <= b:
            return b
    raise ValueError(f"{n} is more than the largest bucket, {buckets[-1]}")


@flax.struct.dataclass
class EngineState:
    """All that a step changes, donated as one pytree. Attributes: `layers` the layer states (KV), `bank` the moving part of the expert bank."""

    layers: Any
    bank: Any


def committed(state: EngineState) -> EngineState:
    """The state to begin with, each array committed to the device it is on.

    What a step returns is committed if any argument is, as a pinned store is, and a program for arrays that are not is another one.
    """
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding), state)


def _forward(
    spec: ModelSpec, params, bank, state: EngineState, batch: Batch, kernels: Kernels, record: bool = False, gates: Gates | None = None,
    layout: Layout = ALONE,
):  # fmt: skip
    bank = bank.join(state.bank)
    bank = bank.in_order() if batch.run > 1 else bank
    if moves(layout, batch):
        if record:
            raise SplitError("exchange = 'coherent' decodes where experts are, and records no routing: choose 'tokens'")
        logits, bank, layers = coherent_forward(spec, params, bank, state.layers, batch, kernels, layout)
        return logits, EngineState(layers, bank.split()[1]), ()
    logits, bank, layers, aux = forward(spec, params, bank, state.layers, batch, kernels, record, gates, layout)
    return logits, EngineState(layers, bank.split()[1]), chosen_experts(spec, aux["routed"]) if record else ()


@functools.cache
def prefill_step(
    spec: ModelSpec, kernels: Kernels, greedy: bool, record: bool = False, gates: bool = False, on: Devices = HERE
) -> Callable:
    """The jitted `(params, bank, state, batch, sampling, positions [R]) -> (tokens [R], state, routed)`.

    `routed` is `chosen_experts` of the batch with `record`, else empty; with `gates` as well, what routers foretell is part of it.
    `on`: the devices that share the work; arrays are whole ones, and a batch is `jaxmoe.cache.batch.join_batches` of theirs.
    """
    own, layout = local_spec(spec, on.layout), on.layout

    def prefill(params, bank, state, batch: Batch, sampling: SamplingParams, positions):
        stacked = stack_gates(own, params) if gates else None
        logits, state, routed = _forward(own, params, bank, state, batch, kernels, record, stacked, layout)
        with jax.named_scope("sample"):
            return chosen_tokens(logits, sampling, positions, greedy, layout), state, routed

    rows, tokens = P(layout.batch), P((*layout.batch, *layout.sequence))
    whole = on_mesh(prefill, spec, on, (tokens, rows, rows), (rows, tokens))
    return jax.jit(whole, donate_argnums=2, compiler_options=kernels.compiler_options())


@functools.cache
def logits_step(spec: ModelSpec, kernels: Kernels, on: Devices = HERE) -> Callable:
    """The jitted `(params, bank, state, batch) -> (logits [R, V], state)`, for scoring and tests."""
    own, layout = local_spec(spec, on.layout), on.layout

    def score(params, bank, state, batch: Batch):
        logits, state, _ = _forward(own, params, bank, state, batch, kernels, layout=layout)
        return whole_logits(logits, layout), state

    whole = on_mesh(score, spec, on, (P((*layout.batch, *layout.sequence)),), (P(layout.batch),))
    return jax.jit(whole, donate_argnums=2, compiler_options=kernels.compiler_options())


def decode_batch(rows, tokens, positions, live) -> Batch:
    """One token each of several sequences; those not `live` are padding to the model."""
    n = rows.shape[0]
    return Batch(
        tokens=tokens,
        positions=positions,
        segments=jnp.where(live, rows, -1),
        run_segments=rows,
        run_positions=positions,
        run_lengths=jnp.ones(n, jnp.int32),
        n_runs=live_count(live),
        logit_rows=jnp.arange(n),
        run=1,
    )


def live_count(live: jax.Array) -> jax.Array:
    """Runs up to and including the last live one."""
    return jnp.max(jnp.where(live, jnp.arange(live.shape[0]) + 1, 0)).astype(jnp.int32)


@functools.cache
def decode_step(
    spec: ModelSpec, kernels: Kernels, greedy: bool, record: bool = False, gates: bool = False, on: Devices = HERE
) -> Callable:
    """The jitted `(params, bank, state, rows, tokens, positions, budget, eos, sampling) -> (out [CHUNK, n], state, routed)`.

    `rows` are cache rows of the sequences, `tokens` their last tokens at `positions`, `budget` int32 [n] how many more each may produce in this call
    (0 for padding). A sequence stops after an end-of-text id; the program ends when all have. Entries past a sequence's end are -1. `routed` is
    `chosen_experts` of every step, [CHUNK, n, L, A], with `record`, else empty; with `gates` as well, what routers foretell is part of it.
    `on`: the devices that share the work; each group of them has an equal share of the n sequences, and `rows` count its own.
    """
    own, layout = local_spec(spec, on.layout), on.layout

    def decode(params, bank, state, rows, tokens, positions, budget, eos, sampling: SamplingParams):
        def body(carry):
            i, state, tokens, positions, left, out, routed = carry
            live = left > 0
            logits, state, chosen = _forward(own, params, bank, state, decode_batch(rows, tokens, positions, live), kernels, record, stacked, layout)
            routed = tuple(jax.lax.dynamic_update_index_in_dim(all, one, i, 0) for all, one in zip(routed, chosen, strict=True))
            new = chosen_tokens(logits, sampling, positions + 1, greedy, layout)
            out = jax.lax.dynamic_update_slice(out, jnp.where(live, new, -1)[None], (i, 0))
            ended = (new[:, None] == eos[None, :]).any(1)
            tokens = jnp.where(live, new, tokens)
            positions = jnp.where(live, positions + 1, positions)
            left = jnp.where(live & ~ended, left - 1, 0)
            return i + 1, state, tokens, positions, left, out, routed

        stacked = stack_gates(own, params) if gates else None
        out = jnp.full((CHUNK, rows.shape[0]), -1, jnp.int32)
        routed = unrouted(spec, rows.shape[0], gates) if record else ()
        carry = (jnp.int32(0), state, tokens, positions, budget, out, routed)
        if kernels.backend in ("cpu", "reference"):
            carry = jax.lax.while_loop(lambda c: (c[0] < CHUNK) & anywhere((c[4] > 0).any(), layout), body, carry)
        else:  # a loop of unknown length reads its predicate back to the host on GPUs; this one's length is known
            carry = jax.lax.fori_loop(0, CHUNK, lambda _, c: body(c), carry)
        return carry[5], carry[1], carry[6]

    rows, chunk = P(layout.batch), P(None, layout.batch)
    whole = on_mesh(decode, spec, on, (rows, rows, rows, rows, P(), rows), (chunk, chunk))
    return jax.jit(whole, donate_argnums=2, compiler_options=kernels.compiler_options())


def unrouted(spec: ModelSpec, rows: int, gates: bool, chunk: int = CHUNK) -> tuple[jax.Array, ...]:
    """`chosen_experts` of a chunk before its first step."""
    layers, active = len(spec.moe_layers), spec.moe[0].active
    kinds: list[tuple[tuple[int, ...], Any]] = [((active,), jnp.int16), ((active,), jnp.float16)]
    kinds += [((AHEAD, WIDTH * active), jnp.int16)] if gates else []
    return tuple(jnp.zeros((chunk, rows, layers, *shape), dtype) for shape, dtype in kinds)


class Fused:
    """Runs prefill and decode as one program each, whatever the bank. Attributes: `stalled`, seconds that the host waited for experts: none."""

    stalled = 0.0

    def __init__(self, spec: ModelSpec, kernels: Kernels, greedy: bool, record: bool = False, gates: bool = False, on: Devices = HERE):
        how = (spec, kernels, greedy, record, *([gates, on] if gates or on != HERE else []))
        self._prefill, self._decode = prefill_step(*how), decode_step(*how)

    def ways(self) -> Iterator[None]:
        """One way of stepping."""
        yield

    def restart(self) -> None:
        """Nothing is kept from step to step."""

    def prefill(self, params, bank, state: EngineState, batch: Batch, sampling: SamplingParams, positions):
        """See `prefill_step`."""
        return self._prefill(params, bank, state, batch, sampling, positions)

    def decode(self, params, bank, state: EngineState, rows, tokens, positions, budget, eos, sampling: SamplingParams):
        """See `decode_step`."""
        return self._decode(params, bank, state, rows, tokens, positions, budget, eos, sampling)


def pad_to(x: Any, n: int, fill: int = 0) -> np.ndarray:
    """An int32 vector of length n, filled up at the end."""
    out = np.full(n, fill, np.int32)
    out[: len(x)] = x
    return out
