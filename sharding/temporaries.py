"""What a step needs beside its arguments, in closed forms: what it computes, and what the compilers of TPUs and GPUs add to it.

Scanned layers take turns, so that nothing here grows with depth. Found by reading optimized programs (jax 0.10.2 for TPUs, 0.11.2 for an H100):

- A scanned layer's weights are slices of those of all layers. TPU compilers slice into the core's own memory (VMEM), which is no part of what is
  reported, and through device memory where a matrix is too large for that. Projections to heads that are held as they are written are also put into
  another order. GPU compilers slice all of a layer's weights at its start.
- Activations live in VMEM likewise, unless they are large; on GPUs all count.
- Experts' rows: each assignment (or row of an exchange) has its activations, its hidden row, and its result, which is float32 and put back into the
  tokens' order.
- Attention of one run of a prompt: scores of all heads over the whole cache row, in float32, and their weights.
- Logits in float32; where the vocabulary is split they are gathered, and put together in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from jaxmoe.spec import ModelSpec
from jaxmoe.spec.types import LayerSpec
from sharding.exchange_cost import even_rooms, transport, wave_size, worst_rooms
from sharding.padding import LANES
from sharding.split import Layout
from sharding.workload import WIDTH, Workload

LARGE = 40 << 20
"""Bytes of the smallest array that a TPU's compiler was seen to keep in device memory where it could choose (33.6 MB lay in VMEM, 46 MB did not)."""
LOGIT_ROWS, RUN, KEY_BLOCK = 8, 64, 128
"""Of `jaxmoe.engine.steps` and `jaxmoe.cache.contiguous`."""
ROW_BUCKETS = (1, 4, 8, 16, 32, 64, 128)
"""`jaxmoe.engine.steps.ROW_BUCKETS`."""


class Temporaries(NamedTuple):
    """Bytes of what is computed, and of what the compiler adds."""

    activations: int
    copies: int


class Step(NamedTuple):
    """One step of a device: `tokens` of it, in runs of `run`; `logits` rows; `keys` of a cache row."""

    tokens: int
    run: int
    logits: int
    keys: int


