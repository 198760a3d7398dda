"""The same leaves with other chunks, in another dtype, and out of stock Orbax saves."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from checkpoints.commit import partial_of
from checkpoints.convert import convert
from checkpoints.errors import CheckpointError
from checkpoints.load import open_checkpoint
from checkpoints.reshard import reshard
from checkpoints.verify import verify
from jaxmoe.compress.round_to_nearest import quantizer
from tests.checkpoints import hf_folders

CONFIG = {**hf_folders.CONFIGS["qwen3_moe"], "hidden_size": 32, "moe_intermediate_size": 64}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A converted folder, plain and quantized, and its Hugging Face folder."""
    folder = tmp_path_factory.mktemp("reshard")
    tensors = hf_folders.random_tensors(CONFIG, "bfloat16")
    hf = hf_folders.write_folder(folder / "hf", CONFIG, tensors, files={"tokenizer.json": "{}"})
    convert(hf, folder / "plain")
    for bits in (8, 4):
        convert(hf, folder / f"int{bits}", quantizer=quantizer(bits, 16))
    return folder


def leaves(folder):
    checkpoint = open_checkpoint(folder)
    return {path: checkpoint.read(path) for path in checkpoint.manifest.leaves}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], path)


@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
@pytest.mark.parametrize("parts", [{}, {"hidden": 1, "heads": 4}, {"embed": 2, "vocab": 37}, {"hidden": 4, "kv_heads": 2}])
def test_bits_stay(source, tmp_path, kind, parts):
    if kind == "int4" and ("embed" in parts or parts.get("hidden") == 4):  # all 32, or 64, numbers along K are packed as one
        with pytest.raises(CheckpointError, match=r"experts.0.(gate|down).values: \d parts don't divide its axis '\w+' of \d\d in steps of \d\d"):
            reshard(source / kind, tmp_path / "out", parts)
        return
    calls: list = []
    manifest = reshard(source / kind, tmp_path / "out", parts, progress=lambda *a: calls.append(a))
    assert_same(leaves(source / kind), leaves(tmp_path / "out"))
    assert verify(tmp_path / "out").strangers == ()
    assert calls[-1][:2] == (2 * manifest.nbytes, 2 * manifest.nbytes)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    before = open_checkpoint(source / kind).manifest
    assert (manifest.fingerprint, manifest.names, manifest.quantization) == (before.fingerprint, before.names, before.quantization)
    if not parts:
        assert {p: r.chunk for p, r in manifest.leaves.items()} == {p: r.chunk for p, r in before.leaves.items()}


def test_chunks_are_what_was_asked_for(source, tmp_path):
    records = reshard(source / "plain", tmp_path / "out", {"hidden": 4, "heads": 2, "vocab": 37}).leaves
    assert records["experts.0.gate"].chunk == (1, 32, 16) and records["experts.0.down"].chunk == (1, 16, 32)
    assert records["params.layers.0.attn.q.kernel"].chunk == (32, 2, 8) and records["params.layers.0.attn.o.kernel"].chunk == (2, 8, 32)
    assert records["params.embed.table"].chunk == (1, 32) and records["params.layers.1.mlp.up.kernel"].chunk == (32, 6)
    assert records["params.layers.0.attn.k.kernel"].chunk == (32, 2, 8)


@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_another_dtype(source, tmp_path, kind):
    manifest = reshard(source / kind, tmp_path / "out", dtype="float32")
    wide = open_checkpoint(tmp_path / "out")
    assert manifest.dtype == wide.spec.precision.params == "float32"
    narrow = open_checkpoint(source / kind)
    for path, record in manifest.leaves.items():
        wanted = narrow.read(path) if record.stored == "int8" or path.endswith(".scales") else narrow.read(path, dtype="float32")
        np.testing.assert_array_equal(wide.read(path), wanted, path)
    assert reshard(tmp_path / "out", tmp_path / "back", dtype="bfloat16").spec_hash == narrow.manifest.spec_hash
    assert_same(leaves(source / kind), leaves(tmp_path / "back"))


def test_a_stock_orbax_save(source, tmp_path):
    checkpoint = open_checkpoint(source / "plain")
    tree = {"params": checkpoint.restore_params(), "experts": checkpoint.restore_experts()}
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "stock", jax.tree.map(np.asarray, tree))
    manifest = reshard(tmp_path / "stock", tmp_path / "out", {"hidden": 4}, config=source / "hf" / "config.json")
    assert_same(leaves(source / "plain"), leaves(tmp_path / "out"))
    assert manifest.leaves["experts.0.up"].chunk == (1, 32, 16)
    assert manifest.leaves["experts.0.up"].sources[1] == "model.layers.0.mlp.experts.1.up_proj.weight"
    verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("parts", "dtype", "message"),
    [
        ({"hidden": 7}, None, "7 parts don't divide its axis 'mlp_hidden' of"),
        ({"hidden": 0}, None, "0 parts don't divide"),
        ({"hiden": 2}, None, "no leaf has an axis 'hiden': embed, experts, head_dim, heads, hidden, kv_heads, mlp_hidden, vocab are there"),
        ({}, "float16", "unsupported dtype 'float16'"),
    ],
)
def test_what_does_not_fit_is_refused(source, tmp_path, parts, dtype, message):
    with pytest.raises(CheckpointError, match=message):
        reshard(source / "plain", tmp_path / "out", parts, dtype)
    assert not list(tmp_path.iterdir())


def test_output_folders_that_hold_something(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        reshard(source / "plain", tmp_path / "out")
    with pytest.raises(CheckpointError, match="both the source and the output"):
        reshard(source / "plain", source / "plain")
    partial_of(tmp_path / "two").mkdir()
    (partial_of(tmp_path / "two") / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not an unfinished output"):
        reshard(source / "plain", tmp_path / "two")
    assert (partial_of(tmp_path / "two") / "notes.txt").read_text() == "mine"


def test_a_damaged_source_makes_nothing(source, tmp_path):
    import shutil

    shutil.copytree(source / "plain", tmp_path / "in")
    a, b = (tmp_path / "in" / "experts.0.up" / f"0.0.{i}" for i in (1, 2))
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)
    with pytest.raises(CheckpointError, match="experts.0.up, expert 0, has checksum"):
        reshard(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stopped_and_begun_again(source, tmp_path):
    def stop(done, total, path):
        if done > total * 3 // 4:  # the first half is verification
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard(source / "plain", tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists() and partial_of(tmp_path / "out").exists()
    reshard(source / "plain", tmp_path / "out", {"hidden": 2})
    assert_same(leaves(source / "plain"), leaves(tmp_path / "out"))
    assert not partial_of(tmp_path / "out").exists()
