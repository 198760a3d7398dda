"""A model that no family has: one layer of each kind, whose tensors lie on disk in every way that a rule can describe.

`tensors` puts the leaves into place by loops, knowing nothing of rules.
"""

import ml_dtypes
import numpy as np

from checkpoints.families import Layout, Rule, leaf_paths
from checkpoints.families.common import ATTENTION, IGNORED, TOP, moved
from jaxmoe.spec.types import (
    AttentionSpec,
    DeltaSpec,
    ExpertSpec,
    LatentSpec,
    LayerSpec,
    ModelSpec,
    Precision,
    RopeSpec,
    RouterSpec,
    Segment,
)

D, V, E, F, H, K, C = 32, 11, 3, 32, 4, 2, 6
DELTA = DeltaSpec(k_heads=2, v_heads=4, k_dim=3, v_dim=5, conv=4)
LATENT = LatentSpec(kv_rank=5, q_rank=7, plain=4, value=3)
R = 2
SHARED = 4

_GQA = AttentionSpec(H, K, C, gate=True, sinks=True)
_ROUTER = RouterSpec(E, 2, select_bias=True)
LAYERS = (
    LayerSpec(None, _ROUTER, ExpertSpec(F), shared=ExpertSpec(SHARED), shared_gate=True, delta=DELTA, layer_scale=True),
    LayerSpec(AttentionSpec(2, 2, 6, latent=LATENT, rope=RopeSpec(width=R)), dense=ExpertSpec(F)),
    LayerSpec(_GQA, RouterSpec(E, 2, matmul_dtype="float32", logits_bias=True), ExpertSpec(F, bias=True)),
)
SPEC = ModelSpec(
    family="odd",
    vocab=V,
    width=D,
    segments=tuple(Segment((layer,), 1, i) for i, layer in enumerate(LAYERS)),
    norm_eps=1e-6,
    max_positions=64,
    extra_heads=(LayerSpec(_GQA, _ROUTER, ExpertSpec(F)),),
    precision=Precision("bfloat16", "bfloat16", kv="bfloat16"),
)
"""In bfloat16; float32 are the selection biases and layer 2's router."""

PINNED = {
    "params.layers.0.router.select_bias",
    "params.layers.2.router.kernel",
    "params.layers.2.router.bias",
    "params.extra.0.layer.router.select_bias",
}

_L = "model.layers.{layer}."
_A = _L + "self_attn."


def _qkvz(which: str):
    def rows(layer):
        d = layer.delta
        wide = d.v_heads // d.k_heads * d.v_dim
        start, size = {"q": (0, d.k_dim), "k": (d.k_dim, d.k_dim), "v": (2 * d.k_dim, wide), "z": (2 * d.k_dim + wide, wide)}[which]
        return start, start + size, 2 * d.k_dim + 2 * wide

    return rows


def _conv(which: str):
    def rows(layer):
        d = layer.delta
        one, two = d.k_heads * d.k_dim, d.v_heads * d.v_dim
        start, size = {"q": (0, one), "k": (one, one), "v": (2 * one, two)}[which]
        return start, start + size, 2 * one + two

    return rows


_BOTH, _KV = LATENT.plain + LATENT.value, LATENT.kv_rank + R

