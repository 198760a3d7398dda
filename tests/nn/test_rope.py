"""Rotary frequencies of every scaling against written-down numbers and transformers; tables; and turns against complex numbers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.nn.rope import apply_rope, inverse_frequencies, rope_tables
from jaxmoe.spec import RopeScaling, RopeSpec, SpecError

SHORT = tuple(1.0 + 0.1 * i for i in range(8))
LONG = tuple(2.0 + i for i in range(8))

YARN = RopeScaling("yarn", factor=32.0, original=4096, truncate=False)
LONGROPE = RopeScaling("longrope", original=4096, short=SHORT, long=LONG, magnitude=1.1, long_magnitude=1.3)
SCALINGS = {
    "default": None,
    "linear": RopeScaling("linear", factor=4.0),
    "llama3": RopeScaling("llama3", factor=8.0, original=8192, low=1.0, high=4.0),
    "yarn": YARN,
    "yarn_truncated": dataclasses.replace(YARN, factor=40.0, truncate=True),
    "longrope": LONGROPE,
    "longrope_extended": dataclasses.replace(LONGROPE, extended=True),
}

WRITTEN = {
    "default": [1.0, 0.31622776601683794, 0.1, 0.031622776601683794, 0.01, 0.0031622776601683794, 0.001, 0.00031622776601683794],
    "linear": [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.00079056947, 0.00025, 7.9056947e-05],
    "llama3": [1.0, 0.31622776, 0.1, 0.031622779, 0.01, 0.0031622777, 0.00021360758, 3.9528473e-05],
    "yarn": [1.0, 0.31622776, 0.1, 0.027735936, 0.0055527543, 0.00073827687, 3.1250001e-05, 9.8821183e-06],
    "yarn_truncated": [1.0, 0.31622776, 0.1, 0.023914725, 0.0051249997, 0.00084986218, 2.4999999e-05, 7.9056945e-06],
    "longrope": [1.0, 0.28747976, 0.083333336, 0.024325214, 0.0071428572, 0.0021081853, 0.000625, 0.00018601633],
    "longrope_extended": [0.5, 0.10540925, 0.025, 0.0063245557, 0.0016666667, 0.00045175396, 0.000125, 3.5136418e-05],
}
"""Of transformers' modeling_rope_utils.py, for 16 channels and base 10,000."""


@pytest.mark.parametrize("name", SCALINGS)
def test_written_down_numbers(name):
    inverse = inverse_frequencies(RopeSpec(width=16, scaling=SCALINGS[name]))
    assert inverse.dtype == np.float32
    np.testing.assert_allclose(inverse, WRITTEN[name], rtol=3e-7)


def test_only_the_first_pairs_turn():
    """With the exponents of the whole width; scaled or not."""
    for scaling in (None, SCALINGS["linear"]):
        some = inverse_frequencies(RopeSpec(width=16, pairs=5, scaling=scaling))
        np.testing.assert_array_equal(some[:5], inverse_frequencies(RopeSpec(width=16, scaling=scaling))[:5])
        assert (some[5:] == 0).all() and some.shape == (8,)
    spec = RopeSpec(width=16, pairs=5)
    x = np.random.default_rng(0).normal(size=(3, 2, 16)).astype(np.float32)
    turned = np.asarray(apply_rope(spec, rope_tables(spec, jnp.array([1, 7, 9000]), jnp.float32), jnp.asarray(x)))
    for half in (0, 8):
        np.testing.assert_array_equal(turned[..., half + 5 : half + 8], x[..., half + 5 : half + 8])
        assert (turned[..., half : half + 5] != x[..., half : half + 5]).any(-1).all()


def test_yarn_s_ends():
    """Fast pairs are those of the base, slow ones are divided by the factor; where the blend has no width, it is a step."""
    spec = RopeSpec(theta=1e6, width=64, scaling=dataclasses.replace(YARN, original=8192))
    plain, scaled = inverse_frequencies(dataclasses.replace(spec, scaling=None)), inverse_frequencies(spec)
    np.testing.assert_array_equal(scaled[:5], plain[:5])
    np.testing.assert_allclose(scaled[-6:] * 32, plain[-6:], rtol=3e-7)
    assert ((scaled <= plain) & (scaled * 33 >= plain)).all()
    step = inverse_frequencies(RopeSpec(width=16, scaling=dataclasses.replace(YARN, low=2.0, high=2.0)))
    assert np.isin(np.round(WRITTEN["default"] / step).astype(int), [1, 32]).all()


