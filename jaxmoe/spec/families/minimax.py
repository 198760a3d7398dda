"""MiniMax-M2: norms over all heads at once, some of a head's channels turn, sigmoid scores with a bias for selection (transformers,
models/minimax_m2). Its heads of multi-token prediction are not released."""

from __future__ import annotations

from jaxmoe.spec.families.common import SHAPE, Family, attention, heads, only, positive, rope, rotary_part, router
from jaxmoe.spec.types import ExpertSpec, LayerSpec, RopeSpec, SpecError


def _rope(config: dict) -> RopeSpec:
    """`rotary_dim` says how many channels turn, or `partial_rotary_factor`, where transformers 5 saved the config."""
    head_dim = heads(config)[2]
    given = rope(config, head_dim, 5e6)
    if config.get("rotary_dim") is None:
        return given
    turned = positive(config, "rotary_dim")
    if turned > head_dim:
        raise SpecError(f"config.json: rotary_dim = {turned} is more than head_dim = {head_dim}")
    part = rotary_part(config)
    if part is not None and given.width != turned:
        raise SpecError(f"config.json: rotary_dim = {turned}, but partial_rotary_factor = {part!r} of head_dim = {head_dim}")
    return rope({**config, "partial_rotary_factor": turned / head_dim}, head_dim, 5e6)


def _layers(config: dict) -> list[LayerSpec]:
    for field, values in _ONLY.items():
        only(config, field, *values)
    kinds, layers = config.get("attn_type_list"), positive(config, "num_hidden_layers")
    if kinds is not None and kinds != [1] * layers:
        raise SpecError(f"config.json: attn_type_list = {kinds!r} is not supported (1, full attention, for each of {layers} layers is)")
    attend = attention(config, qk_norm="full", rope=_rope(config))
    experts = positive(config, "num_local_experts")
    # The gate is released in float32, and transformers computes its logits in the dtype of its weights.
    route = router(
        config, experts, matmul_dtype="float32", score="sigmoid", select_bias=True, normalize=True, weights_dtype="float32"
    )
    return [LayerSpec(attend, route, ExpertSpec(positive(config, "intermediate_size")))] * layers


_ONLY: dict[str, tuple] = {
    "qk_norm_type": ("per_layer",),
    "use_qk_norm": (True,),
    "attention_bias": (False,),
    "use_routing_bias": (True,),
    "scoring_func": ("sigmoid",),
    "norm_topk_prob": (True,),
    "shared_intermediate_size": (0, None),
    "sliding_window": (None,),
    "layernorm_full_attention_beta": (1.0,),
    "layernorm_linear_attention_beta": (1.0,),
    "layernorm_mlp_beta": (1.0,),
}
"""Fields of the publisher's own code, and the only values that transformers' model is right for."""

FAMILY = Family(
    (*SHAPE, "num_local_experts", "num_key_value_heads", "head_dim"),
    ("rotary_dim", "partial_rotary_factor", "attn_type_list", "tie_word_embeddings", *_ONLY),
    _layers,
    no_effect=("mlp_intermediate_size", "mtp_transformer_layers", "num_mtp_modules", "use_mtp", "shared_moe_mode", "swa_rope_theta"),
    models="MiniMax-M2",
)
