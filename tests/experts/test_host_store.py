"""The store of experts: what a record holds, that reading passes errors on, and that a damaged file is found before anything runs."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import tensorstore as ts

from checkpoints.convert import convert
from checkpoints.errors import CheckpointError
from checkpoints.load import open_checkpoint
from checkpoints.manifest import read_manifest, write_manifest
from jaxmoe.engine.model import Offload, load_model, read_store
from jaxmoe.experts import host_store
from jaxmoe.formats import expert_axes
from jaxmoe.spec import ModelSpec
from pallas_kernels.dispatch import Kernels
from tests.checkpoints import hf_folders
from tests.models import CONFIGS

SPEC = ModelSpec.from_hf(CONFIGS["qwen3_moe"]).with_precision("bfloat16")
UNEVEN = ModelSpec.from_hf({**CONFIGS["olmoe"], "hidden_size": 20, "num_attention_heads": 2, "intermediate_size": 7})


def expert_of(spec: ModelSpec, layer: int, expert: int) -> dict[str, np.ndarray]:
    """Numbers that say which expert, matrix, row and column they are of, as far as a leaf's dtype can."""
    d, f = spec.width, spec.moe[1].width
    dtype = np.uint16 if spec.precision.params == "bfloat16" else np.float32
    rng = np.random.default_rng((layer, expert))
    return {name: rng.integers(0, 65536, shape).astype(dtype) for name, shape in (("gate", (d, f)), ("up", (d, f)), ("down", (f, d)))}


@pytest.mark.parametrize("spec, shape", [(SPEC, (3 * 64 * 32 // 256, 256)), (UNEVEN, (1, 3 * 20 * 7))], ids=["rows of 256", "one row"])
def test_a_record_is_gate_and_up_by_rows_and_then_down(spec, shape):
    assert host_store.record_shape(spec) == shape
    expert = expert_of(spec, 0, 3)
    record = host_store.pack_record(spec, expert)
    assert record.shape == shape and record.nbytes == host_store.record_bytes(spec) and record.dtype == expert["gate"].dtype
    plain = [x for d in range(spec.width) for x in (*expert["gate"][d], *expert["up"][d])] + expert["down"].ravel().tolist()
    assert record.ravel().tolist() == plain
    out = np.zeros((3, *shape), record.dtype)
    host_store.pack_record(spec, expert, out[1])
    assert (out[1] == record).all() and not out[[0, 2]].any()


@pytest.mark.parametrize("spec", [SPEC, UNEVEN], ids=["bfloat16", "float32"])
def test_records_come_layer_by_layer_and_progress_is_told(spec):
    seen, experts = [], spec.moe[0].experts
    records = host_store.read_records(spec, lambda l, e: expert_of(spec, l, e), lambda done, total: seen.append((done, total)))
    n = len(spec.moe_layers) * experts
    assert n == 2 * 8 and seen == [(i + 1, n) for i in range(n)]
    for i, record in enumerate(records):
        np.testing.assert_array_equal(record, host_store.pack_record(spec, expert_of(spec, i // experts, i % experts)))


def test_a_reader_that_fails_is_heard():
    class Damaged(Exception):
        pass

    def read(layer, expert):
        if (layer, expert) == (1, 2):
            raise Damaged("expert 2 of layer 1")
        return expert_of(SPEC, layer, expert)

    seen = []
    with pytest.raises(Damaged, match="expert 2 of layer 1"):
        host_store.read_records(SPEC, read, lambda done, total: seen.append(done))
    assert seen[-1] == 8 + 2


def test_a_reader_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="broadcast"):
        host_store.read_records(SPEC, lambda l, e: expert_of(UNEVEN, l, e))


def test_pinned_records_are_in_host_memory_with_the_same_bits():
    records = np.random.default_rng(0).integers(0, 65536, (4, 3, 256)).astype(np.uint16)
    held = host_store.pinned(records)
    assert held.sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(np.asarray(held), records)


def test_memory_that_cannot_be_pinned_is_named(monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of pinned memory\nmore lines")

    monkeypatch.setattr(jax, "device_put", refuse)
    with pytest.raises(ValueError, match=r"^0.00 GB of experts .*XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB.*RESOURCE_EXHAUSTED: out of pinned memory$"):
        host_store.pinned(np.zeros((4, 3, 256), np.uint16))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    convert(hf_folders.tiny(folder / "hf", "qwen3_moe", "bfloat16"), folder / "out")
    return folder / "out"


@pytest.fixture
def copy(converted, tmp_path):
    """A converted folder to damage."""
    return shutil.copytree(converted, tmp_path / "out")


@pytest.mark.parametrize(("dtype", "layout"), [("float32", "d2f"), ("bfloat16", "d2f"), ("bfloat16", "2df"), ("float32", "2fd")])
def test_the_store_of_a_checkpoint_holds_what_a_resident_bank_holds(converted, dtype, layout):
    checkpoint = open_checkpoint(converted)
    spec = checkpoint.spec.with_precision(dtype)
    records, bank = read_store(checkpoint, spec, layout=layout), checkpoint.restore_bank(spec, layout=layout)
    plain = checkpoint.restore_bank(spec)
    for name, axes in zip(("w_in", "w_out"), expert_axes(layout), strict=True):
        np.testing.assert_array_equal(np.asarray(bank[name]).transpose(0, 1, *(2 + a for a in axes)), np.asarray(plain[name]))
    w_in, w_out = (np.asarray(bank[name]).reshape(len(records), -1) for name in ("w_in", "w_out"))
    np.testing.assert_array_equal(records.reshape(len(records), -1), np.concatenate([w_in, w_out], axis=1))


def load(folder):
    return load_model(open_checkpoint(folder), "bfloat16", Kernels("cpu"), offload=Offload(2))


def last_expert(folder) -> tuple[str, int]:
    """The leaf that is read last, and its last expert."""
    spec = open_checkpoint(folder).spec
    return f"experts.{spec.moe_layers[-1]}.down", spec.moe[0].experts - 1


def test_a_flipped_byte_names_the_leaf_and_the_expert_s_chunk(copy):
    leaf, expert = last_expert(copy)
    chunk = sorted((copy / leaf).glob(f"{expert}.*"))[0]
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"leaf {leaf} is damaged.*{chunk.name}"):
        load(copy)


def test_numbers_altered_with_care_name_the_leaf_and_the_expert(copy):
    """The chunk and its own checksum belong together; the manifest knows better."""
    leaf, expert = last_expert(copy)
    array = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{copy / leaf}/"}}).result()
    array[expert, 0, 0] = array[expert, 0, 0].read().result() + 1
    with pytest.raises(CheckpointError, match=f"leaf {leaf} is damaged: chunk {expert}.0.0 is not the one that was written"):
        load(copy)


def test_a_manifest_that_was_altered_names_the_leaf_and_the_expert(copy):
    leaf, expert = last_expert(copy)
    manifest = read_manifest(copy)
    record = manifest.leaves[leaf]
    crc32 = (*record.crc32[:expert], "00000000")
    write_manifest(copy, dataclasses.replace(manifest, leaves={**manifest.leaves, leaf: dataclasses.replace(record, crc32=crc32)}))
    with pytest.raises(CheckpointError, match=f"leaf {leaf}, expert {expert}, .*the manifest says 00000000"):
        load(copy)
