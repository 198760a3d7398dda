"""Attention of single tokens as one kernel: the bits of attention by run, for every mask, and in place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.cache import contiguous
from jaxmoe.cache.batch import Batch
from jaxmoe.cache.contiguous import init_kv, single_as_run
from jaxmoe.engine.steps import decode_batch
from jaxmoe.spec import AttentionSpec
from pallas_kernels.dispatch import Kernels

ROWS, HEADS, KV, C, LONG = 5, 4, 2, 32, 300
SPEC = AttentionSpec(HEADS, KV, C)
MASKS = {"all": {}, "window": {"window": 70}, "chunk": {"chunk": 96}, "sinks": {"sinks": True}}
POSITIONS = np.asarray([0, 127, 128, 131, 299])
"""The first position, both sides of a block's edge, and the last."""


def attended(spec: AttentionSpec, dtype: str, batch: Batch, layer: int = 1):
    """One token of each row after `LONG` random positions of two layers: outputs, keys and values."""
    rng = np.random.default_rng(5)
    state = init_kv(spec.cached, 2, ROWS, LONG, 1, dtype)
    filled = [rng.standard_normal(a.shape, dtype=np.float32) for a in (state.k, state.v)]
    state = dataclasses.replace(state, k=contiguous._held(jnp.asarray(filled[0]), state.k), v=contiguous._held(jnp.asarray(filled[1]), state.v))
    q, k, v = (rng.standard_normal((ROWS, h, C), dtype=np.float32) for h in (spec.heads, spec.kv_heads, spec.kv_heads))
    sinks = jnp.asarray(rng.standard_normal(spec.heads), jnp.float32) if spec.sinks else None
    step = jax.jit(lambda state, batch, q, k, v: state.attend(spec, jnp.int32(layer), q, k, v, batch, Kernels("cpu"), sinks))
    out, state = step(state, batch, q, k, v)
    return np.asarray(out), np.asarray(state.k), np.asarray(state.v)


def tokens(live: list[bool]) -> Batch:
    """A token of each row, some of them padding."""
    return decode_batch(jnp.asarray([3, 1, 4, 0, 2]), jnp.zeros(ROWS, jnp.int32), jnp.asarray(POSITIONS), jnp.asarray(live))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", MASKS)
def test_a_token_has_the_bits_of_attention_by_run(mask, dtype, monkeypatch):
    spec = dataclasses.replace(SPEC, **MASKS[mask])
    assert single_as_run(KV, HEADS // KV, C, C)
    batch = tokens([True] * ROWS)
    found = attended(spec, dtype, batch)
    monkeypatch.setattr(contiguous, "single_as_run", lambda *sizes: False)
    for mine, theirs in zip(found, attended(spec, dtype, batch), strict=True):
        assert (mine == theirs).all()


@pytest.mark.parametrize(("heads", "kv"), [(36, 1), (64, 2), (3, 3)])
def test_many_heads_share_a_key_and_none_does(heads, kv, monkeypatch):
    spec = dataclasses.replace(SPEC, heads=heads, kv_heads=kv)
    assert single_as_run(kv, heads // kv, C, C), "else both are by run"
    found = attended(spec, "float32", tokens([True] * ROWS))
    monkeypatch.setattr(contiguous, "single_as_run", lambda *sizes: False)
    for mine, theirs in zip(found, attended(spec, "float32", tokens([True] * ROWS)), strict=True):
        assert (mine == theirs).all()


def test_tokens_past_the_last_live_one_write_nothing():
    """Those before it do, to rows of their own."""
    out, keys, values = attended(SPEC, "float32", tokens([True, False, True, False, False]))
    before = attended(SPEC, "float32", tokens([False] * ROWS))
    assert (out[3:] == 0).all() and (out[:3] != 0).any()
    for row in (0, 2):  # of the last two
        assert (keys[:, row] == before[1][:, row]).all() and (values[:, row] == before[2][:, row]).all()
    assert (keys[1, 3, :, :, 0] != before[1][1, 3, :, :, 0]).all() and (values[1, 4, :, 128] != before[2][1, 4, :, 128]).all()
    assert (keys[0] == before[1][0]).all()


@pytest.mark.parametrize("width", [8, 16])
def test_narrow_heads_go_by_run(width):
    assert not single_as_run(KV, 2, width, width)
    assert not single_as_run(KV, 2, 512, 512)


def test_a_step_copies_no_cache():
    spec, batch = SPEC, tokens([True] * ROWS)
    state = init_kv((KV, C, C), 2, ROWS, LONG, 1, "float32")
    q, k, v = (jnp.ones((ROWS, h, C)) for h in (HEADS, KV, KV))

    def steps(state, q, k, v):
        def one(i, carry):
            q, state = carry
            for layer in (0, 1):
                q, state = state.attend(spec, jnp.int32(layer), q, k + q[:, :KV], v + q[:, :KV], batch, Kernels("cpu"))
            return q, state

        return jax.lax.fori_loop(0, 3, one, (q, state))

    step = jax.jit(steps, donate_argnums=0).lower(state, q, k, v).compile()
    assert "xla_cpu_small_call" in step.as_text(), "by run there is nothing to copy either"
    stats = step.memory_analysis()
    assert stats.temp_size_in_bytes < state.k.nbytes / 4
