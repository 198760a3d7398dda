"""The router of every family as data, at the sizes of one of its checkpoints; weights for them, and running them."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.routing.route import route
from jaxmoe.spec import GroupLimit, RouterSpec
from pallas_kernels.dispatch import Kernels

D = 37
T = 32
"""Most tests have so many rows, so that they share compiled programs."""

_SOFTMAX = RouterSpec(128, 8)
_SIGMOID = RouterSpec(
    160, 8, matmul_dtype="float32", score="sigmoid", select_bias=True, normalize=True, norm_eps=1e-20, scale=2.5, weights_dtype="float32"
)

FAMILY_ROUTERS: dict[str, RouterSpec] = {
    "mixtral": RouterSpec(8, 2, normalize=True, weights_dtype="float32"),
    "qwen2_moe": dataclasses.replace(_SOFTMAX, experts=60, active=4),
    "qwen3_moe": dataclasses.replace(_SOFTMAX, normalize=True),
    "qwen3_next": dataclasses.replace(_SOFTMAX, experts=512, active=10, normalize=True),
    "olmoe": dataclasses.replace(_SOFTMAX, experts=64),
    "deepseek_v2": RouterSpec(
        160, 6, matmul_dtype="float32", group_limit=GroupLimit(8, 3, "max", 0.0), scale=16.0, weights_dtype="float32"
    ),
    "deepseek_v3": dataclasses.replace(_SIGMOID, experts=256, group_limit=GroupLimit(8, 4, "top2sum", None)),
    "glm4_moe": _SIGMOID,
    "dots1": dataclasses.replace(_SIGMOID, experts=128, active=6),
    "gpt_oss": RouterSpec(32, 4, logits_bias=True, score="none", weight_from="softmax_selected_logits"),
    "phimoe": RouterSpec(16, 2, score="none", select="sparsemixer", weight_from="sparsemixer", jitter=0.01),
    "granitemoe": RouterSpec(40, 8, score="none", weight_from="softmax_selected_logits"),
    "llama4": RouterSpec(16, 1, score="none", weight_from="sigmoid_selected_logits", apply="input"),
    "ernie4_5_moe": RouterSpec(64, 6, matmul_dtype="float32", select_bias=True, normalize=True, norm_min=1e-12),
    "minimax_m2": RouterSpec(256, 8, score="sigmoid", select_bias=True, normalize=True, weights_dtype="float32"),
    "gemma4": RouterSpec(128, 8, input_norm=True, normalize=True, expert_scale=True, weights_dtype="float32"),
}
"""What transformers 5.23 computes, by `model_type`."""

VARIANTS: dict[str, tuple[str, RouterSpec]] = {
    name: (family, dataclasses.replace(FAMILY_ROUTERS[family], **changes))
    for name, family, changes in [
        ("mixtral_odd", "mixtral", {"experts": 7, "active": 3}),
        ("mixtral_one", "mixtral", {"experts": 5, "active": 1}),
        ("qwen2_moe_normalized", "qwen2_moe", {"normalize": True}),
        ("qwen3_moe_all", "qwen3_moe", {"experts": 6, "active": 6}),
        ("deepseek_v2_greedy", "deepseek_v2", {"experts": 9, "group_limit": None, "scale": 1.0}),
        ("deepseek_v2_small", "deepseek_v2", {"experts": 15, "active": 3, "group_limit": GroupLimit(5, 1, "max", 0.0)}),
        ("deepseek_v3_small", "deepseek_v3", {"experts": 21, "active": 5, "group_limit": GroupLimit(7, 3, "top2sum", None)}),
        ("deepseek_v3_pairs", "deepseek_v3", {"experts": 10, "active": 4, "group_limit": GroupLimit(5, 2, "top2sum", None)}),
        ("glm4_moe_plain", "glm4_moe", {"experts": 13, "normalize": False, "scale": 1.0}),
        ("gpt_oss_odd", "gpt_oss", {"experts": 5, "active": 3}),
        ("phimoe_wide", "phimoe", {"experts": 9, "jitter": 0.2}),
        ("phimoe_two", "phimoe", {"experts": 2}),
        ("granitemoe_one", "granitemoe", {"experts": 3, "active": 1}),
        ("llama4_odd", "llama4", {"experts": 3, "active": 2}),
        ("ernie4_5_moe_floor", "ernie4_5_moe", {"experts": 11, "active": 2, "norm_min": 0.7}),
        ("minimax_m2_odd", "minimax_m2", {"experts": 19, "active": 7}),
        ("gemma4_odd", "gemma4", {"experts": 11, "active": 3}),
    ]
}
"""Other settings and sizes: the family each belongs to, and the router."""

CASES: dict[str, tuple[str, RouterSpec]] = {name: (name, spec) for name, spec in FAMILY_ROUTERS.items()} | VARIANTS


def leaves(spec: RouterSpec, width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A router's weights in float32, large enough that choices differ; the biases for selection change which experts are chosen."""
    rng = np.random.default_rng(seed)
    params = {"kernel": rng.normal(0, 1.5 / math.sqrt(width), (width, spec.experts))}
    if spec.logits_bias:
        params["bias"] = rng.normal(0, 1, spec.experts)
    if spec.select_bias:
        params["select_bias"] = rng.normal(0, 0.3, spec.experts)
    if spec.input_norm:
        params["kernel"] *= math.sqrt(width)
        params["input_scale"] = 1 + rng.normal(0, 0.3, width)
    if spec.expert_scale:
        params["expert_scale"] = rng.uniform(0.5, 2, spec.experts)
    return {name: leaf.astype(np.float32) for name, leaf in params.items()}


def rows(count: int, width: int, seed: int = 1) -> np.ndarray:
    """Activations, float32."""
    return np.random.default_rng(seed).normal(0, 1.3, (count, width)).astype(np.float32)


def step(spec, params, x, valid, eps):
    return route(spec, params, x, None, valid, Kernels("cpu"), eps)[0]


STEP = jax.jit(step, static_argnums=0, compiler_options=Kernels("cpu").compiler_options())


def run(spec, params, x, valid=None, eps=1e-6):
    """(ids, weights, logits) as numpy."""
    out = STEP(spec, params, jnp.asarray(x), jnp.asarray(np.ones(len(x), bool) if valid is None else valid), eps)
    return tuple(np.asarray(part) for part in out[:3])
