"""What each model family needs and what of it is supported, in words, read off the specs of small examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jaxmoe.spec import FAMILIES, AttentionSpec, LayerSpec, ModelSpec, RouterSpec

COLUMNS = ("family", "models", "routing", "attention", "feed-forward", "quantized on disk")
"""Of `table`."""

NOTE = (
    "Each family runs with its experts on the device or streamed (fused, layer-grouped, host-driven), with the same bits. Weights come as "
    "float32, float16 or bfloat16, one tensor an expert or a layer's experts in one; those that are quantized on disk are read as transformers "
    "reads them, and held in bfloat16 or float32."
)
"""What holds for all of them."""


def table(examples: Mapping[str, Iterable[dict]]) -> list[dict[str, str]]:
    """A row of `COLUMNS` per family.

    Args:
        examples: configs of each family that together show all it can have.
    """
    return [row(family, [ModelSpec.from_hf(config) for config in examples[family]]) for family in FAMILIES]


def row(family: str, specs: list[ModelSpec]) -> dict[str, str]:
    """A family's features, as its specs show them."""
    layers = [layer for spec in specs for layer in spec.layers]
    sparse = [layer for layer in layers if layer.router is not None]
    attentions = [layer.attention for layer in layers if layer.attention is not None]
    kinds = [words for a in attentions for words in attention(a)]
    if any(layer.delta is not None for layer in layers):
        kinds.append("gated delta layers")
    if any(spec.norm == "layer" for spec in specs):
        kinds.append("LayerNorm")
    return {
        "family": family,
        "models": FAMILIES[family].models,
        "routing": _joined(words for layer in sparse if layer.router for words in routing(layer.router)),
        "attention": _joined(kinds),
        "feed-forward": _joined([words for layer in layers for words in experts(layer)] + ["extra heads" for spec in specs if spec.extra_heads]),
        "quantized on disk": _joined(f"{name} blocks" if name == "fp8" else name for name in FAMILIES[family].formats),
    }


def routing(r: RouterSpec) -> list[str]:
    """The choices of a router's six stages that are not the plainest."""
    if r.select == "sparsemixer":
        return ["sparsemixer"]
    given = {"softmax_selected_logits": "softmax of the chosen", "sigmoid_selected_logits": "sigmoid of the chosen"}
    out = [given.get(r.weight_from, r.score)]
    if r.group_limit is not None:
        out.append("groups by their best" if r.group_limit.score == "max" else "groups by their two best")
    flags = {
        "selection bias": r.select_bias, "bias": r.logits_bias, "normalised": r.normalize, "scaled": r.scale != 1.0,
        "scale per expert": r.expert_scale, "own norm": r.input_norm, "scales the input": r.apply == "input",
    }  # fmt: skip
    return out + [words for words, there in flags.items() if there]


def attention(a: AttentionSpec) -> list[str]:
    """What attention has."""
    out = ["latent (MLA)" if a.latent is not None else "GQA"]
    rope = a.rope
    flags = {
        "norm per head": a.qk_norm == "head", "norm over heads": a.qk_norm == "full", "norm after rope": a.qk_norm == "after_rope",
        "window": a.window is not None, "chunks": a.chunk is not None, "sinks": a.sinks, "bias": a.qkv_bias, "clipped": a.clip is not None,
        "output gate": a.gate, "keys as values": a.values == "keys", "temperature": a.temperature is not None, "layers without rope": rope is None,
        "partial rope": rope is not None and a.latent is None and (rope.width < a.head_dim or rope.pairs is not None),
    }  # fmt: skip
    out += [words for words, there in flags.items() if there]
    return out + ([rope.scaling.kind] if rope is not None and rope.scaling is not None else [])


def experts(layer: LayerSpec) -> list[str]:
    """What a layer's feed-forward part has."""
    if layer.experts is None:
        return ["dense layers"] if layer.dense is not None else []
    flags = {
        "shared expert, gated": layer.shared is not None and layer.shared_gate, "shared experts": layer.shared is not None and not layer.shared_gate,
        "dense network beside": layer.dense is not None, "biases": layer.experts.bias,
    }  # fmt: skip
    glu = {"silu": "SwiGLU", "gelu": "GeGLU", "clamped_swiglu": "clamped SwiGLU"}[layer.experts.activation]
    return [glu, *(words for words, there in flags.items() if there)]


def _joined(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words)) or "-"


def markdown(rows: list[dict[str, str]]) -> str:
    """The table for a README."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS), *(" | ".join(row[name] for name in COLUMNS) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)
