"""Comparing folders: nothing that differs is missed, nothing that is equal is named, and what checksums tell is not read."""

import copy
import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from checkpoints import commit
from checkpoints import diff as comparing
from checkpoints.convert import convert
from checkpoints.diff import diff
from checkpoints.errors import CheckpointError
from checkpoints.export import export_checkpoint
from checkpoints.load import open_checkpoint
from checkpoints.reshard import reshard
from jaxmoe.compress.round_to_nearest import quantizer
from tests.checkpoints import hf_folders, packed
from tests.checkpoints.test_quantized import FP8, MXFP4, fp8_tensors, mxfp4_tensors, odd

__all__ = ["odd"]  # a fixture

CONFIG = hf_folders.CONFIGS["qwen3_moe"]
EXPERT = "model.layers.2.mlp.experts.1.down_proj.weight"
TABLE = "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Nobody cuts the power here."""
    monkeypatch.setattr(commit, "sync", lambda path, forget=False: None)


def folders(tmp_path, name, tensors, config=CONFIG, **how):
    """A Hugging Face folder and its conversion."""
    hf = hf_folders.write_folder(tmp_path / name, config, tensors)
    convert(hf, tmp_path / f"{name}_out", **how)
    return hf, tmp_path / f"{name}_out"


@pytest.fixture
def plain(tmp_path):
    return folders(tmp_path, "plain", hf_folders.random_tensors(CONFIG))


@pytest.mark.parametrize("small", [False, True])
def test_what_is_equal(tmp_path, plain, monkeypatch, small):
    """Whichever kinds of folders, tensors fused or not, chunks cut this way or that."""
    if small:
        monkeypatch.setattr(comparing, "BLOCK_BYTES", 64)
    fused = hf_folders.write_folder(tmp_path / "fused", CONFIG, hf_folders.fuse(CONFIG, hf_folders.random_tensors(CONFIG)))
    reshard(plain[1], tmp_path / "cut", {"embed": 4})
    every = [*plain, fused, tmp_path / "cut"]
    for a in every:
        for b in every[: 1 if small else 4]:
            found = diff(a, b)
            assert found.equal and found.compared == len(open_checkpoint(plain[1]).manifest.leaves), (a, b)
            assert sum(count for *_, count in found.by_kind.values()) == 0


def test_equal_checksums_are_not_read(plain, monkeypatch):
    def refuse(*args):
        raise AssertionError("read")

    monkeypatch.setattr(comparing.store, "read_array", refuse)
    found = diff(plain[1], plain[1])
    assert found.equal and found.nbytes == 0 and found.by_checksum == sum(len(r.crc32) for r in open_checkpoint(plain[1]).manifest.leaves.values())
    with pytest.raises(AssertionError, match="read"):
        diff(plain[1], plain[1], checksums=False)


def changed(**values):
    """Tensors with some numbers replaced: `{tensor: {index: number}}`."""
    tensors = hf_folders.random_tensors(CONFIG)
    for name, numbers in values.items():
        for index, number in numbers.items():
            tensors[name][index] = number
    return tensors


