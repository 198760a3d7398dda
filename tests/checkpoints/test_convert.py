"""Conversion: bits, resuming, refusals."""

import json
import shutil
import threading
import time

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from checkpoints import convert as module
from checkpoints import store
from checkpoints.convert import convert, partial_of
from checkpoints.errors import CheckpointError
from checkpoints.load import open_checkpoint
from checkpoints.manifest import read_manifest
from tests.checkpoints import hf_folders

FAMILIES = tuple(hf_folders.CONFIGS)


def checksums(manifest):
    return {path: record.crc32 for path, record in manifest.leaves.items()}


def tree_bytes(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_restores_the_source_bit_for_bit(tmp_path, family, dtype, shards, assert_trees_equal):
    config = hf_folders.CONFIGS[family]
    tensors = hf_folders.random_tensors(config, dtype)
    manifest = convert(hf_folders.write_folder(tmp_path / "hf", config, tensors, shards), tmp_path / "out")
    params, experts = hf_folders.expected_trees(config, tensors)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert manifest.dtype == checkpoint.spec.precision.params == dtype
    assert manifest == checkpoint.manifest
    assert_trees_equal(checkpoint.restore_params(), params)
    assert_trees_equal(checkpoint.restore_experts(), experts)
    checkpoint.verify()
    assert not partial_of(tmp_path / "out").exists() and not (tmp_path / "out" / module.PROGRESS).exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_names_give_the_same_arrays(tmp_path, family):
    config = hf_folders.CONFIGS[family]
    tensors = hf_folders.random_tensors(config, "bfloat16")
    plain = convert(hf_folders.write_folder(tmp_path / "a", config, tensors), tmp_path / "plain")
    fused = convert(hf_folders.write_folder(tmp_path / "b", config, hf_folders.fuse(config, tensors), 2), tmp_path / "fused")
    assert checksums(plain) == checksums(fused)
    assert plain.names != fused.names


def test_special_values_keep_their_bits(tmp_path, assert_trees_equal):
    """Zeros (also the chunks that are all zero), negative zero, infinities, NaN payloads, denormals."""
    config = hf_folders.CONFIGS["olmoe"]
    tensors = hf_folders.random_tensors(config, "bfloat16")
    name = "model.layers.0.mlp.experts.1.gate_proj.weight"
    tensors[name] = np.zeros_like(tensors[name])
    bits = tensors["model.embed_tokens.weight"].view(np.uint16)
    bits.reshape(-1)[:6] = (0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFFA5, 0x0001)
    convert(hf_folders.write_folder(tmp_path / "hf", config, tensors), tmp_path / "out")
    params, experts = hf_folders.expected_trees(config, tensors)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert_trees_equal(checkpoint.restore_params(), params)
    assert_trees_equal(checkpoint.restore_experts(), experts)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float16", "bfloat16"),
        ("float16", None),
    ],
)
def test_conversion_of_dtypes(tmp_path, source, target, assert_trees_equal):
    config = hf_folders.CONFIGS["mixtral"]
    tensors = hf_folders.random_tensors(config, source)
    manifest = convert(hf_folders.write_folder(tmp_path / "hf", config, tensors), tmp_path / "out", target)
    kind = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[target or "float32"]
    assert manifest.dtype == (target or "float32")
    wanted = {name: value.astype(np.float32).astype(kind) for name, value in tensors.items()}
    params, experts = hf_folders.expected_trees(config, wanted)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert_trees_equal(checkpoint.restore_params(), params)
    assert_trees_equal(checkpoint.restore_experts(), experts)


