"""Gates evaluated ahead: on a layer's own input they choose what its router chooses, and tokens combine as a plain loop combines them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.offload import trace
from jaxmoe.routing import ahead
from jaxmoe.routing.route import initial_state, route
from jaxmoe.spec import AttentionSpec, ExpertSpec, LayerSpec, ModelSpec, RouterSpec, Segment, SpecError
from pallas_kernels.dispatch import Kernels
from tests.quick import OPTIONS
from tests.routing.families import CASES, D, leaves, rows

CPU = Kernels("cpu")
T, LAYERS, EPS = 16, 3, 1e-6
FAMILIES = """qwen3_moe olmoe mixtral_odd deepseek_v2_small deepseek_v3_small gpt_oss_odd phimoe_wide ernie4_5_moe_floor gemma4_odd""".split()


def model_of(*routers: RouterSpec) -> ModelSpec:
    """A layer for each router, the first two of one pattern."""
    layers = [LayerSpec(AttentionSpec(1, 1, 8), router, ExpertSpec(8)) for router in routers]
    segments = (Segment(tuple(layers[:2]), 1, 0), *(Segment((layer,), 1, 2 + i) for i, layer in enumerate(layers[2:])))
    return ModelSpec("a test", 8, D, segments, EPS, 64)


def weights(router: RouterSpec, join=np.stack) -> tuple[list[dict], dict]:
    """Each layer's router, and the segmented tree of all."""
    own = [leaves(router, D, seed) for seed in range(LAYERS)]
    trees = [{"router": {name: join([leaf]) for name, leaf in gate.items()}} for gate in own]
    return own, {"segments": ((trees[0], trees[1]), (trees[2],))}


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=OPTIONS)
def everything(spec: ModelSpec, kernels: Kernels, own, params, x, valid, layer):
    """What routers choose, and what gates say: of the first layer on its own input, and of layers after `layer`, which is traced."""
    router = spec.moe[0]
    chosen = jnp.stack([route(router, gate, x, (), valid, kernels, EPS)[0].ids for gate in own])
    gates = ahead.stack_gates(spec, params)
    wide = ahead.chosen_ahead(spec, gates, -1, x, kernels)
    return (
        chosen,
        wide,
        ahead.gate_scores(spec, gates, layer, x, valid, 2, kernels),
        jax.vmap(lambda row: ahead.gate_scores(spec, gates, -1, row[None], jnp.ones(1, bool), LAYERS, kernels))(x),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_on_their_own_input_gates_choose_what_routers_choose(name):
    router = CASES[name][1]
    spec, (own, params), x = model_of(*[router] * LAYERS), weights(router), rows(T, D)
    valid = np.arange(T) % 5 != 3
    chosen, wide, combined, single = map(np.asarray, everything(spec, CPU, own, params, jnp.asarray(x), jnp.asarray(valid), 1))
    assert wide.dtype == np.int16 and wide.shape == (T, ahead.AHEAD, 3 * router.active)
    assert (wide[:, :LAYERS, : router.active].swapaxes(0, 1) == chosen).all()
    assert (wide[:, LAYERS:] == -1).all()
    found = min(3 * router.active, router.experts)
    assert (wide[:, :LAYERS, found:] == -1).all() and all(len(set(ids[:found])) == found for ids in wide[:, :LAYERS].reshape(-1, wide.shape[2]))
    best = np.argsort(-single, axis=-1, kind="stable")[..., : router.active]
    assert (best.swapaxes(0, 1) == chosen).all()
    assert single.min() >= 0 and single.max() <= 1 and (single.sum(-1) <= router.active + 1e-4).all()
    expected = 1 - np.prod(1 - single[valid, 2].astype(np.float64), axis=0)
    np.testing.assert_allclose(combined[0], expected, atol=1e-5)
    assert (combined[1] == 0).all()


def test_where_groups_limit_the_choice_the_others_come_after():
    router = CASES["deepseek_v3_small"][1]
    own, params = weights(router)
    _, wide, _, single = map(np.asarray, everything(model_of(*[router] * LAYERS), CPU, own, params, jnp.asarray(rows(T, D)), jnp.ones(T, bool), 1))
    size = router.experts // router.group_limit.groups
    for ids, scores in zip(wide[:, 0], single[:, 0], strict=True):
        kept = set((ids[: router.active] // size).tolist()) | set((np.flatnonzero(scores > 0) // size).tolist())
        assert len(kept) == router.group_limit.kept
        inside = [int(i) // size in kept for i in ids]
        assert inside == sorted(inside, reverse=True) and not all(inside)


def test_one_stacked_matmul_ranks_as_layer_by_layer():
    router = CASES["gemma4_odd"][1]
    own, params = weights(router)
    args = (own, params, jnp.asarray(rows(T, D)), jnp.ones(T, bool), 0)
    spec = model_of(*[router] * LAYERS)
    one, other = everything(spec, CPU, *args), everything(spec, Kernels("reference"), *args)
    assert (one[1] == other[1]).all()
    np.testing.assert_allclose(one[2], other[2], atol=1e-5)


def test_stacked_weights_and_tuples_give_the_same_gates():
    router = CASES["gpt_oss_odd"][1]
    spec, (own, stacked), (_, tuples) = model_of(*[router] * LAYERS), weights(router), weights(router, tuple)
    for params in (stacked, tuples):
        gates = ahead.stack_gates(spec, params)
        assert gates.keys() == {"kernel", "bias"}
        for name, leaf in gates.items():
            np.testing.assert_array_equal(leaf, np.stack([gate[name] for gate in own]))


def test_routers_of_several_kinds_are_refused():
    with pytest.raises(SpecError, match="found 2 kinds"):
        ahead.stack_gates(model_of(RouterSpec(4, 2), RouterSpec(4, 1)), {"segments": ()})


def test_traces_hold_what_gates_give():
    assert (trace.AHEAD, trace.WIDTH) == (ahead.AHEAD, ahead.WIDTH)


def test_a_pregated_router_reads_what_the_one_before_was_given():
    plain, before = RouterSpec(6, 2), RouterSpec(6, 2, pregated=True)
    own, xs, valid = [leaves(plain, D, seed) for seed in range(3)], [jnp.asarray(rows(T, D, seed)) for seed in (7, 8, 9)], jnp.ones(T, bool)
    state = initial_state(model_of(before, before), xs[0])
    for params, x, read in zip(own, xs, [xs[0], xs[0], xs[1]], strict=True):
        found, state = route(before, params, x, state, valid, CPU)
        expected, _ = route(plain, params, read, (), valid, CPU)
        assert (found.ids == expected.ids).all() and (found.weights == expected.weights).all()
    assert initial_state(model_of(plain, plain), xs[0]) == ()
    with pytest.raises(SpecError, match=r"RouterSpec\.pregated needs the router state"):
        route(before, own[0], xs[0], (), valid, CPU)
