"""Packed tensors: decoded as transformers does, by rows, through conversion and back; and what may be wrong with them."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoints import families, plan, units
from checkpoints.convert import convert
from checkpoints.errors import CheckpointError
from checkpoints.export import export_hf
from checkpoints.load import load_hf_or_checkpoint, open_checkpoint
from checkpoints.quantized import open_source
from jaxmoe import formats
from tests.checkpoints import hf_folders, odd_model, packed

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": []}


def folder(path, given, tensors, config=None):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**(config or {}), "quantization_config": given}))
    packed.write(path / "model.safetensors", tensors)
    return path


def assert_same_bits(got, expected):
    """All bits, but those of what is not a number."""
    got, expected = formats.load_numpy(got), formats.load_numpy(expected)
    assert got.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    kept = ~np.isnan(got)
    np.testing.assert_array_equal(got[kept].view(np.uint32), expected[kept].view(np.uint32))


def decoded_by_us(tmp_path):
    given = packed.inputs()
    fp8 = {
        "fp8": ("F8_E4M3", given["codes"]),
        "fp8_scale_inv": given["scales"],
        "narrow": ("F8_E4M3", given["codes"]),
        "narrow_scale_inv": ("BF16", given["narrow"]),
    }
    stacked = {"stacked": ("F8_E4M3", given["stacked"]), "stacked_scale_inv": given["stacked_scales"]}
    mxfp4 = {"mxfp4_blocks": given["blocks"], "mxfp4_scales": given["powers"]}
    out = {}
    folders = (({**FP8, "weight_block_size": [8, 8]}, fp8), ({**FP8, "weight_block_size": [2, 2]}, stacked), (MXFP4, mxfp4))
    for i, (config, tensors) in enumerate(folders):
        with open_source(folder(tmp_path / str(i), config, tensors)) as source:
            assert not source.problems
            for name, info in source.tensors.items():
                width = info.shape[-1]
                out[name] = source.read_matrix(name, width, 0, info.size // width).reshape(info.shape)
    return out


def check_against(got, expected):
    assert {f"{name}_{dtype}" for name in got for dtype in formats.DTYPES} == set(expected)
    for name, value in got.items():
        for dtype in formats.DTYPES:
            assert_same_bits(formats.store_numpy(value, dtype), expected[f"{name}_{dtype}"])


def test_golden_of_transformers(tmp_path):
    with np.load(packed.GOLDEN) as golden:
        check_against(decoded_by_us(tmp_path), dict(golden))


def test_live_transformers(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    check_against(decoded_by_us(tmp_path), packed.by_transformers(packed.inputs()))


@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(32, 32), (20, 33), (3, 17), (2, 20, 9), (3, 16, 40)], ids=str)
def test_fp8_blocks_against_loops(tmp_path, shape, scale_dtype):
    """The last blocks are partial; any rows, however they are picked, are those of the whole."""
    codes, scales = packed.random_fp8(shape, (16, 16), scale_dtype=scale_dtype)
    expected = packed.decode_fp8(codes, scales, (16, 16))
    hf = folder(tmp_path, FP8, {"a.weight": ("F8_E4M3", codes), "a.weight_scale_inv": scales, "b": np.zeros(3, np.float32)})
    check_rows(hf, "a.weight", expected, shape)


@pytest.mark.parametrize("shape", [(8, 32), (2, 5, 96)], ids=str)
def test_mxfp4_against_loops(tmp_path, shape):
    blocks, scales = packed.random_mxfp4(shape)
    scales.reshape(-1)[:4] = 0, 1, 250, 251
    check_rows(folder(tmp_path, MXFP4, {"a_blocks": blocks, "a_scales": scales}), "a", packed.decode_mxfp4(blocks, scales), shape)


def check_rows(hf, name, expected, shape):
    rows = expected.reshape(-1, shape[-1])
    with open_source(hf) as source:
        assert not source.problems and source[name].shape == shape
        for start, stop in ((0, len(rows)), (1, 2), (2, len(rows)), (1, 1)):
            np.testing.assert_array_equal(source.read_matrix(name, shape[-1], start, stop), rows[start:stop])
            at = np.arange(0, stop - start, 2)
            np.testing.assert_array_equal(source.read_matrix(name, shape[-1], start, stop, at), rows[start:stop][at])


def test_only_the_rows_asked_for_are_read(tmp_path, monkeypatch):
    codes, scales = packed.random_fp8((64, 32), (16, 16))
    with open_source(folder(tmp_path, FP8, {"a": ("F8_E4M3", codes), "a_scale_inv": scales})) as source:
        read = []
        real = source.source._read
        monkeypatch.setattr(source.source, "_read", lambda info, *args: read.append((info.name, *args[1:])) or real(info, *args))
        source.read_matrix("a", 32, 15, 18)
    assert read == [("a", 15 * 32, 3 * 32), ("a_scale_inv", 0, 4)]


def test_without_a_quantization_config_nothing_is_unpacked(tmp_path):
    tensors = {"a": ("F8_E4M3", np.zeros((2, 2), np.uint8)), "a_scale_inv": np.ones((1, 1), np.float32)}
    with open_source(folder(tmp_path, None, tensors)) as source:
        assert set(source.tensors) == set(tensors) and not source.packed and not source.supports("a")


def test_the_config_of_a_part(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"quantization_config": FP8}}))
    packed.write(tmp_path / "model.safetensors", {"a": ("F8_E4M3", np.zeros((2, 2), np.uint8)), "a_scale_inv": np.ones((1, 1), np.float32)})
    with open_source(tmp_path) as source:
        assert set(source.packed) == {"a"} and source.identity == ["fp8", 16, 16]


# --- conversion -------------------------------------------------------------------------------------------------------

CONFIG = hf_folders.CONFIGS["qwen3_moe"]


def quantized(name):
    return name.endswith("_proj.weight")


def fp8_tensors(seed=0, block=(16, 16)):
    """A folder's tensors, its matrices packed, and the numbers that they stand for, in float32."""
    plain, out, values = hf_folders.random_tensors(CONFIG, "bfloat16", seed), {}, {}
    for i, (name, value) in enumerate(plain.items()):
        if not quantized(name):
            out[name], values[name] = value, value.astype(np.float32)
            continue
        codes, scales = packed.random_fp8(value.shape, block, seed=i)
        out |= {name: ("F8_E4M3", codes), name + "_scale_inv": scales}
        values[name] = packed.decode_fp8(codes, scales, block)
    return out, values


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_fp8_through_conversion_and_back(tmp_path, monkeypatch, dtype, assert_trees_equal):
    monkeypatch.setattr(units, "BLOCK_BYTES", 500)
    tensors, values = fp8_tensors()
    manifest = convert(folder(tmp_path / "hf", FP8, tensors, CONFIG), tmp_path / "out", dtype)
    assert manifest.dtype == (dtype or "bfloat16")
    kind = np.float32 if dtype else ml_dtypes.bfloat16
    wanted = {name: value.astype(kind) for name, value in values.items()}
    params, experts = hf_folders.expected_trees(CONFIG, wanted)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert_trees_equal(checkpoint.restore_params(), params)
    assert_trees_equal(checkpoint.restore_experts(), experts)
    export_hf(checkpoint.spec, {path: checkpoint.read(path) for path in manifest.leaves}, {}, tmp_path / "back", manifest.dtype)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == wanted.keys()
    assert all(back[name].tobytes() == value.tobytes() for name, value in wanted.items())


