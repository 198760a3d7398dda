"""DeepSeek's latent attention and routers: DeepSeek-V2 and V3, and Kimi-K2, which is V3 under a name of its own (transformers, models/deepseek_v2 and
models/deepseek_v3)."""

from __future__ import annotations

from typing import Any, Literal

from jaxmoe.spec.families.common import SHAPE, Family, count, dense_first, only, positive, rope, router, yarn_magnitude
from jaxmoe.spec.types import AttentionSpec, ExpertSpec, GroupLimit, LatentSpec, LayerSpec, RouterSpec, SpecError


def latent(config: dict) -> AttentionSpec:
    """Multi-head latent attention, cached as one head."""
    heads = positive(config, "num_attention_heads")
    only(config, "num_key_value_heads", heads, None)
    turned, plain = positive(config, "qk_rope_head_dim"), positive(config, "qk_nope_head_dim")
    q_rank = config.get("q_lora_rank")
    ranks = LatentSpec(positive(config, "kv_lora_rank"), None if q_rank is None else positive(config, "q_lora_rank"), plain, positive(config, "v_head_dim"))
    scaling = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    scale = (plain + turned) ** -0.5
    if scaling.get("mscale_all_dim") and scaling.get("rope_type", scaling.get("type", "default")) != "default":
        scale *= yarn_magnitude(float(scaling["factor"]), float(scaling["mscale_all_dim"])) ** 2
    style = "interleaved" if config.get("rope_interleave", True) else "half"
    bias = bool(config.get("attention_bias", False))
    turning = rope(config, turned, 10000.0, style)
    return AttentionSpec(heads, 1, plain + turned, ranks, turning, qkv_bias=bias, out_bias=bias, scale=scale)


def group_limit(config: dict, experts: int, score: Literal["max", "top2sum"], mask_value: float) -> GroupLimit | None:
    """Selection among the experts of `topk_group` of `n_group` groups; None where that is no limit."""
    groups, kept = count(config, "n_group", 1) or 1, count(config, "topk_group", 1) or 1
    if groups == 1:
        return None
    size = experts // groups
    if experts % groups or (score == "top2sum" and size < 2):
        raise SpecError(f"config.json: n_group = {groups} does not split {experts} experts into groups{' of two or more' if score != 'max' else ''}")
    if kept > groups or kept * size < positive(config, "num_experts_per_tok"):
        raise SpecError(f"config.json: topk_group = {kept} of {groups} groups of {size} experts can't give {config['num_experts_per_tok']} (num_experts_per_tok)")
    return GroupLimit(groups, kept, score, mask_value)


def v3_router(config: dict, **kwargs: Any) -> RouterSpec:
    """Sigmoid scores, a bias for selection, groups by the sum of their two best: DeepSeek-V3 and those that took it over."""
    experts = positive(config, "n_routed_experts")
    limit = group_limit(config, experts, "top2sum", float("-inf"))
    given = dict(
        matmul_dtype="float32", score="sigmoid", select_bias=True, group_limit=limit, normalize=bool(config["norm_topk_prob"]), norm_eps=1e-20,
        scale=float(config["routed_scaling_factor"]), weights_dtype="float32",
    )  # fmt: skip
    return router(config, experts, **(given | kwargs))


def shared(config: dict) -> ExpertSpec | None:
    """The experts that see every token, as the one network that they are on disk."""
    experts = count(config, "n_shared_experts")
    return ExpertSpec(experts * positive(config, "moe_intermediate_size")) if experts else None


def _v3_sparse(config: dict) -> LayerSpec:
    only(config, "scoring_func", "sigmoid")
    only(config, "topk_method", "noaux_tc")
    only(config, "moe_layer_freq", 1)
    return LayerSpec(latent(config), v3_router(config), ExpertSpec(positive(config, "moe_intermediate_size")), shared=shared(config))


def _v3_heads(config: dict) -> dict:
    return {"extra_heads": (_v3_sparse(config),) * count(config, "num_nextn_predict_layers", count(config, "num_mtp_layers"))}


_LATENT = ("qk_rope_head_dim", "qk_nope_head_dim", "kv_lora_rank", "v_head_dim")

V3 = Family(
    (*SHAPE, *_LATENT, "moe_intermediate_size", "n_routed_experts", "norm_topk_prob", "routed_scaling_factor"),
    (
        "num_key_value_heads", "q_lora_rank", "n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "rope_interleave",
        "attention_bias", "tie_word_embeddings", "num_nextn_predict_layers", "num_mtp_layers", "scoring_func", "topk_method", "moe_layer_freq",
    ),
    lambda config: dense_first(config, "first_k_dense_replace", _v3_sparse(config)),
    _v3_heads,
    no_effect=("ep_size", "aux_loss_alpha", "seq_aux", "head_dim", "qk_head_dim", "num_local_experts"),
)  # fmt: skip
