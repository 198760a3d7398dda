"""The cache that is divided over devices: against a plain float64 loop and the cache of one device, over prompts in several steps and decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxmoe.cache import ring
from jaxmoe.cache.batch import Batch, make_batch
from jaxmoe.cache.contiguous import init_kv
from jaxmoe.cache.deal import split_batch, take_room
from jaxmoe.cache.split_kv import SplitKVState, init_split_kv, local_places
from jaxmoe.spec import AttentionSpec
from jaxmoe.spec.types import LatentSpec, RopeSpec
from pallas_kernels.dispatch import Kernels
from sharding.hlo import collectives
from tests.quick import OPTIONS

CPU = Kernels("cpu", row_invariant=False)
ROWS, LAYERS, LENGTH, TOKENS = 3, 2, 64, 64
PLAIN = AttentionSpec(heads=4, kv_heads=4, head_dim=8)
GROUPED = AttentionSpec(heads=8, kv_heads=1, head_dim=8)
LATENT = AttentionSpec(heads=4, kv_heads=1, head_dim=20, latent=LatentSpec(16, None, 8, 8), rope=RopeSpec(width=4))
STEPS = (
    [(1, 0, 21), (0, 0, 5)],
    [(1, 21, 26)],
    [(1, 47, 7), (2, 0, 18)],
    [(0, 0, 3), (2, 18, 4)],  # row 0 begins anew
)
"""(row, first position, tokens) of each piece of each prefill step; decoding follows."""


def tables(spec, seed=0):
    """q, k and v of every layer, row and position."""
    rng = np.random.default_rng(seed)
    kv_heads, c, value = spec.cached
    q, k = (rng.normal(size=(LAYERS, ROWS, LENGTH, heads, c)).astype(np.float32) for heads in (spec.heads, kv_heads))
    return q, k, None if value is None else rng.normal(size=(LAYERS, ROWS, LENGTH, kv_heads, value)).astype(np.float32)


def expected(spec, q, k, v, sinks=None):
    """Every query's attention over its row up to itself, in float64: [L, B, P, H, V]."""
    group, at = spec.heads // k.shape[3], np.arange(LENGTH)
    first = at - spec.window + 1 if spec.window else at // spec.chunk * spec.chunk if spec.chunk else 0 * at
    keys = np.repeat(k.astype(np.float64), group, 3)
    values = keys[..., : spec.latent.kv_rank] if v is None else np.repeat(v.astype(np.float64), group, 3)
    s = np.einsum("lbqhc,lbkhc->lbhqk", q.astype(np.float64), keys) * spec.softmax_scale
    e = np.exp(s) * ((at <= at[:, None]) & (at >= first[:, None]))
    extra = 0.0 if sinks is None else np.exp(sinks.astype(np.float64))[:, None]
    return np.einsum("lbhqk,lbkhv->lbqhv", e / (e.sum(-1) + extra)[..., None], values)


class Run:
    """A cache on n devices, and its two jitted steps."""

    def __init__(self, spec, n, dtype="float32", way="auto", sinks=None, kernels=CPU, prefix=None):
        self.spec, self.n, self.sinks = spec, n, sinks
        self.mesh = Mesh(np.array(jax.devices()[:n]), ("sequence",))
        made = functools.partial(init_split_kv, spec.cached, LAYERS, ROWS, LENGTH, 16, dtype, n)
        abstract = dataclasses.replace(jax.eval_shape(made), way=way, prefix=prefix)
        axes = abstract.logical_axes()
        self.specs = dataclasses.replace(
            abstract, **{name: PartitionSpec(*("sequence" if a == "positions" else None for a in names)) for name, names in axes.items()}
        )
        self.state = self._mapped(lambda: dataclasses.replace(made(), way=way, prefix=prefix), (), self.specs)()
        part = PartitionSpec("sequence")

        def step(state, q, k, v, batch):  # all layers in one scan, as a model has them
            def layer(state, x):
                o, state = state.attend(spec, x[0], *x[1:4], batch, kernels, sinks)
                return state, o

            return jax.lax.scan(layer, state, (jnp.arange(LAYERS), q, k, v))

        def prefill(state, *args):
            state, o = step(state, *jax.tree.map(lambda x: x[0], args))
            return state, o[None]

        self.prefill = self._mapped(prefill, (self.specs, part, part, part, part), (self.specs, part))
        self.decode = self._mapped(step, (self.specs, *(PartitionSpec(),) * 4), (self.specs, part))

    def _mapped(self, f, in_specs, out_specs):
        return jax.jit(jax.shard_map(f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False), compiler_options=OPTIONS)

    def take(self, tables, batches):
        """The batches' q, k, v, by device."""
        pick = [[None if t is None else t[:, np.maximum(b.segments, 0), b.positions] for t in tables] for b in batches]
        return [None if t[0] is None else np.stack(t) for t in zip(*pick, strict=True)]