@pytest.mark.parametrize("block", [1 << 24, 100])
def test_numbers_that_differ(tmp_path, plain, monkeypatch, block):
    monkeypatch.setattr(comparing, "BLOCK_BYTES", block)
    old = hf_folders.random_tensors(CONFIG)
    far, near = old[EXPERT][3, 5] + np.float32(8), old[TABLE][30, 2] * np.float32(1.25)
    tensors = changed(**{EXPERT: {(3, 5): far, (0, 0): np.nan}, TABLE: {(30, 2): near, (1, 1): np.inf}})
    other = folders(tmp_path, "other", tensors)
    seen = []
    for a, b in ((plain[0], other[0]), (plain[0], other[1]), (plain[1], other[0]), (plain[1], other[1])):
        found = diff(a, b, lambda done, total, path: seen.append((done, total)))
        assert seen[-1][0] == seen[-1][1]
        by_path = {one.path: one for one in found.leaves}
        assert by_path.keys() == {"experts.2.down", "params.embed.table"} and not found.equal
        one = by_path["experts.2.down"]
        assert (one.differ, one.experts, one.not_finite, one.numbers, one.kind) == (2, 1, 1, 4 * 16 * 16, "experts")
        before = old[EXPERT][3, 5]
        assert one.max_abs == abs(float(far) - float(before))
        assert one.max_rel == pytest.approx(abs(float(far) - float(before)) / max(abs(float(far)), abs(float(before))))
        table = by_path["params.embed.table"]
        assert (table.differ, table.not_finite, table.experts) == (2, 1, 1) and table.max_rel == pytest.approx(0.2)
        assert found.by_kind["experts"] == (6, 1, 6 * 1024, 2) and found.by_kind["norms"][1] == 0
    assert found.by_checksum == sum(len(r.crc32) for r in open_checkpoint(plain[1]).manifest.leaves.values()) - 2
    assert found.nbytes == 2 * (4 * 256 + 4 * 37 * 16)


def test_signs_of_zeros_differ_and_equal_not_a_numbers_do_not(tmp_path):
    a = folders(tmp_path, "a", changed(**{TABLE: {(0, 0): 0.0, (0, 1): np.nan}}))[0]
    b = folders(tmp_path, "b", changed(**{TABLE: {(0, 0): -0.0, (0, 1): np.nan}}))[1]
    (one,) = diff(a, b).leaves
    assert (one.differ, one.max_abs, one.max_rel, one.not_finite) == (1, 0.0, 0.0, 0)


def test_dtypes(tmp_path):
    """The same numbers in another dtype: each leaf is named, and no number."""
    tensors = hf_folders.random_tensors(CONFIG, "bfloat16")
    hf, narrow = folders(tmp_path, "narrow", tensors)
    convert(hf, tmp_path / "wide", "float32")
    for a in (hf, narrow):
        found = diff(a, tmp_path / "wide")
        assert len(found.leaves) == found.compared and {one.dtypes for one in found.leaves} == {("bfloat16", "float32")}
        assert not any(one.differ for one in found.leaves) and not found.equal
        assert ("precision.params", "bfloat16", "float32") in found.spec
    rounded = folders(tmp_path, "float", hf_folders.random_tensors(CONFIG), dtype="bfloat16")
    found = diff(*rounded)
    assert 0 < max(one.max_rel for one in found.leaves) <= 2**-8 and all(one.differ for one in found.leaves)


def test_models_and_leaves(tmp_path, plain):
    config = {**CONFIG, "num_hidden_layers": 2, "num_experts": 5, "rope_theta": 1e5}
    other = folders(tmp_path, "other", hf_folders.random_tensors(config), config)[1]
    found = diff(plain[0], other)
    layer = [path for path in open_checkpoint(plain[1]).manifest.leaves if ".2." in path]
    assert sorted(found.only_a) == sorted(layer) and not found.only_b and diff(other, plain[1]).only_b == found.only_a
    shapes = {one.path: one.shapes for one in found.leaves if one.shapes[0] != one.shapes[1]}
    assert shapes["experts.0.gate"] == ((4, 16, 16), (5, 16, 16)) and shapes["params.layers.0.router.kernel"] == ((16, 4), (16, 5))
    assert set(found.spec) == {
        ("layers", 3, 2),
        ("layers.*.attention.rope.theta", 1e6, 1e5),
        ("layers.0.router.experts", 4, 5),
    }


