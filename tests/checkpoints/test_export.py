"""Export: files as the reference writes them, dtypes, what was packed, quantized or passed over, and folders that are whole or not there at all."""

import dataclasses
import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints import commit, export, families, plan, safetensors_writer, store, tensor_rows
from checkpoints.convert import convert, sha256_of
from checkpoints.errors import CheckpointError
from checkpoints.export import export_checkpoint, export_hf
from checkpoints.load import open_checkpoint
from checkpoints.manifest import read_manifest, write_manifest
from checkpoints.reshard import reshard
from checkpoints.safetensors_reader import SafetensorsFolder
from checkpoints.safetensors_writer import MARKER, Tensor, new_folder, plan_shards, write_shards
from jaxmoe import formats
from jaxmoe.compress.round_to_nearest import quantizer
from tests.checkpoints import hf_folders, odd_model, packed
from tests.checkpoints.test_memory import CONFIG as LARGE
from tests.checkpoints.test_quantized import FP8, MXFP4, fp8_tensors, mxfp4_tensors, odd
from tests.checkpoints.test_round_trip import assert_same, read_folder, unsynced

__all__ = ["odd", "unsynced"]  # fixtures

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = hf_folders.CONFIGS["qwen3_moe"]
KINDS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


# --- files ------------------------------------------------------------------------------------------------------------


def some_tensors():
    rng = np.random.default_rng(0)
    shapes = {"b": ("BF16", (3, 5)), "a": ("F16", (7,)), "é": ("F32", (2, 3)), "none": ("F32", (0, 4)), "one": ("BF16", ()), "c": ("F32", (64, 3))}
    return {name: rng.standard_normal(shape).astype(KINDS[kind]) for name, (kind, shape) in shapes.items()}


def write(folder, tensors, limit):
    spelled = {np.dtype(kind): name for name, kind in KINDS.items()}
    shards = plan_shards([Tensor(name, spelled[value.dtype], value.shape) for name, value in tensors.items()], limit)

    def pieces(tensor):
        held = tensors[tensor.name].reshape(-1)
        held = held.view(np.uint16) if tensor.dtype == "BF16" else held
        yield from (held[at : at + 4] for at in range(0, held.size, 4))

    folder.mkdir()
    write_shards(folder, shards, pieces)
    return shards


def test_one_file_has_the_bytes_of_the_references_own(tmp_path):
    tensors = some_tensors()
    (shard,) = write(tmp_path / "ours", tensors, None)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert shard.nbytes == (tmp_path / "theirs").stat().st_size and os.listdir(tmp_path / "ours") == ["model.safetensors"]


def test_several_files_and_their_index(tmp_path):
    tensors = some_tensors()
    shards = write(tmp_path / "ours", tensors, 60)
    names = [f"model-0000{i}-of-0000{len(shards)}.safetensors" for i in range(1, len(shards) + 1)]
    assert [shard.file for shard in shards] == names and len(names) == 3
    assert sorted(os.listdir(tmp_path / "ours")) == [*names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(value.nbytes for value in tensors.values())}
    assert {name: load_file(tmp_path / "ours" / file)[name].shape for name, file in index["weight_map"].items()} == {
        name: value.shape for name, value in tensors.items()
    }
    assert_same(read_folder(tmp_path / "ours"), tensors)
    with SafetensorsFolder(tmp_path / "ours") as folder:
        assert folder.tensors.keys() == tensors.keys()


def test_limits_and_names_that_will_not_do():
    with pytest.raises(CheckpointError, match="0 bytes hold nothing"):
        plan_shards([Tensor("a", "F32", (1,))], 0)
    with pytest.raises(CheckpointError, match="twice"):
        plan_shards([Tensor("a", "F32", (1,)), Tensor("a", "BF16", (1,))])