def test_the_size_of_blocks_is_part_of_the_identity(tmp_path):
    """The same files under another config are other weights."""
    tensors, _ = fp8_tensors(block=(64, 64))
    hf = folder(tmp_path / "hf", {**FP8, "weight_block_size": [64, 64]}, tensors, CONFIG)
    first = load_hf_or_checkpoint(hf, tmp_path / "cache").folder
    again = folder(tmp_path / "hf", {**FP8, "weight_block_size": [65, 65]}, tensors, CONFIG)
    assert load_hf_or_checkpoint(again, tmp_path / "cache").folder != first


@pytest.fixture
def odd(monkeypatch):
    """A family with a layout for plain weights and one for mxfp4, as gpt-oss has; both name their tensors alike."""
    layouts = odd_model.layout("transposed_interleaved"), odd_model.layout("interleaved", packed="mxfp4")
    monkeypatch.setitem(families.LAYOUTS, "odd", layouts)
    monkeypatch.setattr(plan, "read_config", lambda hf: odd_model.SPEC.with_precision("float32"))


def mxfp4_tensors():
    """Tensors with layers 0's and 2's experts packed, and the leaves that they stand for, in bfloat16."""
    leaves = odd_model.random_leaves()
    tensors = odd_model.tensors(leaves, "interleaved")
    for i in (0, 2):
        for j, name in enumerate(("gate_up", "down")):
            path = f"model.layers.{i}.mlp.experts.{name}"
            blocks, scales = packed.random_mxfp4(tensors.pop(path).shape, seed=10 * i + j)
            tensors |= {path + "_blocks": blocks, path + "_scales": scales}
            value = packed.decode_mxfp4(blocks, scales).astype(ml_dtypes.bfloat16)
            if name == "down":
                leaves[f"experts.{i}.down"] = value.swapaxes(1, 2)
            else:
                leaves[f"experts.{i}.gate"], leaves[f"experts.{i}.up"] = value[:, 0::2].swapaxes(1, 2), value[:, 1::2].swapaxes(1, 2)
    return tensors, leaves


