"""The delta rule and its convolution: against a plain loop in float64, in chunks, and in the same bits however a prompt is cut into steps."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import formats
from jaxmoe.cache import recurrent
from jaxmoe.cache.batch import Batch, make_batch
from jaxmoe.cache.recurrent import RecurrentState, delta_full, init_recurrent
from jaxmoe.spec import DeltaSpec, Precision
from pallas_kernels.dispatch import Kernels
from tests.quick import OPTIONS

SPECS = {
    "grouped": DeltaSpec(k_heads=2, v_heads=6, k_dim=8, v_dim=12, conv=4),
    "odd": DeltaSpec(k_heads=3, v_heads=3, k_dim=5, v_dim=7, conv=3),
    "wide": DeltaSpec(k_heads=1, v_heads=2, k_dim=128, v_dim=128, conv=4),
    "plain": DeltaSpec(k_heads=1, v_heads=1, k_dim=4, v_dim=4, conv=1),
}
ROWS, LAYERS = 3, 2
CPU = Kernels("cpu")

Sequence = tuple[np.ndarray, ...]
"""q, k, v, log_decay and beta of every token."""

Step = tuple[list[tuple[int, int, int]], int, int]
"""Pieces (cache row, first position, end), tokens in a run, and the bucket."""


def random_sequence(spec: DeltaSpec, tokens: int, seed: int) -> Sequence:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((tokens, *s)) for s in ((spec.k_heads, spec.k_dim), (spec.k_heads, spec.k_dim), (spec.v_heads, spec.v_dim)))
    log_decay = -np.exp(rng.uniform(-6, 2, (tokens, spec.v_heads)))
    beta = 1 / (1 + np.exp(-rng.standard_normal((tokens, spec.v_heads))))
    return tuple(x.astype(np.float32) for x in (q, k, v, log_decay, beta))


def random_kernels(spec: DeltaSpec) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(5)
    sizes = ((spec.k_heads, spec.k_dim), (spec.k_heads, spec.k_dim), (spec.v_heads, spec.v_dim))
    return tuple(rng.standard_normal((*s, spec.conv)).astype(np.float32) * 0.6 for s in sizes)


def by_hand(spec: DeltaSpec, sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [S, Vh, dv] and the last memory [Vh, dk, dv] in float64, as the paper's recurrence says them."""
    q, k, v, log_decay, beta = (x.astype(np.float64) for x in sequence)
    group = spec.v_heads // spec.k_heads

    def convolved(x, w):
        padded = np.concatenate([np.zeros((spec.conv - 1, *x.shape[1:])), x])
        y = sum(padded[i : i + len(x)] * w[..., i].astype(np.float64) for i in range(spec.conv))
        return y / (1 + np.exp(-y))

    q, k, v = (convolved(x, w) for x, w in zip((q, k, v), random_kernels(spec), strict=True))
    q, k = (np.repeat(x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6), group, 1) for x in (q, k))
    memory, out = np.zeros((spec.v_heads, spec.k_dim, spec.v_dim)), []
    for t in range(len(q)):
        for h in range(spec.v_heads):
            key, old, rate = k[t, h], np.exp(log_decay[t, h]) * memory[h], beta[t, h]
            memory[h] = old - rate * np.outer(key, key @ old) + rate * np.outer(key, v[t, h])
        out.append(np.einsum("hcd,hc->hd", memory, q[t]) * spec.k_dim**-0.5)
    return np.stack(out), memory


@functools.cache
def program(spec: DeltaSpec, chunked: bool = False) -> Callable:
    """The step as the product compiles it; in chunks, which are held to tolerances only, in less time."""

    def step(state, layer, sequence, conv, batch):
        if not chunked:
            return state.delta(spec, layer, *sequence, conv, batch, CPU)
        x, taps = recurrent.joined(*sequence[:3]), recurrent._taps(conv, sequence[0].dtype)
        return recurrent.chunked(state, spec, layer, x, *sequence[3:], taps, batch)

    return jax.jit(step, donate_argnums=0, compiler_options=CPU.compiler_options() | (OPTIONS if chunked else {}))


