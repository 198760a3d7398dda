"""Every family's router against a plain loop in float64, and what holds for all of them: permutations, padding, ties, rows of their own."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.formats import store_numpy
from jaxmoe.routing.route import check, route
from jaxmoe.spec import GroupLimit, RouterSpec, SpecError
from pallas_kernels.dispatch import Kernels
from tests.more import mostly
from tests.routing.families import CASES, FAMILY_ROUTERS, D, T, leaves, rows, run


def softmax(values):
    e = [math.exp(v - max(values)) if v > -math.inf else 0.0 for v in values]
    return [v / sum(e) for v in e]


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def best(values, count):
    """Indices of the largest, ties to the lowest."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def plain_logits(spec, params, x):
    """Stage 1 of one token."""
    p = {name: leaf.astype(np.float64) for name, leaf in params.items()}
    x = x.astype(np.float64)
    if spec.input_norm:
        x = x / math.sqrt((x * x).mean() + 1e-6) * p["input_scale"] / math.sqrt(len(x))
    logits = [float(x @ p["kernel"][:, e]) for e in range(spec.experts)]
    return [v + p["bias"][e] for e, v in enumerate(logits)] if spec.logits_bias else logits


def plain_sparsemixer(spec, logits):
    def near(top, left):
        return [-math.inf if (top - l) / max(abs(l), top) > 2 * spec.jitter else v for l, v in zip(logits, left, strict=True)]

    (first,) = best(logits, 1)
    without = [-math.inf if e == first else v for e, v in enumerate(logits)]
    (second,) = best(without, 1)
    weights = [softmax(near(logits[first], logits))[first], softmax(near(logits[second], without))[second]]
    return [first, second], weights


