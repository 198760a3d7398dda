"""The jitted steps of serving: few programs, with shapes that follow from a `ServeSpec`; the state is donated.

    decode    several tokens of each of some sequences, while nothing has to be asked of the host between them
    prompts   pieces of prompts through all layers, with or without the sequences that decode
    group     a wave of prompts through one group of layers; what they have come to is parked between groups
    pages     copies of pages on the device, to the host, and back

Which group of layers and which pages are values, so that one program serves them all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.cache.batch import Batch
from jaxmoe.cache.layers import LayerStates
from jaxmoe.cache.paged import PagedKV
from jaxmoe.cache.recurrent import RecurrentState
from jaxmoe.decode.adjust import Adjust, draw
from jaxmoe.decode.sampling import SamplingParams
from jaxmoe.engine import steps
from jaxmoe.engine.serving.requests import MOST_LOGPROBS
from jaxmoe.engine.steps import EngineState
from jaxmoe.nn.transformer import chosen_experts, forward, forward_group, head
from jaxmoe.routing.route import initial_state
from jaxmoe.spec import ModelSpec
from pallas_kernels.dispatch import Kernels


@flax.struct.dataclass
class Parked:
    """Where a wave of prompts has come to between groups of layers. Attributes: `x` its residual stream, `router` its routers' state."""

    x: Float[Array, "T D"]
    router: Any


def drawn(logits: Float[Array, "R V"], sampling: SamplingParams, positions, adjust: Adjust | None, kernels: Kernels) -> tuple[jax.Array, tuple]:
    """Tokens [R], and with `adjust` their log probabilities [R] and the likeliest tokens' ids and log probabilities, [R, 20]; else nothing more."""
    if adjust is not None:
        found = draw(logits, sampling, positions, adjust, min(MOST_LOGPROBS, logits.shape[-1]))
        return found.tokens, (found.logprob, found.top_ids, found.top_logprobs)

    def some() -> jax.Array:
        return draw(logits, sampling, positions, None, 0).tokens

    if kernels.backend != "cpu":  # a conditional would ask the host
        return some(), ()
    greedy = functools.partial(draw, logits, sampling, positions, None, 0, greedy_only=True)
    return jax.lax.cond((sampling.temperature > 0).any(), some, lambda: greedy().tokens), ()


@functools.cache
def decode_step(spec: ModelSpec, kernels: Kernels, burst: int, adjusted: bool, record: bool = False) -> Callable:
    """The jitted `(params, bank, state, rows, tokens, positions, budget, tables, eos, sampling, adjust) -> (out [burst, n], state, more, routed)`.

    Args of that: cache rows of n sequences, their last tokens at `positions`, how many tokens each may give (0 for padding), page tables [S, X] of
    all cache rows, and end-of-text ids. A sequence stops after one of those. Entries past a sequence's end are -1. With `adjusted` it is one step,
    whatever the burst: `adjust` is what changes its logits, and `more` what `drawn` gives beside tokens. `routed` is `chosen_experts` of each step
    with `record`.
    """

    def one(params, bank, state, rows, tokens, positions, live, tables, sampling, adjust):
        batch = dataclasses.replace(steps.decode_batch(rows, tokens, positions, live), tables=tables)
        joined = bank.join(state.bank)
        logits, joined, layers, aux = forward(spec, params, joined, state.layers, batch, kernels, record)
        new, more = drawn(logits, sampling, positions + 1, adjust, kernels)
        routed = chosen_experts(spec, aux["routed"]) if record else ()
        return jnp.where(live, new, -1), EngineState(layers, joined.split()[1]), more, routed

    def adjusted_decode(params, bank, state, rows, tokens, positions, budget, tables, eos, sampling: SamplingParams, adjust):
        new, state, more, routed = one(params, bank, state, rows, tokens, positions, budget > 0, tables, sampling, adjust)
        return new[None], state, more, tuple(r[None] for r in routed)

    def decode(params, bank, state, rows, tokens, positions, budget, tables, eos, sampling: SamplingParams, adjust):
        def body(carry):
            i, state, tokens, positions, left, out, routed = carry
            live = left > 0
            new, state, _, chosen = one(params, bank, state, rows, tokens, positions, live, tables, sampling, None)
            routed = tuple(jax.lax.dynamic_update_index_in_dim(all, r, i, 0) for all, r in zip(routed, chosen, strict=True))
            out = jax.lax.dynamic_update_slice(out, new[None], (i, 0))
            ended = (new[:, None] == eos[None, :]).any(1)
            tokens, positions = jnp.where(live, new, tokens), jnp.where(live, positions + 1, positions)
            return i + 1, state, tokens, positions, jnp.where(live & ~ended, left - 1, 0), out, routed

        out = jnp.full((burst, rows.shape[0]), -1, jnp.int32)
        routed = steps.unrouted(spec, rows.shape[0], False, burst) if record else ()
        carry = (jnp.int32(0), state, tokens, positions, budget, out, routed)
        # The length depends on values: a GPU asks the host after each step, which costs less than steps that nobody needs.
        carry = jax.lax.while_loop(lambda c: (c[0] < burst) & (c[4] > 0).any(), body, carry)
        return carry[5], carry[1], (), carry[6]

    return jax.jit(adjusted_decode if adjusted else decode, donate_argnums=2, compiler_options=kernels.compiler_options())


