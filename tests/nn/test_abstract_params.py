"""The written-down shapes of parameters against those that the Linen modules make themselves, and the two arrangements of layers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.cache.batch import make_batch
from jaxmoe.cache.layers import init_layers
from jaxmoe.experts import ResidentBank
from jaxmoe.nn.parts import model_norm
from jaxmoe.nn.transformer import decoder_layer, init_params, layer_tables
from jaxmoe.spec import Leaf, ModelSpec, abstract_experts, abstract_params, stack_layers, unstack_layers
from pallas_kernels.dispatch import Kernels
from scripts.golden_cases import CASES

AXES = {"vocab", "embed", "heads", "kv_heads", "head_dim", "hidden", "mlp_hidden", "shared_hidden", "experts", None}


@pytest.fixture(params=[(name, dtype) for name in CASES for dtype in ("float32", "bfloat16")], ids="-".join)
def spec(request) -> ModelSpec:
    name, dtype = request.param
    return ModelSpec.from_hf(CASES[name].config).with_precision(dtype)


@pytest.fixture
def backend(request) -> str:
    """One for every case and dtype: the other one for the case's other dtype, and by turns for the next case's."""
    name, dtype = request.node.callspec.params["spec"]
    return ("cpu", "reference")[(list(CASES).index(name) + (dtype == "bfloat16")) % 2]


def is_leaf(x) -> bool:
    return isinstance(x, Leaf)


def shapes(tree) -> dict:
    """The tree with (shape, dtype) for leaves."""
    return jax.tree.map(lambda leaf: (tuple(leaf.shape), np.dtype(leaf.dtype)), tree, is_leaf=is_leaf)


def empty_bank(spec: ModelSpec) -> ResidentBank:
    held = abstract_experts(spec)[str(spec.moe_layers[0])]
    n, (e, d, f) = len(spec.moe_layers), held["gate"].shape
    return ResidentBank(jax.ShapeDtypeStruct((n, e, d, 2, f), held["gate"].dtype), jax.ShapeDtypeStruct((n, e, f, d), held["down"].dtype))


def initialised(spec: ModelSpec, index: int, kernels: Kernels):
    """What a layer's own `init` makes, as shapes."""
    layer = spec.layers[index]
    batch = make_batch([(0, 0, [0] * 5)], 8, 8)
    dtype = jnp.dtype(spec.precision.compute)

    def init(key, bank):
        x = jnp.zeros((8, spec.width), dtype)
        tables = layer_tables(layer, batch, dtype)
        state = init_layers(spec, 1, 8, 8)
        return decoder_layer(spec, layer, kernels).init(key, "all", x, spec.state_index(index), 0, bank, state, (), batch, tables)

    return jax.eval_shape(init, jax.random.key(0), empty_bank(spec))


def test_layers_are_what_their_modules_make(spec, backend):
    written = abstract_params(spec)["layers"]
    assert list(written) == [str(i) for i in range(spec.n_layers)]
    made: dict = {}
    for i, layer in enumerate(spec.layers):
        if layer not in made:  # layers of one kind are one module
            made[layer] = initialised(spec, i, Kernels(backend))
        assert set(made[layer]) == {"params"}  # a module keeps no state
        assert shapes(made[layer]["params"]) == shapes(written[str(i)])


def test_the_rest(spec):
    written = abstract_params(spec)
    assert set(written) == {"embed", "layers", "final_norm"} | (set() if spec.tied else {"lm_head"})
    norm = model_norm(spec, Kernels())
    made = jax.eval_shape(norm.init, jax.random.key(0), jnp.zeros((4, spec.width)))
    assert shapes(made["params"]) == shapes(written["final_norm"])
    held = np.dtype(np.float32 if spec.precision.params == "float32" else np.uint16)
    assert shapes(written["embed"]) == {"table": ((spec.vocab, spec.width), held)}
    if not spec.tied:
        bias = {"bias": ((spec.vocab,), held)} if spec.head_bias else {}
        assert shapes(written["lm_head"]) == {"kernel": ((spec.width, spec.vocab), held)} | bias


