"""The decode step with experts in host memory, at the shapes of real models, by the compilers of an H100 and of TPUs: it asks the host for nothing
and needs little memory beside the pool.

Little is three experts: one in use, in float32 where few rows are a sum of products (two), and the activations. XLA may hold one layer's other
weights and its keys and values beside them: a scanned layer's weights are slices of the weights of all layers, which newer versions for GPUs fetch
ahead, all at the start of the layer. That is of a layer, not of the bank, and grows neither with the experts nor with the slots; the programs that do
without it are held to three experts.
"""

import dataclasses
import re

import jax
import numpy as np
import pytest

from jaxmoe.cache.layers import init_layers
from jaxmoe.decode.sampling import sampling_params
from jaxmoe.engine import steps
from jaxmoe.engine.model import Offload, slot_bank
from jaxmoe.experts import host_store
from jaxmoe.formats import leaf_dtype
from jaxmoe.spec import ModelSpec, abstract_params, stack_layers
from pallas_kernels.dispatch import Kernels
from sharding.compile_only import compile_with_host
from tests.more import more

pytestmark = pytest.mark.compile_only

CONFIGS = {
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
    },
    "OLMoE-1B-7B": {
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "rope_theta": 1e4,
    },
}
"""The fields of these models' config.json that shape the step."""

DEVICE_BYTES = {"h100": 80e9, "v5e:2x2": 16e9, "v6e:2x2": 32e9}
POSITIONS = 1024

SLICES_IN_TURN = jax.__version_info__ < (0, 11)
"""Whether XLA slices a layer's weights on a GPU when they are needed, so that one takes the place of another."""


def nbytes(tree) -> int:
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def parts_of(spec: ModelSpec, slots: int, rows: int, layout: str):
    """Spec and abstract `(params, bank, state)` in bfloat16, layers stacked, experts in `layout`."""
    spec = spec.with_precision("bfloat16")

    def shape(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    def stack(leaves):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)

    params = stack_layers(spec, jax.tree.map(shape, abstract_params(spec)), stack)
    records = len(spec.moe_layers) * spec.moe[0].experts
    store = jax.ShapeDtypeStruct((records, *host_store.record_shape(spec)), leaf_dtype("bfloat16"))
    bank = dataclasses.replace(slot_bank(spec, None, Offload(slots), layout), store=store)
    moving = jax.eval_shape(lambda: bank.init_state())
    return spec, params, bank, steps.EngineState(jax.eval_shape(lambda: init_layers(spec, rows, POSITIONS, 1)), moving)


def compiled(target: str, model: str, slots: int, rows: int):
    """The decode step's program, the spec, and the step's abstract `(params, bank, state)`."""
    kernels = Kernels("gpu" if target == "h100" else "tpu")
    spec, *held = parts_of(ModelSpec.from_hf(CONFIGS[model]), slots, rows, kernels.expert_layout)
    row = np.zeros(rows, np.int32)
    rest = (row, row, row, row, np.full(steps.EOS_SLOTS, -2, np.int32), sampling_params(rows))
    # Sampling is the same for every bank, and takes most compilers as long as all the rest; on GPUs it has to go without branches too.
    step = steps.decode_step(spec, kernels, greedy=target != "h100" or rows > 1)
    program = compile_with_host(target, step.__wrapped__, *held, *rest, host={1}, donate=(2,), options=kernels.compiler_options())
    return program, spec, held


# At batch 1 all experts that a token asks for have slots; at batch 8 tokens may ask for more, so that the step goes by waves.
@pytest.mark.parametrize(
    "target, model, slots, rows, strict",
    [
        ("h100", "Qwen3-30B-A3B", 32, 1, SLICES_IN_TURN),
        more("h100", "OLMoE-1B-7B", 16, 8, True),  # waves: the programs of serving/test_serve_compile_only.py have them too
        more("v5e:2x2", "Qwen3-30B-A3B", 16, 8, True),
        ("v6e:2x2", "Mixtral-8x7B", 2, 1, True),
    ],
)
def test_decoding_asks_the_host_for_nothing_and_needs_little_beside_the_pool(target, model, slots, rows, strict):
    program, spec, (params, bank, state) = compiled(target, model, slots, rows)
    record = host_store.record_bytes(spec)
    assert (spec.moe[0].active * rows > slots) == (rows > 1)

    assert "S(5)" in program.text.splitlines()[0]
    assert program.text.count('custom_call_target="mosaic_gpu' if target == "h100" else '"tpu_custom_call"') >= 2, "experts run by our kernel"
    assert program.host_argument_size == nbytes(bank) == len(spec.moe_layers) * spec.moe[0].experts * record
    assert program.host_temp_size == 0
    assert program.argument_size >= nbytes((params, state))
    assert program.alias_size >= nbytes(state), "the pool and the cache are updated in place"
    assert program.argument_size + program.temp_size < DEVICE_BYTES[target]

    one_layer = nbytes((params["segments"], state.layers)) // spec.n_layers
    assert nothing_of_the_pool(program.text, state.bank.pools) == []
    assert program.temp_size <= 3 * record + (0 if strict else one_layer), f"{program.temp_size / record:.2f} experts"

    assert not re.search(r" (send|recv|infeed|outfeed)\(", program.text)
    assert not [name for name in re.findall(r'custom_call_target="([^"]*)"', program.text) if "callback" in name.lower()]
    loops = [line for line in program.text.splitlines() if " while(" in line]
    assert loops
    if target == "h100":  # of a loop of unknown length, and of a branch, the predicate is read back to the host
        assert " conditional(" not in program.text
        assert all("known_trip_count" in line for line in loops), loops


def nothing_of_the_pool(text: str, pools) -> list[str]:
    """Instructions that make another array as large as one of the pools, rather than an update of it in place.

    Temporaries tell as well that there is one; this tells which.
    """
    sizes = {int(np.prod(pool.shape)) for pool in pools}
    in_place = {"parameter", "get-tuple-element", "bitcast", "dynamic-update-slice"}
    found = []
    for line in text.splitlines():
        made = re.match(r"\s*(?:ROOT )?%\S+ = \w+\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if made and made[2] not in in_place and int(np.prod([int(n) for n in made[1].split(",")])) in sizes and "dynamic-update-slice" not in line:
            found.append(line[:200])
    return found
