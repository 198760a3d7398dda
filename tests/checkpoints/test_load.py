"""Restoring: whole trees, sharded, one expert, the resident bank; damage; the cache."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from checkpoints import reading, store
from checkpoints.convert import convert, partial_of
from checkpoints.errors import CheckpointError
from checkpoints.load import load_hf_or_checkpoint, open_checkpoint, read_spec
from jaxmoe import formats
from jaxmoe.spec import ModelSpec, SpecError, abstract_experts, abstract_params
from tests.checkpoints import hf_folders

FAMILIES = tuple(hf_folders.CONFIGS)


@pytest.fixture(
    scope="module", params=[(family, dtype) for family in FAMILIES for dtype in ("float32", "bfloat16")], ids="-".join
)
def converted(request, tmp_path_factory):
    """(folder, params, experts) of a family in a dtype."""
    family, dtype = request.param
    folder = tmp_path_factory.mktemp("converted")
    config = hf_folders.CONFIGS[family]
    tensors = hf_folders.random_tensors(config, dtype)
    convert(hf_folders.write_folder(folder / "hf", config, tensors), folder / "out")
    return folder / "out", *hf_folders.expected_trees(config, tensors)


@pytest.fixture
def copy(tmp_path):
    """A converted folder (qwen3_moe, bfloat16) to damage."""
    convert(hf_folders.tiny(tmp_path / "hf", "qwen3_moe", "bfloat16"), tmp_path / "out")
    return tmp_path / "out"


def cast(tree, dtype):
    kind = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    return jax.tree.map(lambda x: x.astype(np.float32).astype(kind), tree)


def test_spec_comes_back(converted):
    checkpoint = open_checkpoint(converted[0])
    config = json.loads((converted[0] / "config.json").read_text())
    assert checkpoint.spec == ModelSpec.from_hf(config).with_precision(checkpoint.manifest.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trees_are_as_the_spec_describes_them(converted, dtype):
    checkpoint = open_checkpoint(converted[0])
    spec = checkpoint.spec.with_precision(dtype)
    for tree, abstract in (
        (checkpoint.restore_params(spec), abstract_params(spec)),
        (checkpoint.restore_experts(spec), abstract_experts(spec)),
    ):
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree))
        got = jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert got == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_restores_into_either_dtype(converted, dtype, assert_trees_equal):
    folder, params, experts = converted
    checkpoint = open_checkpoint(folder)
    assert_trees_equal(checkpoint.restore_params(dtype=dtype), cast(params, dtype))
    assert_trees_equal(checkpoint.restore_experts(dtype=dtype), cast(experts, dtype))


def test_rounds_to_nearest_even(tmp_path):
    config = hf_folders.CONFIGS["olmoe"]
    tensors = hf_folders.random_tensors(config)
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000], np.uint32)
    tensors["model.embed_tokens.weight"].reshape(-1)[: len(ties)] = ties.view(np.float32)
    convert(hf_folders.write_folder(tmp_path / "hf", config, tensors), tmp_path / "out")
    got = open_checkpoint(tmp_path / "out").restore_params(dtype="bfloat16")["embed"]["table"]
    assert np.asarray(got).reshape(-1)[: len(ties)].tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0xBF82]


def mesh():
    assert len(jax.devices()) == 8
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))


def by_axes(leaf):
    """Experts over one mesh axis, hidden width over the other, everything else replicated."""
    where = {"experts": "b", "hidden": "a", "heads": "b"}
    spec = [where.get(axis) if leaf.shape[i] % 4 == 0 else None for i, axis in enumerate(leaf.axes)]
    return NamedSharding(mesh(), PartitionSpec(*spec))


def test_sharded_restore_is_the_same_tree(converted, assert_trees_equal):
    folder, params, experts = converted
    checkpoint = open_checkpoint(folder)
    got = checkpoint.restore_experts(sharding=by_axes)
    assert_trees_equal(got, experts)
    leaf = abstract_experts(checkpoint.spec)["0"]["gate"]
    assert got["0"]["gate"].sharding == by_axes(leaf)
    assert_trees_equal(checkpoint.restore_params(sharding=by_axes), params)
    device = jax.devices()[5]
    one = checkpoint.restore_params(sharding=SingleDeviceSharding(device))
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(one))


def test_each_slice_is_read_once(copy):
    """Experts over 4 devices, replicated twice."""
    checkpoint = open_checkpoint(copy)
    checkpoint.restore_experts(sharding=NamedSharding(mesh(), PartitionSpec("b")))
    files = [path for path in copy.glob("experts.*/*") if path.name != "zarr.json"]
    assert checkpoint.bytes_read == sum(path.stat().st_size for path in files)
    assert checkpoint.bytes_owned == checkpoint.bytes_read - 4 * len(files)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_bank(converted, dtype, sharded, assert_trees_equal):
    folder, _, experts = converted
    checkpoint = open_checkpoint(folder)

    def place(leaf):
        assert leaf.axes in (("layers", "experts", "embed", None, "hidden"), ("layers", "experts", "hidden", "embed"))
        return by_axes(leaf)

    bank = checkpoint.restore_bank(dtype=dtype, sharding=place if sharded else None)
    layers = [experts[str(i)] for i in checkpoint.spec.moe_layers]
    w_in = np.stack([np.stack([layer["gate"], layer["up"]], axis=2) for layer in layers])
    w_out = np.stack([layer["down"] for layer in layers])
    assert_trees_equal(bank, cast({"w_in": w_in, "w_out": w_out}, dtype))
    if sharded and checkpoint.spec.moe[0].experts == 4:
        assert bank["w_in"].sharding.shard_shape(bank["w_in"].shape)[1] == 1


@pytest.mark.parametrize("layout", ["2df", "2fd"])
def test_a_bank_in_another_layout_is_the_same_bank(converted, layout):
    checkpoint = open_checkpoint(converted[0])
    seen = []

    def place(leaf):
        seen.append(leaf.axes)
        return by_axes(leaf)

    plain, bank = checkpoint.restore_bank(), checkpoint.restore_bank(sharding=place, layout=layout)
    for name, axes in zip(("w_in", "w_out"), formats.expert_axes(layout), strict=True):
        np.testing.assert_array_equal(np.asarray(bank[name]).transpose(0, 1, *(2 + a for a in axes)), np.asarray(plain[name]))
    names = formats.expert_axis_names(layout)
    assert seen == [("layers", "experts", *names[0]), ("layers", "experts", *names[1])]


def test_bank_reads_a_few_chunks_at_a_time(copy, monkeypatch):
    checkpoint = open_checkpoint(copy)
    whole = checkpoint.restore_bank()
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1)
    monkeypatch.setattr(reading, "PENDING_BYTES", 3 * 64)
    sizes, most, began, ended = [], [], reading.Reader._count, reading.Reader._finish

    def begin(reader, box, array):
        sizes.append(reading.volume(box) * 2)
        most.append(len(sizes))
        began(reader, box, array)

    def finish(reader, *item):
        sizes.pop()
        return ended(reader, *item)

    monkeypatch.setattr(reading.Reader, "_count", begin)
    monkeypatch.setattr(reading.Reader, "_finish", finish)
    bank = checkpoint.restore_bank()
    assert max(most) == 3 and checkpoint.bytes_read == 2 * sum(path.stat().st_size for path in copy.glob("experts.*/*.*.*"))
    assert all(bool(jnp.array_equal(bank[k], whole[k])) for k in whole)


def test_bank_on_the_cpu_is_the_memory_that_was_filled(copy, monkeypatch):
    """No second copy: the array's buffer is the one that numpy filled."""
    filled, real = [], formats.aligned_empty

    def remember(shape, dtype):
        out = real(shape, dtype)
        filled.append(out.ctypes.data)
        return out

    monkeypatch.setattr(formats, "aligned_empty", remember)
    bank = open_checkpoint(copy).restore_bank()
    assert [bank["w_in"].unsafe_buffer_pointer(), bank["w_out"].unsafe_buffer_pointer()] == filled


