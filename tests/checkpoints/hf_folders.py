"""Tiny Hugging Face folders with random weights: the three families, whole or in shards, per expert or fused.

Names and layouts are written out by hand here, not taken from `checkpoints.families`, so that the two can disagree.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BASE = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}

CONFIGS = {
    "mixtral": {**BASE, "model_type": "mixtral", "num_local_experts": 3, "rope_theta": 1e6, "sliding_window": None},
    "olmoe": {**BASE, "model_type": "olmoe", "num_experts": 4, "norm_topk_prob": False, "rope_theta": 1e4},
    "qwen3_moe": {
        **BASE,
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "attention_bias": True,
        "rope_theta": 1e6,
    },
}


def head_dim(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def shapes(config: dict, fused: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor that a folder of this config holds."""
    kind, d, v, c = config["model_type"], config["hidden_size"], config["vocab_size"], head_dim(config)
    h, k = config["num_attention_heads"] * c, config["num_key_value_heads"] * c
    out = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (v, d)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        out[at + "input_layernorm.weight"] = out[at + "post_attention_layernorm.weight"] = (d,)
        out |= {at + f"self_attn.{n}_proj.weight": (w, d) for n, w in (("q", h), ("k", k), ("v", k))}
        out[at + "self_attn.o_proj.weight"] = (d, h)
        if config.get("attention_bias"):
            out |= {at + f"self_attn.{n}_proj.bias": (w,) for n, w in (("q", h), ("k", k), ("v", k), ("o", d))}
        if kind == "olmoe":
            out |= {at + "self_attn.q_norm.weight": (h,), at + "self_attn.k_norm.weight": (k,)}
        if kind == "qwen3_moe":
            out |= {at + "self_attn.q_norm.weight": (c,), at + "self_attn.k_norm.weight": (c,)}
        out |= _feed_forward(config, i, at, fused)
    return out


def _feed_forward(config: dict, layer: int, at: str, fused: bool) -> dict[str, tuple[int, ...]]:
    kind, d = config["model_type"], config["hidden_size"]
    if layer in config.get("mlp_only_layers", ()):
        f = config["intermediate_size"]
        return {
            at + "mlp.gate_proj.weight": (f, d),
            at + "mlp.up_proj.weight": (f, d),
            at + "mlp.down_proj.weight": (d, f),
        }
    e, f = expert_sizes(config)
    if fused:
        return {
            at + "mlp.gate.weight": (e, d),
            at + "mlp.experts.gate_up_proj": (e, 2 * f, d),
            at + "mlp.experts.down_proj": (e, d, f),
        }
    moe, gate, up, down = expert_names(kind)
    out = {f"{at}{moe}.gate.weight": (e, d)}
    for j in range(e):
        where = f"{at}{moe}.experts.{j}."
        out |= {f"{where}{gate}.weight": (f, d), f"{where}{up}.weight": (f, d), f"{where}{down}.weight": (d, f)}
    return out


def expert_sizes(config: dict) -> tuple[int, int]:
    """E and F."""
    count = config.get("num_experts") or config["num_local_experts"]
    return count, config.get("moe_intermediate_size", config["intermediate_size"])


def expert_names(kind: str) -> tuple[str, str, str, str]:
    if kind == "mixtral":
        return "block_sparse_moe", "w1", "w3", "w2"
    return "mlp", "gate_proj", "up_proj", "down_proj"


