"""DeepSeek's latent attention and routers: DeepSeek-V2 and V3, Kimi-K2, which is V3 under a name of its own, and GLM-4.7-Flash (transformers,
models/deepseek_v2, models/deepseek_v3 and models/glm4_moe_lite)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxmoe.spec.families.common import (
    SHAPE,
    Family,
    biases,
    count,
    dense_first,
    layer_kinds,
    only,
    positive,
    rope_fields,
    router,
    whole_rope,
    yarn_magnitude,
)
from jaxmoe.spec.types import AttentionSpec, ExpertSpec, GroupLimit, LatentSpec, LayerSpec, RouterSpec, SpecError


def latent(config: dict, wide: bool = False) -> AttentionSpec:
    """Multi-head latent attention, cached as one head; `wide`: see `RopeSpec`."""
    heads = positive(config, "num_attention_heads")
    only(config, "num_key_value_heads", heads, None)
    turned, plain = positive(config, "qk_rope_head_dim"), positive(config, "qk_nope_head_dim")
    q_rank = config.get("q_lora_rank")
    q_rank = None if q_rank is None else positive(config, "q_lora_rank")
    ranks = LatentSpec(positive(config, "kv_lora_rank"), q_rank, plain, positive(config, "v_head_dim"))
    style = "interleaved" if config.get("rope_interleave", True) else "half"
    turning = whole_rope(config, turned, 10000.0, style, wide)
    scale, all_dim = (plain + turned) ** -0.5, rope_fields(config).get("mscale_all_dim")
    if turning.scaling is not None and all_dim:
        scale *= yarn_magnitude(turning.scaling.factor, float(all_dim)) ** 2
    return AttentionSpec(heads, 1, plain + turned, ranks, turning, scale=scale, **biases(config))


def group_limit(config: dict, experts: int, score: Literal["max", "top2sum"], mask_value: float | None) -> GroupLimit | None:
    """Selection among the experts of `topk_group` of `n_group` groups; None where that is no limit."""
    groups = count(config, "n_group", 1) or 1
    if groups == 1:
        only(config, "topk_group", 0, 1, None)
        return None
    size, kept = experts // groups, positive(config, "topk_group")
    if experts % groups or (score == "top2sum" and size < 2):
        raise SpecError(f"config.json: n_group = {groups} does not split {experts} experts into groups{' of two or more' if score != 'max' else ''}")
    chosen = positive(config, "num_experts_per_tok")
    if kept > groups or kept * size < chosen:
        raise SpecError(f"config.json: topk_group = {kept} of {groups} groups of {size} experts can't give {chosen} (num_experts_per_tok)")
    return GroupLimit(groups, kept, score, mask_value)


def routed(config: dict) -> int:
    """How many experts there are to choose from; transformers may save the number under several names."""
    experts = positive(config, "n_routed_experts")
    for field in ("num_local_experts", "num_experts"):
        only(config, field, experts, None)
    return experts


def v3_router(config: dict, **kwargs: Any) -> RouterSpec:
    """Sigmoid scores, a bias for selection, groups by the sum of their two best: DeepSeek-V3 and those that took it over."""
    only(config, "scoring_func", "sigmoid", "noaux_tc")  # dots.llm1 gives the whole method's name here
    only(config, "topk_method", "noaux_tc")
    only(config, "moe_layer_freq", 1)
    experts = routed(config)
    limit = group_limit(config, experts, "top2sum", None)
    given: dict[str, Any] = dict(
        matmul_dtype="float32", score="sigmoid", select_bias=True, group_limit=limit, normalize=bool(config["norm_topk_prob"]), norm_eps=1e-20,
        scale=float(config["routed_scaling_factor"]), weights_dtype="float32",
    )  # fmt: skip
    return router(config, experts, **(given | kwargs))


def shared(config: dict) -> ExpertSpec | None:
    """The experts that see every token, as the one network that they are on disk."""
    experts = count(config, "n_shared_experts")
    return ExpertSpec(experts * positive(config, "moe_intermediate_size")) if experts else None


def extra_heads(config: dict, layer: LayerSpec) -> dict[str, Any]:
    """The heads of multi-token prediction, whose number has two names."""
    old, new = config.get("num_nextn_predict_layers"), config.get("num_mtp_layers")
    if None not in (old, new) and old != new:
        raise SpecError(f"config.json: num_nextn_predict_layers = {old!r} and num_mtp_layers = {new!r} are to be the same")
    return {"extra_heads": (layer,) * count(config, "num_mtp_layers" if old is None else "num_nextn_predict_layers")}


def _v3_sparse(config: dict) -> LayerSpec:
    return LayerSpec(latent(config), v3_router(config), ExpertSpec(positive(config, "moe_intermediate_size")), shared=shared(config))


def _v2_router(config: dict) -> RouterSpec:
    """Softmax scores, groups by their best expert.

    `norm_topk_prob` is refused where it is true: the released code then divides the weights by their sum and leaves out `routed_scaling_factor`,
    transformers does neither; no released checkpoint has it.
    """
    only(config, "scoring_func", "softmax")
    only(config, "topk_method", "greedy", "group_limited_greedy")
    only(config, "norm_topk_prob", False, None)
    only(config, "moe_layer_freq", 1)
    experts, limit = routed(config), None
    if config["topk_method"] == "greedy":
        only(config, "n_group", 0, 1, None)
        only(config, "topk_group", 0, 1, None)
    else:
        positive(config, "n_group")
        limit = group_limit(config, experts, "max", 0.0)
    scale = float(config["routed_scaling_factor"])
    return router(config, experts, matmul_dtype="float32", group_limit=limit, scale=scale, weights_dtype="float32")


def _v2_layers(config: dict) -> list[LayerSpec]:
    """Positions turn as complex numbers, which there are none of in bfloat16."""
    only(config, "mlp_bias", False, None)
    sparse = LayerSpec(latent(config, wide=True), _v2_router(config), ExpertSpec(positive(config, "moe_intermediate_size")), shared=shared(config))
    return dense_first(config, "first_k_dense_replace", sparse)


def _glm_lite_layers(config: dict) -> list[LayerSpec]:
    """The first layer is dense and the others sparse, unless `mlp_layer_types` says otherwise."""
    only(config, "head_dim", config["qk_rope_head_dim"], None)
    kinds = layer_kinds(config, "mlp_layer_types", ("dense", "sparse"), lambda i: "sparse" if i else "dense")
    first = count(config, "first_k_dense_replace", 1)
    if config.get("first_k_dense_replace") is not None and kinds != ["dense"] * first + ["sparse"] * (len(kinds) - first):
        raise SpecError(f"config.json: first_k_dense_replace = {first} contradicts mlp_layer_types (one dense layer and then sparse ones if missing)")
    sparse = _v3_sparse(config)
    dense = LayerSpec(sparse.attention, dense=ExpertSpec(positive(config, "intermediate_size")))
    return [sparse if kind == "sparse" else dense for kind in kinds]


_LATENT = ("qk_rope_head_dim", "qk_nope_head_dim", "kv_lora_rank", "v_head_dim")
_ROUTED = ("moe_intermediate_size", "n_routed_experts", "routed_scaling_factor")
_MAY = (
    "num_key_value_heads", "q_lora_rank", "n_shared_experts", "attention_bias", "tie_word_embeddings", "scoring_func", "topk_method",
    "moe_layer_freq", "num_local_experts", "num_experts",
)  # fmt: skip
_HEADS = ("num_nextn_predict_layers", "num_mtp_layers")
_TRAINING = ("ep_size", "aux_loss_alpha", "seq_aux")
_WIDTHS = ("head_dim", "qk_head_dim")
"""Follow from the other widths: transformers writes them and doesn't read them."""

