"""Tests of jaxmoe.decode.adjust against a float64 reference in numpy, and of what a row's token may depend on. About 6 seconds."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.decode.adjust import Adjust, adjust_logits, draw, words
from jaxmoe.decode.grammar import GrammarCompiler
from jaxmoe.decode.penalties import RowEdits, build_adjust
from jaxmoe.decode.sampling import SamplingParams, sample, sampling_params
from tests.quick import OPTIONS

FILE = Path(__file__).resolve().parents[2] / "checkpoints/default/tokenizer.json"

adjusted = jax.jit(adjust_logits)
drawn = jax.jit(draw, static_argnames=("top", "greedy_only"))

quick_drawn = jax.jit(draw, static_argnames=("top", "greedy_only"), compiler_options=OPTIONS)
quick_sample = jax.jit(sample, static_argnames=("greedy_only",), compiler_options=OPTIONS)
"""For what is held within a tolerance, or held against the other; bits of rows are those of the product's own settings."""

ROWS, VOCAB = 50, 300
"""The shape of most cases: one program for all of them."""


def packed(members: np.ndarray) -> np.ndarray:
    """bool[R, V] as u32[R, words]."""
    padded = np.zeros((len(members), 32 * words(members.shape[1])), bool)
    padded[:, : members.shape[1]] = members
    return np.packbits(padded, axis=-1, bitorder="little").view("<u4").astype(np.uint32)


def neutral(rows: int, vocab: int) -> Adjust:
    return Adjust(
        bias=np.zeros((rows, vocab), np.float32),
        seen=np.zeros((rows, words(vocab)), np.uint32),
        repetition=np.ones(rows, np.float32),
        allowed=np.full((rows, words(vocab)), 2**32 - 1, np.uint32),
    )


def random_case(rows: int, vocab: int, seed: int = 0) -> tuple[np.ndarray, SamplingParams, np.ndarray]:
    rng = np.random.default_rng(seed)
    params = sampling_params(
        rows,
        temperature=rng.choice([0, 0.7, 1.5], rows),
        top_k=rng.choice([0, 5], rows),
        top_p=rng.choice([0.8, 1], rows),
        min_p=rng.choice([0, 0.05], rows),
        seed=rng.integers(0, 2**32, rows),
    )
    return (3 * rng.normal(size=(rows, vocab))).astype(np.float32), params, rng.integers(0, 10**6, rows).astype(np.int32)


def random_adjust(rows: int, vocab: int, seed: int = 0) -> tuple[Adjust, np.ndarray, np.ndarray]:
    """An Adjust, and its sets seen and allowed as bool[R, V]; each row allows a token."""
    rng = np.random.default_rng(seed)
    seen, allowed = rng.random((rows, vocab)) < 0.4, rng.random((rows, vocab)) < 0.7
    allowed[np.arange(rows), rng.integers(0, vocab, rows)] = True
    bias = np.where(rng.random((rows, vocab)) < 0.3, rng.uniform(-100, 100, (rows, vocab)), 0).astype(np.float32)
    repetition = rng.choice([0.5, 1, 1.3, 2.7], rows).astype(np.float32)
    return Adjust(bias=bias, seen=packed(seen), repetition=repetition, allowed=packed(allowed)), seen, allowed


def rows_of(tree, rows):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], tree)


def bits(x) -> np.ndarray:
    return np.asarray(x).view(np.uint32)


# --- Adjustments


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000])
def test_adjusted_logits_are_those_of_the_reference(vocab):
    logits = random_case(40, vocab)[0]
    adjust, seen, allowed = random_adjust(40, vocab)
    z, rate = logits.astype(np.float64), adjust.repetition.astype(np.float64)[:, None]
    z = np.where(seen, np.where(z > 0, z / rate, z * rate), z) + adjust.bias
    got = np.asarray(adjusted(logits, adjust))
    np.testing.assert_array_equal(np.isneginf(got), ~allowed)
    np.testing.assert_allclose(got[allowed], z[allowed], rtol=1e-6, atol=1e-5)


def test_what_no_adjustment_is_about_keeps_its_bits():
    """Rows of a neutral adjustment among others, and single tokens of the others; also values that arithmetic would change."""
    logits = random_case(30, 200)[0]
    logits[:, :6] = np.array([-0.0, 0.0, -np.inf, np.float32(1e-42), np.finfo(np.float32).max, -np.finfo(np.float32).max], np.float32)
    adjust, seen, allowed = random_adjust(30, 200)
    free = np.arange(30) % 3 == 0
    still = neutral(30, 200)
    mixed = jax.tree.map(lambda a, b: np.where(free.reshape((-1,) + (1,) * (a.ndim - 1)), a, b), still, adjust)
    got = bits(adjusted(logits, mixed))
    np.testing.assert_array_equal(got[free], bits(logits)[free])
    alone = ~free[:, None] & allowed & (adjust.bias == 0) & ~(seen & (adjust.repetition != 1)[:, None])
    assert alone.sum() > 100
    np.testing.assert_array_equal(got[alone], bits(logits)[alone])


