"""Keys and values in pages give the bits of contiguous rows: in pieces beside decoding sequences, by groups of layers, in whatever pages."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import formats
from jaxmoe.cache.layers import init_paged_layers
from jaxmoe.cache.paged import init_paged, quantized
from jaxmoe.engine.serving.batches import page_tables, places_of, prompt_batch
from jaxmoe.engine.serving.types import Piece, Row, ServeSpec
from jaxmoe.nn.transformer import forward, forward_group, head, layer_groups
from jaxmoe.routing.route import initial_state
from jaxmoe.spec import AttentionSpec
from pallas_kernels.dispatch import Kernels
from pallas_kernels.paged_attention.types import plain
from tests.families import goldens
from tests.more import mostly
from tests.quick import QuickKernels

CPU = Kernels("cpu")
CASES = ("deepseek_v2_greedy", "gpt_oss_plain", "qwen3_next_named")
"""Latents without values, sinks and windows, a delta rule."""

SPEC = ServeSpec(slots=2, page=16, pages=40, positions=256, batch=2, chunk=128, wave=128, groups=2, run=16)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    goldens.forget_programs()
    run = goldens.make_run(request.param, Path(tmp_path_factory.mktemp(request.param)))
    model = run.load("float32", CPU, False)
    order = np.random.default_rng(0).permutation(SPEC.pages)
    tables = page_tables(SPEC, {0: order[:16].tolist(), 1: order[16:32].tolist()})
    return model, run.requests, goldens.together(model, run.ids), tables


def every_token(batch):
    """The batch with logits of all its tokens asked for."""
    return dataclasses.replace(batch, logit_rows=np.arange(len(batch.tokens), dtype=np.int32))


def take(out, batch, logits) -> None:
    for row, segment, position in zip(np.asarray(logits), batch.segments, batch.positions, strict=True):
        if segment >= 0:
            out[segment][position] = row


def test_pieces_beside_a_sequence_that_decodes(case):
    model, requests, expected, tables = case
    state = init_paged_layers(model.spec, 2, SPEC.pages, SPEC.page, CPU)
    whole = (model.spec, model.params, model.bank)
    step = jax.jit(lambda state, batch: forward(*whole, state, batch, CPU)[::2], compiler_options=CPU.compiler_options())
    got, ids, lengths = [np.full_like(e, np.nan) for e in expected], dict(enumerate(requests)), [len(r) for r in requests]
    at, first = [0, min(16, lengths[1])], Piece(1, 1, 0, min(16, lengths[1]), True)
    pieces, rows = [first], []
    while pieces or rows:
        batch = every_token(prompt_batch(SPEC, rows, pieces, places_of(SPEC, pieces)[0], SPEC.chunk, SPEC.batch, ids, tables))
        logits, state = step(state, batch)
        take(got, batch, logits)
        if first not in pieces:
            at = [at[0] + 32, at[1] + 1]
        rows = [Row(1, 1, at[1], 1)] if at[1] < lengths[1] else []
        pieces = [Piece(0, 0, at[0], min(32, lengths[0] - at[0]), False)] if at[0] < lengths[0] else []
    assert goldens.same_bits(got, expected)


WRITTEN = 3
"""Steps that are enough to write to pages in every way, and to read what was written."""


def attend(spec, kernels, state, batch, q, k, v, sinks):
    return state.attend(spec, jnp.int32(0), q, k, v, batch, kernels, sinks)


@pytest.mark.parametrize("case", mostly(CASES, CASES[:2]), indirect=True)  # the third one's attention is the second's without sinks and windows
@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [(QuickKernels("reference"), None), (QuickKernels("tpu", interpret=True), None), (QuickKernels("tpu", interpret=True), "int8")],
    ids=["scattered", "packed, piece by piece", "int8, scales of a page in a row"],
)
def test_pages_of_accelerators(case, kernels, dtype):
    """All tokens are written before any attends, by a scatter or one run after another; float32 there rounds otherwise than on a CPU."""
    model, _, _, tables = case
    ids, state = {0: [1] * 64, 1: [1] * 64}, init_paged_layers(model.spec, 2, SPEC.pages, SPEC.page, kernels, dtype)
    cpu = init_paged_layers(model.spec, 2, SPEC.pages, SPEC.page, CPU, dtype)
    attends = [layer.attention for layer in model.spec.layers if isinstance(layer.attention, AttentionSpec)]
    rng = np.random.default_rng(1)
    for spec in dict.fromkeys(attends):
        at = state.kinds.index(spec.cached)
        kv, key, value = spec.cached
        one, other = state.states[at], cpu.states[at]
        every = (kernels, QuickKernels("cpu"))
        ours, theirs = (jax.jit(functools.partial(attend, spec, by), compiler_options=by.compiler_options()) for by in every)
        for step in range(WRITTEN):
            pieces = [Piece(0, 0, 32 * step, 32, False)] if step < 2 else []
            rows = [Row(1, 1, step, 1)]
            batch = prompt_batch(SPEC, rows, pieces, places_of(SPEC, pieces)[0], 64, SPEC.batch, ids, tables)
            tokens = len(batch.tokens)
            q = rng.standard_normal((tokens, spec.heads, key), dtype=np.float32)
            k = rng.standard_normal((tokens, kv, key), dtype=np.float32)
            v = None if value is None else rng.standard_normal((tokens, kv, value), dtype=np.float32)
            sinks = rng.standard_normal(spec.heads, dtype=np.float32)
            got, one = ours(one, batch, q, k, v, sinks)
            want, other = theirs(other, batch, q, k, v, sinks)
            real = np.asarray(batch.segments) >= 0
            assert real.sum() == 1 + 32 * len(pieces)
            np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=2e-5)


@pytest.mark.parametrize("case", mostly(CASES, CASES[-1:]), indirect=True)
def test_groups_of_layers(case):
    model, requests, expected, tables = case
    pieces = [Piece(i, i, 0, len(ids), True) for i, ids in enumerate(requests)]
    batch = every_token(prompt_batch(SPEC, (), pieces, places_of(SPEC, pieces)[0], SPEC.chunk, 0, dict(enumerate(requests)), tables))

    def group(state, batch, x, router, first, last):
        x, _, state, router = forward_group(model.spec, model.params, model.bank, state, x, router, batch, CPU, first, last)
        return state, x, router, head(model.spec, model.params, x, batch, CPU)

    step, edges = jax.jit(group, compiler_options=CPU.compiler_options()), layer_groups(model.spec, 2)
    x = jnp.full((SPEC.chunk, model.spec.width), jnp.nan, formats.compute_dtype(model.spec.precision.compute))
    state, router = init_paged_layers(model.spec, 2, SPEC.pages, SPEC.page, CPU), initial_state(model.spec, x)
    for first, last in zip(edges, edges[1:], strict=False):
        state, x, router, logits = step(state, batch, x, router, np.int32(first), np.int32(last))
    got = [np.full_like(e, np.nan) for e in expected]
    take(got, batch, logits)
    assert goldens.same_bits(got, expected)


def test_a_batch_without_tables_and_a_run_that_no_page_holds_are_refused(case):
    model, requests, _, tables = case
    state = init_paged_layers(model.spec, 2, SPEC.pages, SPEC.page, CPU)
    batch = prompt_batch(SPEC, (), [Piece(0, 0, 0, 16, True)], (0,), 64, 0, dict(enumerate(requests)), tables)
    narrow = dataclasses.replace(batch, tables=tables[:, :9])
    bare, long = dataclasses.replace(batch, tables=None), dataclasses.replace(batch, run=32)
    for wrong, says in ((bare, "page tables"), (narrow, "9 pages of 16.*128"), (long, "runs of 32.*pages of 16")):
        with pytest.raises(ValueError, match=says):
            forward(model.spec, model.params, model.bank, state, wrong, CPU)


def test_pages_of_sizes_and_dtypes_that_there_are_not():
    with pytest.raises(ValueError, match="48"):
        init_paged((2, 8, 8), 1, 4, 48, "float32", CPU)
    with pytest.raises(ValueError, match="int4"):
        init_paged((2, 8, 8), 1, 4, 16, "int4", CPU)


def test_int8_keys_are_within_half_a_step_of_what_they_were():
    x = np.random.default_rng(0).standard_normal((5, 3, 64)).astype(np.float32) * np.array([1e-3, 1.0, 1e4])[:, None].astype(np.float32)
    x[2, 1] = 0
    held, scales = quantized(jnp.asarray(x))
    assert held.dtype == jnp.int8 and scales.shape == (5, 3)
    back = np.asarray(plain(held, scales))
    assert (np.abs(back - x) <= 0.501 * np.asarray(scales)[..., None]).all() and (back[2, 1] == 0).all()