@functools.cache
def prompts_step(spec: ModelSpec, kernels: Kernels, record: bool = False) -> Callable:
    """The jitted `(params, bank, state, batch, sampling, positions, adjust) -> (tokens [R], state, more, routed)`; see `drawn`."""

    def prompts(params, bank, state, batch: Batch, sampling: SamplingParams, positions, adjust):
        joined = bank.join(state.bank).in_order()
        logits, joined, layers, aux = forward(spec, params, joined, state.layers, batch, kernels, record)
        tokens, more = drawn(logits, sampling, positions, adjust, kernels)
        return tokens, EngineState(layers, joined.split()[1]), more, chosen_experts(spec, aux["routed"]) if record else ()

    return jax.jit(prompts, donate_argnums=2, compiler_options=kernels.compiler_options())


@functools.cache
def group_step(spec: ModelSpec, kernels: Kernels) -> Callable:
    """The jitted `(params, bank, state, parked, batch, first, last, sampling, positions, adjust) -> (tokens [R], state, parked, more)`.

    Tokens mean something after the last group alone.
    """

    def group(params, bank, state, parked: Parked, batch: Batch, first, last, sampling: SamplingParams, positions, adjust):
        joined = bank.join(state.bank).in_order()
        x, joined, layers, router = forward_group(spec, params, joined, state.layers, parked.x, parked.router, batch, kernels, first, last)

        def tokens():
            return drawn(head(spec, params, x, batch, kernels), sampling, positions, adjust, kernels)

        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(tokens))
        new, more = jax.lax.cond(last == spec.n_layers, tokens, lambda: nothing)
        return new, EngineState(layers, joined.split()[1]), Parked(x, router), more

    return jax.jit(group, donate_argnums=(2, 3), compiler_options=kernels.compiler_options())


def nothing_parked(spec: ModelSpec, tokens: int, dtype: Any) -> Parked:
    """A wave before its first group of layers."""
    x = jnp.zeros((tokens, spec.width), dtype)
    return Parked(x, initial_state(spec, x))


# --- Pages


def _each_pool(state: EngineState, change: Callable[[PagedKV, Any], Any], given: Any) -> EngineState:
    """The state with `change(pool, what is given for it)` in the place of every pool of pages."""
    layers: LayerStates = state.layers
    out, at = [], 0
    for kept in layers.states:
        if isinstance(kept, PagedKV):
            kept, at = change(kept, given[at]), at + 1
        out.append(kept)
    return EngineState(dataclasses.replace(layers, states=tuple(out)), state.bank)


def _pools(state: EngineState) -> list[PagedKV]:
    return [kept for kept in state.layers.states if isinstance(kept, PagedKV)]


def _rows(state: EngineState) -> list[RecurrentState]:
    return [kept for kept in state.layers.states if isinstance(kept, RecurrentState)]


def _all_layers(pool: PagedKV, pages: Int[Array, "Y"]) -> Int[Array, "L Y"]:
    """The places of some pages of every layer in a pool."""
    layers = pool.pages.k.shape[0] // pool.stride
    return jnp.arange(layers)[:, None] * pool.stride + pages[None, :]


@functools.cache
def copy_pages(kernels: Kernels) -> Callable:
    """The jitted `(state, source [Y], target [Y]) -> state`; pairs of the trash page do nothing."""

    def copy(state: EngineState, source, target) -> EngineState:
        def one(pool: PagedKV, _) -> PagedKV:
            a, b = _all_layers(pool, source), _all_layers(pool, target)
            return dataclasses.replace(pool, pages=jax.tree.map(lambda leaf: leaf.at[b].set(leaf[a]), pool.pages))

        return _each_pool(state, one, [None] * len(_pools(state)))

    return jax.jit(copy, donate_argnums=0, compiler_options=kernels.compiler_options())


@functools.cache
def read_pages(kernels: Kernels) -> Callable:
    """The jitted `(state, pages [Y], row) -> block`: for each pool its leaves [L, Y, ...], and a cache row of what no page holds."""

    def read(state: EngineState, pages, row):
        held = [jax.tree.map(lambda leaf, pool=pool: leaf[_all_layers(pool, pages)], pool.pages) for pool in _pools(state)]
        rows = [jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, row, 1, keepdims=False), kept) for kept in _rows(state)]
        return held, rows

    return jax.jit(read, compiler_options=kernels.compiler_options())


@functools.cache
def write_pages(kernels: Kernels) -> Callable:
    """The jitted `(state, pages [Y], row, block) -> state`; the inverse of `read_pages`."""

    def write(state: EngineState, pages, row, block) -> EngineState:
        held, rows = block

        def one(pool: PagedKV, new) -> PagedKV:
            at = _all_layers(pool, pages)
            return dataclasses.replace(pool, pages=jax.tree.map(lambda leaf, x: leaf.at[at].set(x), pool.pages, new))

        state = _each_pool(state, one, held)
        kept, turn = [], iter(rows)
        for own in state.layers.states:
            if isinstance(own, RecurrentState):
                own = jax.tree.map(lambda leaf, x: jax.lax.dynamic_update_index_in_dim(leaf, x, row, 1), own, next(turn))
            kept.append(own)
        return EngineState(dataclasses.replace(state.layers, states=tuple(kept)), state.bank)

    return jax.jit(write, donate_argnums=0, compiler_options=kernels.compiler_options())
