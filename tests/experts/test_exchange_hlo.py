"""What a TPU's compiler makes of the exchanges: the collectives that are written down, and no other."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as Order
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.cache.batch import Batch
from jaxmoe.cache.contiguous import KVState
from jaxmoe.engine import coherent
from jaxmoe.experts.exchange import exchange_tokens, gather_tokens
from pallas_kernels.dispatch import Kernels
from sharding import compile_only
from sharding.exchange_cost import Shape, traffic
from sharding.hlo import collectives
from sharding.split import Split
from tests.experts.exchange_cases import Scales, meeting

pytestmark = pytest.mark.compile_only
N, E, D, A = 8, 64, 256, 4


def compiled(one, *shapes):
    """The collectives of a function of one device's parts, compiled for eight TPU chips; `shapes` are `(shape, dtype, partition)`."""
    mesh = Split(expert=N).mesh(compile_only.devices("v5e:2x4"))
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, p)) for shape, dtype, p in shapes]
    whole = jax.shard_map(one, mesh=mesh, in_specs=tuple(p for _, _, p in shapes), out_specs=P("expert"), check_vma=False)
    return collectives(jax.jit(whole).lower(*args).compile(compiler_options=Kernels("tpu").compiler_options()).as_text())


def exchanged(exchange, tokens: int):
    def one(w, x, ids, valid):
        return exchange(Scales(w, jnp.zeros(1, jnp.int32)), meeting(N, E, 1, Kernels("tpu")), x, ids, valid)[0]

    by = P("expert")
    rows = ((N * tokens, D), jnp.bfloat16, by), ((N * tokens, A), jnp.int32, by), ((N * tokens,), jnp.bool_, by)
    return compiled(one, ((2, E), jnp.float32, P(None, "expert")), *rows)


@pytest.mark.parametrize(
    ("exchange", "tokens", "kinds"),
    [
        (exchange_tokens, 2, ["all-to-all", "all-to-all"]),
        (exchange_tokens, 128, ["all-reduce", "all-to-all", "all-to-all"]),
        (gather_tokens, 8, ["all-gather", "reduce-scatter"]),
    ],
)
def test_a_tpu_runs_the_collectives_that_are_written_down(exchange, tokens, kinds):
    found = exchanged(exchange, tokens)
    assert sorted(c.kind for c in found) == kinds
    if tokens < 128:
        way = "gather" if exchange is gather_tokens else "tokens"
        assert sum(c.sent for c in found) == traffic(way, Shape(tokens, A, E, N, D, 1))


@pytest.mark.parametrize("tokens", [8, 512])
def test_a_token_moves_by_one_all_to_all(tokens):
    layout = dataclasses.replace(meeting(N, E).layout, batch=())

    def one(x, ids, weights, at, count):
        moved = coherent.move(x, ids, weights, coherent.Slots(at, count[0]), E, layout, Kernels("tpu"))
        return moved[0], moved[1], moved[2], moved[3].token, moved[3].size[None]

    row, by = N * tokens, P("expert")
    shapes = ((row, D), jnp.bfloat16), ((row, 1), jnp.int32), ((row, 1), jnp.float32), ((row,), jnp.int32), ((N,), jnp.int32)
    found = compiled(one, *((*shape, by) for shape in shapes))
    assert [c.kind for c in found] == ["all-to-all"]


def test_the_end_of_a_coherent_step_copies_no_cache():
    cache = KVState(jnp.zeros((4, 16, 2, 128, 256), jnp.uint16), jnp.zeros((4, 16, 2, 256, 128), jnp.uint16))
    row = jnp.zeros(16, jnp.int32)

    def end(kv, segments, positions):
        batch = Batch(row, positions, segments, segments, positions, row, jnp.int32(0), row)
        return coherent._with_entries(kv, coherent._new_entries(kv, batch) + jnp.uint16(1), batch)

    shapes = jax.eval_shape(lambda: (cache, row, row))
    on = compile_only.on_device("v5e:2x4")
    placed = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=Format(Order(tuple(range(x.ndim))), on)), t) for t in shapes]
    memory = compile_only.compile_for("v5e:2x4", end, *placed, donate=(0,)).memory_analysis()
    assert memory.alias_size_in_bytes >= cache.k.nbytes + cache.v.nbytes
    assert memory.temp_size_in_bytes < cache.k.nbytes / 4