def test_bank_of_uneven_experts(copy):
    checkpoint = open_checkpoint(copy)
    spec = checkpoint.spec
    sparse, dense, last = spec.layers
    wide = dataclasses.replace(last, experts=dataclasses.replace(last.experts, width=8))
    segments = tuple(
        dataclasses.replace(s, pattern=(layer,)) for s, layer in zip(spec.segments, (sparse, dense, wide), strict=True)
    )
    uneven = dataclasses.replace(checkpoint, spec=dataclasses.replace(spec, segments=segments))
    with pytest.raises(SpecError, match="of one kind"):
        uneven.restore_bank()


def test_read_expert(converted):
    folder, _, experts = converted
    checkpoint = open_checkpoint(folder)
    for layer in checkpoint.spec.moe_layers:
        for e in range(experts[str(layer)]["gate"].shape[0]):
            got = checkpoint.read_expert(layer, e)
            for name in ("gate", "up", "down"):
                expected = experts[str(layer)][name][e]
                assert got[name].shape == expected.shape
                np.testing.assert_array_equal(got[name].view(np.uint8), np.ascontiguousarray(expected).view(np.uint8))


def test_read_expert_needs_only_its_own_chunks(copy):
    expected = open_checkpoint(copy).read_expert(2, 1)
    for path in copy.glob("experts.*/*.*.*"):
        if path.parent.name.split(".")[1] != "2" or path.name.split(".")[0] != "1":
            path.unlink()
    for path in copy.glob("params.*"):
        shutil.rmtree(path)
    got = open_checkpoint(copy).read_expert(2, 1)
    assert all(np.array_equal(got[name], expected[name]) for name in expected)