@pytest.mark.parametrize(("name", "magnitude"), [("default", 1.0), ("yarn", 1.25), ("longrope", 1.1), ("longrope_extended", 1.3)])
def test_tables(name, magnitude):
    """float32 until the cast: in bfloat16 they are those of float32, rounded once."""
    scaling = SCALINGS[name]
    if name == "yarn":
        scaling = dataclasses.replace(YARN, magnitude=1.25)
    spec = RopeSpec(width=16, scaling=scaling)
    positions = np.array([0, 1, 2, 17, 4095, 131071], np.int32)
    angles = (positions[:, None].astype(np.float32) * inverse_frequencies(spec)).astype(np.float64)
    tables = jax.jit(lambda p: rope_tables(spec, p, jnp.float32))(positions)
    for table, f in zip(tables, (np.cos, np.sin), strict=True):
        assert table.shape == (6, 8) and table.dtype == jnp.float32
        np.testing.assert_allclose(table, f(angles) * magnitude, atol=5e-7)
    narrow = jax.jit(lambda p: rope_tables(spec, p, jnp.bfloat16), compiler_options={"xla_allow_excess_precision": False})(positions)
    for table, wide in zip(narrow, tables, strict=True):
        np.testing.assert_array_equal(table, wide.astype(jnp.bfloat16))


def turned_by_complex(spec, positions, x):
    """The definition, in float64: pairs are complex numbers, and a turn is a product."""
    half = spec.width // 2
    out = x.astype(np.float64).copy()
    pairs = [(i, half + i) if spec.style == "half" else (2 * i, 2 * i + 1) for i in range(half)]
    for (a, b), w in zip(pairs, inverse_frequencies(spec), strict=True):
        z = (x[..., a] + 1j * x[..., b]) * np.exp(1j * np.float64(w) * positions)[:, None]
        out[..., a], out[..., b] = z.real, z.imag
    return out


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("width", [2, 6, 14])
def test_turns(style, width):
    """Of 14 channels the first `width` turn, in either style; in bfloat16 too."""
    spec = RopeSpec(width=width, style=style)
    rng = np.random.default_rng(0)
    positions, x = np.arange(0, 55, 11), rng.normal(size=(5, 3, 14)).astype(np.float32)
    expected = turned_by_complex(spec, positions, x)
    got = apply_rope(spec, rope_tables(spec, jnp.asarray(positions), jnp.float32), jnp.asarray(x))
    np.testing.assert_allclose(got, expected, atol=2e-5)
    np.testing.assert_array_equal(got[..., width:], x[..., width:])
    narrow = apply_rope(spec, rope_tables(spec, jnp.asarray(positions), jnp.bfloat16), jnp.asarray(x, jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), expected, atol=0.06)


def test_tables_in_float32_turn_in_float32():
    """Activations in bfloat16 are rounded once, at the end."""
    spec, positions = RopeSpec(width=8), jnp.arange(5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3, 8)), jnp.bfloat16)
    tables = rope_tables(spec, positions, jnp.float32)
    got = apply_rope(spec, tables, x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, apply_rope(spec, tables, x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_scores_depend_on_distance_only():
    for scaling in SCALINGS.values():
        spec = RopeSpec(width=16, scaling=scaling)
        q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 16)).astype(np.float32)

        def score(a, b, spec=spec, q=q, k=k):
            turned = [apply_rope(spec, rope_tables(spec, jnp.array([p]), jnp.float32), jnp.asarray(v)) for p, v in ((a, q), (b, k))]
            return float((turned[0] * turned[1]).sum())

        np.testing.assert_allclose(score(9, 2), score(107, 100), atol=3e-4)


