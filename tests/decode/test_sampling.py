"""Tests of jaxmoe.decode.sampling against a float64 reference in numpy, and of what its draws may depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxmoe.decode.sampling import (
    MAX_VOCAB,
    Purpose,
    SamplingParams,
    first_largest,
    gumbel_noise,
    process_logits,
    sample,
    sampling_params,
)
from tests.more import more
from tests.quick import OPTIONS

draw = jax.jit(sample, static_argnames=("purpose", "greedy_only"))
process = jax.jit(process_logits)
noise = jax.jit(gumbel_noise, static_argnums=(2, 3))

quick_draw = jax.jit(sample, static_argnames=("purpose", "greedy_only"), compiler_options=OPTIONS)
quick_process = jax.jit(process_logits, compiler_options=OPTIONS)
"""For laws and sets; bits are those of the product's own settings."""


def reference(logits: np.ndarray, temperature, top_k, top_p, min_p) -> np.ndarray:
    """Probabilities [V] of one row in float64, by sorting; ties with the last token kept are kept."""
    scaled = logits.astype(np.float64) / float(temperature)
    if top_k:
        scaled = np.where(scaled >= np.sort(scaled)[::-1][min(top_k, scaled.size) - 1], scaled, -np.inf)
    if top_p < 1:
        p = scipy.special.softmax(scaled)
        order = np.argsort(-p, kind="stable")
        last = int(np.searchsorted(np.cumsum(p[order]), float(top_p)))
        scaled = np.where(scaled >= scaled[order[min(last, p.size - 1)]], scaled, -np.inf)
    p = scipy.special.softmax(scaled)
    p = np.where(p >= float(min_p) * p.max(), p, 0)
    return p / p.sum()


def random_case(rows: int, vocab: int, seed: int = 0) -> tuple[np.ndarray, SamplingParams, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = (3 * rng.normal(size=(rows, vocab))).astype(np.float32)
    params = sampling_params(
        rows,
        temperature=rng.choice([0, 0.3, 1, 1.7], rows),
        top_k=rng.choice([0, 1, 5, vocab, 10 * vocab], rows),
        top_p=rng.choice([0, 0.2, 0.9, 0.999, 1], rows),
        min_p=rng.choice([0, 0.001, 0.3], rows),
        seed=rng.integers(0, 2**32, rows),
    )
    return logits, params, rng.integers(0, 10**6, rows).astype(np.int32)


def rows_of(params: SamplingParams, rows) -> SamplingParams:
    return jax.tree.map(lambda leaf: leaf[rows], params)


# --- Filters


@pytest.mark.parametrize("vocab", [1, 7, 100, 1003])
def test_filters_keep_what_the_reference_keeps(vocab):
    logits, params, _ = random_case(200, vocab)
    kept_logits = np.asarray(quick_process(logits, params))
    for row in range(200):
        temperature = params.temperature[row] or 1
        expected = reference(logits[row], temperature, params.top_k[row], params.top_p[row], params.min_p[row])
        np.testing.assert_array_equal(np.isfinite(kept_logits[row]), expected > 0)
        got = scipy.special.softmax(kept_logits[row].astype(np.float64))
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-12)


def test_filters_apply_in_order():
    """Each pair would keep another set in the other order, or on the distribution before the other filter."""
    p = np.array([0.4, 0.3, 0.2, 0.1])
    logits = np.log(p).astype(np.float32)[None]

    def kept(**settings):
        return int(np.isfinite(np.asarray(quick_process(logits, sampling_params(1, **settings)))).sum())

    assert (kept(top_p=0.8), kept(top_p=0.8, temperature=10.0)) == (3, 4)  # 0.4 + 0.3 + 0.2 flattens to 0.77
    assert (kept(top_p=0.75), kept(top_p=0.75, top_k=2)) == (3, 2)
    assert kept(top_k=2, top_p=0.5) == 1  # of all four, 0.5 would need both
    assert (kept(min_p=0.6), kept(min_p=0.6, temperature=0.5)) == (2, 1)


def test_ties_at_the_threshold_are_kept():
    logits = np.array([[1, 2, 1, 1, -0.0, 0.0]], np.float32)

    def kept(**settings):
        return np.flatnonzero(np.isfinite(np.asarray(quick_process(logits, sampling_params(1, **settings)))[0])).tolist()

    assert kept(top_k=2) == [0, 1, 2, 3]
    assert kept(top_p=0.5) == [0, 1, 2, 3]
    assert kept(top_k=5) == [0, 1, 2, 3, 4, 5]
    assert kept(min_p=1.0) == [1]
    assert quick_process(np.zeros((1, 9), np.float32), sampling_params(1, top_k=1, top_p=0.0, min_p=1.0)).tolist() == [
        [0] * 9
    ]


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 1}, {"top_p": 1e-6}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-30}, {"temperature": 0}],
)
def test_settings_that_leave_the_most_likely_token(settings):
    logits, _, position = random_case(50, 300)
    tokens = quick_draw(logits, sampling_params(50, **settings), position)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_off_settings_filter_nothing():
    """Also not what is far too unlikely to be drawn, and whose weight is 0 in float32."""
    logits = np.linspace(0, -500, 64, dtype=np.float32)[None]
    np.testing.assert_array_equal(quick_process(logits, sampling_params(1)), logits)