def test_what_is_packed_is_what_it_is_converted_to(tmp_path, odd):
    """mxfp4 against its conversion, and against the plain folder that this is exported to, whose experts are transposed."""
    (tmp_path / "hf").mkdir()
    packed.write(tmp_path / "hf" / "model.safetensors", mxfp4_tensors()[0])
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"quantization_config": MXFP4}))
    convert(tmp_path / "hf", tmp_path / "out")
    export_checkpoint(tmp_path / "out", tmp_path / "back")
    for a, b in (("hf", "out"), ("hf", "back"), ("back", "out")):
        assert diff(tmp_path / a, tmp_path / b).equal, (a, b)


def test_fp8_is_compared_in_the_others_dtype(tmp_path):
    """Its conversion to bfloat16 is rounded and its conversion to float32 isn't; neither is called different for that."""
    (tmp_path / "hf").mkdir()
    packed.write(tmp_path / "hf" / "model.safetensors", fp8_tensors()[0])
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": FP8}))
    convert(tmp_path / "hf", tmp_path / "out")
    convert(tmp_path / "hf", tmp_path / "wide", "float32")
    assert diff(tmp_path / "hf", tmp_path / "out").equal
    found = diff(tmp_path / "wide", tmp_path / "hf")
    assert not any(one.differ for one in found.leaves) and {one.dtypes for one in found.leaves} == {("float32", "bfloat16")}


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_experts(tmp_path, plain, bits):
    convert(plain[0], tmp_path / "small", quantizer=quantizer(bits, 16))
    reshard(tmp_path / "small", tmp_path / "cut", {"hidden": 1})
    assert diff(tmp_path / "small", tmp_path / "small").nbytes == 0
    assert diff(tmp_path / "small", tmp_path / "cut").equal
    for a in plain:
        found = diff(a, tmp_path / "small")
        assert {one.path for one in found.leaves} == {f"experts.{i}.{name}" for i in (0, 2) for name in ("gate", "up", "down")}
        assert {one.dtypes for one in found.leaves} == {("float32", f"int{bits}")} and not found.spec
        assert all(one.experts == 4 and 0 < one.max_abs < 5 / 2 ** (bits - 1) for one in found.leaves)


def test_folders_that_cannot_be_compared(tmp_path, plain):
    (tmp_path / "empty").mkdir()
    unfinished = tmp_path / "other.partial"
    unfinished.mkdir()
    (unfinished / "_progress.jsonl").write_text("{}\n")
    incomplete = hf_folders.random_tensors(CONFIG)
    del incomplete[EXPERT]
    hf_folders.write_folder(tmp_path / "incomplete", CONFIG, incomplete)
    whys = {"none": "no such folder", "empty": "neither a Hugging Face folder", "other.partial": "unfinished", "incomplete": "1 tensor is missing"}
    for name, why in whys.items():
        for pair in ((tmp_path / name, plain[0]), (plain[1], tmp_path / name)):
            with pytest.raises(CheckpointError, match=why):
                diff(*pair)


def test_a_damaged_chunk_is_an_error(tmp_path, plain):
    other = folders(tmp_path, "other", changed(**{TABLE: {(0, 0): 9.0}}))[1]
    path = other / "params.embed.table" / "0.0"
    path.write_bytes(b"\7" + path.read_bytes()[1:])
    with pytest.raises(CheckpointError, match="leaf params.embed.table is damaged"):
        diff(plain[1], other)


def test_an_unknown_precision_is_not_needed(tmp_path):
    """Tensors of several dtypes, which a conversion would ask about."""
    tensors = hf_folders.random_tensors(CONFIG)
    mixed = copy.copy(tensors)
    mixed[TABLE] = tensors[TABLE].astype(ml_dtypes.bfloat16)
    a, b = (hf_folders.write_folder(tmp_path / name, CONFIG, value) for name, value in (("a", tensors), ("b", mixed)))
    (one,) = diff(a, b).leaves
    assert (one.path, one.dtypes, one.differ) == ("params.embed.table", ("float32", "bfloat16"), int((tensors[TABLE] != mixed[TABLE]).sum()))
    assert dataclasses.asdict(diff(a, a))["leaves"] == ()