def test_read_expert_that_is_not_there(copy):
    checkpoint = open_checkpoint(copy)
    with pytest.raises(CheckpointError, match=r"layer 1 has no experts \(layers \[0, 2\] have\)"):
        checkpoint.read_expert(1, 0)
    for e in (-1, 4):
        with pytest.raises(CheckpointError, match=f"experts 0 to 3, {e} was asked for"):
            checkpoint.read_expert(0, e)


def test_another_models_spec(copy):
    checkpoint = open_checkpoint(copy)
    for restore in (checkpoint.restore_params, checkpoint.restore_experts, checkpoint.restore_bank):
        with pytest.raises(CheckpointError, match="not the one asked for"):
            restore(dataclasses.replace(checkpoint.spec, norm_eps=0.5))
        with pytest.raises(CheckpointError, match="unsupported dtype 'int8'"):
            restore(dtype="int8")


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.unlink()], ids=["flipped", "cut", "gone"])
def test_damaged_chunk_names_the_leaf(copy, damage):
    damage(copy / "experts.2.up" / "3.0.5")
    damage(copy / "params.layers.1.mlp.down.kernel" / "0.0")
    checkpoint = open_checkpoint(copy)
    for call in (checkpoint.restore_experts, checkpoint.restore_bank, lambda: checkpoint.read_expert(2, 3)):
        with pytest.raises(CheckpointError, match="leaf experts.2.up is damaged") as caught:
            call()
        assert "3.0.5" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="leaf params.layers.1.mlp.down.kernel is damaged"):
        checkpoint.restore_params()
    with pytest.raises(CheckpointError, match="leaf params.layers.1.mlp.down.kernel is damaged"):
        checkpoint.verify()
    checkpoint.read_expert(2, 2)


def test_verify_finds_numbers_that_were_altered_with_care(copy):
    """A chunk that was rewritten has a right CRC of its own; the manifest knows better."""
    checkpoint = open_checkpoint(copy)
    checkpoint.verify()
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{copy}/experts.0.down/"}}
    array = ts.open(spec, open=True).result()
    array[2, 3, 4].write(np.uint16(array[2, 3, 4].read().result() ^ 1)).result()
    with pytest.raises(CheckpointError, match="leaf experts.0.down, expert 2, has checksum"):
        open_checkpoint(copy).verify()


def test_verify_reports_every_byte(copy):
    calls = []
    open_checkpoint(copy).verify(lambda *a: calls.append(a))
    assert calls[-1][0] == calls[-1][1] == open_checkpoint(copy).manifest.nbytes


def test_missing_array(copy):
    shutil.rmtree(copy / "params.final_norm.scale")
    with pytest.raises(CheckpointError, match="leaf params.final_norm.scale is missing"):
        open_checkpoint(copy).restore_params()