def test_a_repetition_penalty_of_one_and_a_set_of_none_are_off():
    logits = random_case(4, 50)[0]
    everything = neutral(4, 50).replace(seen=np.full((4, 2), 2**32 - 1, np.uint32))
    nothing = neutral(4, 50).replace(repetition=np.full(4, 3, np.float32))
    np.testing.assert_array_equal(bits(adjusted(logits, everything)), bits(logits))
    np.testing.assert_array_equal(bits(adjusted(logits, nothing)), bits(logits))


def test_nothing_undoes_the_mask():
    logits = np.zeros((1, 40), np.float32)
    bias = np.full((1, 40), 100, np.float32)
    bias[0, 33] = -100
    adjust = neutral(1, 40).replace(bias=bias, allowed=np.array([[0, 2]], np.uint32))
    assert np.flatnonzero(np.isfinite(np.asarray(adjusted(logits, adjust))[0])).tolist() == [33]
    assert quick_drawn(logits, sampling_params(1, temperature=0), np.zeros(1, np.int32), adjust).tokens.tolist() == [33]


@pytest.mark.parametrize("rate", [1e-45, 1e-30, 1e30, 3e38])
def test_penalties_beyond_float32_leave_a_distribution(rate):
    logits = np.array([[5, 1e30, -5, -1e30, 0, -0.0, -np.inf]], np.float32)
    adjust = neutral(1, 7).replace(seen=np.array([[127]], np.uint32), repetition=np.array([rate], np.float32))
    got = np.asarray(adjusted(logits, adjust))[0]
    assert np.isfinite(got[:6]).all() and np.isneginf(got[6])
    assert (got[:2] >= 0).all() and (got[2:4] <= 0).all() and (got[4:6] == 0).all()
    assert (got[:2] > 0).all() if rate < 1 else (got[2:4] < 0).all()  # the others may round to 0
    assert 0 <= int(quick_drawn(logits, sampling_params(1), np.zeros(1, np.int32), adjust).tokens[0]) < 6


def test_shapes_that_do_not_belong_together_are_refused():
    logits = jnp.zeros((2, 40))
    for wrong in (neutral(3, 40), neutral(2, 41), neutral(2, 40).replace(seen=np.zeros((2, 3), np.uint32))):
        with pytest.raises(ValueError, match="bias, seen, repetition and allowed have shapes"):
            adjust_logits(logits, wrong)
    with pytest.raises(ValueError, match="top = -1"):
        draw(logits, sampling_params(2), np.zeros(2, np.int32), top=-1)


# --- Tokens


def test_a_neutral_adjustment_changes_no_token():
    case, still = random_case(ROWS, VOCAB), neutral(ROWS, VOCAB)
    expected = quick_sample(*case)
    np.testing.assert_array_equal(quick_drawn(*case, still).tokens, expected)
    np.testing.assert_array_equal(quick_drawn(*case, None, top=0).tokens, expected)
    greedy = quick_sample(*case, greedy_only=True)
    np.testing.assert_array_equal(quick_drawn(*case, still, greedy_only=True).tokens, greedy)
    np.testing.assert_array_equal(greedy, case[0].argmax(-1))


def test_tokens_are_drawn_from_adjusted_logits():
    allowed_of_all = []
    for seed in range(4):
        logits, params, position = random_case(ROWS, VOCAB, seed)
        adjust, _, allowed = random_adjust(ROWS, VOCAB, seed)
        tokens = np.asarray(quick_drawn(logits, params, position, adjust).tokens)
        np.testing.assert_array_equal(tokens, quick_sample(np.asarray(adjusted(logits, adjust)), params, position))
        allowed_of_all.append(allowed[np.arange(ROWS), tokens])
    assert np.concatenate(allowed_of_all).all()