def random_tensors(config: dict, dtype="float32", seed: int = 0, fused: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    kind = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    return {
        name: rng.standard_normal(shape, dtype=np.float32).astype(kind) for name, shape in shapes(config, fused).items()
    }


def write_folder(
    folder: Path, config: dict, tensors: dict[str, np.ndarray], shards: int = 1, files: dict[str, str] | None = None
) -> Path:
    """Writes config, weights (spread over `shards` files, neighbours in different ones) and small files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for s in range(shards):
        name = f"model-{s + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[s::shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def tiny(
    folder: Path, family: str, dtype: str = "float32", shards: int = 1, fused: bool = False, seed: int = 0, **changes
) -> Path:
    """A folder of a family's tiny config."""
    config = {**CONFIGS[family], **changes}
    return write_folder(folder, config, random_tensors(config, dtype, seed, fused), shards)


def expected_trees(config: dict, tensors: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """What (params, experts) must be, in the tensors' own dtype: from per-expert names."""
    d, c, kind = config["hidden_size"], head_dim(config), config["model_type"]
    h, k = config["num_attention_heads"], config["num_key_value_heads"]
    t = {name.removeprefix("model."): value for name, value in tensors.items()}
    params: dict = {
        "embed": {"table": t["embed_tokens.weight"]},
        "final_norm": {"scale": t["norm.weight"]},
        "layers": {},
    }
    if "lm_head.weight" in t:
        params["lm_head"] = {"kernel": t["lm_head.weight"].T}
    experts: dict = {}
    moe, gate, up, down = expert_names(kind)
    for i in range(config["num_hidden_layers"]):
        at, a = f"layers.{i}.", f"layers.{i}.self_attn."
        attn = {
            "q": {"kernel": t[a + "q_proj.weight"].T.reshape(d, h, c)},
            "k": {"kernel": t[a + "k_proj.weight"].T.reshape(d, k, c)},
            "v": {"kernel": t[a + "v_proj.weight"].T.reshape(d, k, c)},
            "o": {"kernel": t[a + "o_proj.weight"].T.reshape(h, c, d)},
        }
        if config.get("attention_bias"):
            for n, heads in (("q", h), ("k", k), ("v", k)):
                attn[n]["bias"] = t[a + f"{n}_proj.bias"].reshape(heads, c)
            attn["o"]["bias"] = t[a + "o_proj.bias"]
        if a + "q_norm.weight" in t:
            full = kind == "olmoe"
            attn["q_norm"] = {"scale": t[a + "q_norm.weight"].reshape((h, c) if full else (c,))}
            attn["k_norm"] = {"scale": t[a + "k_norm.weight"].reshape((k, c) if full else (c,))}
        layer = {
            "norm_attn": {"scale": t[at + "input_layernorm.weight"]},
            "norm_mlp": {"scale": t[at + "post_attention_layernorm.weight"]},
            "attn": attn,
        }
        if i in config.get("mlp_only_layers", ()):
            layer["mlp"] = {n: {"kernel": t[f"{at}mlp.{n}_proj.weight"].T} for n in ("gate", "up", "down")}
        else:
            layer["router"] = {"kernel": t[f"{at}{moe}.gate.weight"].T}
            count, _ = expert_sizes(config)
            experts[str(i)] = {
                ours: np.stack([t[f"{at}{moe}.experts.{j}.{theirs}.weight"].T for j in range(count)])
                for ours, theirs in (("gate", gate), ("up", up), ("down", down))
            }
        params["layers"][str(i)] = layer
    return params, experts


def fuse(config: dict, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights under the names of transformers 5's own modules."""
    moe, gate, up, down = expert_names(config["model_type"])
    out = {name: value for name, value in tensors.items() if f".{moe}.experts." not in name}
    out = {name.replace(f".{moe}.gate.", ".mlp.gate."): value for name, value in out.items()}
    count, _ = expert_sizes(config)
    for i in range(config["num_hidden_layers"]):
        if i in config.get("mlp_only_layers", ()):
            continue
        at = f"model.layers.{i}.{moe}.experts."
        pairs = [np.concatenate([tensors[f"{at}{j}.{n}.weight"] for n in (gate, up)]) for j in range(count)]
        out[f"model.layers.{i}.mlp.experts.gate_up_proj"] = np.stack(pairs)
        out[f"model.layers.{i}.mlp.experts.down_proj"] = np.stack(
            [tensors[f"{at}{j}.{down}.weight"] for j in range(count)]
        )
    return out
