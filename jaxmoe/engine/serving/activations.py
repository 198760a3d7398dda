"""Upper bounds in closed form on what serving's programs need beside their arguments, before any is compiled.

Sums where `sharding.temporaries`, which predicts, takes the largest: XLA may keep one stage's arrays while it computes the next. The factors are what
programs were seen to need on the CPU (jax 0.10.2, three families, float32 and bfloat16); for accelerators they are the same arrays in narrower types
and have not been held against a compiler. `measured` says what it really is, once there are programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxmoe import formats
from jaxmoe.cache.contiguous import KEY_BLOCK
from jaxmoe.decode.penalties import build_adjust
from jaxmoe.decode.sampling import sampling_params
from jaxmoe.engine import steps
from jaxmoe.engine.serving import programs
from jaxmoe.engine.serving.batches import page_tables, prompt_batch
from jaxmoe.engine.serving.runner import Runner
from jaxmoe.engine.serving.types import PrefillMode, ServeSpec
from jaxmoe.spec import ModelSpec
from jaxmoe.spec.types import AttentionSpec, DeltaSpec, LayerSpec
from pallas_kernels.dispatch import ROW_SLACK, Kernels
from sharding.temporaries import Step, matrices
from sharding.workload import WIDTH

LOGITS = 12
"""Arrays [R, V] of 32 bits while tokens are drawn: 11 were seen with adjustments, 10 without."""


def activation_bytes(
    spec: ModelSpec, serve: ServeSpec, kernels: Kernels, prefill: PrefillMode, streamed: bool, unrolled: bool = False, block: int = 0
) -> int:
    """Of the program of a `ServeSpec` that needs most.

    Args:
        spec: the model, in the precision that it runs in.
        serve: sizes.
        kernels: what runs.
        prefill: how prompts are computed.
        streamed: experts are brought from the host.
        unrolled: layers are arrays of their own (`load_model`'s `unroll`).
        block: bytes of a block of pages, of which a copy needs another.

    Returns:
        Bytes.
    """
    return max(*(program_bytes(spec, step, kernels, streamed, unrolled) for step in program_steps(serve, prefill)), block)


def program_steps(serve: ServeSpec, prefill: PrefillMode) -> tuple[Step, Step]:
    """The largest program that decodes, and the largest for prompts."""
    decode = Step(serve.batch, 1, serve.batch, serve.positions)
    if prefill == "layered":
        return decode, Step(serve.wave, serve.run, serve.slots, serve.positions)
    singles, tokens = serve.batch if serve.mixed else 0, max(serve.chunk, serve.positions) if prefill == "whole" else serve.chunk
    return decode, Step(tokens + singles, serve.run, serve.slots + singles, serve.positions)


def program_bytes(spec: ModelSpec, step: Step, kernels: Kernels, streamed: bool, unrolled: bool) -> int:
    """Of one program: the residual stream, weights that are cut out or widened, the layer that needs most, and drawing tokens."""
    width, kinds = WIDTH[spec.precision.compute], tuple(dict.fromkeys(spec.layers))
    wide = 4 if kernels.backend == "cpu" else width
    stages = [_mixing(kind, step, kernels, wide) for kind in kinds]
    stages += [_feed_forward(kind, spec, step, kernels, streamed) for kind in kinds]
    stages.append(step.logits * (LOGITS * spec.vocab + 2 * spec.width) * 4)
    return step.tokens * spec.width * (width + 4) + _weights(spec, kernels, unrolled) + max(stages)


def _weights(spec: ModelSpec, kernels: Kernels, unrolled: bool) -> int:
    """Copies of weights. A scan cuts a repeat's out of the stack. The CPU computes in float32, and widens what is held in 16 bits: a repeat's, the
    output matrix, and where no loop holds it back every layer's."""
    width = WIDTH[spec.precision.params]
    repeats = [sum(sum(matrices(layer, spec.width)) for layer in segment.pattern) for segment in spec.segments]
    cut = 0 if unrolled else sum(repeats) * width
    if kernels.backend != "cpu" or width == 4:
        return cut
    every = sum(n * (segment.repeats if unrolled else 1) for n, segment in zip(repeats, spec.segments, strict=True))
    return cut + 4 * (every + spec.vocab * spec.width)


def _mixing(layer: LayerSpec, step: Step, kernels: Kernels, wide: int) -> int:
    """Attention, or a delta rule."""
    if layer.delta is not None:
        return _delta(layer.delta, step)
    assert layer.attention is not None, "a layer has attention or a delta rule"
    return _attention(layer.attention, step, kernels, wide)


def _delta(d: DeltaSpec, step: Step) -> int:
    """Inputs before and after the convolution, and some sequences' states."""
    channels = 2 * d.k_heads * d.k_dim + d.v_heads * d.v_dim
    return 4 * (8 * step.tokens * (channels + d.v_heads * (d.v_dim + d.k_dim)) + 4 * d.v_heads * d.k_dim * d.v_dim)


def _attention(a: AttentionSpec, step: Step, kernels: Kernels, wide: int) -> int:
    """Projections, before and after norms and rotation, and the scores of one run: over a block of keys on the CPU, over none in kernels (they stay
    in the core) and over a whole sequence in plain XLA."""
    kv, key, value = a.cached
    own = key if value is None else value
    flat = step.tokens * (2 * (a.heads + kv) * (key + own) * wide + a.heads * own * 4)
    if kernels.backend in ("gpu", "tpu") and kernels.pallas:
        return flat + 2 * step.tokens * a.heads * own * 4
    run = max(step.run, 4)
    keys = KEY_BLOCK if kernels.backend == "cpu" else step.keys
    return flat + 4 * (3 * a.heads * run * keys + 2 * a.heads * run * (key + own) + 2 * kv * keys * (key + own))


def _feed_forward(layer: LayerSpec, spec: ModelSpec, step: Step, kernels: Kernels, streamed: bool) -> int:
    """A dense network, or routing and the rows of experts: sorted, computed and put back, one more expert, and one on its way."""
    hidden = sum(part.width for part in (layer.dense, layer.shared) if part is not None)
    total = 3 * step.tokens * hidden * 4
    if layer.router is None or layer.experts is None:
        return total
    experts, active, width = layer.router.experts, layer.router.active, layer.experts.width
    rows, held = step.tokens * active + ROW_SLACK, WIDTH[spec.precision.params]
    total += step.tokens * (experts * (2 * 4 + active) + active * active * 4)
    total += rows * spec.width * 3 * 4
    total += 0 if kernels.backend == "cpu" else rows * width * held  # the CPU goes by tiles of few rows
    return total + 3 * spec.width * width * (4 + held * (2 if streamed else 1))


# --- What it really is


def measured(runner: Runner, prefill: PrefillMode, largest: bool = True) -> int:
    """Bytes that the runner's programs need beside their arguments, as XLA has compiled them; runs nothing.

    Programs that a warm-up has compiled are found again; others are compiled.

    Args:
        runner: of compiled steps.
        prefill: how prompts are computed.
        largest: only the largest of each kind of program, which needs most; else all.

    Returns:
        Of the program that needs most: temporaries, and results that are not written over an argument.

    Raises:
        ValueError: the host sends the experts, in programs of its own.
    """
    return max(needed(step, args) for _, step, args in compiled_steps(runner, prefill, largest))


def needed(step: Any, args: tuple[Any, ...]) -> int:
    """Bytes that one jitted step needs beside its arguments; `args` may be shapes."""
    found = step.lower(*args).compile().memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def compiled_steps(runner: Runner, prefill: PrefillMode, largest: bool) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """The programs that a warm-up compiles: a name, the jitted step, and arguments; `prefill` and `largest` as for `measured`."""
    spec, model, state = runner.spec, runner.model, runner.state
    own, kernels, tables = model.spec, model.kernels, page_tables(spec, {})
    if getattr(model.bank, "store", ()) is None:
        raise ValueError("the host sends this model's experts, in programs of its own: measured() is for compiled steps")

    def drawing(rows: int) -> tuple[Any, ...]:
        return sampling_params(rows), np.zeros(rows, np.int32), build_adjust([None] * rows, [None] * rows, rows, own.vocab)

    def prompts(tokens: int, singles: int) -> tuple[Any, ...]:
        return prompt_batch(spec, (), (), (), tokens, singles, {}, tables), *drawing(singles + spec.slots)

    def some(buckets: tuple[int, ...]) -> tuple[int, ...]:
        return buckets[-1:] if largest else buckets

    for rows in some(runner.row_buckets):
        row, eos = np.zeros(rows, np.int32), np.zeros(steps.EOS_SLOTS, np.int32)
        for adjusted in (False, True):
            step = programs.decode_step(own, kernels, spec.burst, adjusted, runner.record)
            sampling, _, adjust = drawing(rows)
            args = (model.params, model.bank, state, row, row, row, row, tables, eos, sampling, adjust if adjusted else None)
            yield f"decode of {rows}{', adjusted' if adjusted else ''}", step, args
    whole, layered = prefill == "whole", prefill == "layered"
    for tokens in () if layered else some(tuple(n for n in runner.chunk_buckets if whole or n <= spec.chunk)):
        batch = prompts(tokens, spec.batch if spec.mixed else 0)
        yield f"prompts of {tokens}", programs.prompts_step(own, kernels, runner.record), (model.params, model.bank, state, *batch)
    for tokens in some(runner.wave_buckets) if layered else ():
        parked = programs.nothing_parked(own, tokens, formats.compute_dtype(own.precision.compute))
        args = (model.params, model.bank, state, parked, *prompts(tokens, 0)[:1], np.int32(0), np.int32(1), *drawing(spec.slots))
        yield f"waves of {tokens}", programs.group_step(own, kernels), args
    pages, first = np.full(spec.move, spec.trash, np.int32), np.int32(0)
    block = jax.eval_shape(programs.read_pages(kernels), state, pages, first)
    yield "copies of pages", programs.copy_pages(kernels), (state, pages, pages)
    yield "pages into", programs.write_pages(kernels), (state, pages, first, block)
