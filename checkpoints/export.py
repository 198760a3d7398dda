"""Writes weights as a Hugging Face folder: the converter's tables, read the other way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from checkpoints.errors import CheckpointError
from checkpoints.families import hf_tensors, layouts_of, pinned_paths
from jaxmoe import formats
from jaxmoe.spec import ModelSpec


def export_hf(spec: ModelSpec, leaves: Mapping[str, np.ndarray], config: dict, folder: Path, dtype: str) -> int:
    """Writes `model.safetensors` and `config.json`, in the family's first layout for plain weights.

    Args:
        spec: the model.
        leaves: canonical arrays by dotted path, such as `experts.0.gate`; float32, or bfloat16 held as uint16, each on its own.
        config: the config.json to go with them; its `dtype` is set.
        folder: made if it isn't there.
        dtype: 'float32' or 'bfloat16' on disk; float32 is rounded to nearest even. Tensors of leaves that are float32 in any model stay so.

    Returns:
        Bytes of `model.safetensors`.

    Raises:
        CheckpointError: a leaf is missing or has another shape.
    """
    tensors = {}
    pinned = pinned_paths(spec)
    for name, (shape, parts) in hf_tensors(spec, layouts_of(spec)[0]).items():
        kind = "float32" if all(path in pinned for path, _ in parts) else dtype
        out = np.empty(shape, formats.leaf_dtype(kind))
        for path, piece in parts:
            if path not in leaves:
                raise CheckpointError(f"{path}: missing, {name} needs it")
            leaf = leaves[path] if piece.expert is None else leaves[path][piece.expert]
            if leaf.shape != piece.shape:
                raise CheckpointError(f"{path}: its shape is {leaf.shape}, {name} needs {piece.shape}")
            view = piece.view(out)
            view[...] = formats.store_numpy(piece.to_hf(leaf), kind).reshape(view.shape)
        tensors[name] = out.view(ml_dtypes.bfloat16) if kind == "bfloat16" else out
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "model.safetensors"
    save_file(tensors, target, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")
    return target.stat().st_size