def plain_choice(spec, logits, params):
    """Stages 2 to 4 of one token: ids and weights."""
    if spec.select == "sparsemixer":
        return plain_sparsemixer(spec, logits)
    scores = {
        "softmax": lambda: softmax(logits),
        "sigmoid": lambda: [sigmoid(v) for v in logits],
        "sqrtsoftplus": lambda: [math.sqrt(math.log1p(math.exp(v))) for v in logits],
        "none": lambda: list(logits),
    }[spec.score]()
    biased = [v + float(params["select_bias"][e]) if spec.select_bias else v for e, v in enumerate(scores)]
    if (limit := spec.group_limit) is not None:
        size = spec.experts // limit.groups
        groups = [biased[g * size : (g + 1) * size] for g in range(limit.groups)]
        of_group = [max(g) if limit.score == "max" else sum(sorted(g)[-2:]) for g in groups]
        kept = best(of_group, limit.kept)
        biased = [v if e // size in kept else (-math.inf if limit.mask_value is None else limit.mask_value) for e, v in enumerate(biased)]
    ids = best(biased, spec.active)
    if spec.weight_from == "softmax_selected_logits":
        return ids, softmax([logits[e] for e in ids])
    if spec.weight_from == "sigmoid_selected_logits":
        return ids, [sigmoid(logits[e]) for e in ids]
    return ids, [scores[e] for e in ids]


def plain(spec, params, x):
    """One token after the other, one number after the other."""
    all_ids, all_weights = [], []
    for row in x:
        ids, weights = plain_choice(spec, plain_logits(spec, params, row), params)
        if spec.normalize:
            total = max(sum(weights) + spec.norm_eps, spec.norm_min)
            weights = [w / total for w in weights]
        if spec.expert_scale:
            weights = [w * float(params["expert_scale"][e]) for w, e in zip(weights, ids, strict=True)]
        all_ids.append(ids)
        all_weights.append([w * spec.scale for w in weights])
    return np.array(all_ids), np.array(all_weights)


MORE = {
    "sqrtsoftplus": RouterSpec(14, 6, score="sqrtsoftplus", select_bias=True, normalize=True, norm_eps=1e-20, scale=1.5),
    "logits_as_weights": RouterSpec(6, 2, score="none"),
    "everything": RouterSpec(
        12,
        3,
        input_norm=True,
        matmul_dtype="float32",
        logits_bias=True,
        score="sigmoid",
        select_bias=True,
        group_limit=GroupLimit(3, 2, "top2sum", -math.inf),
        normalize=True,
        norm_eps=0.25,
        norm_min=1.5,
        expert_scale=True,
        scale=0.5,
        apply="input",
    ),
    "max_with_bias": RouterSpec(12, 3, select_bias=True, group_limit=GroupLimit(4, 2, "max", -math.inf)),
}
"""Settings that no family above has."""

SPECS = {name: spec for name, (_, spec) in CASES.items()} | MORE


@pytest.mark.parametrize("name", mostly(SPECS, [name for name in SPECS if not name.endswith(("_odd", "_small"))]))  # of other sizes alone
def test_equals_a_plain_loop(name):
    spec, count = SPECS[name], 12
    params, x = leaves(spec, D), rows(T, D)
    ids, weights, logits = run(spec, params, x)
    expected_ids, expected = plain(spec, params, x[:count])
    np.testing.assert_array_equal(ids[:count], expected_ids)
    np.testing.assert_allclose(weights[:count], expected, rtol=2e-5, atol=1e-7)
    assert weights.dtype == logits.dtype == np.float32 and logits.shape == (T, spec.experts)


def test_the_bias_chooses_and_does_not_weigh():
    spec = SPECS["glm4_moe_plain"]
    params, x = leaves(spec, D), rows(T, D)
    ids, weights, logits = run(spec, params, x)
    unbiased = run(spec, params | {"select_bias": np.zeros(spec.experts, np.float32)}, x)[0]
    assert (np.sort(ids, 1) != np.sort(unbiased, 1)).any()
    np.testing.assert_allclose(weights, 1 / (1 + np.exp(-np.take_along_axis(logits, ids, 1))), rtol=1e-6)


def test_a_sigmoid_that_underflows_is_divided_by_no_less_than_the_eps():
    spec = SPECS["glm4_moe"]
    params = leaves(spec, D) | {"kernel": np.full((D, spec.experts), -8, np.float32)}
    weights = run(spec, params, np.ones((3, D), np.float32))[1]
    assert np.isfinite(weights).all()


def test_a_masked_expert_that_is_chosen_has_the_mask_as_its_score():
    """Where every eligible softmax but one underflows, DeepSeek-V2's zeros tie with masked experts."""
    spec = RouterSpec(6, 2, group_limit=GroupLimit(3, 1, "max", 0.0))
    kernel = np.array([[80, 85, 0, 0, 300, -300]], np.float32)
    ids, weights, _ = run(spec, {"kernel": kernel}, np.ones((1, 1), np.float32))
    np.testing.assert_array_equal(ids, [[4, 0]])
    np.testing.assert_array_equal(weights, [[1, 0]])
    spec = dataclasses.replace(spec, active=1, group_limit=GroupLimit(3, 1, "max", 0.5))
    ids, weights, _ = run(spec, {"kernel": np.zeros((1, 6), np.float32)}, np.ones((1, 1), np.float32))
    np.testing.assert_array_equal((ids[0, 0], weights[0, 0]), (2, 0.5))


def permutation(spec, rng):
    """Of experts; where they have groups, of groups and inside each."""
    groups = spec.group_limit.groups if spec.group_limit else 1
    blocks = np.arange(spec.experts).reshape(groups, -1)
    return rng.permuted(blocks, axis=1)[rng.permutation(groups)].reshape(-1)


@pytest.mark.parametrize("name", FAMILY_ROUTERS)
def test_permuting_experts_permutes_ids_only(name):
    spec = FAMILY_ROUTERS[name]
    params, x = leaves(spec, D), rows(T, D)
    new = permutation(spec, np.random.default_rng(2))
    moved = {key: leaf if key == "input_scale" else leaf[..., new] for key, leaf in params.items()}
    ids, weights, logits = run(spec, params, x)
    moved_ids, moved_weights, moved_logits = run(spec, moved, x)
    np.testing.assert_array_equal(new[moved_ids], ids)
    np.testing.assert_allclose(moved_weights, weights, rtol=1e-5)
    np.testing.assert_allclose(moved_logits, logits[:, new], rtol=1e-5, atol=1e-6)


UNLIKE = (
    *("mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss", "phimoe", "llama4"),
    *("sqrtsoftplus", "everything"),
)
"""Routers that have every choice of every stage between them."""


@pytest.mark.parametrize("name", UNLIKE)
def test_rows_do_not_depend_on_rows_around_them(name, exhaustive):
    """Nor does padding change them; its own weights are zero, whatever it holds."""
    spec = SPECS[name]
    width = 96
    params, x = leaves(spec, width), rows(130, width)
    expected = run(spec, params, x)
    for count in (1, 7, 33) if exhaustive else (1, 7):
        start = 130 - count
        padding = np.arange(count) % 3 == 1
        got = run(spec, params, np.where(padding[:, None], np.nan if count == 7 else 0, x[start:]).astype(np.float32), ~padding)
        assert (got[1][padding] == 0).all()
        for part, whole in zip(got, expected, strict=True):
            np.testing.assert_array_equal(part[~padding], whole[start:][~padding])


@pytest.mark.parametrize("name", FAMILY_ROUTERS)
def test_ties_go_to_the_lowest_id(name):
    """Equal experts, in equal groups."""
    spec = FAMILY_ROUTERS[name]
    params = {key: leaf if key == "input_scale" else np.broadcast_to(leaf[..., :1], leaf.shape) for key, leaf in leaves(spec, D).items()}
    ids, weights, _ = run(spec, params, rows(T, D))
    np.testing.assert_array_equal(ids, np.broadcast_to(np.arange(spec.active), ids.shape))
    assert np.isfinite(weights).all()
    if spec.select != "sparsemixer":
        assert (weights == weights[:, :1]).all()


def test_ties_of_some():
    """Three experts share the second place, of which two are chosen; of two equal groups the first is kept."""
    kernel = np.array([[1.0, 2.0, 5.0, 2.0, 0.0, 2.0]], np.float32)
    one = np.ones((1, 1), np.float32)
    assert run(RouterSpec(6, 3), {"kernel": kernel}, one)[0].tolist() == [[2, 1, 3]]
    limited = RouterSpec(6, 2, group_limit=GroupLimit(3, 2, "max", 0.0))
    assert run(limited, {"kernel": np.array([[1.0, 2.0, 2.0, 1.5, 2.0, 1.9]], np.float32)}, one)[0].tolist() == [[1, 2]]
    mixed = FAMILY_ROUTERS["phimoe"]
    mixed = dataclasses.replace(mixed, experts=6)
    ids, weights, _ = run(mixed, {"kernel": kernel}, one)
    assert ids.tolist() == [[2, 1]]
    np.testing.assert_allclose(weights, [[1, 1 / 3]], rtol=1e-6)


def test_sparsemixer_of_zeros_and_of_negative_logits():
    """Zero logits have no distance from each other; where all are negative, the second choice's distances are as the reference has them."""
    spec = dataclasses.replace(FAMILY_ROUTERS["phimoe"], experts=4)
    kernel = np.array([[0, 0, 0, 0], [-1, -1.01, -3, -1.025]], np.float32)
    ids, weights, _ = run(spec, {"kernel": kernel}, np.eye(2, dtype=np.float32))
    assert ids.tolist() == [[0, 1], [0, 1]]
    np.testing.assert_allclose(weights[0], [1 / 4, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(weights[1], [1 / (1 + math.exp(-0.01)), 1 / (1 + math.exp(-0.015))], rtol=1e-6)


def test_weights_held_in_bfloat16():
    """Leaves of uint16 are read as bfloat16, and the rest is as with the same values in float32."""
    spec = dataclasses.replace(SPECS["everything"], matmul_dtype="model")
    x, wide = rows(T, D).astype(jnp.bfloat16), leaves(spec, D)
    held = {key: leaf if key == "select_bias" else store_numpy(leaf, "bfloat16") for key, leaf in wide.items()}
    rounded = {key: leaf if key == "select_bias" else leaf.astype(jnp.bfloat16).astype(np.float32) for key, leaf in wide.items()}
    for a, b in zip(run(spec, held, x), run(spec, rounded, x), strict=True):
        np.testing.assert_array_equal(a, b)


def test_dtypes():
    """In bfloat16, logits are rounded with 'model' and not with 'float32'; so are weights."""
    x = rows(T, D).astype(jnp.bfloat16)
    for matmul in ("model", "float32"):
        for final in ("model", "float32"):
            spec = RouterSpec(9, 3, matmul_dtype=matmul, weights_dtype=final, normalize=True)
            _, weights, logits = run(spec, leaves(spec, D), x)
            assert (logits == logits.astype(jnp.bfloat16).astype(np.float32)).all() == (matmul == "model")
            assert (weights == weights.astype(jnp.bfloat16).astype(np.float32)).all() == (final == "model")


def test_the_norm_s_epsilon():
    spec = dataclasses.replace(FAMILY_ROUTERS["gemma4"], experts=5, active=2)
    params, x = leaves(spec, D), rows(3, D) * 1e-3
    logits = [run(spec, params, x, eps=eps)[2] for eps in (1e-12, 1e-6)]
    ratio = np.sqrt((x.astype(np.float64) ** 2).mean(1) / ((x.astype(np.float64) ** 2).mean(1) + 1e-6))
    np.testing.assert_allclose(logits[1], logits[0] * ratio[:, None], rtol=1e-4)


GOOD = RouterSpec(12, 4)
MIXER = FAMILY_ROUTERS["phimoe"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        *[(dataclasses.replace(GOOD, select=value), rf"RouterSpec\.select = '{value}'") for value in ("top_p", "hash", "rank", "topk ")],
        (dataclasses.replace(GOOD, score="tanh"), r"RouterSpec\.score = 'tanh'"),
        (dataclasses.replace(GOOD, weight_from="rank"), r"RouterSpec\.weight_from = 'rank'"),
        (dataclasses.replace(GOOD, apply="both"), r"RouterSpec\.apply = 'both'"),
        (dataclasses.replace(GOOD, matmul_dtype="bfloat16"), r"RouterSpec\.matmul_dtype"),
        (dataclasses.replace(GOOD, weights_dtype="bfloat16"), r"RouterSpec\.weights_dtype"),
        (dataclasses.replace(GOOD, active=13), r"RouterSpec\.active = 13"),
        (dataclasses.replace(GOOD, active=0), r"RouterSpec\.active = 0"),
        (dataclasses.replace(GOOD, weight_from="sparsemixer"), r"RouterSpec\.select = 'topk'"),
        (dataclasses.replace(MIXER, weight_from="score"), r"weight_from = 'score'"),
        (dataclasses.replace(MIXER, active=3), r"RouterSpec\.active = 3"),
        (dataclasses.replace(MIXER, score="softmax"), "no score"),
        (dataclasses.replace(GOOD, group_limit=GroupLimit(5, 2, "max", 0.0)), r"GroupLimit\.groups = 5"),
        (dataclasses.replace(GOOD, group_limit=GroupLimit(12, 6, "top2sum", 0.0)), "groups of one expert"),
        (dataclasses.replace(GOOD, group_limit=GroupLimit(4, 1, "max", 0.0)), r"GroupLimit\.kept = 1"),
        (dataclasses.replace(GOOD, group_limit=GroupLimit(4, 5, "max", 0.0)), r"GroupLimit\.kept = 5"),
        (dataclasses.replace(GOOD, group_limit=GroupLimit(4, 2, "mean", 0.0)), r"GroupLimit\.score = 'mean'"),
    ],
)
def test_refused(spec, words):
    with pytest.raises(SpecError, match=words) as refused:
        check(spec)
    assert "\n" not in str(refused.value)
    with pytest.raises(SpecError):
        route(spec, {}, jnp.ones((1, 3)), None, jnp.ones(1, bool), Kernels("cpu"))