def test_top_p_counts_a_tail_of_many_unlikely_tokens():
    """Half of the weight in 2**18 tokens, each of them 2**-18 of the first: lost if their sum were not exact."""
    vocab = 2**18 + 1
    logits = np.full((2, vocab), -18 * np.log(2), np.float32)
    logits[:, 0] = 0
    logits[:, 1:1001] -= 1e-3  # a little less likely: the tail beyond a threshold between 0.5 and 1
    kept = np.isfinite(np.asarray(quick_process(logits, sampling_params(2, top_p=[0.499, 0.51])))).sum(-1)
    assert kept.tolist() == [1, vocab - 1000]


def test_forbidden_tokens_are_never_drawn():
    logits = np.full((500, 40), -np.inf, np.float32)
    logits[:, [3, 17]] = [-1e30, -1e30]
    tokens = np.asarray(quick_draw(logits, sampling_params(500, top_k=30, top_p=0.99), np.arange(500, dtype=np.int32)))
    assert set(tokens.tolist()) == {3, 17}


# --- Greedy


def test_greedy_takes_the_lowest_id_of_equals():
    logits = np.array([[0, 5, 5, 1], [7, 7, 7, 7], [-3, -3, -4, -3]], np.float32)
    params, position = sampling_params(3, temperature=0), np.arange(3, dtype=np.int32)
    assert quick_draw(logits, params, position).tolist() == [1, 0, 0]
    assert quick_draw(logits, params, position, greedy_only=True).tolist() == [1, 0, 0]


