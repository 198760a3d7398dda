"""Reading again what was written, and what it was made of."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints.convert import convert
from checkpoints.errors import CheckpointError
from checkpoints.load import open_checkpoint
from checkpoints.manifest import content_sha256, read_manifest, write_manifest
from checkpoints.verify import verify
from jaxmoe.compress.round_to_nearest import quantizer
from tests.checkpoints import hf_folders


@pytest.fixture
def converted(tmp_path):
    """(source, converted folder)."""
    config = hf_folders.CONFIGS["qwen3_moe"]
    hf = hf_folders.write_folder(tmp_path / "hf", config, hf_folders.random_tensors(config, "bfloat16"), files={"tokenizer.json": "{}"})
    convert(hf, tmp_path / "out")
    return hf, tmp_path / "out"


def test_says_what_was_checked(converted):
    hf, out = converted
    calls: list = []
    found = verify(out, hf, progress=lambda *a: calls.append(a))
    manifest = read_manifest(out)
    assert (found.leaves, found.nbytes, found.source_units) == (len(manifest.leaves), manifest.nbytes, found.units)
    assert found.units == len(manifest.leaves) + 6 * 3 and found.files == 2 + 3 and found.strangers == ()
    assert calls[-1][:2] == (2 * manifest.nbytes, 2 * manifest.nbytes)
    assert verify(out).source_units == 0


def test_strangers_are_named(converted):
    (converted[1] / "notes.txt").write_text("mine")
    assert verify(converted[1]).strangers == ("notes.txt",)


def test_all_that_is_wrong_is_told_at_once(converted):
    _, out = converted
    flip(out / "experts.0.up" / "2.0.3")
    (out / "params.final_norm.scale" / "0").unlink()
    (out / "tokenizer.json").write_text("[]")
    swap(out / "experts.2.down" / "0.1.0", out / "experts.2.down" / "0.2.0")
    with pytest.raises(CheckpointError) as caught:
        verify(out)
    text = str(caught.value)
    assert "tokenizer.json has been altered" in text and "leaf params.final_norm.scale is damaged" in text
    assert "leaf experts.0.up is damaged" in text and "leaf experts.2.down, expert 0, has checksum" in text and "\n" not in text


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def swap(a, b):
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data["codecs"].pop(), "has codecs"),
        (lambda data: data.update(fill_value=1), "has fill_value 1, 0 was written"),
        (lambda data: data["chunk_grid"]["configuration"].update(chunk_shape=[1, 16, 16]), "has chunk_grid"),
        (lambda data: data.update(data_type="int16"), "has data_type int16, uint16 was written"),
        (lambda data: data["codecs"][0].update(configuration={"endian": "big"}), "has codecs"),
    ],
)
def test_numbers_that_would_be_read_otherwise(converted, edit, message):
    """An array's own description, altered in a way that tensorstore takes: loading refuses it too."""
    _, out = converted
    path = out / "experts.0.gate" / "zarr.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    for check in (lambda: verify(out), lambda: open_checkpoint(out).read("experts.0.gate"), lambda: open_checkpoint(out).read_expert(0, 1)):
        with pytest.raises(CheckpointError, match=f"experts.0.gate is damaged: zarr.json {message}"):
            check()


def test_metadata_of_another_tree(converted):
    path = converted[1] / "_METADATA"
    path.write_text(path.read_text().replace("experts", "expertz", 1))
    with pytest.raises(CheckpointError, match="_METADATA is not what was written"):
        verify(converted[1])


def test_a_source_that_changed(converted):
    """One number, between the samples that the fingerprint takes of large files: only making the leaf again shows it."""
    hf, out = converted
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.2.mlp.experts.1.up_proj.weight"][3, 4] += 1
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is not what .* was made of .fingerprint"):
        verify(out, hf)
    manifest = read_manifest(out)
    from checkpoints.plan import make_plan
    from checkpoints.quantized import open_source

    with open_source(hf) as source:
        plan = make_plan(hf, source, None)
    write_manifest(out, type(manifest)(**{**vars(manifest), "fingerprint": plan.fingerprint}))
    with pytest.raises(CheckpointError, match=r"experts.1.up_proj.weight of .* becomes experts.2.up with checksum"):
        verify(out, hf)


def test_quantized_folders_need_their_quantizer_only_for_the_source(tmp_path):
    hf = hf_folders.tiny(tmp_path / "hf", "olmoe")
    convert(hf, tmp_path / "out", quantizer=quantizer(8, 8))
    assert verify(tmp_path / "out").units
    with pytest.raises(CheckpointError, match="its experts are quantized .*: comparing with the source needs that quantizer"):
        verify(tmp_path / "out", hf)
    assert verify(tmp_path / "out", hf, quantizer(8, 8)).source_units
    with pytest.raises(CheckpointError, match="quantization is"):
        verify(tmp_path / "out", hf, quantizer(8, 4))


def test_a_manifest_that_was_edited(converted):
    path = converted[1] / "manifest.json"
    data = json.loads(path.read_text())
    data["leaves"]["experts.0.gate"]["crc32"][0] = "00000000"
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="manifest.json: damaged: its content doesn't have the checksum"):
        open_checkpoint(converted[1])
    data["sha256"] = content_sha256(data)
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="experts.0.gate, expert 0, has checksum .* the manifest says 00000000"):
        verify(converted[1])


def test_a_manifest_with_a_key_twice(converted):
    path = converted[1] / "manifest.json"
    path.write_text(path.read_text().replace('"dtype": "bfloat16",', '"dtype": "bfloat16", "dtype": "bfloat16",', 1))
    with pytest.raises(CheckpointError, match="manifest.json: damaged: a key that occurs twice"):
        open_checkpoint(converted[1])


def test_a_newer_version(converted):
    path = converted[1] / "manifest.json"
    data = json.loads(path.read_text())
    data["version"] += 1
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="version 4 was written by a newer jaxmoe, this one reads up to 3: update jaxmoe"):
        open_checkpoint(converted[1])


def test_kept_files_that_are_gone(converted):
    shutil.rmtree(converted[1] / "params.embed.table")
    (converted[1] / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json is missing; leaf params.embed.table is missing or damaged"):
        verify(converted[1])


def test_revision_of_the_source(tmp_path):
    """As huggingface_hub's cache names folders, and as its local folders note it down."""
    sha = "0123456789abcdef0123456789abcdef01234567"
    hf = hf_folders.tiny(tmp_path / "models--a--b" / "snapshots" / sha, "olmoe")
    assert convert(hf, tmp_path / "one").revision == sha
    hf = hf_folders.tiny(tmp_path / "local", "olmoe")
    assert convert(hf, tmp_path / "two").revision == ""
    note = hf / ".cache/huggingface/download/config.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{sha}\netag\n1700000000.0\n")
    assert convert(hf, tmp_path / "three").revision == sha
    np.testing.assert_equal(read_manifest(tmp_path / "three").revision, sha)
