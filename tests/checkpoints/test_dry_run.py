"""What a conversion would do, told without doing it; and sources on the hub."""

import json
import sys
import types

import numpy as np
import pytest

from checkpoints import commit, hub
from checkpoints.commit import partial_of
from checkpoints.convert import convert
from checkpoints.dry_run import dry_run
from checkpoints.errors import CheckpointError
from jaxmoe.compress.round_to_nearest import quantizer
from scripts import convert as script
from tests.checkpoints import hf_folders
from tests.scripts import commands


@pytest.mark.parametrize("how", [None, quantizer(4, 8)], ids=["plain", "int4"])
def test_foretells_what_convert_does(tmp_path, how):
    config = {**hf_folders.CONFIGS["olmoe"], "tie_word_embeddings": True}
    tensors = hf_folders.random_tensors(config, "bfloat16")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    hf = hf_folders.write_folder(tmp_path / "hf", config, tensors, shards=2)
    found = dry_run(hf, tmp_path / "deep" / "out", quantizer=how)
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}
    manifest = convert(hf, tmp_path / "out", quantizer=how)
    assert {(r.path, r.dtype, r.shape, r.chunk, r.nbytes) for r in found.leaves} == {
        (path, r.dtype, r.shape, r.chunk, r.nbytes) for path, r in manifest.leaves.items()
    }
    assert sum(r.files for r in found.leaves) == sum(1 for p in (tmp_path / "out").glob("*/*") if p.name != "zarr.json")
    assert found.forecast is not None and found.forecast.nbytes == manifest.nbytes and found.problems == ()
    assert found.forecast.seconds > 0 and found.forecast.needed >= manifest.nbytes
    status = {row.name: row.status for row in found.tensors}
    assert status.keys() == tensors.keys()
    assert status["lm_head.weight"] == "copy" and status["model.layers.0.self_attn.rotary_emb.inv_freq"] == "buffer"
    assert set(status.values()) == {"used", "copy", "buffer"}
    used = {row.name: row.becomes for row in found.tensors if row.status == "used"}
    assert used["model.layers.1.mlp.experts.2.up_proj.weight"] == ("experts.1.up[2]",)


def test_fused_tensors_become_several_leaves(tmp_path):
    hf = hf_folders.tiny(tmp_path / "hf", "olmoe", fused=True)
    row = next(row for row in dry_run(hf, tmp_path / "out").tensors if row.name.endswith("layers.0.mlp.experts.gate_up_proj"))
    assert sorted(row.becomes) == sorted(f"experts.0.{name}[{e}]" for name in ("gate", "up") for e in range(4))


def test_lists_every_problem(tmp_path):
    config = hf_folders.CONFIGS["qwen3_moe"]
    tensors = hf_folders.random_tensors(config)
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = np.zeros((37, 15), np.float32)
    tensors["model.layers.0.self_attn.sinks"] = np.zeros(4, np.float32)
    tensors["model.layers.0.mlp.experts.0.up_proj.weight"] = np.zeros((16, 16), np.int32)
    found = dry_run(hf_folders.write_folder(tmp_path / "hf", config, tensors), tmp_path / "out")
    status = {row.name: row.status for row in found.tensors if row.status != "used"}
    assert status == {
        "model.norm.weight": "missing",
        "lm_head.weight": "misshapen",
        "model.layers.0.self_attn.sinks": "unexpected",
        "model.layers.0.mlp.experts.0.up_proj.weight": "unsupported",
    }
    assert len(found.problems) == 4 and not found.leaves and found.forecast is None


def test_counts_what_an_unfinished_run_has_done(tmp_path):
    hf = hf_folders.tiny(tmp_path / "hf", "olmoe")

    def stop(done, total, path):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(hf, tmp_path / "out", progress=stop)
    before = sorted(p.name for p in partial_of(tmp_path / "out").rglob("*"))
    found = dry_run(hf, tmp_path / "out")
    assert found.forecast is not None and 0 < found.forecast.done < found.forecast.nbytes
    assert before == sorted(p.name for p in partial_of(tmp_path / "out").rglob("*"))


def test_too_little_room(tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "free_bytes", lambda place: 1000)
    found = dry_run(hf_folders.tiny(tmp_path / "hf", "olmoe"), tmp_path / "out")
    assert "the disk has 1000 bytes free" in found.problems[0]


def test_the_source_as_output(tmp_path):
    hf = hf_folders.tiny(tmp_path / "hf", "olmoe")
    for act in (dry_run, convert):
        with pytest.raises(CheckpointError, match="is both the source and the output folder"):
            act(hf, hf)


def test_the_command(tmp_path):
    hf = hf_folders.tiny(tmp_path / "hf", "olmoe")
    done = commands.call(script, hf, tmp_path / "out", "--dry-run", "--quantize", "int8", "--group", "8")
    assert done.code == 0 and "experts.1.down.scales" in done.out and "nothing was written" in done.out and "MB/s" in done.out
    assert not (tmp_path / "out").exists()
    (hf / "config.json").write_text(json.dumps({**hf_folders.CONFIGS["olmoe"], "num_experts": 5}))
    done = commands.call(script, hf, tmp_path / "out", "--dry-run")
    assert done.code == 2 and "missing" in done.out and done.err.startswith("error: ") and done.err.count("\n") == 1


# --- hub --------------------------------------------------------------------------------------------------------------


def fake_hub(monkeypatch, folder, error=None):
    calls = []

    def snapshot_download(name, **options):
        calls.append((name, options))
        if error:
            raise error
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    return calls


def test_a_hub_model_is_downloaded_and_converted(tmp_path, monkeypatch):
    sha = "f" * 40
    hf = hf_folders.tiny(tmp_path / "snapshots" / sha, "olmoe")
    calls = fake_hub(monkeypatch, hf)
    done = commands.call(script, "hub:allenai/OLMoE-1B-7B-0924@main", tmp_path / "out")
    assert done.code == 0 and json.loads((tmp_path / "out" / "manifest.json").read_text())["revision"] == sha
    assert calls[0][0] == "allenai/OLMoE-1B-7B-0924" and calls[0][1]["revision"] == "main"


@pytest.mark.parametrize("source", ["hub:", "hub:name", "hub:a/b/c", "hub:a/b@", "hub:a b/c"])
def test_malformed_hub_names(tmp_path, monkeypatch, source):
    calls = fake_hub(monkeypatch, tmp_path)
    with pytest.raises(CheckpointError, match="not a hub model: write hub:ORG/NAME or hub:ORG/NAME@REVISION"):
        hub.download(source)
    assert not calls


def test_no_connection(tmp_path, monkeypatch):
    fake_hub(monkeypatch, tmp_path, ConnectionError("no route\nto host"))
    with pytest.raises(CheckpointError, match="hub:a/b: could not be downloaded: no route to host"):
        hub.download("hub:a/b")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install 'jaxmoe.hub.'"):
        hub.download("hub:a/b")


def test_folders_are_never_taken_for_hub_models(tmp_path, monkeypatch):
    calls = fake_hub(monkeypatch, tmp_path)
    done = commands.call(script, "allenai/OLMoE-1B-7B-0924", tmp_path / "out")
    assert done.code == 2 and "no such folder" in done.err and not calls