def test_random_parameters_have_the_written_shapes(spec):
    made = jax.eval_shape(lambda key: init_params(spec, key), jax.random.key(0))
    expected = stack_layers(spec, shapes(abstract_params(spec)), lambda leaves: ((len(leaves), *leaves[0][0]), leaves[0][1]))
    assert shapes(made) == expected


def test_axes_have_the_rank_of_their_leaf(spec):
    leaves = jax.tree.leaves((abstract_params(spec), abstract_experts(spec)), is_leaf=is_leaf)
    assert len(leaves) > 20
    for leaf in leaves:
        assert is_leaf(leaf) and len(leaf.axes) == len(leaf.shape) and set(leaf.axes) <= AXES
        named = [axis for axis in leaf.axes if axis is not None]
        assert len(named) == len(set(named))
        assert leaf.nbytes == np.zeros(leaf.shape, leaf.dtype).nbytes


def test_axes_of_states_and_banks_have_the_rank_of_their_leaf(spec):
    for tree in (init_layers(spec, 2, 8, 8), empty_bank(spec)):
        axes = jax.tree.leaves(tree.logical_axes(), is_leaf=lambda x: isinstance(x, tuple))
        assert [len(a) for a in axes] == [len(leaf.shape) for leaf in jax.tree.leaves(tree)]


def test_an_axis_name_has_one_size(spec):
    """Leaves of a layer that share an axis name share its size: what makes a rule per name enough for sharding."""
    for tree in (*abstract_params(spec)["layers"].values(), *abstract_experts(spec).values()):
        sizes: dict[str, set[int]] = {}
        for leaf in jax.tree.leaves(tree, is_leaf=is_leaf):
            for name, size in zip(leaf.axes, leaf.shape, strict=True):
                if name is not None:
                    sizes.setdefault(name, set()).add(size)
        assert all(len(found) == 1 for found in sizes.values()), sizes


def test_expert_bytes(spec):
    written = abstract_experts(spec)
    assert list(written) == [str(i) for i in spec.moe_layers]
    for size, layer in zip(spec.expert_bytes(), written.values(), strict=True):
        experts = layer["gate"].shape[0]
        assert size * experts == sum(leaf.nbytes for leaf in layer.values())


def numbered(spec: ModelSpec) -> dict:
    """A layered tree whose every leaf holds values of its own."""
    count = iter(range(10**6))
    return jax.tree.map(lambda leaf: np.full(leaf.shape, next(count), np.int32), abstract_params(spec), is_leaf=is_leaf)


@pytest.mark.parametrize("stack", [np.stack, tuple], ids=["stacked", "tuples"])
def test_stacking_and_back(spec, stack):
    layered = numbered(spec)
    segmented = stack_layers(spec, layered, stack)
    assert len(segmented["segments"]) == len(spec.segments)
    back = unstack_layers(spec, segmented)
    assert list(back["layers"]) == list(layered["layers"])
    assert jax.tree.structure(back) == jax.tree.structure(layered)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(layered), strict=True))


def test_segments_hold_the_layers_in_order(spec):
    order = [seg.layer_index(r, j) for seg in spec.segments for r in range(seg.repeats) for j in range(len(seg.pattern))]
    assert order == list(range(spec.n_layers))
    assert spec.layers == tuple(seg.pattern[j] for seg in spec.segments for _ in range(seg.repeats) for j in range(len(seg.pattern)))


def test_the_cases_cover_more_than_one_kind_of_segment():
    specs = [ModelSpec.from_hf(case.config) for case in CASES.values()]
    assert any(len(spec.segments) > 1 for spec in specs)
    assert any(len(seg.pattern) > 1 and seg.repeats > 1 for spec in specs for seg in spec.segments)
    assert any(len(seg.pattern) == 1 and seg.repeats > 1 for spec in specs for seg in spec.segments)


def test_a_spec_survives_json(spec):
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert dataclasses.replace(spec, width=spec.width + 1).hash() != spec.hash()
