"""Attention round a ring of devices: against a float64 loop whoever holds which position, and its bytes against the formulas, as compiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxmoe.cache import merge, ring
from jaxmoe.cache.batch import make_batch
from jaxmoe.cache.deal import balance, pairs, split_batch, take_room, zigzag
from jaxmoe.cache.masks import seen
from jaxmoe.cache.merge import Partial
from jaxmoe.cache.split_kv import local_places
from jaxmoe.report.ring_bench import by_shift
from jaxmoe.spec import AttentionSpec
from jaxmoe.spec.types import LatentSpec, RopeSpec
from tests.quick import OPTIONS

ONE = AttentionSpec(heads=4, kv_heads=4, head_dim=8)  # g = 1
EIGHT = AttentionSpec(heads=8, kv_heads=1, head_dim=8)  # g = 8
LATENT = AttentionSpec(heads=4, kv_heads=1, head_dim=20, latent=LatentSpec(16, None, 8, 8), rope=RopeSpec(width=4))


# --- Merging


def test_merging_is_associative_and_nothing_changes_nothing():
    rng = np.random.default_rng(0)
    a, b, c = (Partial(*(rng.normal(size=s).astype(np.float32) for s in ((5, 2, 3), (5, 2), (5, 2)))) for _ in range(3))

    @jax.jit
    def f(a, b, c):
        both, none = merge.merge_partials, merge.nothing((5, 2), 3)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), a, b, c)
        same = both(a, none), both(none, a), merge.unpacked(merge.packed(a))
        return both(both(a, b), c), both(a, both(b, c)), merge.merge_all(stacked), same, merge.finish(both(none, none))

    left, right, folded, same, empty = f(a, b, c)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), left, right)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), left, folded)
    for other in same:
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), other, a)
    assert (np.asarray(empty) == 0).all()


def test_parts_of_the_keys_and_a_sink_are_the_softmax_over_all():
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=s).astype(np.float32) for s in ((1, 4, 8), (1, 8, 12), (1, 12, 6)))
    visible, sinks = rng.random((4, 12)) < 0.6, np.array([0.3], np.float32)
    visible[2] = False

    @jax.jit
    def f(q, k, v, visible):
        parts = [merge.attend_block(q, k[..., a:b], v[:, a:b], visible[:, a:b], 0.5) for a, b in ((0, 5), (5, 6), (6, 12))]
        parts = [ring.by_token(part, 4) for part in parts]
        return merge.finish(functools.reduce(merge.merge_partials, [*parts, merge.of_sinks(sinks, parts[0])]))

    found = np.asarray(f(q, k, v, visible))[:, 0]
    e = np.exp((q[0] @ k[0]).astype(np.float64) * 0.5) * visible
    np.testing.assert_allclose(found, e @ v[0] / (e.sum(1, keepdims=True) + np.exp(0.3)), atol=1e-6)
    assert (found[2] == 0).all()


# --- The ring


def expected(spec, q, k, v, at_query, at_key, of_query, of_key, sinks):
    """In float64, all pairs at once."""
    group = spec.heads // k.shape[1]
    keys = np.repeat(k.astype(np.float64), group, 1)
    values = keys[..., : spec.latent.kv_rank] if v is None else np.repeat(v.astype(np.float64), group, 1)
    visible = np.asarray(seen(spec, at_query[:, None], at_key)) & (at_key >= 0) & (of_query[:, None] == of_key)
    e = np.exp(np.einsum("thc,shc->hts", q.astype(np.float64), keys) * spec.softmax_scale) * visible
    total = e.sum(-1) + (0 if sinks is None else np.exp(sinks.astype(np.float64))[:, None])
    return np.einsum("hts,shv->thv", e / np.where(total == 0, 1, total)[..., None], values)


def program(spec, n, way, sinks=None, segments=True):
    mesh, part = Mesh(np.array(jax.devices()[:n]), ("sequence",)), PartitionSpec("sequence")

    def f(q, k, v, at_query, at_key, of_query, of_key):
        of = (of_query, of_key) if segments else (None, None)
        return ring.ring_attention(q, k, v, at_query, at_key, spec, "sequence", *of, sinks, way)

    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=part, out_specs=part, check_vma=False), compiler_options=OPTIONS)


def inputs(spec, queries, keys, seed=0):
    """Two sequences whose positions lie anywhere, some keys that aren't there, and queries at some of the positions."""
    rng = np.random.default_rng(seed)
    kv_heads, c, value = spec.cached
    q, k = (rng.normal(size=s).astype(np.float32) for s in ((queries, spec.heads, c), (keys, kv_heads, c)))
    v = None if value is None else rng.normal(size=(keys, kv_heads, value)).astype(np.float32)
    at = np.concatenate([np.arange(keys // 2), np.arange(keys - keys // 2)]).astype(np.int32)
    of = (np.arange(keys) >= keys // 2).astype(np.int32)
    order, chosen = rng.permutation(keys), rng.choice(keys, queries, replace=False)
    at_key = np.where(rng.random(keys) < 0.1, -1, at[order]).astype(np.int32)
    return q, k, v, at[chosen], at_key, of[chosen], of[order]


CASES = {
    "g=8, keys travel": (EIGHT, 8, "ring"),
    "g=1, queries travel": (ONE, 8, "token"),
    "latent, queries travel": (LATENT, 4, "token"),
    "latent, keys travel": (LATENT, 2, "ring"),
    "window, results straight home": (dataclasses.replace(ONE, window=5), 4, "direct"),
    "chunk and sinks": (dataclasses.replace(EIGHT, chunk=7, sinks=True), 4, "token"),
    "window and sinks, keys travel": (dataclasses.replace(ONE, kv_heads=2, window=9, sinks=True), 2, "ring"),
    "one device": (ONE, 1, "token"),
}


@pytest.mark.parametrize(("spec", "n", "way"), CASES.values(), ids=CASES.keys())
def test_equal_to_attention_on_one_device(spec, n, way):
    sinks = np.linspace(-1, 2, spec.heads).astype(np.float32) if spec.sinks else None
    args = inputs(spec, 24, 48)
    found = program(spec, n, way, sinks)(*args)
    np.testing.assert_allclose(found, expected(spec, *args, sinks), rtol=0, atol=1e-5)


def test_bfloat16_keys_held_as_uint16():
    q, k, v, *rest = inputs(ONE, 8, 16)
    held = [jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.bfloat16), jnp.uint16) for x in (k, v)]
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (k, v)]
    np.testing.assert_allclose(program(ONE, 2, "ring")(q, *held, *rest), expected(ONE, q, *rounded, *rest, None), rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["ring", "token", "direct"])
@pytest.mark.parametrize("spec", [ONE, EIGHT, LATENT], ids=["g=1", "g=8", "latent"])
def test_bytes_are_those_of_the_formula_in_both_directions(spec, way):
    """And no other collective: what `choose` compares is all that is sent."""
    n, tokens, keys = 4, 4, 8
    args = inputs(spec, n * tokens, n * keys)
    sent = by_shift(program(spec, n, way, segments=False).lower(*args).compile().as_text(), n)
    sizes = ring.key_bytes(spec, keys, 4), ring.query_bytes(spec, tokens, 4, tokens), ring.result_bytes(spec, tokens)
    forward, backward = ring.traffic(way, n, *sizes)
    if way == "direct":
        assert sent == {1: forward + backward / 3, 2: backward / 3, 3: backward / 3}  # home from 1, 2 and 3 hops away
    else:
        assert sent == {1: forward, 3: backward} and forward == backward


def test_what_is_chosen():
    """By hand, for bfloat16 and 128 channels: a key takes 512 K + 4 bytes, a query 256 H + 4, a result 520 H."""
    for heads, kv_heads in ((16, 16), (32, 4)):
        spec = AttentionSpec(heads=heads, kv_heads=kv_heads, head_dim=128)
        sizes = ring.key_bytes(spec, 1, 2), ring.query_bytes(spec, 1, 2, 1), ring.result_bytes(spec, 1)
        assert sizes == (512 * kv_heads + 4, 256 * heads + 4, 520 * heads)
        assert ring.choose(8, *sizes) == "ring"
        even = (7 * sizes[1] + 8 * sizes[2]) / (7 * sizes[0])  # keys a query, where both send as much
        assert [ring.choose(8, int(sizes[0] * even * times), *sizes[1:]) for times in (0.99, 1.01)] == ["ring", "token"]
        assert 1.6 < even * kv_heads / heads < 1.7
    latent = AttentionSpec(heads=128, kv_heads=1, head_dim=576, latent=LatentSpec(512, 1536, 128, 128), rope=RopeSpec(width=64))
    assert ring.key_bytes(latent, 10, 2) == 10 * (576 * 2 + 4) and ring.result_bytes(latent, 1) == 128 * (512 + 2) * 4
    assert ring.traffic("ring", 1, 5, 5, 5) == ring.traffic("token", 1, 5, 5, 5) == (0, 0)


# --- Dealing


def test_zigzag_and_its_balance():
    assert zigzag(np.arange(10), 3).tolist() == [0, 1, 2, 2, 1, 0, 0, 1, 2, 2]
    spec, at = AttentionSpec(heads=1, kv_heads=1, head_dim=8), np.arange(64)
    for owner in (zigzag(at // 4, 4), at // 16, at % 4):
        for mask in (spec, dataclasses.replace(spec, window=7), dataclasses.replace(spec, chunk=10)):
            visible = np.asarray(seen(mask, at[:, None], at))
            want = [[visible[owner == d][:, owner == e].sum() for e in range(4)] for d in range(4)]
            assert (pairs(mask, owner, 4) == want).all()
    assert balance(pairs(spec, at // 16, 4)) == (904 / 520, 904 / 520)  # the last 16 positions see 904 of 4 * 520 pairs
    whole, by_hop = balance(pairs(spec, zigzag(at // 8, 4), 4))
    assert whole == 1 and by_hop < 1.1


def test_a_batch_is_dealt_out_whole():
    pieces = [(2, 16, list(range(100, 137))), (0, 0, list(range(9)))]
    batch = make_batch(pieces, 16, 64, n_logits=4)
    for n in (2, 3, 4, 8):
        batches, own = split_batch(batch, n)
        assert len({tuple(x.shape for x in jax.tree.leaves(b)) for b in batches}) == 1 and len(batches) == n
        assert sum(len(b.tokens) for b in batches) >= 64 and len(batches[0].tokens) <= -(-64 // n) + batches[0].run
        tokens = {(int(s), int(p)): int(t) for b in batches for s, p, t in zip(b.segments, b.positions, b.tokens, strict=True) if s >= 0}
        assert tokens == {(row, first + i): t for row, first, ids in pieces for i, t in enumerate(ids)}
        for b in batches:
            for r in range(len(b.run_lengths)):
                here = slice(r * b.run, r * b.run + b.run_lengths[r])
                assert (b.positions[here] == b.run_positions[r] + np.arange(b.run_lengths[r])).all() and (b.segments[here] == b.run_segments[r]).all()
            assert (b.run_lengths > 0).sum() == b.n_runs == (b.run_lengths[: b.n_runs] > 0).sum()
        assert own.sum(0).tolist() == [1] * 4
        for r, row in enumerate(batch.logit_rows):
            b = batches[int(np.argmax(own[:, r]))]
            assert (b.tokens[b.logit_rows[r]], b.positions[b.logit_rows[r]]) == (batch.tokens[row], batch.positions[row])
        held = take_room(np.full((n, 3), 5), batches, 64)
        assert held.sum(0).tolist() == [9, 5 * n, 5 * n + 37]


@pytest.mark.parametrize(("tokens", "run", "n"), [(512, 64, 8), (128, 32, 4), (32, 32, 2)])
def test_room_is_enough_for_a_queue_of_prompts(tokens, run, n):
    """Packed into steps as the engine does: as much of each as the step has room for."""
    rng, rows = np.random.default_rng(n), 12
    lengths = np.where(rng.random(rows) < 0.5, rng.integers(1, 100, rows), rng.integers(100, 1500, rows))
    at, held, longest = np.zeros(rows, int), np.zeros((n, rows), int), 0
    while (at < lengths).any():
        room, pieces = tokens // run, []
        for row in np.flatnonzero(at < lengths):
            taken = min(lengths[row] - at[row], room * run)
            pieces += [(int(row), int(at[row]), [1] * int(taken))] if taken else []
            room, at[row] = room - -(-taken // run), at[row] + taken
        batches, _ = split_batch(make_batch(pieces, run, tokens), n)
        longest = max(longest, batches[0].run)
        held = take_room(held, batches, local_places(int(lengths.max()), longest, n))
    assert (held.sum(0) == lengths).all() and (held - -(-lengths // n)).max() <= 3 * longest
