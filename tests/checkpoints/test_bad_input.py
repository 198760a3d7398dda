"""Every bad input: one clear line that names what is wrong, and not a byte written."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints.convert import convert
from checkpoints.errors import CheckpointError
from tests.checkpoints import hf_folders

CONFIG = hf_folders.CONFIGS["qwen3_moe"]
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"
SHARD = "model-00002-of-00003.safetensors"


def edit_tensors(change):
    def damage(hf):
        tensors = hf_folders.random_tensors(CONFIG)
        change(tensors)
        hf_folders.write_folder(hf, CONFIG, tensors, shards=3)

    return damage


def edit_config(**changes):
    def damage(hf):
        config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not ...}
        (hf / "config.json").write_text(json.dumps(config))

    return damage


def cut_shard(hf):
    data = (hf / SHARD).read_bytes()
    (hf / SHARD).write_bytes(data[:-100])


def damage_header(hf):
    data = bytearray((hf / SHARD).read_bytes())
    data[8:12] = b"\xff\xfe\x00\x01"
    (hf / SHARD).write_bytes(data)


def add_many(tensors):
    tensors.update({f"model.layers.{i}.extra.weight": np.zeros(1, np.float32) for i in range(30)})


def fuse_in_part(tensors):
    """One layer fused, the other not."""
    fused = hf_folders.fuse(CONFIG, tensors)
    for name in list(tensors):
        if name.startswith("model.layers.0.mlp.experts."):
            del tensors[name]
    tensors.update({name: value for name, value in fused.items() if name.startswith("model.layers.0.mlp.experts.")})


CASES = {
    "no_folder": (lambda hf: __import__("shutil").rmtree(hf), "hf: no such folder"),
    "no_config": (lambda hf: (hf / "config.json").unlink(), "config.json: missing"),
    "damaged_config": (
        lambda hf: (hf / "config.json").write_text('{"model_type":'),
        "config.json: damaged: not a JSON object",
    ),
    "config_is_a_list": (lambda hf: (hf / "config.json").write_text("[]"), "config.json: damaged: not a JSON object"),
    "unknown_family": (
        edit_config(model_type="gpt9"),
        "unknown model_type 'gpt9'; supported: .*mixtral, .*olmoe, .*qwen3_moe",
    ),
    "unknown_field": (edit_config(secret_gate=1), "field 'secret_gate' = 1"),
    "field_of_another_type": (edit_config(num_hidden_layers="3"), "num_hidden_layers = '3' must be a positive integer"),
    "field_that_is_no_list": (edit_config(mlp_only_layers=3), "mlp_only_layers = 3 must list layers, from 0 to 2"),
    "field_that_is_no_number": (edit_config(rms_norm_eps="small"), "config.json: damaged: could not convert string to float: 'small'"),
    "missing_field": (edit_config(norm_topk_prob=...), "needs the field 'norm_topk_prob'"),
    "quantized": (edit_config(quantization_config={"bits": 4}), "quantization_config"),
    "no_weights": (
        lambda hf: (hf / "model.safetensors.index.json").unlink(),
        "neither model.safetensors nor model.safetensors.index.json",
    ),
    "missing_shard": (lambda hf: (hf / SHARD).unlink(), f"{SHARD}: missing"),
    "truncated_shard": (cut_shard, rf"{SHARD}: truncated: \d+ bytes needed, the file has \d+"),
    "damaged_header": (damage_header, f"{SHARD}: damaged header"),
    "damaged_index": (lambda hf: (hf / "model.safetensors.index.json").write_text("{"), "index.json: damaged"),
    "missing_tensor": (edit_tensors(lambda t: t.pop(EXPERT)), f"1 tensor is missing that the config needs: {EXPERT}$"),
    "no_output_matrix": (
        edit_tensors(lambda t: t.pop("lm_head.weight")),
        "1 tensor is missing that the config needs: lm_head.weight$",
    ),
    "wrong_shape": (
        edit_tensors(lambda t: t.update({EXPERT: np.zeros((16, 17), np.float32)})),
        rf"tensor {EXPERT} has shape \[16, 17\], the config needs \[16, 16\]",
    ),
    "config_of_another_size": (
        edit_config(vocab_size=38),
        r"embed_tokens.weight has shape \[37, 16\], the config needs \[38, 16\]",
    ),
    "more_experts_in_config": (
        edit_config(num_experts=5),
        r"6 tensors are missing that the config needs: model.layers.0.mlp.experts.4.down",
    ),
    "fewer_experts_in_config": (
        edit_config(num_experts=3),
        r"6 tensors are unexpected.*model.layers.2.mlp.experts.3.up_proj.weight",
    ),
    "leftover": (
        edit_tensors(lambda t: t.update({"model.layers.0.self_attn.sinks": np.zeros(4, np.float32)})),
        "1 tensor is unexpected, which the config has no place for: model.layers.0.self_attn.sinks$",
    ),
    "many_leftovers": (edit_tensors(add_many), "30 tensors are unexpected.* and 10 more$"),
    "fused_in_part": (
        edit_tensors(fuse_in_part),
        "missing that the config needs: model.layers.0.mlp.experts.0.down_proj.weight",
    ),
    "integer_tensor": (
        edit_tensors(lambda t: t.update({EXPERT: np.zeros((16, 16), np.int8)})),
        f"tensor {EXPERT} has dtype I8, which is not supported",
    ),
    "several_dtypes": (
        edit_tensors(lambda t: t.update({"model.norm.weight": np.zeros(16, np.float16)})),
        r"several dtypes \(\d+ of F32, 1 of F16\): choose one, float32 or bfloat16",
    ),
}


@pytest.mark.parametrize(("damage", "message"), CASES.values(), ids=CASES.keys())
def test_refused_before_the_first_byte(tmp_path, damage, message):
    hf = hf_folders.tiny(tmp_path / "hf", "qwen3_moe", shards=3)
    damage(hf)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(hf, tmp_path / "deep" / "out")
    assert "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} <= {"hf"}


def test_undamaged_it_converts(tmp_path):
    """So that the cases above fail for their own reason."""
    manifest = convert(hf_folders.tiny(tmp_path / "hf", "qwen3_moe", shards=3), tmp_path / "deep" / "out")
    assert manifest.leaves and {p.name for p in (tmp_path / "deep").iterdir()} == {"out"}


def test_several_dtypes_convert_when_one_is_chosen(tmp_path):
    tensors = hf_folders.random_tensors(CONFIG)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    hf = hf_folders.write_folder(tmp_path / "hf", CONFIG, tensors)
    assert convert(hf, tmp_path / "out", "float32").dtype == "float32"


def test_unsupported_output_dtype(tmp_path):
    with pytest.raises(CheckpointError, match="unsupported dtype 'float16'"):
        convert(hf_folders.tiny(tmp_path / "hf", "olmoe"), tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()


def test_weights_of_another_framework(tmp_path):
    hf = hf_folders.tiny(tmp_path / "hf", "olmoe")
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        convert(hf, tmp_path / "out")


def test_single_file_cut_to_nothing(tmp_path):
    hf = hf_folders.tiny(tmp_path / "hf", "olmoe")
    save_file({}, hf / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"\d+ tensors are missing .* and \d+ more"):
        convert(hf, tmp_path / "out")
