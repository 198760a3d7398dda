"""What Gemma 4's reader and names have that no other family's do."""

import copy
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints.convert import convert
from checkpoints.errors import CheckpointError
from checkpoints.load import open_checkpoint
from jaxmoe.spec import ModelSpec
from scripts import make_goldens
from scripts.golden_cases import CASES

TOWERS = ("model.vision_tower.encoder.layers.0.mlp.down_proj.linear.weight", "model.embed_vision.embedding_projection.weight", "model.audio_tower.x")


def with_more(folder, names) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, **{name: np.ones((3, 5), np.float32) for name in names}}, folder / "model.safetensors")


def test_both_spellings_of_the_wider_heads():
    """In fields of their own, as released, and by layer, as transformers 5 saves them; what is as in other layers it leaves out."""
    config = copy.deepcopy(CASES["gemma4_text_keys"].config)
    by_layer = {**config, "global_head_dim": None, "num_global_key_value_heads": None}
    own = {"head_dim": 24, "num_key_value_heads": 1}
    assert ModelSpec.from_hf({**by_layer, "per_layer_config": {"1": own, "3": own}}) == ModelSpec.from_hf(config)
    padded = {"01": own, "03": own}  # as transformers writes them where there are more than nine layers
    assert ModelSpec.from_hf({**by_layer, "per_layer_config": padded}) == ModelSpec.from_hf(config)
    same = {**config, "global_head_dim": config["head_dim"], "num_global_key_value_heads": None}
    assert ModelSpec.from_hf({**by_layer, "per_layer_config": {}}) == ModelSpec.from_hf(same)
    assert [a.kv_heads for a in attentions({**config, "attention_k_eq_v": False})] == [2, 2, 2, 2]
    assert [a.kv_heads for a in attentions(config)] == [2, 1, 2, 1]


def attentions(config: dict) -> list:
    return [layer.attention for layer in ModelSpec.from_hf(config).layers]


def test_the_text_model_within_the_whole_is_the_text_model():
    whole = CASES["gemma4_within"].config
    alone = {**whole["text_config"], "tie_word_embeddings": True}
    assert ModelSpec.from_hf(whole).segments == ModelSpec.from_hf(alone).segments
    for within in (True, False):  # what the whole says counts
        assert ModelSpec.from_hf({**whole, "text_config": {**alone, "tie_word_embeddings": within}}).tied
        assert not ModelSpec.from_hf({**whole, "tie_word_embeddings": False, "text_config": {**alone, "tie_word_embeddings": within}}).tied
    assert ModelSpec.from_hf({key: value for key, value in whole.items() if key != "tie_word_embeddings"}).tied


def test_towers_are_passed_over_and_listed(tmp_path):
    folder = make_goldens.write_folder(tmp_path / "hf", CASES["gemma4_within"].config)
    with_more(folder, TOWERS)
    manifest = convert(folder, tmp_path / "out")
    assert sorted(manifest.ignored) == sorted(TOWERS)
    held, given = open_checkpoint(tmp_path / "out"), load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(held.read("params.layers.1.layer_scale.scale"), given["model.language_model.layers.1.layer_scalar"])
    assert json.loads((folder / "config.json").read_text())["model_type"] == held.spec.family == "gemma4"


def test_the_text_model_alone_has_no_towers(tmp_path):
    folder = make_goldens.write_folder(tmp_path / "hf", CASES["gemma4_text_values"].config)
    with_more(folder, TOWERS[:1])
    with pytest.raises(CheckpointError, match="vision_tower"):
        convert(folder, tmp_path / "out")
