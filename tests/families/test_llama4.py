"""Llama 4 beyond its goldens: what a checkpoint of images and text also holds, and the two spellings of one model."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints.convert import convert
from checkpoints.errors import CheckpointError
from checkpoints.load import open_checkpoint
from jaxmoe.spec import ModelSpec, Temperature
from jaxmoe.spec.params import parameter_counts
from jaxmoe.spec.published import published
from scripts import golden_cases, make_goldens
from tests.families.real_llama4 import REAL

NESTED = golden_cases.CASES["llama4_nested"].config
SEEING = {"vision_model.class_embedding": 16, "vision_model.model.layers.0.mlp.fc1.weight": 24, "multi_modal_projector.linear_1.weight": 8}
"""Tensors that see images, and how many numbers each holds."""


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of images and text."""
    folder = make_goldens.write_folder(tmp_path / "hf", NESTED)
    more = {name: np.ones(size, np.float32) for name, size in SEEING.items()}
    save_file(load_file(folder / "model.safetensors") | more, folder / "model.safetensors")
    return folder


def test_what_sees_images_is_passed_over_and_listed(folder, tmp_path):
    manifest = convert(folder, tmp_path / "out")
    assert set(manifest.ignored) == set(SEEING)
    assert manifest.dropped == (len(SEEING), 4 * sum(SEEING.values()))


def test_a_tensor_of_neither_part_is_refused(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"audio_model.weight": np.ones(2, np.float32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="unexpected, which the config has no place for: audio_model.weight$"):
        convert(folder, tmp_path / "out")


def test_the_text_model_alone_is_the_same(folder, tmp_path):
    convert(folder, tmp_path / "whole")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_text(json.dumps(NESTED["text_config"]))
    tensors = {n.removeprefix("language_model."): t for n, t in load_file(folder / "model.safetensors").items() if n not in SEEING}
    save_file(tensors, alone / "model.safetensors")
    convert(alone, tmp_path / "text")
    whole, text = open_checkpoint(tmp_path / "whole"), open_checkpoint(tmp_path / "text")
    assert whole.spec.segments == text.spec.segments and whole.manifest.leaves.keys() == text.manifest.leaves.keys()
    for path in whole.manifest.leaves:
        np.testing.assert_array_equal(whole.read(path), text.read(path), err_msg=path)


def test_temperatures_of_the_first_released_configs():
    """They have none of the fields: layers without positions have a temperature all the same."""
    config = {key: value for key, value in NESTED["text_config"].items() if key not in ("attn_temperature_tuning", "floor_scale", "attn_scale")}
    layers = ModelSpec.from_hf(config).layers
    assert [layer.attention.temperature for layer in layers] == [None, Temperature(8192.0, 0.1)]


@pytest.mark.parametrize("name", REAL)
def test_activated_parameters_round_to_those_published(name):
    """17B, for both: the publisher counts the embedding's table too."""
    spec = published(name)
    assert round((parameter_counts(spec)[1] + spec.vocab * spec.width) / 1e9) == 17