# --- tensors out of leaves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", odd_model.EXPERTS)
def test_every_arrangement_in_small_chunks_and_blocks(tmp_path, monkeypatch, form):
    """Leaves cut into many chunks, tensors put together from many blocks, float32 leaves among bfloat16 ones, an extra head, several files."""
    monkeypatch.setitem(families.LAYOUTS, "odd", (odd_model.layout(form),))
    monkeypatch.setattr(plan, "read_config", lambda hf: odd_model.SPEC.with_precision("float32"))
    monkeypatch.setattr(store, "CHUNK_BYTES", 300)
    monkeypatch.setattr(store, "_PART_BYTES", 1)
    monkeypatch.setattr(tensor_rows, "BLOCK_BYTES", 700)
    monkeypatch.setattr(tensor_rows, "_COLUMNS", 5)
    tensors = odd_model.tensors(odd_model.random_leaves("bfloat16"), form)
    manifest = convert(hf_folders.write_folder(tmp_path / "hf", {}, tensors), tmp_path / "out")
    cut = {i for record in manifest.leaves.values() for i, (n, c) in enumerate(zip(record.shape, record.chunk, strict=True)) if c < n}
    assert cut == {0, 1, 2}
    done = export_checkpoint(tmp_path / "out", tmp_path / "back", max_shard_bytes=20000)
    assert_same(read_folder(tmp_path / "back"), tensors)
    assert len(done.files) > 2 and done.tensors == {"BF16": len(tensors) - 4, "F32": 4}


def test_blocks_bound_what_is_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_rows, "BLOCK_BYTES", 256)
    convert(hf_folders.tiny(tmp_path / "hf", "qwen3_moe", fused=True), tmp_path / "out")
    sizes, write = [], safetensors_writer.np.ascontiguousarray
    monkeypatch.setattr(safetensors_writer.np, "ascontiguousarray", lambda x: sizes.append(x.size) or write(x))
    seen = []
    export_checkpoint(tmp_path / "out", tmp_path / "back", progress=lambda done, total, name: seen.append((done, total, name)))
    assert sizes and len(seen) > 100
    assert seen[-1][0] == seen[-1][1] == sum(value.nbytes for value in read_folder(tmp_path / "back").values())
    assert [done for done, *_ in seen] == sorted(done for done, *_ in seen) and seen[0][0] <= 4 * 64


@pytest.mark.slow
def test_memory_holds_an_experts_matrix_not_a_layer(tmp_path):
    """Growth of the peak while 255 MB are written, of which an expert's matrix, the embedding and the output matrix have 29 MB each."""
    rng = np.random.default_rng(0)
    config = {**LARGE, "num_local_experts": 2}
    shapes = hf_folders.shapes(config, fused=True)
    tensors = {name: rng.integers(0, 2**15, shape, dtype=np.uint16).view(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    convert(hf_folders.write_folder(tmp_path / "hf", config, tensors), tmp_path / "out")
    convert(hf_folders.tiny(tmp_path / "tiny", "mixtral", "bfloat16"), tmp_path / "small")
    program = """
import json, sys
from checkpoints.export import export_checkpoint
export_checkpoint(sys.argv[1], sys.argv[2])     # loads every module and starts every thread
def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024
before = status("VmRSS")
done = export_checkpoint(sys.argv[3], sys.argv[4])
print(json.dumps({"growth": status("VmHWM") - before, "nbytes": done.nbytes}))
"""
    paths = [str(tmp_path / name) for name in ("small", "small_back", "out", "back")]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program, *paths], cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    print(measured)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()
    matrix = 7168 * 2048 * 2
    assert measured["nbytes"] > 250e6 and matrix / 2 < measured["growth"] <= matrix + 90e6


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "held"), [("BF16", None), ("BF16", "float32"), ("F16", None)])
def test_every_code_comes_back(tmp_path, source, held):
    """Infinities, numbers below the normal ones and every not-a-number among them."""
    config = {**hf_folders.CONFIGS["olmoe"], "vocab_size": 4096}
    tensors = hf_folders.random_tensors(config, np.dtype(KINDS[source]).name)
    tensors["model.embed_tokens.weight"] = np.arange(65536, dtype=np.uint16).view(KINDS[source]).reshape(4096, 16)
    with np.errstate(invalid="ignore"):
        convert(hf_folders.write_folder(tmp_path / "hf", config, tensors), tmp_path / "out", held)
    done = export_checkpoint(tmp_path / "out", tmp_path / "back")
    assert_same(read_folder(tmp_path / "back"), tensors)
    assert not done.rounded and not done.narrowed


