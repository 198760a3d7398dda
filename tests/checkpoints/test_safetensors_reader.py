"""The reader against the reference implementation, and what it says about files that are not as they should be."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints.errors import CheckpointError
from checkpoints.safetensors_reader import SafetensorsFolder


def write(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_reads_what_the_reference_wrote(tmp_path, dtype):
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape).astype(dtype) for name, shape in (("a", (5, 3)), ("b", (7,)), ("c", (2, 3, 4)))
    }
    with SafetensorsFolder(write(tmp_path, tensors)) as folder:
        assert set(folder.tensors) == set(tensors)
        for name, expected in tensors.items():
            bits = expected.view(np.uint16) if dtype == ml_dtypes.bfloat16 else expected
            got = folder.read(name)
            assert got.dtype == bits.dtype
            np.testing.assert_array_equal(got, bits)
            np.testing.assert_array_equal(folder.read_rows(name, 1, 2), bits[1:2])
            np.testing.assert_array_equal(folder.read_elements(name, 2, 4), bits.reshape(-1)[2:6])


def test_reads_only_the_rows_asked_for(tmp_path, monkeypatch):
    with SafetensorsFolder(
        write(tmp_path, {"a": np.zeros((100, 10), np.float32), "b": np.zeros(3, np.float32)})
    ) as folder:
        asked = []
        real = folder._pread
        monkeypatch.setattr(
            folder, "_pread", lambda file, at, into: (asked.append((at, len(into))), real(file, at, into))
        )
        folder.read_rows("a", 20, 30)
        assert asked == [(folder["a"].start + 20 * 40, 400)]


def test_ranges_outside_the_tensor(tmp_path):
    with SafetensorsFolder(write(tmp_path, {"a": np.zeros((4, 2), np.float32)})) as folder:
        for start, stop in ((-1, 2), (3, 5), (3, 2)):
            with pytest.raises(IndexError, match="a"):
                folder.read_rows("a", start, stop)
        with pytest.raises(IndexError, match="a"):
            folder.read_elements("a", 7, 2)


def test_missing_tensor_and_wrong_shape(tmp_path):
    with SafetensorsFolder(write(tmp_path, {"a": np.zeros((4, 2), np.float32)})) as folder:
        with pytest.raises(CheckpointError, match="tensor b is missing"):
            folder.read("b")
        with pytest.raises(CheckpointError, match=r"tensor a has shape \[4, 2\], the config needs \[2, 4\]"):
            folder.check_shape("a", (2, 4))


def test_unsupported_dtype(tmp_path):
    with SafetensorsFolder(write(tmp_path, {"a": np.zeros((4, 2), np.int8)})) as folder:
        with pytest.raises(CheckpointError, match="tensor a has dtype I8"):
            folder.read("a")


def test_truncated_says_needed_and_actual_size(tmp_path):
    path = write(tmp_path, {"a": np.zeros((4, 2), np.float32)}) / "model.safetensors"
    whole = path.read_bytes()
    for length in (4, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=rf"model.safetensors: truncated: \d+ bytes needed.* has {length}$"):
            SafetensorsFolder(tmp_path)
    assert f"{len(whole)} bytes needed" in str(pytest.raises(CheckpointError, SafetensorsFolder, tmp_path).value)


def test_file_cut_after_it_was_opened(tmp_path):
    path = write(tmp_path, {"a": np.zeros((4, 2), np.float32)}) / "model.safetensors"
    with SafetensorsFolder(tmp_path) as folder:
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(CheckpointError, match="truncated"):
            folder.read("a")


def damaged(header: bytes, data: bytes = b"\0" * 8) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


HEADERS = {
    "no_json": damaged(b"\x93\x00nonsense"),
    "a_list": damaged(b"[1, 2]"),
    "no_offsets": damaged(b'{"a": {"dtype": "F32", "shape": [2]}}'),
    "negative_shape": damaged(entry(shape=(-2,))),
    "size_against_shape": damaged(entry(shape=(3,))),
    "hole": damaged(entry(shape=(1,), offsets=(4, 8))),
    "trailing_bytes": damaged(entry(), b"\0" * 9),
    "impossible_length": (1 << 60).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("raw", HEADERS.values(), ids=HEADERS.keys())
def test_damaged_header(tmp_path, raw):
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="model.safetensors: damaged") as caught:
        SafetensorsFolder(tmp_path)
    assert "\n" not in str(caught.value)


def test_overlapping_tensors(tmp_path):
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"}
    (tmp_path / "model.safetensors").write_bytes(damaged(json.dumps(header).encode()))
    with pytest.raises(CheckpointError, match="damaged header: tensor b begins"):
        SafetensorsFolder(tmp_path)


def sharded(folder, weight_map):
    save_file({"a": np.zeros(2, np.float32)}, folder / "one.safetensors")
    save_file({"b": np.zeros(2, np.float32)}, folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards(tmp_path):
    with SafetensorsFolder(sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})) as folder:
        assert {name: info.file for name, info in folder.tensors.items()} == {
            "a": "one.safetensors",
            "b": "two.safetensors",
        }


def test_missing_shard_is_named(tmp_path):
    sharded(tmp_path, {"a": "one.safetensors", "b": "three.safetensors"})
    with pytest.raises(CheckpointError, match="three.safetensors: missing"):
        SafetensorsFolder(tmp_path)


def test_index_that_is_wrong_about_a_tensor(tmp_path):
    sharded(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(CheckpointError, match="one.safetensors: tensor b is missing"):
        SafetensorsFolder(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match="tensor a is in one.safetensors as well"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_damaged_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="index.json"):
        SafetensorsFolder(tmp_path)


def test_index_may_not_leave_the_folder(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "one.safetensors")
    (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
    with pytest.raises(CheckpointError, match="not a file name"):
        SafetensorsFolder(inner)


def test_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        SafetensorsFolder(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        SafetensorsFolder(tmp_path / "none")


def test_files_of_one_shape_but_other_numbers_differ(tmp_path):
    first = SafetensorsFolder(write(tmp_path, {"a": np.zeros((100, 100), np.float32)})).files
    second = SafetensorsFolder(write(tmp_path, {"a": np.ones((100, 100), np.float32)})).files
    assert first[0].header_sha256 == second[0].header_sha256
    assert first[0].sample_sha256 != second[0].sample_sha256