V3 = Family(
    (*SHAPE, *_LATENT, *_ROUTED, "norm_topk_prob", "n_group", "topk_group", "first_k_dense_replace"),
    (*_MAY, *_HEADS, "rope_interleave"),
    lambda config: dense_first(config, "first_k_dense_replace", _v3_sparse(config)),
    lambda config: extra_heads(config, _v3_sparse(config)),
    models="DeepSeek-V3, V3.1, R1",
    no_effect=(*_TRAINING, *_WIDTHS),
)

KIMI_K2 = dataclasses.replace(V3, models="Kimi-K2-Base, Kimi-K2-Instruct")

V2 = Family(
    (*SHAPE, *_LATENT, *_ROUTED, "topk_method", "first_k_dense_replace"),
    (*_MAY, "norm_topk_prob", "n_group", "topk_group", "mlp_bias"),
    _v2_layers,
    models="DeepSeek-V2, V2-Lite, Coder-V2",
    no_effect=(*_TRAINING, *_WIDTHS),
)

GLM_LITE = Family(
    (*SHAPE, *_LATENT, *_ROUTED, "norm_topk_prob", "n_group", "topk_group"),
    (*_MAY, *_HEADS, "rope_interleave", "mlp_layer_types", "first_k_dense_replace", "head_dim", "partial_rotary_factor"),
    _glm_lite_layers,
    lambda config: extra_heads(config, _v3_sparse(config)),
    models="GLM-4.7-Flash",
    no_effect=("qk_head_dim",),
)