def noise(state: RecurrentState) -> RecurrentState:
    """The state as if every row had been used before."""
    rng = np.random.default_rng(9)
    return jax.tree.map(lambda x: jnp.asarray((rng.standard_normal(x.shape) * 9).astype(x.dtype)), state)


def used(spec: DeltaSpec, rows: int = ROWS, dtype: str = "float32") -> RecurrentState:
    return noise(init_recurrent(spec, LAYERS, rows, Precision(compute=dtype)))


def packed(sequences: list[Sequence], step: Step) -> tuple[list[np.ndarray], Batch]:
    """The batch of a step, and its tokens' numbers, with ones in padding."""
    pieces, run, bucket = step
    batch = make_batch([(row, a, [0] * (b - a)) for row, a, b in pieces], run, bucket, [0])
    arrays = [np.ones((bucket, *x.shape[1:]), np.float32) for x in sequences[0]]
    for t in np.flatnonzero(batch.segments >= 0):
        for array, x in zip(arrays, sequences[batch.segments[t]], strict=True):
            array[t] = x[batch.positions[t]]
    return arrays, batch


def run_steps(spec: DeltaSpec, sequences: list[Sequence], steps: list[Step], state=None, layer: int = 1, chunked: bool = False, dtype=np.float32):
    """Every sequence's outputs [S, Vh, dv], and the state after the steps; sequence i is in cache row i."""
    state = used(spec, max(len(sequences), ROWS), np.dtype(dtype).name) if state is None else state
    out = [np.full((len(s[0]), spec.v_heads, spec.v_dim), np.nan, np.float32) for s in sequences]
    for step in steps:
        (q, k, v, log_decay, beta), batch = packed(sequences, step)
        inputs = (*(x.astype(dtype) for x in (q, k, v)), log_decay, beta)
        o, state = program(spec, chunked)(state, layer, inputs, random_kernels(spec), batch)
        o = np.asarray(o)
        assert (o[batch.segments < 0] == 0).all()
        for t in np.flatnonzero(batch.segments >= 0):
            out[batch.segments[t]][batch.positions[t]] = o[t]
    return out, state


def in_steps(sequences: list[Sequence], size: int, run: int, bucket: int) -> list[Step]:
    """Each sequence in pieces of `size`, one sequence after another."""
    return [([(i, a, min(a + size, len(s[0])))], run, bucket) for i, s in enumerate(sequences) for a in range(0, len(s[0]), size)]


def bits(x) -> np.ndarray:
    return np.asarray(x).view(np.uint32 if x.dtype.itemsize == 4 else np.uint16)


def assert_same_bits(got, expected) -> None:
    (outs, state), (outs_expected, state_expected) = got, expected
    for a, b in zip(outs, outs_expected, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(state_expected), strict=True):
        np.testing.assert_array_equal(bits(a)[1, : len(outs)], bits(b)[1, : len(outs)])


@pytest.mark.parametrize("name, chunked", [(name, chunked) for name in SPECS for chunked in (False, True) if name != "odd" or not chunked])
def test_float64_loop(name, chunked):
    spec = SPECS[name]
    sequences = [random_sequence(spec, n, seed) for seed, n in enumerate((45, 1, 20))]
    out, state = run_steps(spec, sequences, [([(i, 0, len(s[0])) for i, s in enumerate(sequences)], 16, 96)], chunked=chunked)
    for i, sequence in enumerate(sequences):
        o, memory = by_hand(spec, sequence)
        np.testing.assert_allclose(out[i], o, rtol=0, atol=3e-6 * np.abs(o).max())
        np.testing.assert_allclose(state.memory[1, i], memory, rtol=0, atol=3e-6 * np.abs(memory).max())
        q, k, v = (x[max(len(x) - spec.conv + 1, 0) :].reshape(-1, np.prod(x.shape[1:])) for x in sequence[:3])
        last = np.concatenate([q, k, v], 1)[: spec.conv - 1]
        kept = np.asarray(state.conv[1, i])
        np.testing.assert_array_equal(kept[len(kept) - len(last) :], last)
        assert (kept[: len(kept) - len(last)] == 0).all(), "what the row held before is gone"


