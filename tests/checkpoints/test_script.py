"""scripts/convert.py as a user runs it."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from checkpoints import families, store
from checkpoints.load import open_checkpoint
from jaxmoe.spec import FAMILIES
from tests.checkpoints import hf_folders
from tests.scripts import commands

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert.py"


def run(*args, cwd):
    """From another folder and without PYTHONPATH, as one line in a shell."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"COLUMNS": "200"}
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_converts_and_reports(tmp_path):
    hf_folders.tiny(tmp_path / "hf", "qwen3_moe")
    done = run("hf", "out", "--dtype", "bfloat16", "--leaves", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = open_checkpoint(tmp_path / "out").manifest
    assert manifest.dtype == "bfloat16"
    assert f"{manifest.nbytes:,}" in done.stdout and "MB/s" in done.stdout
    assert all(path in done.stdout for path in manifest.leaves)
    again = run("hf", "out", "--dtype", "bfloat16", cwd=tmp_path)
    assert again.returncode == 0 and "nothing was written" in again.stdout
    assert "experts.0.gate" not in again.stdout


def test_lists_the_families(tmp_path):
    done = run("--list", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for family in FAMILIES:
        assert any(line.startswith(f"{family} ") for line in done.stdout.splitlines()), family
    words = " ".join(done.stdout.split())
    assert "Mixtral-8x7B" in words and "latent (MLA)" in words and "groups by their two best" in words
    without = run(cwd=tmp_path)
    assert without.returncode == 2 and "give the folder to convert" in without.stderr


def no_such(hf):
    (hf / "config.json").unlink()


def cut(hf):
    path = hf / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"), [(no_such, "config.json: missing"), (cut, "model-00001-of-00002.safetensors: truncated")]
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, damage, message):
    damage(hf_folders.tiny(tmp_path / "hf", "olmoe", shards=2))
    done = run("hf", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout.strip()
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_output_folder_that_is_taken(tmp_path):
    hf_folders.tiny(tmp_path / "hf", "olmoe")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    done = run("hf", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr.startswith("error: ")
        and "choose another output folder" in done.stderr
        and done.stderr.count("\n") == 1
    )


def test_unwritable_place(tmp_path):
    hf_folders.tiny(tmp_path / "hf", "olmoe")
    (tmp_path / "file").write_text("")
    done = run("hf", "file/out", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_wrong_arguments(tmp_path):
    done = run("hf", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr


# --- in this process --------------------------------------------------------------------------------------------------

convert_script = commands.load("convert")


def check_refused(done: commands.Done, message: str) -> None:
    assert done.code == 2 and done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and message in done.err, done.err


def test_output_folder_of_another_model(tmp_path):
    hf_folders.tiny(tmp_path / "hf", "olmoe")
    hf_folders.tiny(tmp_path / "other", "olmoe", seed=1)
    assert commands.call(convert_script, tmp_path / "hf", tmp_path / "out").code == 0
    expected = open_checkpoint(tmp_path / "out").manifest
    check_refused(commands.call(convert_script, tmp_path / "other", tmp_path / "out"), "out: holds another model or dtype (fingerprint")
    check_refused(commands.call(convert_script, tmp_path / "hf", tmp_path / "out", "--dtype", "bfloat16"), "out: holds another model or dtype")
    assert open_checkpoint(tmp_path / "out").manifest == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "other", "out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full_disk", "interrupt"])
def test_stopped_while_it_converts(tmp_path, monkeypatch, error):
    hf, writes, real = hf_folders.tiny(tmp_path / "hf", "olmoe"), [], store.write_chunk

    def stop(*args):
        writes.append(args)
        if len(writes) == 30:
            raise error
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_chunk", stop)
        done = commands.call(convert_script, hf, tmp_path / "out")
    if isinstance(error, KeyboardInterrupt):
        assert done == (130, "", "interrupted\n")
    else:
        check_refused(done, "out.partial: the disk is full after about")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out.partial"]
    done = commands.call(convert_script, hf, tmp_path / "out")
    assert done.code == 0 and "bytes written in" in done.out
    open_checkpoint(tmp_path / "out").verify()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json"])
def test_disk_that_is_full_for_the_last_files(tmp_path, monkeypatch, name):
    """Neither an unfinished folder nor a finished one, whose tokenizer was edited since, keeps a temporary file."""
    hf, out = hf_folders.tiny(tmp_path / "hf", "olmoe"), tmp_path / "out"
    real = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(28, "No space left on device", str(source))
        real(source, target)

    for text in ("one", "two"):
        (hf / "tokenizer.json").write_text(text)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            check_refused(commands.call(convert_script, hf, out), f"{name}.tmp: No space left on device")
        assert not list(tmp_path.rglob("*.tmp"))
        assert commands.call(convert_script, hf, out).code == 0
        assert (out / "tokenizer.json").read_text() == text
        open_checkpoint(out).verify()


def test_brackets_in_a_path_are_printed(tmp_path):
    hf = hf_folders.tiny(tmp_path / "hf", "olmoe")
    for said in ("bytes written in", "was there already"):
        done = commands.call(convert_script, hf, tmp_path / "out[red][/blue]")
        assert done.code == 0 and said in done.out and "out[red][/blue]" in done.out


def test_weights_that_are_passed_over_are_told(tmp_path, monkeypatch):
    """Not buffers, nor a tied model's copy of the embedding."""
    config = {**hf_folders.CONFIGS["olmoe"], "tie_word_embeddings": True}
    tensors = hf_folders.random_tensors(config)
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"], "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    done = commands.call(convert_script, hf_folders.write_folder(tmp_path / "hf", config, tensors), tmp_path / "out")
    assert done.code == 0 and "passed over" not in done.out
    lossy = tuple(dataclasses.replace(layout, ignored=(*layout.ignored, r"mtp\..*")) for layout in families.LAYOUTS["olmoe"])
    monkeypatch.setitem(families.LAYOUTS, "olmoe", lossy)
    tensors |= {"mtp.a.weight": np.zeros((40, 10), np.float32), "mtp.b.weight": np.zeros(3, np.float32)}
    done = commands.call(convert_script, hf_folders.write_folder(tmp_path / "hf", config, tensors), tmp_path / "other")
    assert done.code == 0 and "passed over, as nothing here uses them: 2 weights, 1,612 bytes (manifest.json lists them)" in done.out