def test_what_conversion_rounded_has_the_sources_dtype_and_is_named(tmp_path):
    tensors = hf_folders.random_tensors(CONFIG)
    convert(hf_folders.write_folder(tmp_path / "hf", CONFIG, tensors), tmp_path / "out", "bfloat16")
    done = export_checkpoint(tmp_path / "out", tmp_path / "back")
    assert_same(read_folder(tmp_path / "back"), {name: value.astype(ml_dtypes.bfloat16).astype(np.float32) for name, value in tensors.items()})
    assert sorted(done.rounded) == sorted(tensors) and not done.narrowed
    narrow = export_checkpoint(tmp_path / "out", tmp_path / "narrow", "bfloat16")
    assert_same(read_folder(tmp_path / "narrow"), {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()})
    assert not narrow.narrowed and json.loads((tmp_path / "narrow" / "config.json").read_text()) == CONFIG | {"dtype": "bfloat16"}


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
def test_a_dtype_that_is_asked_for(tmp_path, dtype, kind):
    config = {**CONFIG, "torch_dtype": "float32", "text_config": {"dtype": "float32"}}
    tensors = hf_folders.random_tensors(CONFIG)
    convert(hf_folders.write_folder(tmp_path / "hf", CONFIG, tensors), tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    _sign(tmp_path / "out")
    done = export_checkpoint(tmp_path / "out", tmp_path / "back", dtype)
    assert_same(read_folder(tmp_path / "back"), {name: value.astype(KINDS[kind]) for name, value in tensors.items()})
    assert len(done.narrowed) == (0 if kind == "F32" else len(tensors)) and not done.rounded
    wanted = {**config, "torch_dtype": dtype, "text_config": {"dtype": dtype}}
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == wanted


def _sign(folder):
    """The manifest with the small files as they are now."""
    manifest = read_manifest(folder)
    write_manifest(folder, dataclasses.replace(manifest, files={name: sha256_of(folder / name) for name in manifest.files}))


def test_numbers_that_float16_cannot_hold(tmp_path):
    tensors = hf_folders.random_tensors(CONFIG)
    tensors["lm_head.weight"][3, 4] = 70000.0
    convert(hf_folders.write_folder(tmp_path / "hf", CONFIG, tensors), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"tensor lm_head.weight has numbers that float16 can't hold: export it as float32 or bfloat16"):
        export_checkpoint(tmp_path / "out", tmp_path / "back", "float16")
    with pytest.raises(CheckpointError, match="unsupported dtype 'int8'"):
        export_checkpoint(tmp_path / "out", tmp_path / "back", "int8")
    assert sorted(os.listdir(tmp_path)) == ["hf", "out"]


def test_leaves_that_are_float32_in_any_model_keep_their_dtype(tmp_path, monkeypatch):
    """Of bfloat16 tensors, widened when they were converted, or float32 ones: asked for the other, they stay what they were."""
    monkeypatch.setitem(families.LAYOUTS, "odd", (odd_model.layout(),))
    monkeypatch.setattr(plan, "read_config", lambda hf: odd_model.SPEC.with_precision("float32"))
    wide = odd_model.tensors(odd_model.random_leaves("bfloat16"))
    name = "model.layers.2.mlp.gate.weight"
    for i, tensors in enumerate((wide, {**wide, name: wide[name].astype(ml_dtypes.bfloat16)})):
        convert(hf_folders.write_folder(tmp_path / f"hf{i}", {}, tensors), tmp_path / f"out{i}")
        export_checkpoint(tmp_path / f"out{i}", tmp_path / f"back{i}", ("bfloat16", "float32")[i])
        back = read_folder(tmp_path / f"back{i}")
        assert back[name].tobytes() == tensors[name].tobytes() and back[name].dtype == tensors[name].dtype
        assert back["lm_head.weight"].dtype == (ml_dtypes.bfloat16, np.float32)[i]


# --- what was packed, quantized, cut otherwise or passed over ---------------------------------------------------------


def test_fp8_comes_out_plain(tmp_path):
    tensors, values = fp8_tensors()
    config = {**CONFIG, "quantization_config": FP8}
    (tmp_path / "hf").mkdir()
    packed.write(tmp_path / "hf" / "model.safetensors", tensors)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "hf", tmp_path / "out")
    done = export_checkpoint(tmp_path / "out", tmp_path / "back")
    assert_same(read_folder(tmp_path / "back"), {name: value.astype(ml_dtypes.bfloat16) for name, value in values.items()})
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == CONFIG
    assert sorted(done.unpacked) == sorted(name for name in values if f"{name}_scale_inv" in tensors) and not done.rounded


def test_mxfp4_comes_out_plain_under_the_plain_layouts_names(tmp_path, odd):
    tensors, leaves = mxfp4_tensors()
    (tmp_path / "hf").mkdir()
    packed.write(tmp_path / "hf" / "model.safetensors", tensors)
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"a": 1, "text_config": {"quantization_config": MXFP4}, "quantization_config": MXFP4}))
    convert(tmp_path / "hf", tmp_path / "out")
    done = export_checkpoint(tmp_path / "out", tmp_path / "back")
    assert_same(read_folder(tmp_path / "back"), odd_model.tensors(leaves, "transposed_interleaved"))
    assert done.layout == "odd-transposed_interleaved" and len(done.unpacked) == 4
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == {"a": 1, "text_config": {}}


