"""Runs tiny random models in transformers and keeps their logits in tests/goldens, for machines that have no torch to compare with.

    python scripts/make_goldens.py [--out FOLDER]

Needs the `bench` extra. A model's weights follow from its config alone, so that only logits are kept; a test makes the same weights again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("checkpoints") is None:
    sys.path.insert(0, str(ROOT))

from safetensors.numpy import save_file

from checkpoints.families import LAYOUTS, hf_tensors
from jaxmoe.spec import ModelSpec

GOLDENS = ROOT / "tests" / "goldens"

_TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_QWEN3_MOE = {**_TINY, "model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 24, "head_dim": 16, "num_hidden_layers": 3}
_OLMOE = {**_TINY, "model_type": "olmoe", "num_experts": 8}
_MIXTRAL = {**_TINY, "model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": None}

CASES: dict[str, dict[str, Any]] = {
    "qwen3_moe_normalized": {
        **_QWEN3_MOE,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
        "rope_theta": 1e6,
    },
    "qwen3_moe_tied": {
        **_QWEN3_MOE,
        "num_hidden_layers": 4,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 2,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 10,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "olmoe_clipped": {**_OLMOE, "norm_topk_prob": False, "clip_qkv": 0.8, "num_key_value_heads": 4, "rope_theta": 1e4},
    "olmoe_normalized": {**_OLMOE, "norm_topk_prob": True, "clip_qkv": None, "attention_bias": True, "tie_word_embeddings": True},
    "mixtral_windowed": {**_MIXTRAL, "sliding_window": 16},
    "mixtral_full": {**_MIXTRAL, "sliding_window": None, "rope_theta": 2e4, "num_key_value_heads": 1},
}
"""Configs by name. Together they hold every field that a family's graph depends on, each with both kinds of value."""

LENGTHS = {"mixtral_windowed": (41, 150)}
"""Tokens of the two sequences where they are not `_LENGTHS`: a window that slides past a whole block of keys."""

_LENGTHS = (41, 37)

SMALLEST_GAP = 1e-4
"""Between the last chosen expert's logit and the first one left out: less, and rounding may choose another. Seeds are tried until one keeps it."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Runs tiny random models in transformers and keeps their logits."""

    out: Path = GOLDENS
    """Where the files go."""


def uniform(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 values of variance one. Raw bits of a generator are the same in every version of numpy; its distributions need not be."""
    raw = np.random.PCG64(seed).random_raw(math.prod(shape)) >> np.uint64(40)
    return ((raw.astype(np.float64) / 2**23 - 1.0) * math.sqrt(3.0)).astype(np.float32).reshape(shape)


def weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of a Hugging Face folder of this config, float32: norms around one, biases small, matrices such that activations stay near one."""
    spec = ModelSpec.from_hf(config)
    out = {}
    for name, (shape, _) in hf_tensors(spec, LAYOUTS[spec.family][0]).items():
        value = uniform(shape, zlib.crc32(f"{seed} {name}".encode()))
        if name.endswith("norm.weight"):
            out[name] = 1.0 + 0.2 * value
        elif name.endswith("bias"):
            out[name] = 0.2 * value
        else:
            gain = 0.5 if "embed_tokens" in name else 2.0 if "mlp.gate.weight" in name or "moe.gate.weight" in name else 1.0
            out[name] = value * np.float32(gain if "embed_tokens" in name else gain / math.sqrt(shape[-1]))
    return out


def write_folder(folder: Path, config: dict, seed: int = 0) -> Path:
    """A Hugging Face folder of this config with `weights`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def digest(config: dict, seed: int = 0) -> str:
    """SHA-256 of all weights in the order of their names: whether two machines made the same ones."""
    made = weights(config, seed)
    found = hashlib.sha256()
    for name in sorted(made):
        found.update(name.encode())
        found.update(made[name].astype("<f4").tobytes())
    return found.hexdigest()


def sequence(config: dict, length: int, seed: int) -> np.ndarray:
    """int32 token ids."""
    raw = np.random.PCG64(1000 + seed).random_raw(length)
    return (raw % np.uint64(config["vocab_size"])).astype(np.int32)


def load_transformers(folder: Path, dtype: str = "float32"):
    """The folder in transformers, in eager mode; refuses one whose tensors are not exactly those that the model has."""
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    wrong = {kind: sorted(names) for kind, names in info.items() if names}
    if wrong:
        raise ValueError(f"{folder}: transformers takes the tensors otherwise: {wrong}")
    return model.eval()


def run_transformers(model, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 logits [T, V] of one sequence, and [T] the smallest gap in any layer between a chosen expert's logit and one left out."""
    import torch

    with torch.no_grad():
        out = model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False, output_router_logits=True)
    active = model.config.num_experts_per_tok
    ranked = [np.sort(logits.float().numpy(), axis=-1)[:, ::-1] for logits in out.router_logits]
    gaps = np.min([r[:, active - 1] - r[:, active] for r in ranked], axis=0)
    return out.logits[0].float().numpy(), gaps


def run_case(name: str, seed: int) -> tuple[dict[str, np.ndarray], float]:
    """`{ids_0, logits_0, ids_1, logits_1}` of one case, and its smallest gap."""
    config, arrays, gap = CASES[name], {}, np.inf
    with tempfile.TemporaryDirectory() as folder:
        model = load_transformers(write_folder(Path(folder), config, seed))
        for i, length in enumerate(LENGTHS.get(name, _LENGTHS)):
            arrays[f"ids_{i}"] = sequence(config, length, i)
            arrays[f"logits_{i}"], gaps = run_transformers(model, arrays[f"ids_{i}"])
            gap = min(gap, float(gaps.min()))
    return arrays, gap


def make(name: str, out: Path) -> int:
    """Writes NAME.npz (ids and logits) and NAME.json (config, seed and provenance); returns their bytes."""
    import torch
    import transformers

    for seed in range(20):
        arrays, gap = run_case(name, seed)
        if gap >= SMALLEST_GAP:
            break
    else:
        raise ValueError(f"{name}: no seed of 20 keeps the experts' logits {SMALLEST_GAP} apart")
    made = {
        "config": CASES[name],
        "seed": seed,
        "weights_sha256": digest(CASES[name], seed),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__},
        "smallest_router_gap": round(gap, 6),
    }
    (out / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n")
    np.savez_compressed(out / f"{name}.npz", **arrays)
    return sum((out / f"{name}.{kind}").stat().st_size for kind in ("json", "npz"))


def main() -> int:
    """Makes every case's files."""
    args = tyro.cli(Arguments, description=__doc__)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        print(f"{name}: {make(name, args.out):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
