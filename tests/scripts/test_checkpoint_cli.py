"""scripts/checkpoint.py: what is in folders of every kind, what differs, and folders written again, as users run it."""

import io
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from checkpoints import commit, export
from checkpoints.convert import convert
from checkpoints.families import LAYOUTS, hf_tensors, leaf_paths
from checkpoints.load import open_checkpoint
from checkpoints.trees import save_tree
from jaxmoe.compress.round_to_nearest import quantizer
from jaxmoe.report import checkpoint_tables as tables
from jaxmoe.spec import ModelSpec
from scripts.golden_cases import CASES
from tests.checkpoints import hf_folders, packed
from tests.checkpoints.test_quantized import FP8, fp8_tensors
from tests.scripts import commands

script = commands.load("checkpoint")
CONFIG = {**hf_folders.CONFIGS["qwen3_moe"], "hidden_size": 32, "moe_intermediate_size": 64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{hf, plain, small}: a source, its conversion, and one with experts of 4 bits."""
    root = tmp_path_factory.mktemp("folders")
    files = {"tokenizer.json": "{}"}
    hf_folders.write_folder(root / "hf", CONFIG, hf_folders.random_tensors(CONFIG, "bfloat16"), shards=2, files=files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "sync", lambda path, forget=False: None)
        convert(root / "hf", root / "plain")
        convert(root / "hf", root / "small", quantizer=quantizer(4, 16))
    return root


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Nobody cuts the power here."""
    monkeypatch.setattr(commit, "sync", lambda path, forget=False: None)


def run(*args, code=0):
    """A command that ends as it should; what it said, without the spaces that align columns."""
    done = commands.call(script, *args)
    assert (done.code, done.err) == (code, ""), done
    return done.out


def refused(*args):
    """The one line of a command that is refused."""
    done = commands.call(script, *args)
    assert done.code == 2 and done.out == "" and done.err.startswith("error: ") and done.err.count("\n") == 1, done
    return done.err


def row(text, first):
    """The words of the line that begins with `first`."""
    return next(line for line in text.splitlines() if line.startswith(first)).removeprefix(first).split()


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_a_converted_folder(tmp_path, folders):
    manifest = open_checkpoint(folders / "plain").manifest
    out = run("inspect", folders / "plain", "--json", tmp_path / "made.json")
    assert out.splitlines()[0] == f"{folders / 'plain'}: converted folder"
    assert "qwen3_moe, 3 layers, width 32, vocabulary 37" in out and "4 in 2 layers, 2 active" in out
    assert "config.json, tokenizer.json" in out and row(out, "source dtypes") == ["BF16"]
    of_experts = sum(record.nbytes for path, record in manifest.leaves.items() if path.startswith("experts."))
    assert row(out, "experts  ")[:1] != [] and f"{of_experts / manifest.nbytes:.1%}" in out
    assert row(out, "experts.*.gate") == ["2", "4x32x64", "bfloat16", "1x32x8", "32", "16.4", "kB", "32.8", "kB"]
    assert "experts of 2 layers, 0 to 2, each: 49.2 kB" in out and "params.layers.1.mlp.up.kernel" in out
    assert "params.layers.0.attn.q.kernel" not in out and "params.layers.0.attn.q.kernel" in run("inspect", folders / "plain", "--leaves")
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["nbytes"] == manifest.nbytes and made["files"] == sum(1 for path in (folders / "plain").glob("*/*") if path.name != "zarr.json")
    assert {leaf["path"] for leaf in made["leaves"]} == manifest.leaves.keys()
    assert made["expert_bytes"] == {"0": 49152, "2": 49152} and made["model"]["experts"] == [4]
    kinds = {kind["name"]: kind["leaves"] for kind in made["kinds"]}
    assert kinds == {"embedding": 1, "attention": 30, "router": 2, "dense feed-forward": 3, "norms": 7, "experts": 6, "output": 1}
    assert sum(kind["parameters"] for kind in made["kinds"]) == made["model"]["parameters"]


def test_quantized_experts_count_as_what_they_stand_for(tmp_path, folders):
    out = run("inspect", folders / "small", "--json", tmp_path / "made.json")
    assert "method round_to_nearest, bits 4, group 16" in out and "int4" in out
    made = json.loads((tmp_path / "made.json").read_text())
    assert sum(kind["parameters"] for kind in made["kinds"]) == made["model"]["parameters"]


def test_extra_heads_are_told_apart(tmp_path):
    config = CASES["glm4_moe_normalized"].config | {"num_nextn_predict_layers": 1}
    spec = ModelSpec.from_hf(config)
    tensors = {name: np.ones(shape, np.float32) for name, (shape, _) in hf_tensors(spec, LAYOUTS["glm4_moe"][0]).items()}
    hf_folders.write_folder(tmp_path / "hf", config, tensors)
    own = [path for path in leaf_paths(spec) if path.startswith(("params.extra.", f"experts.{spec.n_layers}."))]
    out = run("inspect", tmp_path / "hf")
    assert row(out, "extra heads")[0] == str(len(own)) and ", 1 extra head(s)" in out
    assert row(out, "experts  ")[0] != row(out, "extra heads")[0]


def test_a_hugging_face_folder(tmp_path, folders):
    out = run("inspect", folders / "hf")
    assert "Hugging Face folder" in out and row(out, "names") == ["qwen3_moe"] and row(out, "experts.*.down")[:3] == ["2", "4x64x32", "BF16"]
    (tmp_path / "fp8").mkdir()
    packed.write(tmp_path / "fp8" / "model.safetensors", fp8_tensors()[0])
    (tmp_path / "fp8" / "config.json").write_text(json.dumps({**hf_folders.CONFIGS["qwen3_moe"], "quantization_config": FP8}))
    out = run("inspect", tmp_path / "fp8")
    assert row(out, "quantization") == ["fp8"] and row(out, "experts.*.up")[:3] == ["2", "4x16x16", "F8_E4M3"]
    hf_folders.write_folder(tmp_path / "odd", {"model_type": "gpt2"}, {"wte.weight": np.ones((3, 4), np.float32)})
    out = run("inspect", tmp_path / "odd")
    assert "note: " in out and "gpt2" in out and row(out, "wte.weight") == ["1", "3x4", "F32", "48", "B", "48", "B"]


def test_folders_that_are_unfinished(tmp_path, folders, monkeypatch):
    def stop(done, total, path):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folders / "hf", tmp_path / "out", progress=stop)
    out = run("inspect", tmp_path / "out.partial")
    assert "unfinished conversion, " in out.splitlines()[0] and " done" in out.splitlines()[0] and "will go on from there" in out
    assert int(row(out, "units")[0]) > 5
    convert(folders / "hf", tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "named.partial")
    (tmp_path / "named.partial" / "_progress.jsonl").write_text("{}\n")
    total = tables.size(open_checkpoint(folders / "plain").manifest.nbytes)
    assert f"unfinished conversion, 0 B of {total} done (0%)" in run("inspect", tmp_path / "named.partial")
    (tmp_path / "cut.partial").mkdir()
    (tmp_path / "cut.partial" / commit.LOCK).write_text("")
    assert "unfinished folder" in run("inspect", tmp_path / "cut.partial")
    seen = []
    monkeypatch.setattr(export, "write_shards", lambda partial, *rest: seen.append(run("inspect", partial)))
    export.export_checkpoint(folders / "plain", tmp_path / "back")
    assert "unfinished export, 0 B of " in seen[0] and "(0%)" in seen[0]