@pytest.mark.parametrize(("bits", "fused", "dtype"), [(8, False, "float32"), (4, True, "bfloat16"), (4, False, "float16")])
def test_quantized_experts_come_out_as_what_they_stand_for(tmp_path, bits, fused, dtype):
    config = {**CONFIG, "hidden_size": 96, "moe_intermediate_size": 192}
    tensors = hf_folders.random_tensors(config, dtype)
    tensors = hf_folders.fuse(config, tensors) if fused else tensors
    convert(hf_folders.write_folder(tmp_path / "hf", config, tensors), tmp_path / "out", quantizer=quantizer(bits, 16))
    reshard(tmp_path / "out", tmp_path / "cut", {"embed": 3})
    for name in ("out", "cut"):  # cut along what they share scales along as well
        done = export_checkpoint(tmp_path / name, tmp_path / f"{name}_back")
        source, back = open_checkpoint(tmp_path / name), read_folder(tmp_path / f"{name}_back")
        assert {k: (v.dtype, v.shape) for k, v in back.items()} == {k: (v.dtype, v.shape) for k, v in tensors.items()}
        assert sorted(done.dequantized) == sorted(k for k in tensors if ".experts." in k)
        assert_same({k: v for k, v in back.items() if ".experts." not in k}, {k: v for k, v in tensors.items() if ".experts." not in k})
        values, scales = (source.read(f"experts.2.down.{part}") for part in ("values", "scales"))
        wide = formats.dequantize(formats.Quantized(values, scales, bits, 16, -2))
        wanted = np.asarray(wide)[1].T.astype(back["lm_head.weight"].dtype)
        got = back["model.layers.2.mlp.experts.down_proj"][1] if fused else back["model.layers.2.mlp.experts.1.down_proj.weight"]
        np.testing.assert_array_equal(got, wanted)
    assert_same(read_folder(tmp_path / "cut_back"), read_folder(tmp_path / "out_back"))


def test_a_folder_that_was_cut_otherwise(tmp_path):
    tensors = hf_folders.random_tensors(CONFIG, "bfloat16")
    convert(hf_folders.write_folder(tmp_path / "hf", CONFIG, tensors), tmp_path / "out")
    reshard(tmp_path / "out", tmp_path / "cut", {"embed": 4}, "float32")
    export_checkpoint(tmp_path / "cut", tmp_path / "back")
    assert_same(read_folder(tmp_path / "back"), tensors)


def test_copies_are_written_again_and_what_was_passed_over_is_named(tmp_path):
    config = {**hf_folders.CONFIGS["olmoe"], "tie_word_embeddings": True}
    tensors = hf_folders.random_tensors(config, "float16")
    tied = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for i in (0, 1)}
    for name, source in (("tied", tied), ("single", tensors)):
        convert(hf_folders.write_folder(tmp_path / name, config, {**source, **buffers}), tmp_path / f"{name}_out")
        done = export_checkpoint(tmp_path / f"{name}_out", tmp_path / f"{name}_back")
        assert_same(read_folder(tmp_path / f"{name}_back"), source)
        assert sorted(done.missing) == sorted(buffers) and done.copies == (("lm_head.weight",) if name == "tied" else ())


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def converted(tmp_path):
    files = {"tokenizer.json": "{}", "chat_template.jinja": "é", "notes.txt": "not kept"}
    tensors = hf_folders.random_tensors(CONFIG, "bfloat16")
    convert(hf_folders.write_folder(tmp_path / "hf", CONFIG, tensors, files=files), tmp_path / "out")
    return tmp_path / "out"