def test_refused():
    with pytest.raises(SpecError, match=r"RopeScaling\.long has 8 factors for 16 frequencies"):
        inverse_frequencies(RopeSpec(width=32, scaling=SCALINGS["longrope_extended"]))
    with pytest.raises(SpecError, match=r"RopeScaling\.kind 'dynamic'"):
        inverse_frequencies(RopeSpec(width=8, scaling=RopeScaling("dynamic")))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def live():
    """Frequencies and magnitude as transformers computes them: (type, base, width, its parameters, length) -> (array, number)."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    utils = pytest.importorskip("transformers.modeling_rope_utils")

    def compute(kind, theta, width, parameters, length=None):
        config = transformers.LlamaConfig(
            head_dim=width,
            hidden_size=width,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=131072,
            rope_parameters={"rope_type": kind, "rope_theta": theta, **parameters},
        )
        if kind == "default":
            from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

            inverse, magnitude = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
        else:
            inverse, magnitude = utils.ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
        return inverse.numpy(), magnitude

    return compute


def ulps(a, b):
    return int(np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32)).max())


@pytest.mark.parametrize("theta", [1e4, 1.5e5, 1e7])
@pytest.mark.parametrize("width", [2, 20, 64, 256])
def test_equals_transformers(live, theta, width):
    """To the rounding of a power, and of what is computed from it."""
    half = width // 2
    factors = {"short_factor": [1 + 0.013 * i for i in range(half)], "long_factor": [1 + 1.7 * i for i in range(half)]}
    longrope = RopeScaling("longrope", original=4096, short=tuple(factors["short_factor"]), long=tuple(factors["long_factor"]))
    past = {"original_max_position_embeddings": 4096}
    yarn = {"factor": 32.0, "truncate": False} | past
    other_yarn = {"factor": 7.3, "beta_slow": 1.5, "beta_fast": 20.0} | past
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    quarter = {"partial_rotary_factor": 0.25}
    cases = [
        (("default", {}, None), RopeSpec()),
        (("proportional", quarter, None), RopeSpec(pairs=width // 8)),
        (("linear", {"factor": 3.0}, None), RopeSpec(scaling=RopeScaling("linear", factor=3.0))),
        (("llama3", llama3, None), RopeSpec(scaling=SCALINGS["llama3"])),
        (("yarn", yarn, None), RopeSpec(scaling=YARN)),
        (("yarn", other_yarn, None), RopeSpec(scaling=RopeScaling("yarn", factor=7.3, original=4096, low=1.5, high=20.0))),
        (("longrope", factors | past, None), RopeSpec(scaling=longrope)),
        (("longrope", factors | past, 4097), RopeSpec(scaling=dataclasses.replace(longrope, extended=True))),
    ]
    for (kind, parameters, length), spec in cases:
        got = inverse_frequencies(dataclasses.replace(spec, theta=theta, width=width))
        expected, _ = live(kind, theta, width, parameters, length)
        assert ulps(got, expected) <= 2, (kind, parameters)


def test_magnitudes_of_transformers_are_of_the_spec_s_reader(live):
    """What a reader has to write into `magnitude`: yarn's 0.1 ln(factor) + 1, longrope's sqrt(1 + ln(factor) / ln(original))."""
    yarn = {"factor": 32.0, "original_max_position_embeddings": 4096}
    assert live("yarn", 1e4, 16, yarn)[1] == pytest.approx(0.1 * math.log(32) + 1)
    longrope = {"short_factor": SHORT, "long_factor": LONG, "factor": 32.0, "original_max_position_embeddings": 4096}
    assert live("longrope", 1e4, 16, longrope)[1] == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


def test_cosines_are_computed_once_whatever_uses_them():
    """Otherwise every layer computes its own, for each head."""
    spec = RopeSpec(width=16)

    def turned(positions, q, k):
        for _ in range(3):
            q, k = (jnp.sin(apply_rope(spec, rope_tables(spec, positions, jnp.float32), x)) for x in (q, k))
        return q, k

    text = jax.jit(turned).lower(jnp.arange(8), jnp.ones((8, 4, 16)), jnp.ones((8, 2, 16))).compile().as_text()
    assert text.count(" cosine(") == 1