def check(run, tables, want, steps=STEPS, decode=4):
    """Every token of every step."""
    for pieces in steps:
        batches, _ = split_batch(batch_of(pieces), run.n)
        run.state, o = run.prefill(run.state, *run.take(tables, batches), stacked(batches))
        assert sum(int((b.segments >= 0).sum()) for b in batches) == sum(length for _, _, length in pieces)
        for b, found in zip(batches, np.asarray(o), strict=True):
            real = b.segments >= 0
            np.testing.assert_allclose(found[:, real], want[:, b.segments[real], b.positions[real]], rtol=0, atol=1e-5)
            assert not found[:, ~real].any()
    at = np.array([3, 54, 22])
    for _ in range(decode):
        batch = decoding(at.astype(np.int32))
        run.state, o = run.decode(run.state, *(None if t is None else t[0] for t in run.take(tables, [batch])), batch)
        o = np.asarray(o).reshape(run.n, LAYERS, 3, run.spec.heads, -1)
        assert (o == o[0]).all(), "devices differ"
        np.testing.assert_allclose(o[0, :, :2], want[:, [0, 1], at[:2]], rtol=0, atol=1e-5)
        assert not o[:, :, 2].any()
        at[:2] += 1
    return at


def decoding(at):
    """A token each of all rows but the last, which is padding as the engine's decode batches have it."""
    rows = np.arange(ROWS, dtype=np.int32)
    segments = np.where(rows < ROWS - 1, rows, -1).astype(np.int32)
    return Batch(np.zeros(ROWS, np.int32), at, segments, rows, at, np.ones(ROWS, np.int32), np.int32(ROWS - 1), rows, 1)


def batch_of(pieces):
    return make_batch([(row, first, [1] * length) for row, first, length in pieces], 16, TOKENS, n_logits=2)


def stacked(batches):
    return jax.tree.map(lambda *x: np.stack(x), *batches)


def filled(run):
    """Positions of each row on each device."""
    at = np.asarray(run.state.positions).reshape(ROWS, run.n, -1)
    return [[sorted(int(p) for p in at[row, d] if p >= 0) for d in range(run.n)] for row in range(ROWS)]


CASES = {
    "eight devices": (PLAIN, 8, "direct"),
    "chunk and sinks": (dataclasses.replace(GROUPED, chunk=16, sinks=True), 4, "token"),
    "latent": (LATENT, 2, "ring"),
}


@pytest.mark.parametrize(("spec", "n", "way"), CASES.values(), ids=CASES.keys())
def test_prompts_in_steps_then_decoding(spec, n, way):
    sinks = np.random.default_rng(1).normal(size=spec.heads).astype(np.float32) if spec.sinks else None
    run, made = Run(spec, n, way=way, sinks=sinks), tables(spec)
    at = check(run, made, expected(spec, *made, sinks))
    rows = filled(run)
    assert [sorted(sum(row, [])) for row in rows] == [list(range(at[0])), list(range(at[1])), list(range(22))], "each position is on one device"
    most, least = max(map(len, rows[1])), min(map(len, rows[1]))
    assert most - least <= 2 * TOKENS // (2 * n) + 1, "positions lie evenly"


