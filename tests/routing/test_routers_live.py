"""Every family's router against the one in transformers, on random weights. Needs the `bench` extra."""

import importlib
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.formats import store_numpy
from tests.routing.families import CASES, FAMILY_ROUTERS, D, T, leaves, rows, run

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

ROWS = 9 * T

MODULES = {
    "mixtral": "MixtralTopKRouter",
    "qwen2_moe": "Qwen2MoeTopKRouter",
    "qwen3_moe": "Qwen3MoeTopKRouter",
    "qwen3_next": "Qwen3NextTopKRouter",
    "olmoe": "OlmoeTopKRouter",
    "deepseek_v2": "DeepseekV2TopkRouter",
    "deepseek_v3": "DeepseekV3TopkRouter",
    "glm4_moe": "Glm4MoeTopkRouter",
    "dots1": "Dots1TopkRouter",
    "gpt_oss": "GptOssTopKRouter",
    "phimoe": "PhimoeTopKRouter",
    "granitemoe": "GraniteMoeTopKRouter",
    "llama4": "Llama4Router",
    "ernie4_5_moe": "Ernie4_5_MoeTopKRouter",
    "minimax_m2": "MiniMaxM2TopKRouter",
    "gemma4": "Gemma4TextRouter",
}
"""The class of each family's router, in its modeling file."""


def settings(spec):
    """A config as routers read it: every spelling of the same few numbers."""
    groups = (spec.group_limit.groups, spec.group_limit.kept) if spec.group_limit else (1, 1)
    return SimpleNamespace(
        hidden_size=D,
        num_experts=spec.experts,
        num_local_experts=spec.experts,
        num_experts_per_tok=spec.active,
        moe_k=spec.active,
        top_k_experts=spec.active,
        norm_topk_prob=spec.normalize,
        topk_method="group_limited_greedy" if spec.group_limit else "greedy",
        n_group=groups[0],
        topk_group=groups[1],
        routed_scaling_factor=spec.scale,
        moe_norm_min=spec.norm_min,
        router_jitter_noise=spec.jitter,
        input_jitter_noise=0.0,
        rms_norm_eps=1e-6,
    )


def router_of(family, spec, params):
    """The family's router with these weights."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    router = getattr(module, MODULES[family])(settings(spec)).eval()
    named = {"proj.weight" if spec.input_norm else "weight": params["kernel"].T}
    for name, leaf in (("bias", "bias"), ("scale", "input_scale"), ("per_expert_scale", "expert_scale")):
        if leaf in params:
            named[name] = params[leaf]
    if family == "ernie4_5_moe":
        named["moe_statics.e_score_correction_bias"] = params["select_bias"][None]
    elif spec.select_bias and family != "minimax_m2":
        named["e_score_correction_bias"] = params["select_bias"]
    state = {name: torch.from_numpy(np.ascontiguousarray(leaf)) for name, leaf in named.items()}
    missing, unexpected = router.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"e_score_correction_bias"} and (not missing or not spec.select_bias)
    return router


def theirs(family, spec, router, params, x):
    """[T, E]: each expert's weight, zero where it isn't chosen; and ids [T, A], in no order."""
    with torch.no_grad():
        if family == "minimax_m2":
            _, weights, ids = router(x, torch.from_numpy(params["select_bias"]))
        elif family == "llama4":
            scores, logits = router(x)
            ids = logits.topk(spec.active, dim=1)[1]
            assert ((scores != 0).sum(1) == spec.active).all()
            weights = scores.gather(1, ids)
        else:
            _, weights, ids = router(x)
    return spread(ids.numpy(), weights.float().numpy(), spec.experts), ids.numpy()


def ours(spec, params, x):
    """As `theirs`."""
    parts = [run(spec, params, x[start : start + T]) for start in range(0, len(x), T)]
    ids, weights, _ = (np.concatenate(part) for part in zip(*parts, strict=True))
    return spread(ids, weights, spec.experts), ids


def spread(ids, weights, experts):
    dense = np.zeros((len(ids), experts), np.float32)
    np.put_along_axis(dense, ids, weights, axis=1)
    return dense


@pytest.mark.parametrize("name", CASES)
def test_float32(name):
    """The same experts, with the same weights; in the same order, where theirs have one."""
    family, spec = CASES[name]
    params, x = leaves(spec, D), rows(ROWS, D)
    expected, expected_ids = theirs(family, spec, router_of(family, spec, params), params, torch.from_numpy(x))
    got, ids = ours(spec, params, x)
    np.testing.assert_array_equal(np.sort(ids, 1), np.sort(expected_ids, 1))
    if spec.matmul_dtype == "model" and not spec.select_bias:
        np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(got, expected, rtol=1e-6 if spec.scale == 1.0 else 3e-6, atol=1e-6 * spec.scale)


def whole(leaf, size):
    """Of numbers, eighths: few enough bits for a dot to be exact in every order of adding up."""
    return np.clip(np.round(leaf * size), -31, 31).astype(np.float32) / 8


@pytest.mark.parametrize("family", [f for f in FAMILY_ROUTERS if f != "gemma4"])
def test_bfloat16(family):
    """Roundings happen in the same places: a dot in bfloat16 is exact here, so that weights differ by one rounding, and choices in ties only."""
    spec = FAMILY_ROUTERS[family]
    params, x = leaves(spec, D), whole(rows(ROWS, D), 4)
    held = params
    router = router_of(family, spec, params)
    logits = x @ params["kernel"]
    if spec.matmul_dtype == "model":
        params |= {key: whole(leaf, 8) for key, leaf in params.items() if key != "select_bias"}
        held = {key: leaf if key == "select_bias" else store_numpy(leaf, "bfloat16") for key, leaf in params.items()}
        router = router_of(family, spec, params).to(torch.bfloat16)
        logits = (x @ params["kernel"] + params.get("bias", 0)).astype(jnp.bfloat16).astype(np.float32)
    expected, _ = theirs(family, spec, router, params, torch.from_numpy(x).to(torch.bfloat16))
    got, _ = ours(spec, held, x.astype(jnp.bfloat16))
    same = ((got > 0) == (expected > 0)).all(1)
    clear = ~tied(logits, spec.active + 1)
    assert clear.sum() > 20 and same[clear].all(), f"{(~same & clear).sum()} of {clear.sum()} rows differ"
    bound = 2.0**-7 if spec.weights_dtype == "model" else 1e-5
    np.testing.assert_allclose(got[clear], expected[clear], rtol=bound, atol=0)


def tied(logits, count):
    """Rows in which any of the largest logits are equal."""
    top = -np.sort(-logits, axis=1)[:, :count]
    return (top[:, 1:] == top[:, :-1]).any(1)


def test_bfloat16_with_the_router_s_own_norm():
    """Gemma 4's dot has inputs that were normalised, so it is not exact: nearly all choices agree, and weights to a rounding of a logit."""
    spec = FAMILY_ROUTERS["gemma4"]
    params = {key: leaf.astype(jnp.bfloat16).astype(np.float32) for key, leaf in leaves(spec, D).items()}
    x = rows(ROWS, D).astype(jnp.bfloat16)
    router = router_of("gemma4", spec, params).to(torch.bfloat16)
    expected, _ = theirs("gemma4", spec, router, params, torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16))
    got, _ = ours(spec, {key: store_numpy(leaf, "bfloat16") for key, leaf in params.items()}, x)
    same = ((got > 0) == (expected > 0)).all(1)
    assert same.mean() > 0.9
    np.testing.assert_allclose(got[same], expected[same], rtol=0.03)
    assert np.median(np.abs(got[same] - expected[same]).max(1)) < 1e-5
