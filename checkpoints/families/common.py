"""Rules that many families share: names as Llama and Qwen have them."""

from __future__ import annotations

from checkpoints.families.rules import Layout, Rule, moved

TOP = {
    "embed.table": Rule("model.embed_tokens.weight", matrix=1),
    "final_norm.scale": Rule("model.norm.weight"),
    "lm_head.kernel": Rule("lm_head.weight", in_axes=1),
}
"""What is outside the layers; the same for every family so far."""

_L = "model.layers.{layer}."

ATTENTION = {
    "norm_attn.scale": Rule(_L + "input_layernorm.weight"),
    "norm_mlp.scale": Rule(_L + "post_attention_layernorm.weight"),
    "attn.q.kernel": Rule(_L + "self_attn.q_proj.weight", in_axes=1),
    "attn.k.kernel": Rule(_L + "self_attn.k_proj.weight", in_axes=1),
    "attn.v.kernel": Rule(_L + "self_attn.v_proj.weight", in_axes=1),
    "attn.o.kernel": Rule(_L + "self_attn.o_proj.weight", in_axes=2),
    "attn.q.bias": Rule(_L + "self_attn.q_proj.bias"),
    "attn.k.bias": Rule(_L + "self_attn.k_proj.bias"),
    "attn.v.bias": Rule(_L + "self_attn.v_proj.bias"),
    "attn.o.bias": Rule(_L + "self_attn.o_proj.bias"),
    "attn.q_norm.scale": Rule(_L + "self_attn.q_norm.weight"),
    "attn.k_norm.scale": Rule(_L + "self_attn.k_norm.weight"),
}
"""Norms and grouped-query attention, as Llama named them."""

MLP = {
    "router.kernel": Rule(_L + "mlp.gate.weight", in_axes=1),
    "mlp.gate.kernel": Rule(_L + "mlp.gate_proj.weight", in_axes=1),
    "mlp.up.kernel": Rule(_L + "mlp.up_proj.weight", in_axes=1),
    "mlp.down.kernel": Rule(_L + "mlp.down_proj.weight", in_axes=1),
}
"""Router and dense feed-forward layers, as Qwen named them."""

EXPERTS = {
    "gate": Rule(_L + "mlp.experts.{expert}.gate_proj.weight", in_axes=1),
    "up": Rule(_L + "mlp.experts.{expert}.up_proj.weight", in_axes=1),
    "down": Rule(_L + "mlp.experts.{expert}.down_proj.weight", in_axes=1),
}
"""One tensor per expert and matrix, as Qwen named them."""

FUSED_EXPERTS = {
    "gate": Rule(_L + "mlp.experts.gate_up_proj", in_axes=1, part=(0, 2), experts=True),
    "up": Rule(_L + "mlp.experts.gate_up_proj", in_axes=1, part=(1, 2), experts=True),
    "down": Rule(_L + "mlp.experts.down_proj", in_axes=1, experts=True),
}
"""All experts of a layer in `[E, 2F, D]` and `[E, D, F]`: transformers 5's modules, saved by
`save_pretrained(save_original_format=False)`."""

BUFFERS = (r"(.+\.)?rotary_emb\.inv_freq",)
"""Buffers that older conversions saved and nothing needs: the positions' frequencies follow from the config."""

IGNORED = BUFFERS
"""What every layout passes over."""

__all__ = ["ATTENTION", "BUFFERS", "EXPERTS", "FUSED_EXPERTS", "IGNORED", "MLP", "TOP", "Layout", "Rule", "moved"]
