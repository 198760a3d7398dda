"""Heads of multi-token prediction: kept by a conversion and given back by an export, or left out where a folder has none."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints.convert import convert
from checkpoints.errors import CheckpointError
from checkpoints.export import export_hf
from checkpoints.load import open_checkpoint
from jaxmoe.spec import Leaf, abstract_experts, abstract_params
from scripts import make_goldens
from scripts.golden_cases import CASES

NAMES = ("deepseek_v3_plain", "deepseek_v3_yarn", "glm4_moe_normalized")


def config_of(name: str) -> dict:
    return {**CASES[name].config, "num_nextn_predict_layers": 1}


def head_of(config: dict) -> str:
    return f"model.layers.{config['num_hidden_layers']}."


@pytest.mark.parametrize("name", NAMES)
def test_a_head_is_kept_and_given_back(tmp_path, name):
    config = config_of(name)
    n, head = config["num_hidden_layers"], head_of(config)
    tensors = load_file(make_goldens.write_folder(tmp_path / "hf", config) / "model.safetensors")
    manifest = convert(tmp_path / "hf", tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert len(checkpoint.spec.extra_heads) == 1 and manifest.absent_heads == 0 and not manifest.ignored
    leaves = {path: checkpoint.read(path) for path in manifest.leaves}

    d = config["hidden_size"]
    norms = {"embed_norm": "enorm", "hidden_norm": "hnorm", "norm": "shared_head.norm", "layer.norm_mlp": "post_attention_layernorm"}
    for leaf, theirs in norms.items():
        np.testing.assert_array_equal(leaves[f"params.extra.0.{leaf}.scale"], tensors[f"{head}{theirs}.weight"])
    join = tensors[head + "eh_proj.weight"]
    np.testing.assert_array_equal(leaves["params.extra.0.join.kernel"], np.stack([join[:, :d].T, join[:, d:].T]))
    np.testing.assert_array_equal(leaves["params.extra.0.layer.router.kernel"], tensors[head + "mlp.gate.weight"].T)
    np.testing.assert_array_equal(leaves["params.extra.0.layer.router.select_bias"], tensors[head + "mlp.gate.e_score_correction_bias"])
    o = leaves["params.extra.0.layer.attn.o.kernel"]
    np.testing.assert_array_equal(o.reshape(-1, d), tensors[head + "self_attn.o_proj.weight"].T)
    for e in (0, config["n_routed_experts"] - 1):
        for kind in ("gate", "up", "down"):
            np.testing.assert_array_equal(leaves[f"experts.{n}.{kind}"][e], tensors[f"{head}mlp.experts.{e}.{kind}_proj.weight"].T)

    export_hf(checkpoint.spec, leaves, config, tmp_path / "back", "float32")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert sorted(back) == sorted(tensors)
    for tensor, value in tensors.items():
        np.testing.assert_array_equal(back[tensor], value, err_msg=tensor)


@pytest.mark.parametrize("name", ("deepseek_v3_yarn", "glm4_moe_normalized"))
def test_copies_of_embedding_and_output_matrix_are_passed_over(tmp_path, name):
    config = config_of(name)
    file = make_goldens.write_folder(tmp_path / "hf", config) / "model.safetensors"
    tensors = load_file(file)
    copies = {"embed_tokens.weight": tensors["model.embed_tokens.weight"], "shared_head.head.weight": tensors["lm_head.weight"]}
    save_file(tensors | {head_of(config) + theirs: value for theirs, value in copies.items()}, file)
    manifest = convert(tmp_path / "hf", tmp_path / "out")
    assert sorted(manifest.ignored) == sorted(head_of(config) + theirs for theirs in copies)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_the_head_is_converted_without_it(tmp_path, name):
    """As transformers saves such a model: the config still has the head."""
    make_goldens.write_folder(tmp_path / "hf", CASES[name].config)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config_of(name)))
    manifest = convert(tmp_path / "hf", tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert manifest.absent_heads == checkpoint.manifest.absent_heads == 1
    assert checkpoint.spec.extra_heads == () and not [path for path in manifest.leaves if path.startswith("params.extra.")]
    assert f"experts.{checkpoint.spec.n_layers}.gate" not in manifest.leaves


@pytest.mark.parametrize("name", ("deepseek_v3_yarn", "glm4_moe_normalized"))
def test_a_part_of_a_head_is_not_enough(tmp_path, name):
    config = config_of(name)
    file = make_goldens.write_folder(tmp_path / "hf", config) / "model.safetensors"
    tensors = load_file(file)
    del tensors[head_of(config) + "eh_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"1 tensor is missing .*eh_proj\.weight"):
        convert(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize("name", ("deepseek_v3_yarn", "glm4_moe_normalized"))
def test_a_head_that_the_config_does_not_have_is_refused(tmp_path, name):
    make_goldens.write_folder(tmp_path / "hf", config_of(name))
    (tmp_path / "hf" / "config.json").write_text(json.dumps(CASES[name].config))
    with pytest.raises(CheckpointError, match=r"unexpected.*eh_proj\.weight"):
        convert(tmp_path / "hf", tmp_path / "out")


def test_a_head_is_loaded_apart_from_the_model(tmp_path):
    config = config_of("deepseek_v3_yarn")
    make_goldens.write_folder(tmp_path / "hf", config)
    convert(tmp_path / "hf", tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    spec = checkpoint.spec.with_precision("bfloat16")
    params, experts = checkpoint.restore_params(spec), checkpoint.restore_experts(spec)
    assert "extra" not in params and sorted(map(int, experts)) == list(spec.moe_layers)
    (head,) = checkpoint.restore_extra_heads(spec).values()
    own = head.pop("experts")
    written = {"params": abstract_params(spec)["extra"]["0"], "experts": abstract_experts(spec)[str(spec.n_layers)]}

    def shapes(tree):
        return jax.tree.map(lambda leaf: (tuple(leaf.shape), leaf.dtype), tree, is_leaf=lambda x: isinstance(x, Leaf))

    assert shapes({"params": head, "experts": own}) == shapes(written)
    np.testing.assert_array_equal(own["gate"], checkpoint.read(f"experts.{spec.n_layers}.gate", dtype="bfloat16"))