def places(layout: Layout, workload: Workload) -> int:
    """Keys that a device's cache has room for, of each sequence: all positions and a run past the last (`jaxmoe.cache.contiguous.init_kv`), or its
    share of them and four runs (`jaxmoe.cache.split_kv.local_places`)."""
    n = layout.size(layout.sequence)
    if n == 1:
        return -(-(workload.positions + RUN) // KEY_BLOCK) * KEY_BLOCK
    return -(-(-(-workload.positions // n) + 4 * RUN) // (2 * KEY_BLOCK)) * 2 * KEY_BLOCK


def step_of(layout: Layout, workload: Workload, phase: Literal["prefill", "decode"]) -> Step:
    """Sizes of a step of one device."""
    keys = places(layout, workload)
    if phase == "decode":
        rows = workload.local_rows(layout)
        rows = next((n for n in ROW_BUCKETS if n >= rows), rows)
        return Step(rows, 1, rows, keys)
    tokens = workload.prefill_tokens
    return Step(tokens, min(tokens, RUN if tokens > KEY_BLOCK else RUN // 2), LOGIT_ROWS, keys)


def temporaries(
    own: ModelSpec, vocab: int, layout: Layout, workload: Workload, backend: str, phase: Literal["prefill", "decode"]
) -> Temporaries:
    """What a step needs.

    Args:
        own: the model that a device computes (`local_spec`).
        vocab: of the whole model.
        layout, workload: how it is split, and what it does.
        backend: 'tpu', 'gpu' or 'cpu'.
        phase: which step.
    """
    step, width = step_of(layout, workload, phase), WIDTH[workload.dtype]
    parts = [_stage(experts(layer, own.width, step, layout, width, backend), backend) for layer in _kinds(own)]
    parts += [_stage(attention(layer, own.width, step, width), backend) for layer in _kinds(own)]
    parts.append(_stage(logits(step, vocab, own.vocab, backend), backend))
    computed, copied = max(parts, default=0), copies(own, width, backend)
    if workload.slots is not None and own.moe_layers:  # one expert on its way and one in use
        computed += 2 * 3 * own.width * own.moe[1].width * width
    if backend == "tpu":  # by turns: a large slice is gone when what is large among the rows is there
        return Temporaries(computed, 0) if computed >= copied else Temporaries(0, copied)
    return Temporaries(computed + 2 * step.tokens * own.width * width, copied)


def _stage(arrays: Iterator[int], backend: str) -> int:
    """Bytes of arrays that are there at once."""
    return sum(n for n in arrays if backend != "tpu" or n >= LARGE)


def _kinds(own: ModelSpec) -> tuple[LayerSpec, ...]:
    return tuple(dict.fromkeys(layer for segment in own.segments for layer in segment.pattern))


def expert_rows(layer: LayerSpec, step: Step, layout: Layout, dim: int, width: int, backend: str) -> int:
    """Rows that a device's experts compute in a layer, those that stay empty included."""
    assert layer.router is not None
    n, active = layout.size(layout.experts), layer.router.active
    count = layer.router.experts // n
    if not exchanged(layout):
        return step.tokens * active
    if layout.split.exchange == "gather":
        return n * step.tokens * active
    if coherent(layout):
        return n * step.tokens
    if layout.split.exchange == "tokens":
        worst = worst_rooms(step.tokens, active, count)
        rounds = transport(backend, n * worst.results * dim * width) == "rounds"
        return n * (even_rooms(step.tokens, active, count, n) if rounds else worst).results
    return step.tokens * active


def coherent(layout: Layout) -> bool:
    """Whether tokens go on where their experts were (ExFlow)."""
    split = layout.split
    return split.exchange == "coherent" and split.expert > 1 and split.attention == "data"


def exchanged(layout: Layout) -> bool:
    """Whether rows come from other devices and go back to them."""
    return layout.size(layout.experts) > 1 and layout.split.attention == "data"


def experts(layer: LayerSpec, dim: int, step: Step, layout: Layout, width: int, backend: str) -> Iterator[int]:
    """Arrays of a layer's feed-forward part."""
    hidden = max((part.width for part in (layer.dense, layer.shared) if part is not None), default=0)
    yield 2 * step.tokens * hidden * width
    if layer.router is None or layer.experts is None:
        return
    rows = expert_rows(layer, step, layout, dim, width, backend)
    yield rows * layer.experts.width * width
    yield rows * dim * 4
    if exchanged(layout):
        yield rows * dim * width
        if layout.split.exchange == "weights":  # a wave of experts that has come, and the next on its way
            n = layout.size(layout.experts)
            yield 2 * n * wave_size(layer.router.experts, n) * 3 * dim * layer.experts.width * width
        return
    for _ in range(2):  # in the tokens' order, and for the sum over each token's experts
        yield rows * dim * 4


def attention(layer: LayerSpec, dim: int, step: Step, width: int) -> Iterator[int]:
    """Arrays of attention, one run after another."""
    a = layer.attention
    if a is None:
        return
    _, key, value = a.cached
    value = key if value is None else value
    scores = a.heads * step.run * step.keys
    yield scores * 4
    yield scores * width
    if a.latent is not None:  # queries and outputs in the latents' space, once as they are made and once by run
        for _ in range(3):
            yield step.tokens * a.heads * key * width
    else:
        yield step.tokens * a.heads * (key + value) * width


def logits(step: Step, vocab: int, own_vocab: int, backend: str) -> Iterator[int]:
    """Arrays of logits; where the vocabulary is split, TPUs put together what was gathered in several goes."""
    for _ in range(5 if backend == "tpu" and vocab != own_vocab else 1):
        yield step.logits * vocab * 4


def copies(own: ModelSpec, width: int, backend: str) -> int:
    """Bytes of slices of weights, and of what they are put in order to."""
    if backend == "cpu":
        return 0
    if backend == "gpu":
        return max((sum(sum(matrices(layer, own.width)) for layer in segment.pattern) * width for segment in own.segments), default=0)
    sizes = [_sliced(n, layer, width) for layer in _kinds(own) for n in matrices(layer, own.width)]
    return max((n for n in sizes if n >= LARGE), default=0)


def _sliced(numbers: int, layer: LayerSpec, width: int) -> int:
    """Twice the bytes of projections to heads that are held as they are written."""
    a = layer.attention
    by_head = a is not None and a.latent is None and numbers % (a.heads * a.head_dim) == 0 and a.heads % 8 == 0 and a.head_dim % LANES == 0
    return numbers * width * (2 if by_head else 1)


def matrices(layer: LayerSpec, dim: int) -> Iterator[int]:
    """Numbers of each matrix of a layer, without routed experts."""
    a, d = layer.attention, layer.delta
    if a is not None and a.latent is not None:
        m, turned = a.latent, a.rope.width if a.rope else 0
        yield dim * (m.kv_rank + turned)
        yield from (dim * m.q_rank, m.q_rank * a.heads * a.head_dim) if m.q_rank else (dim * a.heads * a.head_dim,)
        yield from (a.heads * m.plain * m.kv_rank, a.heads * m.value * m.kv_rank, a.heads * m.value * dim)
    elif a is not None:
        yield from (dim * a.heads * a.head_dim,) * (3 if a.gate else 2)
        yield from (dim * a.kv_heads * a.head_dim,) * (1 if a.values == "keys" else 2)
    if d is not None:
        yield from (dim * d.k_heads * d.k_dim,) * 2
        yield from (dim * d.v_heads * d.v_dim,) * 3
    for part in (layer.dense, layer.shared):
        yield from (dim * part.width,) * 3 if part is not None else ()
    if layer.router is not None:
        yield math.prod((dim, layer.router.experts))