LAYER = {
    **ATTENTION,
    "router.kernel": Rule(_L + "mlp.gate.weight", in_axes=1),
    "router.bias": Rule(_L + "mlp.gate.bias"),
    "router.select_bias": Rule(_L + "mlp.correction", unit_axis=0),
    "attn.q.kernel": Rule(_A + "q_proj.weight", in_axes=1, rows=lambda layer: (0, layer.attention.head_dim, 2 * layer.attention.head_dim)),
    "attn.gate.kernel": Rule(
        _A + "q_proj.weight", in_axes=1, rows=lambda layer: (layer.attention.head_dim, 2 * layer.attention.head_dim, 2 * layer.attention.head_dim)
    ),
    "attn.sinks.scale": Rule(_A + "sinks"),
    "attn.q_down.kernel": Rule(_A + "q_a.weight", in_axes=1),
    "attn.q_norm.scale": Rule(_A + "q_a_norm.weight"),
    "attn.q_up.kernel": Rule(_A + "q_b.weight", in_axes=1),
    "attn.kv_down.kernel": Rule(_A + "kv_a.weight", in_axes=1, rows=lambda layer: (0, LATENT.kv_rank, _KV)),
    "attn.k_rope.kernel": Rule(_A + "kv_a.weight", in_axes=1, rows=lambda layer: (LATENT.kv_rank, _KV, _KV)),
    "attn.kv_norm.scale": Rule(_A + "kv_a_norm.weight"),
    "attn.k_up.kernel": Rule(_A + "kv_b.weight", matrix=2, rows=lambda layer: (0, LATENT.plain, _BOTH)),
    "attn.v_up.kernel": Rule(_A + "kv_b.weight", matrix=2, rows=lambda layer: (LATENT.plain, _BOTH, _BOTH)),
    **{f"delta.{name}.kernel": Rule(_L + "delta.qkvz.weight", in_axes=1, rows=_qkvz(name)) for name in "qkvz"},
    **{f"delta.conv_{name}.kernel": Rule(_L + "delta.conv1d.weight", matrix=2, unit_axis=1, rows=_conv(name)) for name in "qkv"},
    "delta.beta.kernel": Rule(_L + "delta.ba.weight", in_axes=1, rows=(0, 2, 4)),
    "delta.decay.kernel": Rule(_L + "delta.ba.weight", in_axes=1, rows=(2, 4, 4)),
    "delta.a_log.scale": Rule(_L + "delta.A_log"),
    "delta.dt_bias.bias": Rule(_L + "delta.dt_bias"),
    "delta.norm.scale": Rule(_L + "delta.norm.weight"),
    "delta.o.kernel": Rule(_L + "delta.out.weight", in_axes=2),
    "mlp.gate.kernel": Rule(_L + "mlp.input.weight", in_axes=1, part=(0, 2)),
    "mlp.up.kernel": Rule(_L + "mlp.input.weight", in_axes=1, part=(1, 2)),
    "mlp.down.kernel": Rule(_L + "mlp.output", in_axes=1, transposed=True),
    **{f"shared.{name}.kernel": Rule(_L + f"mlp.shared.{name}.weight", in_axes=1) for name in ("gate", "up", "down")},
    "shared_gate.kernel": Rule(_L + "mlp.shared_gate.weight", in_axes=1),
    "layer_scale.scale": Rule(_L + "scalar"),
    "expert_bias.w_in": Rule(_L + "mlp.experts.gate_up_bias", order=(0, 2, 1), matrix=1),
    "expert_bias.w_out": Rule(_L + "mlp.experts.down_bias", matrix=1),
}

_X = _L + "mlp.experts."
EXPERTS = {
    "single": {name: Rule(_X + f"{{expert}}.{name}.weight", in_axes=1) for name in ("gate", "up", "down")},
    "stacked": {
        "gate": Rule(_X + "gate_up", in_axes=1, part=(0, 2), experts=True),
        "up": Rule(_X + "gate_up", in_axes=1, part=(1, 2), experts=True),
        "down": Rule(_X + "down", in_axes=1, experts=True),
    },
    "interleaved": {
        "gate": Rule(_X + "gate_up", in_axes=1, rows=(0, 1, 2), experts=True),
        "up": Rule(_X + "gate_up", in_axes=1, rows=(1, 2, 2), experts=True),
        "down": Rule(_X + "down", in_axes=1, experts=True),
    },
    "transposed_stacked": {
        "gate": Rule(_X + "gate_up", in_axes=1, part=(0, 2), transposed=True, experts=True),
        "up": Rule(_X + "gate_up", in_axes=1, part=(1, 2), transposed=True, experts=True),
        "down": Rule(_X + "down", in_axes=1, transposed=True, experts=True),
    },
    "transposed_interleaved": {
        "gate": Rule(_X + "gate_up", in_axes=1, rows=(0, 1, 2), transposed=True, experts=True),
        "up": Rule(_X + "gate_up", in_axes=1, rows=(1, 2, 2), transposed=True, experts=True),
        "down": Rule(_X + "down", in_axes=1, transposed=True, experts=True),
    },
}