@functools.cache
def from_the_loop(name: str):
    """Two sequences and what they give in runs of 64."""
    sequences = [random_sequence(SPECS[name], n, seed) for seed, n in enumerate((150, 5))]
    return sequences, *run_steps(SPECS[name], sequences, in_steps(sequences, 192, 64, 192))


@pytest.mark.parametrize("run, bucket", [(1, 4), (2, 32), (64, 192), (100, 100)])
def test_chunks_are_the_loop(run, bucket):
    sequences, expected, state_expected = from_the_loop("grouped")
    out, state = run_steps(SPECS["grouped"], sequences, in_steps(sequences, bucket, run, bucket), chunked=True)
    for a, b in zip(out, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    np.testing.assert_allclose(state.memory, state_expected.memory, rtol=0, atol=1e-5 * np.abs(state_expected.memory).max())
    np.testing.assert_array_equal(state.conv, state_expected.conv)


def test_chunks_with_equal_keys():
    """Every token overwrites the one before it: the worst case for a triangular system."""
    spec = SPECS["grouped"]
    q, k, v, log_decay, beta = random_sequence(spec, 128, 3)
    sequence = (q, np.ones_like(k), v, np.full_like(log_decay, -1e-4), np.full_like(beta, 0.999))
    (out, _), (expected, _) = (run_steps(spec, [sequence], in_steps([sequence], 192, 64, 192), chunked=chunked) for chunked in (True, False))
    np.testing.assert_allclose(out[0], expected[0], rtol=0, atol=1e-4 * np.abs(expected[0]).max())


CUTS = {
    "runs of a step": lambda s: in_steps(s, 128, 32, 128),
    "one run a step": lambda s: in_steps(s, 32, 32, 32),
    "short pieces": lambda s: in_steps(s, 7, 32, 32),
    "token by token": lambda s: in_steps(s, 1, 1, 1),
    "token by token, in a bucket": lambda s: in_steps(s, 1, 1, 8),
    "runs of one token": lambda s: in_steps(s, 8, 1, 8),
}


@pytest.mark.parametrize("name, dtype", [("odd", "float32"), ("wide", "bfloat16")])
def test_bits_of_cuts(name, dtype):
    spec = SPECS[name]
    sequences = [random_sequence(spec, n, seed) for seed, n in enumerate((75, 3))]
    how = {"dtype": formats.compute_dtype(dtype)}
    expected = run_steps(spec, sequences, in_steps(sequences, 512, 64, 512), **how)
    for cut in CUTS.values():
        assert_same_bits(run_steps(spec, sequences, cut(sequences), **how), expected)


def test_bits_among_other_rows():
    """Prompts side by side in one step, then decoding together, then rows that drop out."""
    spec = SPECS["grouped"]
    lengths, prompt = (40, 70, 5), (33, 64, 1)
    sequences = [random_sequence(spec, n, seed) for seed, n in enumerate(lengths)]
    expected = run_steps(spec, sequences, in_steps(sequences, 160, 32, 160))
    steps: list[Step] = [([(i, 0, n) for i, n in enumerate(prompt)], 32, 160)]
    for t in range(max(lengths)):
        piece = [(i, p + t, p + t + 1) for i, (p, n) in enumerate(zip(prompt, lengths, strict=True)) if p + t < n]
        steps += [(piece[:: -1 if t % 2 else 1], 1, 4)] if piece else []
    assert_same_bits(run_steps(spec, sequences, steps, used(spec, 8)), expected)


@pytest.mark.parametrize("chunked", [False, True])
def test_rows_that_are_not_live(chunked):
    """A decode batch with a stopped row, at position 0 even, and one after the last run: neither moves."""
    spec = SPECS["grouped"]
    sequences = [random_sequence(spec, 4, seed) for seed in range(ROWS)]
    arrays, batch = packed(sequences, ([(0, 0, 1), (1, 0, 1), (2, 0, 1)], 1, 4))
    for segments, n_runs in (((-1, 1, -1, -1), 2), ((-1, 1, 2, -1), 2), ((-1, -1, -1, -1), 0)):
        before = used(spec)
        dead = dataclasses.replace(batch, segments=np.asarray(segments, np.int32), run_lengths=np.ones(4, np.int32), n_runs=np.int32(n_runs))
        o, after = program(spec, chunked)(used(spec), 1, tuple(arrays), random_kernels(spec), dead)
        alive = [row for row in (1,) if n_runs]
        assert [bool(np.any(np.asarray(o[t]))) for t in range(4)] == [t in alive for t in range(4)]
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
            np.testing.assert_array_equal(bits(a)[0], bits(b)[0])
            assert [bool((bits(a)[1, r] != bits(b)[1, r]).any()) for r in range(ROWS)] == [r in alive for r in range(ROWS)]


@pytest.mark.parametrize(
    "run, bucket, dtype, unrolled", [(1, 1, "bfloat16", True), (1, 4, "float32", False), (32, 32, "float32", True), (32, 64, "bfloat16", False)]
)
def test_in_place(run, bucket, dtype, unrolled):
    """No step copies the state, inside a loop over layers that carries it or layer after layer."""
    spec, layers, rows = DeltaSpec(k_heads=4, v_heads=4, k_dim=32, v_dim=32, conv=4), 4, 512
    sequence = random_sequence(spec, bucket, 0)
    batch = make_batch([(0, 0, [0] * bucket)], run, bucket)

    def step(state, sequence, conv, batch):
        def layer(carry, i):
            state, q = carry
            o, state = state.delta(spec, i, q, *sequence[1:], conv, batch, CPU)
            return (state, q + o.astype(q.dtype)), None

        if unrolled:
            return functools.reduce(lambda carry, i: layer(carry, i)[0], range(layers), (state, sequence[0]))
        return jax.lax.scan(layer, (state, sequence[0]), jnp.arange(layers))[0]

    state = jax.eval_shape(lambda: init_recurrent(spec, layers, rows, Precision(compute=dtype)))
    given = [jnp.asarray(x, formats.compute_dtype(dtype)) for x in sequence[:3]] + list(sequence[3:])
    stats = jax.jit(step, donate_argnums=0).lower(state, given, random_kernels(spec), batch).compile().memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert stats.alias_size_in_bytes >= size
    assert stats.temp_size_in_bytes < size / 20, f"{stats.temp_size_in_bytes / size:.1%} of the state"


def test_whole_sequences():
    """Outputs are those of the steps, and gradients the slope of the loss."""
    sequences, expected, _ = from_the_loop("grouped")
    spec, length = SPECS["grouped"], 70
    longer = random_sequence(spec, length, 7)
    stacked = [jnp.concatenate([x[:length], y]) for x, y in zip(sequences[0], longer, strict=True)]
    conv = tuple(map(jnp.asarray, random_kernels(spec)))

    @functools.partial(jax.jit, compiler_options=OPTIONS)
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(stacked, conv):
        o = delta_full(spec, 2, *stacked, conv)
        return jnp.sin(o).sum(), o

    (_, o), grads = loss(stacked, conv)
    np.testing.assert_allclose(o[:length], expected[0][:length], rtol=0, atol=1e-6 * np.abs(expected[0]).max())
    by_loop, _ = by_hand(spec, longer)
    np.testing.assert_allclose(o[length:], by_loop, rtol=0, atol=3e-6 * np.abs(by_loop).max())
    rng = np.random.default_rng(1)
    way = jax.tree.map(lambda g: jnp.asarray(np.sign(g) * rng.random(g.shape, np.float32)), grads)
    before, after = (float(loss(*jax.tree.map(lambda x, d, h=h: x + h * d, (stacked, conv), way))[0][0]) for h in (-1e-3, 1e-3))
    slope = sum(float((a * b).sum()) for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(way), strict=True))
    np.testing.assert_allclose((after - before) / 2e-3, slope, rtol=1e-2)


def test_axes():
    state = jax.eval_shape(lambda: init_recurrent(SPECS["grouped"], 2, 3, Precision(compute="bfloat16")))
    assert {name: len(axes) for name, axes in state.logical_axes().items()} == {"conv": state.conv.ndim, "memory": state.memory.ndim}
    assert (state.conv.dtype, state.memory.dtype) == (np.uint16, np.float32)
