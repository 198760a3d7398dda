"""The engine's own steps compile for an H100 and a TPU v5e, with the state reused in place and no second copy of the weights."""

import functools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmoe.cache.batch import make_batch
from jaxmoe.cache.layers import init_layers
from jaxmoe.decode.sampling import sampling_params
from jaxmoe.engine import steps
from jaxmoe.experts import ResidentBank
from jaxmoe.formats import expert_shapes
from jaxmoe.spec import ModelSpec, abstract_experts, abstract_params, stack_layers
from pallas_kernels.dispatch import Kernels
from sharding.compile_only import compile_for

pytestmark = pytest.mark.compile_only

SHIPPED = json.loads((Path(__file__).resolve().parents[2] / "checkpoints" / "default" / "config.json").read_text())
ROWS, POSITIONS = 8, 1024


@functools.cache
def parts(layout):
    """Spec and abstract `(params, bank, state)` of the shipped model in bfloat16, layers stacked, experts in `layout`."""
    spec = ModelSpec.from_hf(SHIPPED).with_precision("bfloat16")

    def shape(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    def stack(leaves):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)

    params = stack_layers(spec, jax.tree.map(shape, abstract_params(spec)), stack)
    experts = list(abstract_experts(spec).values())
    e, d, f = experts[0]["gate"].shape
    dtype = experts[0]["gate"].dtype
    w_in, w_out = (jax.ShapeDtypeStruct((len(experts), e, *rest), dtype) for rest in expert_shapes(d, f, layout))
    bank, moving = ResidentBank(w_in, w_out, spec.moe[1].activation, layout).split()
    layers = jax.eval_shape(lambda: init_layers(spec, ROWS, POSITIONS, steps.run_length(512)))
    return spec, params, bank, steps.EngineState(layers, moving)


def nbytes(tree) -> int:
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("target, backend", [("h100", "gpu"), ("v5e:2x2", "tpu")])
@pytest.mark.parametrize("which", ["prefill", "decode"])
def test_steps_compile(target, backend, which):
    kernels = Kernels(backend)
    spec, params, bank, state = parts(kernels.expert_layout)
    if which == "prefill":
        step = steps.prefill_step(spec, kernels, False)
        batch = make_batch([(0, 0, [1] * 512)], steps.run_length(512), 512, n_logits=steps.LOGIT_ROWS)
        rest = (batch, sampling_params(steps.LOGIT_ROWS), np.zeros(steps.LOGIT_ROWS, np.int32))
    else:
        step = steps.decode_step(spec, kernels, False)
        row = np.zeros(ROWS, np.int32)
        rest = (row, row, row, row, np.full(steps.EOS_SLOTS, -2, np.int32), sampling_params(ROWS))
    program = compile_for(target, step.__wrapped__, params, bank, state, *rest, donate=(2,), options=kernels.compiler_options())
    stats = program.memory_analysis()
    held = nbytes((params, bank, state))
    assert held <= stats.argument_size_in_bytes
    assert stats.alias_size_in_bytes >= nbytes(state), "the cache is reused in place"
    text = program.as_text()
    assert "bf16[" in text
    assert ("mosaic_gpu" if target == "h100" else "tpu_custom_call") in text, "experts run by our kernel"
    # On a GPU a loop of unknown length, or a branch, reads its predicate back to the host.
    loops = [line for line in text.splitlines() if re.search(r" (while|conditional)\(", line)]
    assert loops
    assert target != "h100" or all("known_trip_count" in line for line in loops), loops