def test_mxfp4_through_conversion_and_back(tmp_path, odd, monkeypatch):
    monkeypatch.setattr(units, "BLOCK_BYTES", 700)
    tensors, leaves = mxfp4_tensors()
    manifest = convert(folder(tmp_path / "hf", MXFP4, tensors), tmp_path / "out")
    assert (manifest.dtype, manifest.names) == ("bfloat16", "odd-interleaved")
    checkpoint = open_checkpoint(tmp_path / "out")
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(formats.load_numpy(checkpoint.read(path)), leaf.astype(np.float32), err_msg=path)
    export_hf(checkpoint.spec, {path: checkpoint.read(path) for path in manifest.leaves}, {}, tmp_path / "back", "bfloat16")
    back, wanted = load_file(tmp_path / "back" / "model.safetensors"), odd_model.tensors(leaves, "transposed_interleaved")
    assert back.keys() == wanted.keys()
    assert all(back[name].tobytes() == value.tobytes() for name, value in wanted.items())
    again = convert(hf_folders.write_folder(tmp_path / "plain", {}, back), tmp_path / "again")
    assert again.names == "odd-transposed_interleaved"
    assert {path: record.crc32 for path, record in again.leaves.items()} == {path: record.crc32 for path, record in manifest.leaves.items()}


# --- what may be wrong ------------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj.weight"


def _change(name, value):
    return lambda tensors: tensors.pop(name) if value is None else tensors.update({name: value})


FP8_CASES = {
    "no_scale": (_change(Q + "_scale_inv", None), rf"hf: tensor {Q} has dtype F8_E4M3, and there is no {Q}_scale_inv$"),
    "no_tensor": (
        _change(Q, None),
        rf"hf: tensor {Q}_scale_inv is there without {Q}, which it scales; 1 tensor is missing that the config needs: {Q}$",
    ),
    "scale_of_another_shape": (
        _change(Q + "_scale_inv", np.ones((2, 2), np.float32)),
        rf"tensor {Q}_scale_inv has shape \[2, 2\], {Q} \[32, 16\] in blocks of \[16, 16\] needs \[2, 1\]$",
    ),
    "scale_of_another_dtype": (
        _change(Q + "_scale_inv", np.ones((2, 1), np.uint8)),
        f"tensor {Q}_scale_inv has dtype U8, F32 or BF16 is needed$",
    ),
    "packed_tensor_of_another_shape": (
        _change(Q, ("F8_E4M3", np.zeros((32, 15), np.uint8))),
        rf"hf: tensor {Q} has shape \[32, 15\], the config needs \[32, 16\]$",
    ),
    "a_packed_vector": (
        _change("model.norm.weight", ("F8_E4M3", np.zeros(16, np.uint8))),
        "model.norm.weight has dtype F8_E4M3, and there is no",
    ),
    "a_scale_of_a_plain_tensor": (
        _change("model.norm.weight_scale_inv", np.ones((1, 1), np.float32)),
        "1 tensor is unexpected, which the config has no place for: model.norm.weight_scale_inv$",
    ),
}


@pytest.mark.parametrize(("damage", "message"), FP8_CASES.values(), ids=FP8_CASES.keys())
def test_damaged_fp8_is_refused(tmp_path, damage, message):
    tensors, _ = fp8_tensors()
    damage(tensors)
    refused(folder(tmp_path / "hf", FP8, tensors, CONFIG), tmp_path, message)


def refused(hf, tmp_path, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(hf, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}


def test_fp8_without_a_word_in_the_config(tmp_path):
    tensors, _ = fp8_tensors()
    message = r"\d+ tensors are unexpected.*; tensor model.layers.0.mlp.experts.0.down_proj.weight has dtype F8_E4M3.*, which is not supported"
    refused(folder(tmp_path / "hf", None, tensors, CONFIG), tmp_path, message)


X = "model.layers.2.mlp.experts.down"
MXFP4_CASES = {
    "no_scales": (_change(X + "_scales", None), f"of {X}_blocks and {X}_scales, which belong together and alone, there is {X}_blocks;"),
    "no_blocks": (_change(X + "_blocks", None), f"there is {X}_scales; 1 tensor is missing that the config needs: {X}$"),
    "plain_as_well": (_change(X, np.zeros((3, 32, 32), np.float32)), f"there is {X}_blocks and {X}_scales and {X}$"),
    "scales_of_another_shape": (
        _change(X + "_scales", np.zeros((3, 32, 2), np.uint8)),
        rf"{X}_scales has shape \[3, 32, 2\], {X}_blocks \[3, 32, 1, 16\] needs \[3, 32, 1\]$",
    ),
    "blocks_of_another_shape": (
        _change(X + "_blocks", np.zeros((3, 32, 1, 8), np.uint8)),
        rf"{X}_blocks has shape \[3, 32, 1, 8\], \[rows, groups, 16\] is needed$",
    ),
    "scales_of_another_dtype": (_change(X + "_scales", np.zeros((3, 32, 1), np.float32)), f"{X}_scales has dtype F32, U8 is needed$"),
    "another_size": (
        lambda t: t.update({X + "_blocks": np.zeros((3, 32, 2, 16), np.uint8), X + "_scales": np.zeros((3, 32, 2), np.uint8)}),
        rf"tensor {X} has shape \[3, 32, 64\], the config needs \[3, 32, 32\]$",
    ),
}


@pytest.mark.parametrize(("damage", "message"), MXFP4_CASES.values(), ids=MXFP4_CASES.keys())
def test_damaged_mxfp4_is_refused(tmp_path, odd, damage, message):
    tensors, _ = mxfp4_tensors()
    damage(tensors)
    refused(folder(tmp_path / "hf", MXFP4, tensors), tmp_path, message)
