"""Where folders may lie: links, '..', '.', within each other; and folders that were begun or finished otherwise."""

import json
import os

import pytest

from checkpoints import commit
from checkpoints.convert import convert, partial_of
from checkpoints.dry_run import dry_run
from checkpoints.errors import CheckpointError
from checkpoints.export import export_checkpoint
from checkpoints.journal import PROGRESS
from checkpoints.load import open_checkpoint
from checkpoints.reshard import reshard
from checkpoints.verify import verify
from jaxmoe.compress.round_to_nearest import quantizer
from tests.checkpoints import hf_folders


@pytest.fixture
def hf(tmp_path):
    return hf_folders.tiny(tmp_path / "hf", "olmoe", num_hidden_layers=1)


def stopped(hf, out, **how):
    def stop(done, total, path):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(hf, out, progress=stop, **how)


def test_paths_upward(tmp_path, hf, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert("../hf", "../out")
    assert verify("../out", "../hf").units
    assert open_checkpoint("../out").restore_params()
    reshard("../out", "../again", {"hidden": 2})
    export_checkpoint("../again", "../back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "back", "here", "hf", "out"]


@pytest.mark.parametrize("dangling", [False, True])
def test_the_output_is_a_link(tmp_path, hf, dangling):
    if not dangling:
        (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real", target_is_directory=True)
    convert(hf, tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and verify(tmp_path / "real").units
    convert(hf, tmp_path / "out")


def test_the_output_is_the_current_folder(tmp_path, hf, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    convert(hf, ".")
    assert verify(tmp_path / "out").units


def test_a_mount_point_is_refused_before_any_work(tmp_path, hf, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="a disk is mounted there"):
        convert(hf, tmp_path / "out")
    assert not partial_of(tmp_path / "out").exists()
    assert "a disk is mounted there" in dry_run(hf, tmp_path / "out").problems[0]


@pytest.mark.parametrize("act", [convert, dry_run])
def test_within_the_source(hf, act):
    with pytest.raises(CheckpointError, match="lies within the source folder"):
        act(hf, hf / "deep" / "out")
    assert not (hf / "deep").exists()


def test_a_source_that_changed_since_is_not_mixed_in(tmp_path, hf):
    """Where the fingerprint's samples don't show it: files that are written again have another time."""
    stopped(hf, tmp_path / "out")
    os.utime(hf / "model.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="unfinished conversion of another .*source_times differs"):
        convert(hf, tmp_path / "out")
    assert (partial_of(tmp_path / "out") / PROGRESS).exists()


def test_begun_with_other_chunks(tmp_path, hf):
    stopped(hf, tmp_path / "out")
    path = partial_of(tmp_path / "out") / PROGRESS
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {"cut": "otherwise"}), *rest]) + "\n")
    with pytest.raises(CheckpointError, match="cut differs"):
        convert(hf, tmp_path / "out")


@pytest.mark.parametrize("change", [{"version": 9}, {"dtype": "int7"}])
def test_an_output_of_a_newer_version_or_damaged_is_told_as_such(tmp_path, hf, change):
    convert(hf, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    wanted = "version 9 was written by a newer jaxmoe" if "version" in change else "its content doesn't have the checksum"
    with pytest.raises(CheckpointError, match=f"{wanted}.*or choose another output folder"):
        convert(hf, tmp_path / "out")


def test_a_finished_folder_on_a_read_only_disk(tmp_path, hf, monkeypatch):
    manifest = convert(hf, tmp_path / "out")

    def refuse(self, missing_ok=False):
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(type(tmp_path), "unlink", refuse)
    assert convert(hf, tmp_path / "out") == manifest


def test_a_dry_run_looks_at_the_output(tmp_path, hf):
    convert(hf, tmp_path / "out")
    found = dry_run(hf, tmp_path / "out")
    assert found.finished and found.forecast is None and found.problems == () and found.leaves
    assert "holds another model or dtype" in dry_run(hf, tmp_path / "out", "bfloat16").problems[0]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert "is not a converted checkpoint" in dry_run(hf, tmp_path / "other").problems[0]
    stopped(hf, tmp_path / "begun", dtype="bfloat16")
    assert "unfinished conversion of another model" in dry_run(hf, tmp_path / "begun").problems[0]


@pytest.mark.parametrize("parts", [{"embed": 2}, {"hidden": 1, "vocab": 37}])
@pytest.mark.parametrize("how", [None, quantizer(8, 8)], ids=["plain", "int8"])
def test_resharded_folders_are_verified_against_the_source(tmp_path, hf, how, parts):
    convert(hf, tmp_path / "out", quantizer=how)
    reshard(tmp_path / "out", tmp_path / "again", parts)
    assert verify(tmp_path / "again", hf, how).source_units


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_experts_of_one_chunk_are_exported(tmp_path, bits):
    """Groups as wide as the experts: nothing is cut along K."""
    hf = hf_folders.tiny(tmp_path / "hf", "olmoe", num_hidden_layers=1, intermediate_size=16)
    convert(hf, tmp_path / "out", quantizer=quantizer(bits, 16))
    assert open_checkpoint(tmp_path / "out").manifest.leaves["experts.0.down.values"].chunk[1] == 16 * bits // 8
    export_checkpoint(tmp_path / "out", tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "plain")
    for name in ("gate", "up", "down"):
        path = f"experts.0.{name}"
        assert (open_checkpoint(tmp_path / "plain").read(path) == open_checkpoint(tmp_path / "out").read(path)).all()


def test_a_config_for_a_folder_of_our_own(tmp_path, hf):
    convert(hf, tmp_path / "out")
    with pytest.raises(CheckpointError, match="config"):
        reshard(tmp_path / "out", tmp_path / "again", config=hf / "config.json")
    assert not (tmp_path / "again").exists()


def test_errors_of_files_that_sync_in_the_background(tmp_path):
    with pytest.raises(FileNotFoundError), commit.Syncing() as syncing:
        syncing.begin([str(tmp_path / "gone")])
