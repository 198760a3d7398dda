"""Serving's programs at the shapes of a real model, by the compilers of an H100 and of a TPU: pages and slots are changed where they are. The step
with prompts has single tokens that decode beside them, and so all that a decoding step has.

A pool that is copied shows as temporaries of its size. Sizes matter: with half as many pages XLA copied nothing even where it was free to.
"""

import dataclasses

import jax
import numpy as np
import pytest

from jaxmoe.cache.layers import init_paged_layers
from jaxmoe.decode.penalties import build_adjust
from jaxmoe.decode.sampling import sampling_params
from jaxmoe.engine import steps
from jaxmoe.engine.serving import programs
from jaxmoe.engine.serving.batches import page_tables, prompt_batch
from jaxmoe.engine.serving.types import ServeSpec
from jaxmoe.spec import ModelSpec
from jaxmoe.spec.published import published
from jaxmoe.spec.types import Segment
from pallas_kernels.dispatch import Kernels
from sharding.compile_only import Compiled, compile_with_host
from tests.engine.test_slots_compile_only import CONFIGS, nbytes, parts_of
from tests.more import more

pytestmark = pytest.mark.compile_only

SERVE = ServeSpec(
    slots=16, page=32, pages=1024, positions=4096, batch=16, chunk=256, wave=512, groups=8, burst=8, run=32, host_pages=64, move=16
)  # fmt: skip
MODEL, SLOTS = "OLMoE-1B-7B", 16
VOCAB = 4096
"""Fewer tokens than the model has: sampling compiles sooner, and neither pages nor slots depend on them."""


def first_layers(name: str, layers: int) -> ModelSpec:
    """A published model's first layers, whole patterns of them."""
    spec = published(name)
    segments, first = list[Segment](), 0
    for segment in spec.segments:
        repeats = min(segment.repeats, -(-(layers - first) // len(segment.pattern)))
        segments.append(Segment(segment.pattern, repeats, first))
        first += repeats * len(segment.pattern)
    return dataclasses.replace(spec, segments=tuple(s for s in segments if s.repeats > 0), extra_heads=(), vocab=VOCAB)


def compiled(target: str, kind: str, other: ModelSpec | None = None, slots: int = SLOTS, kv: str | None = None) -> tuple[Compiled, steps.EngineState]:
    """A program and its abstract state, of `MODEL` or of another one."""
    kernels = Kernels("gpu" if target == "h100" else "tpu")
    spec = ModelSpec.from_hf(CONFIGS[MODEL] | {"vocab_size": VOCAB}) if other is None else other
    spec, params, bank, state = parts_of(spec, slots, 1, kernels.expert_layout)
    layers = jax.eval_shape(lambda: init_paged_layers(spec, SERVE.slots, SERVE.pages, SERVE.page, kernels, kv))
    state, tables = steps.EngineState(layers, state.bank), page_tables(SERVE, {})

    def drawing(rows: int):
        return sampling_params(rows), np.zeros(rows, np.int32), build_adjust([None] * rows, [None] * rows, rows, spec.vocab)

    def prompts(tokens: int, singles: int):
        return prompt_batch(SERVE, (), (), (), tokens, singles, {}, tables), *drawing(singles + SERVE.slots)

    pages, first = np.zeros(SERVE.move, np.int32), np.int32(0)
    read = programs.read_pages(kernels)
    if kind == "prompts":
        step, rest = programs.prompts_step(spec, kernels), prompts(SERVE.chunk, SERVE.batch)
    else:
        step, args = {
            "copy": (programs.copy_pages(kernels), (state, pages, pages)),
            "read": (read, (state, pages, first)),
            "write": (programs.write_pages(kernels), (state, pages, first, jax.eval_shape(read, state, pages, first))),
        }[kind]
        donate = () if kind == "read" else (0,)
        return compile_with_host(target, step.__wrapped__, *args, host=(), donate=donate, options=kernels.compiler_options()), state
    args = (params, bank, state, *rest)
    return compile_with_host(target, step.__wrapped__, *args, host={1}, donate=(2,), options=kernels.compiler_options()), state


@pytest.mark.parametrize("target, kind", [("v6e:2x2", "prompts"), ("h100", "prompts")])
def test_steps_change_pages_and_slots_where_they_are(target, kind):
    program, state = compiled(target, kind)
    assert program.alias_size >= nbytes(state) > 7e9, "pages and slots are given back in place"
    assert program.temp_size < 0.3e9 < min(nbytes(leaf) for leaf in (*state.bank.pools, *jax.tree.leaves(state.layers)))
    assert "S(5)" in program.text.splitlines()[0], "experts are read from host memory"


@pytest.mark.parametrize("target", [more("v6e:2x2"), more("h100")])
def test_scales_of_int8_pages_lie_as_they_are_read(target):
    program, state = compiled(target, "prompts", kv="int8")
    assert program.alias_size >= nbytes(state) > 5e9
    assert program.temp_size < 0.1e9, "no leaf of all layers' scales is laid out anew"


@pytest.mark.parametrize("target, model, layers, slots", [
    ("h100", "deepseek_v2_lite", 27, 16), more("v6e:2x2", "deepseek_v2_lite", 27, 16),
    more("h100", "qwen3_next_80b_a3b", 16, 64), more("v6e:2x2", "qwen3_next_80b_a3b", 16, 64),
    more("h100", "gpt_oss_20b", 24, 8), more("v6e:2x2", "gpt_oss_20b", 24, 8),
])  # fmt: skip
def test_latents_recurrent_states_and_biased_experts_stay_where_they_are_too(target, model, layers, slots):
    program, state = compiled(target, "prompts", first_layers(model, layers), slots)
    assert program.alias_size >= nbytes(state) > 7e9
    assert program.temp_size < 0.2e9 < min(nbytes(pool) for pool in state.bank.pools)


@pytest.mark.parametrize("kind", ["copy", "read", "write"])
@pytest.mark.parametrize("target", ["v6e:2x2", "h100"])
def test_pages_are_moved_without_copies_of_the_pool(target, kind):
    program, state = compiled(target, kind)
    assert program.temp_size < 0.1e9
    assert program.alias_size >= (0 if kind == "read" else nbytes(state.layers))
