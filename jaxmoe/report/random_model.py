"""A random model to time: large where the shipped one is small."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from checkpoints.export import export_hf
from checkpoints.families import leaf_paths
from jaxmoe.spec import ModelSpec


def random_olmoe(folder: Path) -> Path:
    """A random model of OLMoE-1B-7B's routing (64 experts, 8 active) at half its widths, 3 layers: 1.3 GB in float32."""
    config = dict(
        model_type="olmoe", vocab_size=8192, hidden_size=1024, intermediate_size=512, num_hidden_layers=3, num_attention_heads=16,
        num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, norm_topk_prob=False, rms_norm_eps=1e-5, max_position_embeddings=4096,
        tie_word_embeddings=False, rope_theta=10000.0, hidden_act="silu", clip_qkv=None, attention_bias=False,
    )  # fmt: skip
    if not (folder / "model.safetensors").exists():
        spec = ModelSpec.from_hf(config)
        rng = np.random.default_rng(0)

        def leaf(path: str, shape):
            return np.ones(shape, np.float32) if path.endswith("scale") else rng.normal(0, 0.02, shape).astype(np.float32)

        export_hf(spec, {p: leaf(p, x.shape) for p, x in leaf_paths(spec).items()}, config, folder, "float32")
        jax.clear_caches()
    return folder