def test_array_of_another_shape(copy):
    shutil.rmtree(copy / "params.final_norm.scale")
    shutil.copytree(copy / "params.layers.0.attn.q_norm.scale", copy / "params.final_norm.scale")
    with pytest.raises(
        CheckpointError, match=r"leaf params.final_norm.scale is damaged: zarr.json has shape \[8\], \[16\] was written"
    ):
        open_checkpoint(copy).restore_params()


@pytest.mark.parametrize("name", ["manifest.json", "spec.json"])
@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"format": "jaxmoe-checkpoint", "version": 99}'])
def test_damaged_description(copy, name, text):
    if text is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(copy)


def test_description_of_another_folder(copy):
    data = json.loads((copy / "spec.json").read_text())
    (copy / "spec.json").write_text(json.dumps({**data, "norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match="spec.json: damaged: it is spec"):
        open_checkpoint(copy)


@pytest.mark.parametrize(("version", "message"), [(2, "version 2 .* convert the model again"), (99, "a newer jaxmoe, .* update jaxmoe")])
def test_another_version(copy, version, message):
    data = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**data, "version": version}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(copy)


def test_manifest_with_a_field_missing(copy):
    data = json.loads((copy / "manifest.json").read_text())
    del data["leaves"]["experts.0.up"]["crc32"]
    (copy / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="manifest.json: damaged"):
        open_checkpoint(copy)


def test_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "none")


# --- the cache --------------------------------------------------------------------------------------------------------


def test_cache_converts_once(tmp_path, monkeypatch):
    hf = hf_folders.tiny(tmp_path / "hf", "mixtral")
    first = load_hf_or_checkpoint(hf, tmp_path / "cache")
    assert first.folder.parent == tmp_path / "cache" and first.spec.hash() in first.folder.name
    monkeypatch.setattr(store, "write_chunk", None)  # any write would raise
    again = load_hf_or_checkpoint(hf, tmp_path / "cache")
    assert again.folder == first.folder and again.manifest == first.manifest


def test_cache_tells_sources_and_dtypes_apart(tmp_path):
    hf = hf_folders.tiny(tmp_path / "hf", "mixtral")
    folders = [load_hf_or_checkpoint(hf, tmp_path / "cache", dtype).folder for dtype in (None, "float32", "bfloat16")]
    assert folders[0] == folders[1] != folders[2]
    hf_folders.tiny(tmp_path / "hf", "mixtral", seed=1)  # other weights in the same place
    other = load_hf_or_checkpoint(hf, tmp_path / "cache")
    assert other.folder not in folders
    expected = hf_folders.random_tensors(hf_folders.CONFIGS["mixtral"], seed=1)["model.norm.weight"]
    np.testing.assert_array_equal(other.read("params.final_norm.scale"), expected)


def test_cache_opens_a_converted_folder_as_it_is(copy, tmp_path):
    assert load_hf_or_checkpoint(copy, tmp_path / "cache").folder == copy
    assert not (tmp_path / "cache").exists()


def test_cache_and_other_folders(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_hf_or_checkpoint(tmp_path / "none", tmp_path / "cache")
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="neither a Hugging Face folder .* nor a converted one"):
        load_hf_or_checkpoint(tmp_path / "other", tmp_path / "cache")


def test_spec_of_either_kind_of_folder(copy, tmp_path):
    """Before anything is converted: no weights are read, not even found."""
    spec = ModelSpec.from_hf(hf_folders.CONFIGS["qwen3_moe"])
    assert read_spec(copy) == spec.with_precision("bfloat16")
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert read_spec(tmp_path / "hf") == spec
    with pytest.raises(CheckpointError, match="neither a Hugging Face folder .* nor a converted one"):
        read_spec(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        read_spec(tmp_path / "none")


def test_cache_and_an_unfinished_folder(tmp_path):
    hf = hf_folders.tiny(tmp_path / "hf", "mixtral")

    def stop(done, total, path):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(hf, tmp_path / "out", progress=stop)
    with pytest.raises(CheckpointError, match="unfinished"):
        load_hf_or_checkpoint(partial_of(tmp_path / "out"), tmp_path / "cache")