def test_trees_and_orbax_saves(tmp_path):
    tree = {"params": {"embed": {"table": jnp.ones((6, 4))}}, "optimizer": [np.arange(3, dtype=np.int32), {"mu": np.ones(5, ml_dtypes.bfloat16)}]}
    save_tree(tmp_path / "tree", tree, step=7)
    out = run("inspect", tmp_path / "tree")
    assert "saved tree" in out and row(out, "step") == ["7"] and row(out, "embedding")[:2] == ["1", "24"]
    assert row(out, "optimizer.1.mu")[1:3] == ["5", "bfloat16"]
    assert "whole: 3 leaves, 3 checksums" in run("verify", tmp_path / "tree")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", {"params": {"embed": {"table": jnp.ones((6, 4))}}, "experts": {"0": {"gate": jnp.ones((2, 3, 4))}}})
    out = run("inspect", tmp_path / "orbax")
    assert "Orbax save" in out and row(out, "experts.0.gate")[:3] == ["1", "2x3x4", "float32"]
    assert "experts of layer 0: 96 B" in out and row(out, "embedding")[:2] == ["1", "24"]


def test_what_inspect_refuses(tmp_path, folders):
    (tmp_path / "empty").mkdir()
    assert "no such folder" in refused("inspect", tmp_path / "none")
    assert "neither a converted folder" in refused("inspect", tmp_path / "empty")
    assert ".json" in refused("inspect", folders / "plain", "--json", tmp_path / "made.txt")


# --- diff -------------------------------------------------------------------------------------------------------------


def test_equal_folders(tmp_path, folders):
    assert run("diff", folders / "hf", folders / "plain").startswith("equal: 50 leaves compared, ")
    out = run("diff", folders / "plain", folders / "plain", "--json", tmp_path / "made.json")
    assert "68 leaves or experts are equal by their checksums, and were not read" in out and ", 0 B read" in out
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["equal"] and made["nbytes"] == 0 and made["leaves"] == []
    assert "checksums" not in run("diff", folders / "plain", folders / "plain", "--read-all")