def test_the_cache_of_one_device_gives_the_same():
    """`KVState` on the same bfloat16 keys, with a window and sinks, here and in the plain loop."""
    spec, n, sinks = dataclasses.replace(PLAIN, kv_heads=2, window=6, sinks=True), 2, np.linspace(-1, 1, 4).astype(np.float32)
    made = tables(spec, 3)
    held = [made[0], *(t.astype(ml_dtypes.bfloat16).astype(np.float32) for t in made[1:])]
    run = Run(spec, n, "bfloat16", sinks=sinks)
    assert run.state.k.dtype == jnp.uint16
    want = expected(spec, *held, sinks)
    check(run, made, want, decode=0)
    for places in (240, 241):
        _, o = run.prefill(with_filled(run.state, places), *prompt(run, made, [(1, 1, 9)]))
        assert np.isnan(o).any() == (places + 16 > 256), "places that run out are seen"
    alone = init_kv(spec.cached, LAYERS, ROWS, LENGTH, 16, "bfloat16")
    attend = jax.jit(lambda state, layer, q, k, v, batch: state.attend(spec, layer, q, k, v, batch, CPU, sinks), compiler_options=OPTIONS)
    for pieces in STEPS:
        batch = batch_of(pieces)
        real = batch.segments >= 0
        for layer in range(LAYERS):
            o, alone = attend(alone, layer, *(t[layer, np.maximum(batch.segments, 0), batch.positions] for t in made), batch)
            np.testing.assert_allclose(np.asarray(o)[real], want[layer, batch.segments[real], batch.positions[real]], rtol=0, atol=1e-5)


def test_products_in_the_queries_dtype_with_loops_of_known_length():
    """As on GPUs: float32 stays float32. And of each row only `prefix` places travel."""
    run, made = Run(GROUPED, 2, way="ring", kernels=Kernels("gpu"), prefix=128), tables(GROUPED)
    run.prefill = run.prefill.lower(run.state, *prompt(run, made, STEPS[0])).compile()
    text = run.prefill.as_text()
    check(run, made, expected(GROUPED, *made), STEPS[:2], decode=0)
    for places in (0, 128, 129):
        _, o = run.prefill(with_filled(run.state, places), *prompt(run, made, [(1, 1, 9)]))
        assert np.isnan(o).any() == (places + 8 > 128), "keys that don't travel are seen"
    loops = [line for line in text.splitlines() if " while(" in line]
    assert loops and all("known_trip_count" in line for line in loops)
    sent = sum(c.bytes * c.times for c in collectives(text) if c.kind == "collective-permute")
    assert sent == LAYERS * ring.key_bytes(GROUPED, ROWS * 128, 4)


def prompt(run, tables, pieces):
    """What the prefill step takes beside the state."""
    batches, _ = split_batch(batch_of(pieces), run.n)
    return *run.take(tables, batches), stacked(batches)


def with_filled(state, places):
    """So many places of each row taken, on every device, by position 0."""
    at = np.full(state.positions.shape, -1, np.int32).reshape(ROWS, -1, 256)
    at[:, :, :places] = 0
    return dataclasses.replace(state, positions=jax.device_put(at.reshape(ROWS, -1), state.positions.sharding))


def test_room_is_counted_on_the_host():
    batches, _ = split_batch(batch_of([(1, 0, 60)]), 2)
    assert take_room(np.full((2, ROWS), 7), batches, 48).tolist() == [[7, 28, 7], [7, 32, 7]]
    with pytest.raises(ValueError, match="row 1: 32 tokens on device 1 and a run of 16 are more than its 47 positions"):
        take_room(np.full((2, ROWS), 40), batches, 47)  # other rows are full, and not written


def test_what_a_device_makes_room_for():
    state = init_split_kv(PLAIN.cached, 1, 2, 1000, 16, "bfloat16", 4)
    assert state.positions.shape == (2, local_places(1000, 16, 4)) == (2, 512) and state.k.shape == (1, 2, 4, 8, 512)
    assert init_split_kv(LATENT.cached, 1, 2, 1000, 16, "float32", 4).v is None
    assert set(state.logical_axes()) == {"k", "v", "positions"} and len(state.logical_axes()["v"]) == state.v.ndim


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="choose sequence = 1"):
        SplitKVState(jnp.zeros(1), None, jnp.zeros(1)).delta(None, None)
    with pytest.raises(ValueError, match="run = 1: a decode batch"):
        split_batch(make_batch([(0, 3, [1])], 1, 4), 2)
