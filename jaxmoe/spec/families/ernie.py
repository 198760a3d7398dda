"""ERNIE 4.5: neighbouring channels turn together, a bias for selection, experts in some of the layers (transformers, models/ernie4_5_moe).

Its heads of multi-token prediction are not read, as in transformers.
"""

from __future__ import annotations

from jaxmoe.spec.families.common import SHAPE, Family, attention, biases, count, heads, only, positive, router, whole_rope
from jaxmoe.spec.types import ExpertSpec, LayerSpec, SpecError


def _sparse_layers(config: dict) -> list[bool]:
    """Which layers have experts."""
    layers, every = positive(config, "num_hidden_layers"), positive(config, "moe_layer_interval")
    first, last = count(config, "moe_layer_start_index"), config.get("moe_layer_end_index")
    last = layers - 1 if last in (None, -1) else last
    if type(last) is not int or last < 0:
        raise SpecError(f"config.json: moe_layer_end_index = {last!r} must be a layer's index, or -1 for the last one's")
    sparse = [first <= i <= last and (i + 1) % every == 0 for i in range(layers)]
    if not any(sparse):
        raise SpecError(
            f"config.json: moe_layer_start_index = {first}, moe_layer_end_index = {last} and moe_layer_interval = {every} leave no layer with experts"
        )
    return sparse


def _layers(config: dict) -> list[LayerSpec]:
    for field, value in _ONLY.items():
        only(config, field, value, None)
    turning = whole_rope(config, heads(config)[2], 500000.0, "interleaved", wide=True)
    attend = attention(config, rope=turning, **biases(config, "use_bias"))
    least = config.get("moe_norm_min")
    least = 1e-12 if least is None else least
    if type(least) not in (int, float) or least < 0:
        raise SpecError(f"config.json: moe_norm_min = {least!r} must be a number of at least 0")
    route = router(
        config, positive(config, "moe_num_experts"), "moe_k", matmul_dtype="float32", select_bias=True, normalize=True, norm_min=float(least)
    )
    width, shared = positive(config, "moe_intermediate_size"), count(config, "moe_num_shared_experts")
    sparse = LayerSpec(attend, route, ExpertSpec(width), shared=ExpertSpec(shared * width, bias=attend.out_bias) if shared else None)
    dense = LayerSpec(attend, dense=ExpertSpec(positive(config, "intermediate_size"), bias=attend.out_bias))
    return [sparse if own else dense for own in _sparse_layers(config)]


def _model(config: dict) -> dict:
    given, bias = config.get("tie_word_embeddings"), bool(config.get("use_bias", False))
    tied = True if given is None else bool(given)  # configs that transformers 4 saved lack the field where it is true
    if tied and bias:
        raise SpecError(f"config.json: use_bias = True is not supported with tie_word_embeddings = {given!r}")
    return {"tied": tied, "head_bias": bias}


_ONLY = {
    "moe_gate": "topk",
    "moe_gate_act": "softmax",
    "scoring_func": "softmax",
    "moe_use_aux_free": True,
    "moe_norm_gate_logits": True,
    "moe_group_experts": False,
    "use_rmsnorm": True,
    "compression_ratio": 1.0,
}
"""Fields of the publisher's own code, and the only value that transformers' model is right for."""

FAMILY = Family(
    (
        *(field for field in SHAPE if field != "num_experts_per_tok"),
        "moe_num_experts", "moe_k", "moe_intermediate_size", "moe_num_shared_experts", "moe_layer_start_index", "moe_layer_interval",
    ),
    ("num_key_value_heads", "head_dim", "use_bias", "moe_norm_min", "moe_layer_end_index", "tie_word_embeddings", *_ONLY),
    _layers,
    _model,
    no_effect=(
        "num_nextn_predict_layers", "moe_capacity", "moe_aux_loss_lambda", "moe_z_loss_lambda", "moe_orthogonal_loss_lambda", "moe_dropout_prob",
        "moe_all_to_all_dropout", "moe_group", "hidden_dropout_prob", "attention_probs_dropout_prob",
    ),
    models="ERNIE-4.5-21B-A3B, 300B-A47B",
)  # fmt: skip