@pytest.mark.parametrize("vocab", [1, 3, 64, 100, 192])
def test_the_first_largest_is_argmax(vocab):
    x = np.random.default_rng(vocab).integers(-3, 3, (50, vocab)).astype(np.float32)
    x[:10] = -np.inf
    x[5:10, vocab // 2] = 0
    x[10:15] = 7
    x[15:17, -1] = np.inf
    x[17:20, vocab // 3] = np.nan  # means nothing, but has to be a token
    found = np.asarray(jax.jit(first_largest)(x))
    numbers = ~np.isnan(x).any(1)
    assert (found[numbers] == np.argmax(x[numbers], axis=1)).all() and ((found >= 0) & (found < vocab)).all()


def test_greedy_path_has_no_noise_and_no_loop():
    args = (jnp.zeros((2, 100)), sampling_params(2, temperature=0), jnp.zeros(2, jnp.int32))

    def program(greedy_only):
        return str(jax.make_jaxpr(lambda *a: sample(*a, greedy_only=greedy_only))(*args))

    for name in ("random_bits", "while", "scan", "log"):
        assert (name in program(False)) or name in ("while", "scan")
        assert name not in program(True)
    assert "scan" in program(False) and "while" not in program(False)  # a loop, of a known number of rounds
    assert " sort" not in program(False)


# --- Laws


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 6},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_tokens_follow_the_reference_law(settings):
    n = 20_000
    logits = (2 * np.random.default_rng(1).normal(size=16)).astype(np.float32)
    all_settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    p = reference(logits, **all_settings)
    for seed in range(2):
        rows = np.broadcast_to(logits, (n, 16))
        tokens = quick_draw(rows, sampling_params(n, seed=seed, **settings), np.arange(n, dtype=np.int32))
        counts = np.bincount(tokens, minlength=16)
        assert counts[p == 0].sum() == 0
        assert scipy.stats.chisquare(counts[p > 0], n * p[p > 0]).pvalue > 1e-3


def test_noise_is_gumbel_and_reaches_far():
    values = np.asarray(noise(np.zeros(100, np.uint32), np.arange(100, dtype=np.int32), Purpose.SAMPLE, 20_000)).ravel()
    assert np.isfinite(values).all()
    assert scipy.stats.kstest(values[:100_000], "gumbel_r").pvalue > 1e-3
    # 23-bit uniforms taken from the other side have some 800 values to choose the largest 200 from, and repeat them.
    assert len(np.unique(np.sort(values)[-200:])) >= 198


@pytest.mark.parametrize("changed", ["seed", "position", "purpose", "token"])
def test_noise_of_different_coordinates_is_independent(changed):
    seed, position = np.full(50, 7, np.uint32), np.arange(50, dtype=np.int32)
    base = np.asarray(noise(seed, position, Purpose.SAMPLE, 1001))
    other = {
        "seed": lambda: noise(seed + 1, position, Purpose.SAMPLE, 1001),
        "position": lambda: noise(seed, position + 50, Purpose.SAMPLE, 1001),
        "purpose": lambda: noise(seed, position, Purpose.DRAFT, 1001),
        "token": lambda: np.roll(base, 1, axis=-1),
    }[changed]()
    assert abs(scipy.stats.pearsonr(base.ravel(), np.asarray(other).ravel()).statistic) < 4 / np.sqrt(base.size)


def test_purposes_draw_differently():
    logits, params, position = random_case(200, 50)
    params = params.replace(temperature=np.full(200, 2, np.float32), top_k=np.zeros(200, np.int32))
    params = params.replace(top_p=np.ones(200, np.float32), min_p=np.zeros(200, np.float32))
    tokens = [np.asarray(quick_draw(logits, params, position, purpose=purpose)) for purpose in Purpose]
    for i in range(len(tokens)):
        for j in range(i):
            assert (tokens[i] != tokens[j]).mean() > 0.5
    assert [int(purpose) for purpose in Purpose] == [0, 1, 2, 3]  # part of the law: a change changes all tokens


# --- What a draw does not depend on


@pytest.mark.parametrize("vocab", [5, more(129), 1003])
def test_rows_are_bitwise_independent(vocab):
    """One row alone, 8 in other places beside other rows, and all 24: the same bits, before and after the noise."""
    logits, params, position = random_case(24, vocab)

    @jax.jit  # one program, for they have nearly all in common
    def all_three(logits, params, position):
        return sample(logits, params, position), process_logits(logits, params), gumbel_noise(params.seed, position, Purpose.SAMPLE, vocab)

    def bits(rows) -> list[np.ndarray]:
        return [np.asarray(x).view(np.uint32) for x in all_three(logits[rows], rows_of(params, rows), position[rows])]

    whole, rng = bits(np.arange(24)), np.random.default_rng(2)
    np.testing.assert_array_equal(np.asarray(draw(logits, params, position)).view(np.uint32), whole[0])
    for rows in [*np.arange(24)[:, None], *(rng.permutation(24)[:8] for _ in range(10))]:
        for got, expected in zip(bits(rows), whole, strict=True):
            np.testing.assert_array_equal(got, expected[rows])


def test_padded_vocabulary_changes_nothing():
    """Noise belongs to a token id, so forbidden ids beyond the vocabulary leave the draws alone."""
    logits, params, position = random_case(50, 100)
    params = params.replace(top_k=np.minimum(params.top_k, 50))
    padded = np.pad(logits, ((0, 0), (0, 28)), constant_values=-np.inf)
    np.testing.assert_array_equal(draw(padded, params, position), draw(logits, params, position))


@pytest.mark.parametrize(
    "setting",
    [
        ("jax_default_prng_impl", "rbg"),
        ("jax_threefry_partitionable", False),
        ("jax_random_seed_offset", 5),
        ("jax_enable_x64", True),
        ("jax_default_matmul_precision", "bfloat16"),
    ],
)
def test_configuration_of_jax_changes_no_token(setting):
    name, value = setting
    logits, params, position = random_case(64, 200)
    expected, before = np.asarray(draw(logits, params, position)), getattr(jax.config, name)
    assert before != value
    jax.config.update(name, value)
    try:
        tokens = jax.jit(lambda *args: sample(*args))(logits, params, position)
    finally:
        jax.config.update(name, before)
    np.testing.assert_array_equal(tokens, expected)
    assert tokens.dtype == np.int32


def test_tokens_stay_what_they_were():
    """The law of the draws is part of the interface: these were drawn when it was written."""
    logits, params, position = random_case(16, 1000, seed=5)
    params = params.replace(temperature=np.full(16, 1.5, np.float32), top_p=np.ones(16, np.float32))
    params = params.replace(top_k=np.zeros(16, np.int32), min_p=np.zeros(16, np.float32))
    drawn = [444, 698, 160, 782, 430, 377, 829, 344, 300, 288, 848, 37, 468, 328, 398, 337]
    assert draw(logits, params, position).tolist() == drawn


# --- Refusals


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": np.inf}, "temperature = inf"),
        ({"temperature": np.nan}, "temperature = nan"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_k": 1.5}, "top_k must be of integers"),
        ({"top_p": 1.01}, "top_p = 1.01"),
        ({"min_p": [0.0, 2.0, 0.0]}, "min_p = 2.0"),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"seed": [1, 2]}, r"seed has shape \(2,\); expected one number or 3"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sampling_params(3, **settings)


def test_logits_of_another_kind_are_refused():
    params, position = sampling_params(1), np.zeros(1, np.int32)
    with pytest.raises(TypeError, match="bfloat16"):
        sample(jnp.zeros((1, 8), jnp.bfloat16), params, position)
    with pytest.raises(ValueError, match=str(MAX_VOCAB + 1)):
        jax.eval_shape(sample, jax.ShapeDtypeStruct((1, MAX_VOCAB + 1), jnp.float32), params, position)