_HEAD = "heads.{head}."
EXTRA = {
    "embed_norm.scale": Rule(_HEAD + "enorm.weight"),
    "hidden_norm.scale": Rule(_HEAD + "hnorm.weight"),
    "join.kernel": Rule(_HEAD + "join.weight", in_axes=2),
    "norm.scale": Rule(_HEAD + "norm.weight"),
    **moved({name: LAYER[name] for name in ("attn.q.kernel", "attn.gate.kernel")}, _L, _HEAD + "layer.", "layer."),
    **moved(EXPERTS["single"], _L, _HEAD + "layer.", "experts."),
}
"""Attention's q and gate, and the experts, under names of their own; what else the layer has, under the next layer's."""


def layout(experts: str = "single", prefixes=(), packed: str = "") -> Layout:
    ignored = (*IGNORED, r"vision\..*", r"model\.layers\.{n_layers}\.embed\.weight")
    return Layout(f"odd-{experts}", TOP, LAYER, EXPERTS[experts], ignored, EXTRA, prefixes, packed)


def random_leaves(dtype: str = "bfloat16", seed: int = 0) -> dict[str, np.ndarray]:
    """Every leaf by its path; bfloat16 as such."""
    rng = np.random.default_rng(seed)
    kinds = {np.dtype(np.uint16): ml_dtypes.bfloat16, np.dtype(np.float32): np.float32}
    leaves = leaf_paths(SPEC.with_precision(dtype))
    return {path: rng.standard_normal(leaf.shape, dtype=np.float32).astype(kinds[leaf.dtype]) for path, leaf in leaves.items()}


def tensors(leaves: dict[str, np.ndarray], experts: str = "single") -> dict[str, np.ndarray]:
    """The Hugging Face tensors that hold these leaves."""
    out = {
        "model.embed_tokens.weight": leaves["params.embed.table"],
        "model.norm.weight": leaves["params.final_norm.scale"],
        "lm_head.weight": leaves["params.lm_head.kernel"].T,
    }
    for i in range(3):
        own = {path.removeprefix(f"params.layers.{i}."): leaf for path, leaf in leaves.items() if path.startswith(f"params.layers.{i}.")}
        out |= {f"model.layers.{i}.{name}": value for name, value in _layer(own).items()}
    for i in (0, 2):
        own = {name: leaves[f"experts.{i}.{name}"] for name in ("gate", "up", "down")}
        out |= {f"model.layers.{i}.mlp.experts.{name}": value for name, value in _experts(own, experts).items()}
    own = {path.removeprefix("params.extra.0.layer."): leaf for path, leaf in leaves.items() if path.startswith("params.extra.0.layer.")}
    for name, value in _layer(own).items():
        out[f"heads.0.layer.{name}" if name == "self_attn.q_proj.weight" else f"model.layers.3.{name}"] = value
    for name in ("gate", "up", "down"):
        for e in range(E):
            out[f"heads.0.layer.mlp.experts.{e}.{name}.weight"] = leaves[f"experts.3.{name}"][e].T
    for ours, theirs in (("embed_norm", "enorm"), ("hidden_norm", "hnorm"), ("norm", "norm")):
        out[f"heads.0.{theirs}.weight"] = leaves[f"params.extra.0.{ours}.scale"]
    out["heads.0.join.weight"] = np.concatenate([leaves["params.extra.0.join.kernel"][n].T for n in (0, 1)], axis=1)
    return {name: np.ascontiguousarray(value) for name, value in out.items()}


def _experts(own: dict[str, np.ndarray], form: str) -> dict[str, np.ndarray]:
    if form == "single":
        return {f"{e}.{name}.weight": own[name][e].T for name in own for e in range(E)}
    gate_up = np.empty((E, D, 2 * F), own["gate"].dtype)
    for f in range(F):
        for j, name in enumerate(("gate", "up")):
            gate_up[:, :, 2 * f + j if "interleaved" in form else j * F + f] = own[name][:, :, f]
    if form.startswith("transposed"):
        return {"gate_up": gate_up, "down": own["down"]}
    return {"gate_up": gate_up.swapaxes(1, 2), "down": own["down"].swapaxes(1, 2)}


