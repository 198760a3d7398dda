"""Attention over a divided sequence, compiled for TPUs and for H100s: links carry both directions at once, beside the arithmetic, and as many bytes
as the formulas say."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe.cache import ring
from jaxmoe.cache.batch import make_batch
from jaxmoe.cache.deal import split_batch
from jaxmoe.cache.split_kv import init_split_kv
from jaxmoe.spec import AttentionSpec
from pallas_kernels.dispatch import Kernels
from sharding.compile_only import H100, devices
from sharding.hlo import collectives

pytestmark = pytest.mark.compile_only

SPEC = AttentionSpec(heads=8, kv_heads=2, head_dim=128)
N, ROWS, LAYERS = 4, 2, 2
PART = PartitionSpec("sequence")


def mesh_of(target):
    if target == "h100":
        found = topologies.get_topology_desc("", platform="cuda", target_config=H100, topology=f"1x1x{N}").devices
    else:
        found = devices(target)
    return Mesh(np.array(found), ("sequence",))


def compiled(mesh, f, in_specs, out_specs, args, donate=()):
    shown = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s)), args, in_specs)
    mapped = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(mapped, donate_argnums=donate).lower(*shown).compile()


def by_side(found, n=N):
    """Bytes and whether all are asynchronous, of permutes by how many places on they go; ids of a mesh of one axis."""
    out = {}
    for c in found:
        if c.kind == "collective-permute":
            (shift,) = {(target - source) % n for source, target in c.groups}
            size, apart = out.get(shift, (0, True))
            out[shift] = (size + c.bytes * c.times, apart and c.asynchronous)
    return out


@pytest.mark.parametrize("target", ["v5e:2x2", "h100"])
@pytest.mark.parametrize("way", ["ring", "token"])
def test_both_directions_are_used_at_once(way, target):
    tokens, keys = 64, 128
    shapes = ((tokens, 8, 128), (keys, 2, 128), (keys, 2, 128), (tokens,), (keys,))
    dtypes = (jnp.bfloat16, jnp.uint16, jnp.uint16, jnp.int32, jnp.int32)
    args = tuple(jax.ShapeDtypeStruct((N * s[0], *s[1:]), d) for s, d in zip(shapes, dtypes, strict=True))
    attend = functools.partial(ring.ring_attention, spec=SPEC, axis="sequence", way=way)
    text = compiled(mesh_of(target), lambda *a: attend(*a), (PART,) * 5, PART, args).as_text()
    sizes = ring.key_bytes(SPEC, keys, 2), ring.query_bytes(SPEC, tokens, 2, tokens), ring.result_bytes(SPEC, tokens)
    forward, backward = ring.traffic(way, N, *sizes)
    found = by_side(collectives(text))
    assert {side: size for side, (size, _) in found.items()} == {1: forward, N - 1: backward}
    if target != "h100":  # where the last results' way home has nothing beside it, and is awaited at once
        assert all(apart for _, apart in found.values())
        assert overlapping(text), "a permute to either side is begun before one to the other is awaited"


def overlapping(text):
    """Whether, in the order of the schedule, permutes to both sides are under way at some time."""
    side = {c.name: (c.groups[0][1] - c.groups[0][0]) % N for c in collectives(text) if c.kind == "collective-permute"}
    under_way, both = {}, False
    for line in text.splitlines():
        name, _, rest = line.strip().removeprefix("ROOT ").removeprefix("%").partition(" = ")
        if name in side and "collective-permute-start(" in rest:
            under_way[name] = side[name]
        elif "collective-permute-done(" in rest:
            under_way.pop(rest.partition("collective-permute-done(%")[2].partition(")")[0], None)
        both |= len(set(under_way.values())) > 1
    return both


@pytest.mark.parametrize(("target", "backend"), [("v5e:2x2", "tpu"), ("h100", "gpu")])
def test_the_divided_cache_compiles(target, backend):
    """A prompt's step and one of decoding: on GPUs without a loop of unknown length; decoding by one all-gather a layer and nothing else."""
    mesh = mesh_of(target)
    local = jax.eval_shape(lambda: init_split_kv(SPEC.cached, LAYERS, ROWS, 8192, 16, "bfloat16", N))
    specs = dataclasses.replace(
        local, **{name: PartitionSpec(*("sequence" if a == "positions" else None for a in axes)) for name, axes in local.logical_axes().items()}
    )
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct([n * (N if a else 1) for n, a in zip(x.shape, s, strict=True)], x.dtype), local, specs)

    def step(state, q, k, v, batch):
        def layer(state, i):
            here = (q + i.astype(q.dtype), k, v)  # of this layer, or what is sent first would be sent once for all
            o, state = state.attend(SPEC, i, *here, batch, Kernels(backend))
            return state, o

        return jax.lax.scan(layer, state, jnp.arange(LAYERS))

    def prompt(state, *args):
        state, o = step(state, *jax.tree.map(lambda x: x[0], args))
        return state, o[None]

    batches, _ = split_batch(make_batch([(0, 0, [1] * 50)], 32, 64), N)
    shown = jax.tree.map(lambda *x: np.stack(x), *batches)
    heads = [jax.ShapeDtypeStruct((N, len(batches[0].tokens), n, 128), jnp.bfloat16) for n in (8, 2, 2)]
    specs_of = lambda tree, spec: jax.tree.map(lambda _: spec, tree)  # noqa: E731
    args = (state, *heads, shown)
    program = compiled(mesh, prompt, (specs, PART, PART, PART, specs_of(shown, PART)), (specs, PART), args, donate=(0,))
    found, cache = collectives(program.as_text()), math.prod(local.k.shape) * 2
    assert program.memory_analysis().temp_size_in_bytes < cache, "a step needs no second cache"
    runs, run = len(batches[0].run_lengths), batches[0].run
    keys = ring.key_bytes(SPEC, ROWS * local.positions.shape[1], 2)
    sizes = keys, ring.query_bytes(SPEC, runs * run, 2, 2 * runs), ring.result_bytes(SPEC, runs * run)
    assert ring.choose(N, *sizes) == "token"
    each = ring.traffic("token", N, *sizes)[0] * LAYERS
    sent = by_side(found)  # where the runs are is the same in all layers, and may be sent once
    assert sent.keys() == {1, N - 1} and all(each - 8 * LAYERS <= size <= each for size, _ in sent.values())
    (first,) = (c for c in found if c.kind != "collective-permute")  # each row's first position: once a step, if the compiler sees that it may be
    assert (first.kind, first.bytes) == ("all-reduce", 4 * ROWS) and first.times in (1, LAYERS)
    one = make_batch([(row, 50, [1]) for row in range(ROWS)], 1, ROWS)
    heads = [jax.ShapeDtypeStruct((ROWS, n, 128), jnp.bfloat16) for n in (8, 2, 2)]
    whole = PartitionSpec()
    program = compiled(mesh, step, (specs, whole, whole, whole, specs_of(one, whole)), (specs, whole), (state, *heads, one), donate=(0,))
    text = program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < cache / 4
    assert [(c.kind, c.bytes, c.times) for c in collectives(text)] == [("all-gather", N * ROWS * 8 * 130 * 4, LAYERS)]
    if backend == "gpu":
        loops = [line for line in text.splitlines() if " while(" in line]
        assert loops and all("known_trip_count" in line for line in loops)