def test_different_folders(tmp_path, folders):
    out = run("diff", folders / "plain", folders / "small", "--limit", "4", "--json", tmp_path / "made.json", code=1)
    assert "and 2 more" in out and "different: 50 leaves compared" in out and "bfloat16 / int4" in out and "4 of 4" in out
    made = json.loads((tmp_path / "made.json").read_text())
    assert not made["equal"] and len(made["leaves"]) == 6
    shorter = {**CONFIG, "num_hidden_layers": 2, "rope_theta": 1e5}
    hf_folders.write_folder(tmp_path / "other", shorter, hf_folders.random_tensors(shorter, "bfloat16", seed=1))
    out = run("diff", tmp_path / "other", folders / "hf", code=1)
    assert row(out, "layers.*.attention.rope.theta") == ["100000.0", "1000000.0"] and row(out, "layers ") == ["2", "3"]
    assert "only in B: params.layers.2.norm_attn.scale" in out and row(out, "router")[:2] == ["1", "1"]


def test_what_diff_refuses(tmp_path, folders):
    assert "no such folder" in refused("diff", folders / "plain", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "neither a Hugging Face folder" in refused("diff", tmp_path / "empty", folders / "plain")


# --- verify, reshard, export ------------------------------------------------------------------------------------------


def test_verify(tmp_path, folders):
    out = run("verify", folders / "plain")
    assert "whole: 50 leaves, 68 checksums" in out and "MB/s" in out
    for name in ("plain", "small"):
        assert "becomes the same: 68 leaves or experts made again" in run("verify", folders / name, "--source", folders / "hf")
    convert(folders / "hf", tmp_path / "out")
    path = next((tmp_path / "out" / "experts.2.up").glob("3.*"))
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert "experts.2.up" in refused("verify", tmp_path / "out")
    assert "is not what" in refused("verify", folders / "plain", "--source", _other(tmp_path))


def _other(tmp_path):
    return hf_folders.write_folder(tmp_path / "other", CONFIG, hf_folders.random_tensors(CONFIG, "bfloat16", seed=3))


def test_reshard(tmp_path, folders):
    out = run("reshard", folders / "plain", tmp_path / "cut", "--split", "heads=2", "hidden=4", "--dtype", "float32")
    assert row(out, "experts.*.gate") == ["2", "4x32x64", "1x32x8", "1x32x16", "32", "16", "bfloat16", "/", "float32"]
    assert row(out, "params.layers.*.attn.q.kernel")[2:6] == ["32x4x8", "32x2x8", "1", "2"] and "files (" in out
    assert "different" in run("diff", folders / "plain", tmp_path / "cut", code=1)
    assert "--split heads: an axis and a number" in refused("reshard", folders / "plain", tmp_path / "no", "--split", "heads")
    assert "given twice" in refused("reshard", folders / "plain", tmp_path / "no", "--split", "heads=2", "heads=4")
    assert "no leaf has an axis 'head'" in refused("reshard", folders / "plain", tmp_path / "no", "--split", "head=2")
    assert not (tmp_path / "no").exists()


def test_export(tmp_path, folders):
    out = run("export", folders / "plain", tmp_path / "back", "--max-shard-gb", "0.00005")
    assert "68 BF16 tensors, " in out and "with config.json, tokenizer.json" in out and "note" not in out
    assert run("diff", tmp_path / "back", folders / "hf").startswith("equal")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == 3
    out = run("export", folders / "small", tmp_path / "wide", "--dtype", "float16")
    assert "68 F16 tensors, " in out and "24 tensors come from quantized experts" in out and "44 tensors were rounded" in out
    assert "exists and is not empty" in refused("export", folders / "plain", tmp_path / "back")
    for wrong in ("0", "-1", "nan", "inf"):
        assert "positive number" in refused("export", folders / "plain", tmp_path / "no", f"--max-shard-gb={wrong}")


def test_words():
    assert [tables.size(n) for n in (0, 999, 1000, 1234567, 61.1e9, 1.5e12)] == ["0 B", "999 B", "1 kB", "1.23 MB", "61.1 GB", "1.5 TB"]
    assert tables.some(["a", "b", "c"], 2) == "a, b and 1 more" and tables.numbers([64, 1280]) == "64 or 1,280"


def test_as_one_line_in_a_shell(tmp_path, folders):
    """From another folder, and into a terminal that knows no Unicode."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, script.__file__, "inspect", "plain"], cwd=folders, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "####" in done.stdout and "█" not in done.stdout, done.stderr


def test_arguments_that_are_wrong():
    for wrong in (["weigh"], ["diff", "a"], ["export", "a", "b", "--dtype", "int8"]):
        done = commands.call(script, *wrong, out=io.StringIO())
        assert done.code == 2 and "Traceback" not in done.err
