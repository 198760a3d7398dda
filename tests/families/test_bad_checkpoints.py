"""A folder with a tensor missing, one too many and one of another shape: one line names all three, before anything is written; for every family."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints.convert import convert
from checkpoints.errors import CheckpointError
from scripts import golden_cases, make_goldens


@pytest.mark.parametrize("family", golden_cases.FAMILIES)
def test_everything_that_is_wrong_is_listed(tmp_path, family):
    case = next(iter(golden_cases.FAMILIES[family].values()))
    folder = make_goldens.write_folder(tmp_path / "hf", case.config)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    missing, misshapen = names[len(names) // 3], next(name for name in names[len(names) // 2 :] if tensors[name].ndim > 1)
    del tensors[missing]
    tensors[misshapen] = np.zeros((*tensors[misshapen].shape[:-1], tensors[misshapen].shape[-1] + 1), np.float32)
    tensors["model.layers.0.novel_gate.weight"] = np.zeros(3, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / "out")
    message = str(caught.value)
    assert all(name in message for name in (missing, misshapen, "model.layers.0.novel_gate.weight")) and "\n" not in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