@pytest.mark.parametrize("width", [24, 16, 14, 7, 13])
def test_chunks_are_an_expert_by_an_eighth(tmp_path, width):
    parts = {24: 8, 16: 8, 14: 7, 7: 7, 13: 1}[width]
    hf = hf_folders.tiny(tmp_path / "hf", "qwen3_moe", moe_intermediate_size=width)
    manifest = convert(hf, tmp_path / "out")
    assert manifest.leaves["experts.0.gate"].chunk == (1, 16, width // parts)
    assert manifest.leaves["experts.0.down"].chunk == (1, width // parts, 16)
    assert len(list((tmp_path / "out" / "experts.0.gate").glob("*.*.*"))) == 4 * parts
    size = (tmp_path / "out" / "experts.0.gate" / "0.0.0").stat().st_size
    assert size == 16 * width // parts * 4 + 4  # plain numbers and a CRC
    open_checkpoint(tmp_path / "out").verify()


@pytest.mark.parametrize("rows", [1, 5, 36])
def test_large_leaves_go_by_rows(tmp_path, rows, monkeypatch, assert_trees_equal):
    """With chunks made small, every leaf is cut; 37 rows are cut unevenly."""
    config = hf_folders.CONFIGS["qwen3_moe"]
    monkeypatch.setattr(store, "CHUNK_BYTES", rows * 16 * 4)
    tensors = hf_folders.random_tensors(config)
    manifest = convert(hf_folders.write_folder(tmp_path / "hf", config, tensors), tmp_path / "out")
    assert manifest.leaves["params.embed.table"].chunk == (rows, 16)
    assert manifest.leaves["params.lm_head.kernel"].chunk == (16, rows)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert_trees_equal(checkpoint.restore_params(), hf_folders.expected_trees(config, tensors)[0])
    checkpoint.verify()


def test_keeps_the_small_files_and_says_so(tmp_path):
    config = hf_folders.CONFIGS["olmoe"]
    files = {name: f"of {name}" for name in module.KEPT_FILES if name != "config.json"} | {"README.md": "not kept"}
    hf = hf_folders.write_folder(tmp_path / "hf", config, hf_folders.random_tensors(config), files=files)
    manifest = convert(hf, tmp_path / "out")
    assert set(manifest.files) == set(module.KEPT_FILES)
    for name in module.KEPT_FILES:
        assert (tmp_path / "out" / name).read_bytes() == (hf / name).read_bytes()
    assert not (tmp_path / "out" / "README.md").exists()
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.file("tokenizer.json") == tmp_path / "out" / "tokenizer.json"
    assert checkpoint.file("README.md") is None


def test_manifest_describes_each_leaf(tmp_path):
    manifest = convert(hf_folders.tiny(tmp_path / "hf", "mixtral", "bfloat16", shards=2), tmp_path / "out")
    record = manifest.leaves["experts.1.up"]
    assert (record.shape, record.dtype, record.stored) == ((3, 16, 24), "bfloat16", "uint16")
    assert record.axes == ("experts", "embed", "hidden")
    assert record.sources == tuple(f"model.layers.1.block_sparse_moe.experts.{e}.w3.weight" for e in range(3))
    assert record.op == "linear" and len(record.crc32) == 3
    assert [row[0] for row in manifest.source_files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert manifest.nbytes == sum(record.nbytes for record in manifest.leaves.values())
    assert read_manifest(tmp_path / "out") == manifest


def test_progress_counts_every_byte(tmp_path):
    calls = []
    manifest = convert(hf_folders.tiny(tmp_path / "hf", "olmoe"), tmp_path / "out", progress=lambda *a: calls.append(a))
    assert calls[0] == (0, manifest.nbytes, "")
    assert calls[-1][0] == calls[-1][1] == manifest.nbytes
    done = [call[0] for call in calls]
    assert done == sorted(done) and set(call[2] for call in calls[1:]) == set(manifest.leaves)


# --- tied embeddings and buffers --------------------------------------------------------------------------------------


def tied_folder(path, head=None, extra=None):
    config = {**hf_folders.CONFIGS["qwen3_moe"], "tie_word_embeddings": True}
    tensors = hf_folders.random_tensors(config)
    if head is not None:
        tensors["lm_head.weight"] = head(tensors["model.embed_tokens.weight"])
    return hf_folders.write_folder(path, config, {**tensors, **(extra or {})})


def test_tied_model_has_no_output_matrix(tmp_path):
    manifest = convert(tied_folder(tmp_path / "hf"), tmp_path / "out")
    assert "params.lm_head.kernel" not in manifest.leaves and manifest.ignored == ()
    assert "lm_head" not in open_checkpoint(tmp_path / "out").restore_params()


def test_tied_model_may_have_a_copy_on_disk(tmp_path):
    manifest = convert(tied_folder(tmp_path / "hf", head=np.copy), tmp_path / "out")
    assert manifest.ignored == ("lm_head.weight",)


def test_tied_model_with_another_output_matrix_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens.weight"):
        convert(tied_folder(tmp_path / "hf", head=lambda x: x + 1), tmp_path / "out")


def test_known_buffers_are_passed_over_and_listed(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    manifest = convert(tied_folder(tmp_path / "hf", extra={name: np.zeros(4, np.float32)}), tmp_path / "out")
    assert manifest.ignored == (name,)


# --- resuming ---------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """As a signal would stop it: nothing catches this."""


def stop_at(monkeypatch, n, error=Stopped):
    """Makes the n-th chunk's write fail; gives a list that counts the writes."""
    real, writes = store.write_chunk, []

    def write(array, region, data):
        if len(writes) == n:
            raise error
        writes.append(region)
        return real(array, region, data)

    monkeypatch.setattr(store, "write_chunk", write)
    return writes


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A source, its checksums, the bytes of its converted folder, and how many chunks that takes."""
    folder = tmp_path_factory.mktemp("straight")
    hf = hf_folders.tiny(folder / "hf", "qwen3_moe", "bfloat16", shards=2)
    with pytest.MonkeyPatch.context() as patch:
        writes = stop_at(patch, -1)
        manifest = convert(hf, folder / "out")
    return hf, checksums(manifest), tree_bytes(folder / "out"), len(writes)


@pytest.mark.parametrize("n", [0, 1, 7, 40, 41, 100, 150, -1])
def test_goes_on_after_a_stop(tmp_path, monkeypatch, straight, n):
    hf, expected, files, count = straight
    n = n % count
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, n)
        with pytest.raises(Stopped):
            convert(hf, out)
    assert not out.exists()
    with pytest.raises(CheckpointError, match="unfinished"):
        open_checkpoint(partial_of(out))
    writes = stop_at(monkeypatch, -1)
    manifest = convert(hf, out)
    assert checksums(manifest) == expected
    assert tree_bytes(out) == files
    assert count - n <= len(writes) <= count - n + 8  # at most the unit that was under way is written again
    assert not partial_of(out).exists()


class SlowWrite:
    """A write that ends a while after it began, as on a busy disk."""

    def __init__(self, array, region, data):
        self.done = False
        self._thread = threading.Thread(target=self._run, args=(array, region, data))
        self._thread.start()

    def _run(self, array, region, data):
        time.sleep(0.3)
        array[region].write(data).result()
        self.done = True

    def exception(self):
        self._thread.join()

    result = exception


@pytest.mark.parametrize("error", [Stopped, OSError(28, "No space left on device")])
def test_nothing_is_being_written_after_a_stop(tmp_path, straight, monkeypatch, error):
    """A write left running would go on in a folder whose lock is gone, under the next run's feet."""
    begun = []

    def write(array, region, data):
        if len(begun) == 3:
            raise error
        begun.append(SlowWrite(array, region, data))
        return begun[-1]

    monkeypatch.setattr(store, "CHUNK_BYTES", 5 * 16 * 2)  # several chunks of the embedding are under way at once
    monkeypatch.setattr(store, "write_chunk", write)
    with pytest.raises((Stopped, CheckpointError)):
        convert(straight[0], tmp_path / "out")
    assert [write.done for write in begun] == [True] * 3


def test_goes_on_after_three_stops(tmp_path, straight):
    hf, _, files, _ = straight
    for n in (30, 30, 30):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, n)
            with pytest.raises(Stopped):
                convert(hf, tmp_path / "out")
    convert(hf, tmp_path / "out")
    assert tree_bytes(tmp_path / "out") == files


@pytest.fixture
def unfinished(tmp_path, straight):
    """An unfinished folder, and the source it belongs to."""
    hf, _, _, count = straight
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, count - 5)
        with pytest.raises(Stopped):
            convert(hf, tmp_path / "out")
    return hf, tmp_path / "out", partial_of(tmp_path / "out")


def test_lost_and_cut_chunks_are_written_again(unfinished, straight, monkeypatch):
    hf, out, partial = unfinished
    (partial / "experts.0.up" / "2.0.3").unlink()
    chunk = partial / "experts.0.down" / "1.4.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    (partial / "params.final_norm.scale" / "0").write_bytes(b"")
    convert(hf, out)
    assert tree_bytes(out) == straight[2]


def test_a_line_that_was_cut_off_is_passed_over(unfinished, straight):
    hf, out, partial = unfinished
    path = partial / module.PROGRESS
    path.write_bytes(path.read_bytes()[:-20])
    convert(hf, out)
    assert tree_bytes(out) == straight[2]


def test_stopped_before_the_first_line_was_whole(tmp_path, straight):
    partial_of(tmp_path / "out").mkdir()
    (partial_of(tmp_path / "out") / module.PROGRESS).write_text('{"vers')
    convert(straight[0], tmp_path / "out")
    assert tree_bytes(tmp_path / "out") == straight[2]


def test_stopped_between_rename_and_the_last_removal(tmp_path, straight):
    hf, out = straight[0], tmp_path / "out"
    convert(hf, out)
    (out / module.PROGRESS).write_text("{}\n")
    convert(hf, out)
    assert tree_bytes(out) == straight[2]


def test_unfinished_folder_of_another_model(unfinished, tmp_path):
    _, out, partial = unfinished
    before = tree_bytes(partial)
    other = hf_folders.tiny(tmp_path / "other", "qwen3_moe", "bfloat16", shards=2, seed=1)
    with pytest.raises(CheckpointError, match="unfinished conversion of another model or dtype \\(fingerprint"):
        convert(other, out)
    assert tree_bytes(partial) == before and not out.exists()


def test_unfinished_folder_of_another_dtype(unfinished):
    hf, out, partial = unfinished
    before = tree_bytes(partial)
    with pytest.raises(CheckpointError, match="another model or dtype"):
        convert(hf, out, "float32")
    assert tree_bytes(partial) == before


def test_partial_folder_that_is_something_else(tmp_path, straight):
    partial = partial_of(tmp_path / "out")
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not an unfinished conversion"):
        convert(straight[0], tmp_path / "out")
    assert tree_bytes(partial) == {"notes.txt": b"mine"}


def test_two_at_once_is_refused(tmp_path, straight):
    hf, out = straight[0], tmp_path / "out"
    errors = []

    def again(done, total, path):
        if not errors:
            errors.append(pytest.raises(CheckpointError, convert, hf, out).value)

    convert(hf, out, progress=again)
    assert "another process" in str(errors[0])
    assert tree_bytes(out) == straight[2]


# --- a finished or foreign output folder ------------------------------------------------------------------------------


def test_finished_folder_returns_at_once(tmp_path, straight, monkeypatch):
    hf, out = straight[0], tmp_path / "out"
    first = convert(hf, out)
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    writes = stop_at(monkeypatch, -1)
    assert convert(hf, out) == first
    assert not writes and times == {p: p.stat().st_mtime_ns for p in out.rglob("*")}


def test_edited_tokenizer_reaches_a_finished_folder(tmp_path):
    config = hf_folders.CONFIGS["olmoe"]
    hf = hf_folders.write_folder(tmp_path / "hf", config, hf_folders.random_tensors(config), files={"tokenizer.json": "old"})
    convert(hf, tmp_path / "out")
    (hf / "tokenizer.json").write_text("new")
    manifest = convert(hf, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "new"
    assert read_manifest(tmp_path / "out") == manifest


@pytest.mark.parametrize("change", ["seed", "dtype", "config"])
def test_output_folder_with_another_model(tmp_path, straight, change):
    hf, out = straight[0], tmp_path / "out"
    convert(hf, out)
    before = tree_bytes(out)
    other, dtype = hf, None
    if change == "dtype":
        dtype = "float32"
    elif change == "seed":
        other = hf_folders.tiny(tmp_path / "other", "qwen3_moe", "bfloat16", shards=2, seed=1)
    else:
        other = tmp_path / "other"
        shutil.copytree(hf, other)
        config = json.loads((hf / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    with pytest.raises(CheckpointError, match="holds another model or dtype"):
        convert(other, out, dtype)
    assert tree_bytes(out) == before and not partial_of(out).exists()


def test_output_folder_with_something_else(tmp_path, straight):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not a converted checkpoint"):
        convert(straight[0], out)
    assert tree_bytes(out) == {"notes.txt": b"mine"} and not partial_of(out).exists()


def test_output_is_a_file(tmp_path, straight):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not a converted checkpoint"):
        convert(straight[0], tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_the_source_itself_as_output(tmp_path):
    hf = hf_folders.tiny(tmp_path / "hf", "olmoe")
    before = tree_bytes(hf)
    with pytest.raises(CheckpointError, match="choose another output folder"):
        convert(hf, hf)
    assert tree_bytes(hf) == before


def test_empty_output_folder_will_do(tmp_path, straight):
    (tmp_path / "deep" / "out").mkdir(parents=True)
    convert(straight[0], tmp_path / "deep" / "out")
    assert tree_bytes(tmp_path / "deep" / "out") == straight[2]


# --- disk -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), ValueError('RESOURCE_EXHAUSTED: "x" No space left on device [a=b]')],
)
def test_full_disk(tmp_path, straight, error):
    hf, _, files, count = straight
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, count // 2, error)
        with pytest.raises(CheckpointError, match=r"the disk is full after about \d+ of \d+ bytes: free \d+ more and run again"):
            convert(hf, out)
    assert not out.exists() and partial_of(out).is_dir()
    convert(hf, out)
    assert tree_bytes(out) == files


def test_other_write_errors_are_told(tmp_path, straight, monkeypatch):
    stop_at(monkeypatch, 3, OSError(5, "Input/output error"))
    with pytest.raises(CheckpointError, match="writing failed.*Input/output error"):
        convert(straight[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_little_room_is_refused_before_the_first_byte(tmp_path, straight, monkeypatch):
    needed = sum(len(data) for name, data in straight[2].items() if name.endswith(("0", "1")))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 100))
    assert needed > 100
    with pytest.raises(CheckpointError, match=r"\d+ bytes are to be written, the disk has 100 free"):
        convert(straight[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_array_of_another_shape_in_the_way(tmp_path, straight):
    """Progress can't be trusted over an array that somebody else made: it is an error, not an overwrite."""
    hf, out = straight[0], tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 0)
        with pytest.raises(Stopped):
            convert(hf, out)
    shutil.rmtree(partial_of(out) / "params.embed.table")
    other = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{partial_of(out)}/params.embed.table/"}}
    ts.open({**other, "metadata": {"shape": [3], "data_type": "int8"}}, create=True).result()
    with pytest.raises(CheckpointError, match="writing failed"):
        convert(hf, out)
    assert not out.exists()