def test_rows_under_grammars_beside_free_ones():
    """Rows that a grammar holds to its texts, with penalties and without; the free rows draw as if they were alone. The vocabulary is padded."""
    vocab, rng = 4107, np.random.default_rng(0)
    tokenizer = tokenizers.Tokenizer.from_file(str(FILE))
    compiler = GrammarCompiler(FILE, vocab, [0])
    texts = ["yes, always", "no", "now and then"]
    matchers = [compiler.choice(texts).matcher(), None, compiler.choice(texts).matcher(), None]
    edits = [None, None, RowEdits(4096, frequency=2, repetition=1.5, min_new_tokens=9, eos_ids=[0], logit_bias={0: 50}), None]
    params, done, drawn_ids = sampling_params(5, temperature=[1, 1, 2, 0, 0], seed=np.arange(5)), [False] * 4, [[], [], [], []]
    for step in range(40):
        logits = (3 * rng.normal(size=(5, vocab))).astype(np.float32)
        logits[[0, 2], 4100] = 1e4
        position = np.full(5, step, np.int32)
        adjust = build_adjust(edits, [None if m is None else m.mask() for m in matchers], 5, vocab)
        tokens = np.asarray(quick_drawn(logits, params, position, adjust).tokens)
        np.testing.assert_array_equal(tokens[[1, 3, 4]], np.asarray(quick_sample(logits, params, position))[[1, 3, 4]])
        for row in (0, 2):
            assert matchers[row].consume(int(tokens[row]))
            if not done[row]:
                drawn_ids[row].append(int(tokens[row]))
                done[row] = tokens[row] == 0
        edits[2].push(int(tokens[2]))
        if done[0] and done[2]:
            break
    for row in (0, 2):
        assert drawn_ids[row][-1] == 0 and tokenizer.decode(drawn_ids[row][:-1]) in texts


@settings(deadline=None, max_examples=40, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), order=st.permutations(range(7)), kept=st.integers(1, 7))
def test_a_row_is_the_same_alone_and_in_any_batch(seed, order, kept):
    """Any rows beside it, in any place, adjusted or not: the same token and the same bits of its log probabilities."""
    rows, vocab = 7, 70
    case, adjust = random_case(rows, vocab, seed), random_adjust(rows, vocab, seed)[0]
    free = neutral(rows, vocab)
    adjust = jax.tree.map(lambda a, b: np.concatenate([a[:5], b[5:]]), adjust, free)
    whole = drawn(*case, adjust, top=4)
    others = random_case(rows, vocab, seed + 1)
    places = np.array(order[:kept])  # row i goes to place places[i]; the rest is filled with strangers

    def put(stranger, own):
        mixed = np.array(stranger)
        mixed[places] = np.asarray(own)[:kept]
        return mixed

    mixed = drawn(*jax.tree.map(put, others, case), jax.tree.map(put, random_adjust(rows, vocab, seed + 1)[0], adjust), top=4)
    alone = drawn(*rows_of(case, [0]), rows_of(adjust, [0]), top=4)
    for got, one, expected in zip(*(jax.tree.leaves(x) for x in (mixed, alone, whole)), strict=True):
        np.testing.assert_array_equal(bits(got)[places], bits(expected)[:kept])
        np.testing.assert_array_equal(bits(one)[0], bits(expected)[0])


# --- Log probabilities


def test_log_probabilities_are_those_of_the_model():
    logits, params, position = random_case(ROWS, VOCAB)
    adjust = random_adjust(ROWS, VOCAB)[0]
    got = quick_drawn(logits, params, position, adjust, top=20)
    expected = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    np.testing.assert_allclose(got.logprob, expected[np.arange(ROWS), np.asarray(got.tokens)], atol=3e-6)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :20]
    np.testing.assert_array_equal(got.top_ids, order)
    np.testing.assert_allclose(got.top_logprobs, np.take_along_axis(expected, order, axis=-1), atol=3e-6)
    assert got.top_ids.dtype == got.tokens.dtype == np.int32 and got.logprob.dtype == got.top_logprobs.dtype == np.float32


def test_of_equals_the_lowest_id_is_first():
    logits = np.array([[-0.0, 1, 0.0, 1, -0.0, -2], [7, 7, 7, 7, 7, 7]], np.float32)
    got = quick_drawn(logits, sampling_params(2, temperature=0), np.zeros(2, np.int32), top=5)
    assert got.top_ids.tolist() == [[1, 3, 0, 2, 4], [0, 1, 2, 3, 4]]
    assert got.tokens.tolist() == [1, 0]


def test_at_most_the_vocabulary_is_given():
    logits, params, position = random_case(3, 7)
    got = quick_drawn(logits, params, position, top=20)
    assert got.top_ids.shape == got.top_logprobs.shape == (3, 7)
    np.testing.assert_allclose(scipy.special.logsumexp(got.top_logprobs, axis=-1), 0, atol=1e-6)


def test_without_log_probabilities_nothing_is_computed_for_them():
    args = (jnp.zeros((2, 100)), sampling_params(2), jnp.zeros(2, jnp.int32), neutral(2, 100))

    def program(top):
        return str(jax.make_jaxpr(lambda *a: draw(*a, top=top))(*args))

    assert "top_k[" in program(20) and "top_k[" not in program(0) and " sort" not in program(0)
    got = quick_drawn(*args, top=0)
    assert got.logprob is None and got.top_ids is None and got.top_logprobs is None