def test_kept_files_come_along(tmp_path, converted):
    done = export_checkpoint(converted, tmp_path / "deep" / "er" / "back")
    assert sorted(os.listdir(done.folder)) == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    for name in done.kept:
        assert (done.folder / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    (converted / "tokenizer.json").write_text('{"other": 1}')
    with pytest.raises(CheckpointError, match="out/tokenizer.json: damaged"):
        export_checkpoint(converted, tmp_path / "back")
    assert sorted(os.listdir(tmp_path)) == ["deep", "hf", "out"]


def test_numbers_with_another_checksum(tmp_path, converted):
    """What the chunks' own checksums can't see: a whole chunk, rewritten."""
    record = open_checkpoint(converted).manifest.leaves["experts.2.up"]
    array = store.create_array(converted, "experts.2.up", families.leaf_paths(open_checkpoint(converted).spec)["experts.2.up"], record.chunk)
    array[1, 3, 5].write(np.uint16(7)).result()
    with pytest.raises(CheckpointError, match=r"out: leaf experts.2.up, expert 1, has checksum [0-9a-f]{8}, the manifest says [0-9a-f]{8}$"):
        export_checkpoint(converted, tmp_path / "back")
    path = converted / "params.embed.table" / "0.0"
    path.write_bytes(path.read_bytes()[:-5] + b"abcde")
    with pytest.raises(CheckpointError, match=r"out: leaf params.embed.table is damaged"):
        export_checkpoint(converted, tmp_path / "back")
    assert sorted(os.listdir(tmp_path)) == ["hf", "out"]


def test_an_output_folder_that_is_taken(tmp_path, converted):
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "mine").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine").write_text("")
    before = sorted(tmp_path.rglob("*"))
    reasons = {"back": "exists and is not empty", "file": "is not a folder", "other": "not an unfinished export", "out/back": "lies in"}
    for name, why in reasons.items():
        with pytest.raises(CheckpointError, match=why):
            export_checkpoint(converted, tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "back" / "mine").unlink()
    assert export_checkpoint(converted, tmp_path / "back").folder == tmp_path / "back"


def test_what_a_killed_run_left_is_written_anew(tmp_path, converted):
    stale = tmp_path / "back.partial"
    stale.mkdir()
    for name in (MARKER, commit.LOCK, "model-00001-of-00009.safetensors"):
        (stale / name).write_text("{}")
    with open(stale / commit.LOCK) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process is writing into it"):
            export_checkpoint(converted, tmp_path / "back")
    assert (stale / MARKER).exists()
    export_checkpoint(converted, tmp_path / "back")
    assert sorted(os.listdir(tmp_path / "back")) == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert not stale.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_will_not_take_it(tmp_path, converted, monkeypatch, code):
    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(export, "write_shards", fail)
    words = {errno.ENOSPC: "the disk is full", errno.EROFS: "read-only", errno.EACCES: "no permission", errno.EIO: "writing failed"}
    with pytest.raises(CheckpointError, match=words[code]) as caught:
        export_checkpoint(converted, tmp_path / "back")
    assert "\n" not in str(caught.value) and sorted(os.listdir(tmp_path)) == ["hf", "out"]


def test_no_room(tmp_path, converted, monkeypatch):
    monkeypatch.setattr(commit, "free_bytes", lambda place: 1000)
    with pytest.raises(CheckpointError, match=r"back: \d+ bytes are to be written, the disk has 1000 free"):
        export_checkpoint(converted, tmp_path / "back")
    assert sorted(os.listdir(tmp_path)) == ["hf", "out"]


def test_an_interrupt_leaves_nothing(tmp_path, converted):
    def interrupt(done, total, name):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(converted, tmp_path / "back", progress=interrupt)
    assert sorted(os.listdir(tmp_path)) == ["hf", "out"]


def test_another_process_was_faster(tmp_path):
    with pytest.raises(CheckpointError, match="is not empty"), new_folder(tmp_path / "back", 1):
        (tmp_path / "back").mkdir()
        (tmp_path / "back" / "theirs").write_text("")
        safetensors_writer._refuse_taken(tmp_path / "back")
    assert os.listdir(tmp_path) == ["back"]


def test_leaves_in_memory(tmp_path, converted):
    """The export of a training run: what is there stays until the new file is whole."""
    source = open_checkpoint(converted)
    leaves = {path: source.read(path) for path in source.manifest.leaves}
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "model.safetensors").write_text("old")
    for wrong, message in ((leaves | {"experts.0.up": leaves["experts.0.up"][:, 1:]}, r"experts.0.up: its shape is \(15, 16\)"), ({}, "missing")):
        with pytest.raises(CheckpointError, match=message):
            export_hf(source.spec, wrong, CONFIG, tmp_path / "back", "bfloat16")
    assert (tmp_path / "back" / "model.safetensors").read_text() == "old"
    assert export_hf(source.spec, leaves, CONFIG, tmp_path / "back", "bfloat16") == (tmp_path / "hf" / "model.safetensors").stat().st_size
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path / "back")) == ["config.json", "model.safetensors"]
