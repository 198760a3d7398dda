"""scripts/convert.py as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints.load import open_checkpoint
from tests.checkpoints import hf_folders

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert.py"


def run(*args, cwd):
    """From another folder and without PYTHONPATH, as one line in a shell."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"COLUMNS": "200"}
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_converts_and_reports(tmp_path):
    hf_folders.tiny(tmp_path / "hf", "qwen3_moe")
    done = run("hf", "out", "--dtype", "bfloat16", "--list", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = open_checkpoint(tmp_path / "out").manifest
    assert manifest.dtype == "bfloat16"
    assert f"{manifest.nbytes:,}" in done.stdout and "MB/s" in done.stdout
    assert all(path in done.stdout for path in manifest.leaves)
    again = run("hf", "out", "--dtype", "bfloat16", cwd=tmp_path)
    assert again.returncode == 0 and "nothing was written" in again.stdout
    assert "experts.0.gate" not in again.stdout


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