def _layer(own: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {"input_layernorm.weight": own["norm_attn.scale"], "post_attention_layernorm.weight": own["norm_mlp.scale"]}
    if "delta.q.kernel" in own:
        out |= _delta(own)
    elif "attn.kv_down.kernel" in own:
        out |= _latent(own)
    else:
        rows = []
        for h in range(H):
            rows += [own["attn.q.kernel"][:, h].T, own["attn.gate.kernel"][:, h].T]
        out["self_attn.q_proj.weight"] = np.concatenate(rows)
        for name in "kv":
            out[f"self_attn.{name}_proj.weight"] = own[f"attn.{name}.kernel"].reshape(D, -1).T
        out["self_attn.o_proj.weight"] = own["attn.o.kernel"].reshape(-1, D).T
        out["self_attn.sinks"] = own["attn.sinks.scale"]
    if "router.kernel" in own:
        out["mlp.gate.weight"] = own["router.kernel"].T
    if "router.bias" in own:
        out["mlp.gate.bias"] = own["router.bias"]
    if "router.select_bias" in own:
        out["mlp.correction"] = own["router.select_bias"][None]
    if "shared.gate.kernel" in own:
        out |= {f"mlp.shared.{name}.weight": own[f"shared.{name}.kernel"].T for name in ("gate", "up", "down")}
        out["mlp.shared_gate.weight"] = own["shared_gate.kernel"].T
    if "mlp.gate.kernel" in own:
        out["mlp.input.weight"] = np.concatenate([own["mlp.gate.kernel"].T, own["mlp.up.kernel"].T])
        out["mlp.output"] = own["mlp.down.kernel"]
    if "layer_scale.scale" in own:
        out["scalar"] = own["layer_scale.scale"]
    if "expert_bias.w_in" in own:
        bias = np.empty((E, 2 * F), own["expert_bias.w_in"].dtype)
        for f in range(F):
            bias[:, 2 * f], bias[:, 2 * f + 1] = own["expert_bias.w_in"][:, 0, f], own["expert_bias.w_in"][:, 1, f]
        out |= {"mlp.experts.gate_up_bias": bias, "mlp.experts.down_bias": own["expert_bias.w_out"]}
    return out


def _latent(own: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    heads = []
    for h in range(2):
        heads += [own["attn.k_up.kernel"][h], own["attn.v_up.kernel"][h]]
    return {
        "self_attn.q_a.weight": own["attn.q_down.kernel"].T,
        "self_attn.q_a_norm.weight": own["attn.q_norm.scale"],
        "self_attn.q_b.weight": own["attn.q_up.kernel"].reshape(LATENT.q_rank, -1).T,
        "self_attn.kv_a.weight": np.concatenate([own["attn.kv_down.kernel"].T, own["attn.k_rope.kernel"].T]),
        "self_attn.kv_a_norm.weight": own["attn.kv_norm.scale"],
        "self_attn.kv_b.weight": np.concatenate(heads),
        "self_attn.o_proj.weight": own["attn.o.kernel"].reshape(-1, D).T,
    }


def _delta(own: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    each, rows, pairs = DELTA.v_heads // DELTA.k_heads, [], []
    for h in range(DELTA.k_heads):
        rows += [own[f"delta.{name}.kernel"][:, h].T for name in "qk"]
        for name in "vz":
            rows += [own[f"delta.{name}.kernel"][:, h * each + j].T for j in range(each)]
        for name in ("beta", "decay"):
            pairs += [own[f"delta.{name}.kernel"][:, h * each + j] for j in range(each)]
    return {
        "delta.qkvz.weight": np.concatenate(rows),
        "delta.ba.weight": np.stack(pairs),
        "delta.conv1d.weight": np.concatenate([own[f"delta.conv_{name}.kernel"].reshape(-1, DELTA.conv) for name in "qkv"])[:, None],
        "delta.A_log": own["delta.a_log.scale"],
        "delta.dt_bias": own["delta.dt_bias.bias"],
        "delta.norm.weight": own["delta.norm.scale"],
        "delta.out.weight": own["delta.o.kernel"].reshape(-1, D).T,
    }
