"""The reader against the reference implementation, and what it says about files that are not as they should be."""

import hashlib
import json
import os
import socket

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from checkpoints import safetensors_header, safetensors_reader
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
    "listed_twice": damaged(entry()[:-1] + b", " + entry()[1:]),
    "listed_twice_differently": damaged(entry()[:-1] + b", " + entry("I32")[1:]),
    "metadata_twice": damaged(b'{"__metadata__": {"a": "b", "a": "c"}, ' + entry()[1:]),
    "leading_space": damaged(b" " + entry()),
    "line_break_in_a_name": damaged(entry().replace(b'"a"', b'"a\\nb"')),
    "long_name": damaged(entry().replace(b'"a"', b'"%s"' % (b"a" * 5000))),
    "many_axes": damaged(entry(shape=(1,) * 1000 + (2,))),
    "empty_but_huge": damaged(entry(shape=(2**63, 0), offsets=(0, 0)), b""),
    "entry_is_a_list": damaged(b'{"a": ["F32", [2], [0, 8]]}'),
    "impossible_length": (1 << 60).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("raw", HEADERS.values(), ids=HEADERS.keys())
def test_damaged_header(tmp_path, raw):
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="model.safetensors: damaged") as caught:
        SafetensorsFolder(tmp_path)
    assert "\n" not in str(caught.value)


def listed(**entries) -> bytes:
    return json.dumps(entries).encode()


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
KINDS = {
    "plain": (entry(), 8),
    "spaces_after": (entry() + b"  ", 8),
    "line_break_after": (entry() + b"\n", 8),
    "scalar": (entry(shape=(), offsets=(0, 4)), 4),
    "empty_tensor": (entry(shape=(0, 3), offsets=(0, 0)), 0),
    "empty_tensor_between": (listed(a=A, z={"dtype": "F32", "shape": [0], "data_offsets": [8, 8]}), 8),
    "empty_tensor_amid": (listed(a=A, z={"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}), 8),
    "no_tensor": (b"{}", 0),
    "name_in_utf8": (entry().replace(b'"a"', '"\u00e4 \u4e2d"'.encode()), 8),
    "unknown_field": (entry()[:-2] + b', "more": [{"x": 1}]}}', 8),
    "metadata": (listed(__metadata__={"format": "pt"}, a=A), 8),
    "metadata_null": (listed(__metadata__=None, a=A), 8),
    "metadata_list": (listed(__metadata__=[], a=A), 8),
    "metadata_text": (listed(__metadata__="pt", a=A), 8),
    "metadata_of_numbers": (listed(__metadata__={"a": 1}, a=A), 8),
    "metadata_that_is_a_tensor": (listed(__metadata__=A), 8),
    "other_dtypes": (listed(a={**A, "dtype": "I64", "shape": [1]}, b={"dtype": "BOOL", "shape": [3], "data_offsets": [8, 11]}), 11),
    "half_bytes": (entry("F4", (4, 4)), 8),
    "half_bytes_odd": (entry("F4", (15,)), 8),
    "six_bits": (entry("F6_E2M3", (4,), (0, 3)), 3),
    "size_of_another_dtype": (entry("I64"), 8),
    "unknown_dtype": (entry("F99"), 8),
    "dtype_in_small_letters": (entry("f32"), 8),
    "dtype_number": (entry(3), 8),
    "field_twice": (entry()[:-2] + b', "shape": [2]}}', 8),
    "shape_missing": (b'{"a": {"dtype": "F32", "data_offsets": [0, 8]}}', 8),
    "shape_negative": (entry(shape=(-2,)), 8),
    "shape_float": (entry(shape=(2.0,)), 8),
    "shape_bool": (entry(shape=(True, 2)), 8),
    "shape_nested": (entry(shape=((2,),)), 8),
    "shape_text": (entry(shape="2"), 8),
    "shape_object": (entry(shape={}, offsets=(0, 4)), 4),
    "shape_null": (entry(shape=None), 8),
    "shape_beyond_64_bits": (entry(shape=(2**64, 0), offsets=(0, 0)), 0),
    "shape_that_wraps": (entry(shape=(2**32, 2**32), offsets=(0, 0)), 0),
    "shape_of_many_digits": (entry().replace(b"[2]", b"[" + b"9" * 5000 + b"]"), 8),
    "offsets_reversed": (entry(offsets=(8, 0)), 8),
    "offsets_negative": (entry(offsets=(-8, 0)), 8),
    "offsets_beyond": (entry(offsets=(8, 16)), 8),
    "offsets_float": (entry(offsets=(0.0, 8.0)), 8),
    "offsets_of_three": (entry(offsets=(0, 8, 8)), 8),
    "offsets_huge": (entry(offsets=(2**64 - 8, 2**64)), 8),
    "overlap": (listed(a=A, b=A), 8),
    "hole": (listed(a=A, b={**A, "data_offsets": [12, 20]}), 20),
    "too_little_data": (entry(), 7),
    "too_much_data": (entry(), 9),
    "entry_null": (b'{"a": null}', 0),
    "nan": (entry().replace(b"[2]", b"[NaN]"), 8),
    "nan_in_an_unknown_field": (entry()[:-2] + b', "more": NaN}}', 8),
    "infinity_in_metadata": (b'{"__metadata__": {"a": Infinity}, ' + entry()[1:], 8),
    "no_header": (b"", 0),
    "list": (b"[]", 0),
    "zeros_after": (entry() + b"\0\0", 8),
    "more_after": (entry() + b"{}", 8),
    "comma_too_many": (entry().replace(b"[2]", b"[2,]"), 8),
    "byte_order_mark": (b"\xef\xbb\xbf" + entry(), 8),
    "utf16": (entry().decode().encode("utf-16-le"), 8),
    "no_utf8": (entry().replace(b'"a"', b'"\xff"'), 8),
    "half_a_surrogate": (entry().replace(b'"a"', b'"\\ud800"'), 8),
    "half_a_surrogate_in_bytes": (entry().replace(b'"a"', b'"\xed\xa0\x80"'), 8),
    "control_character": (entry().replace(b'"a"', b'"\x01"'), 8),
    "deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0),
    "deep_objects": (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, 0),
    "deep_in_an_unknown_field": (entry()[:-2] + b', "more": ' + b"[" * 5000 + b"]" * 5000 + b"}}", 8),
}
"""Headers and the bytes of data after them, of which the reference reader takes some."""


@pytest.mark.parametrize(("header", "size"), KINDS.values(), ids=KINDS.keys())
def test_judged_as_by_the_reference(tmp_path, header, size):
    """What the reference reader refuses is refused, in one line; what it takes has the same dtypes, shapes and bytes."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(damaged(header, np.random.default_rng(0).bytes(size)))
    try:
        found = dict(safetensors.deserialize(path.read_bytes()))
    except safetensors.SafetensorError:
        with pytest.raises(CheckpointError, match="model.safetensors: (damaged|truncated)") as caught:
            SafetensorsFolder(tmp_path)
        assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500
        return
    with SafetensorsFolder(tmp_path) as folder:
        assert folder.tensors.keys() == found.keys()
        for name, info in folder.tensors.items():
            assert (info.dtype, list(info.shape)) == (found[name]["dtype"], list(found[name]["shape"]))
            assert path.read_bytes()[info.start : info.start + info.nbytes] == bytes(found[name]["data"])
            if info.dtype == "F32":
                assert folder.read(name).tobytes() == bytes(found[name]["data"])


def test_the_kinds_have_both_outcomes(tmp_path):
    """So that the comparison above compares: the reference reader takes some, refuses others."""
    taken = []
    for name, (header, size) in KINDS.items():
        try:
            safetensors.deserialize(damaged(header, bytes(size)))
            taken.append(name)
        except safetensors.SafetensorError:
            pass
    assert {"plain", "scalar", "empty_tensor", "spaces_after", "half_bytes"} <= set(taken) and len(taken) < len(KINDS) / 2


def test_every_dtype_of_the_reference_is_known():
    """What it lists when it meets one that it doesn't know."""
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(damaged(entry("F99")))
    listed = set(str(caught.value).split("expected one of", 1)[1].split("at line")[0].replace("`", "").replace(",", " ").split())
    assert {"F32", "BF16", "F8_E4M3"} <= listed <= set(safetensors_header._BITS)


def test_a_header_of_zeros_is_not_read(tmp_path, monkeypatch):
    """A hundred megabytes that a damaged length speaks of, in a file that is large enough: a byte shows that they are no header."""
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write((99_999_999).to_bytes(8, "little"))
        file.truncate(120_000_000)  # a hole: takes no room
    read, real = [], SafetensorsFolder._pread
    monkeypatch.setattr(SafetensorsFolder, "_pread", lambda self, file, at, into: read.append(len(into)) or real(self, file, at, into))
    with pytest.raises(CheckpointError, match="damaged header"):
        SafetensorsFolder(tmp_path)
    assert read == [8, 1]


def make_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


NO_FILES = {
    "folder": (lambda path: path.mkdir(), "cannot be read: not a regular file"),
    "pipe": (os.mkfifo, "cannot be read: not a regular file"),
    "socket": (make_socket, "cannot be read"),
    "link_to_nowhere": (lambda path: path.symlink_to("nowhere"), "missing: a link to nowhere, which is not there"),
    "link_to_itself": (lambda path: path.symlink_to(path), "(missing|cannot be read)"),
}


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "one.safetensors"])
@pytest.mark.parametrize(("make", "message"), NO_FILES.values(), ids=NO_FILES.keys())
def test_what_is_no_file(tmp_path, name, make, message):
    if name == "one.safetensors":
        sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
        (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: {message}") as caught:
        SafetensorsFolder(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_links_to_files_are_files(tmp_path):
    """The cache of huggingface_hub is made of them."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": np.arange(3, dtype=np.float32)}, tmp_path / "blobs" / "0123")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0123")
    with SafetensorsFolder(tmp_path / "snapshot") as folder:
        assert folder.read("a").tolist() == [0, 1, 2]


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    path = write(tmp_path, {"a": np.zeros(1000, np.float32)}) / "model.safetensors"
    real = os.preadv
    with SafetensorsFolder(tmp_path) as folder:

        def shrinking(fd, buffers, offset):
            got = real(fd, [buffers[0][:100]], offset)
            os.truncate(path, folder["a"].start + 150)
            return got

        monkeypatch.setattr(os, "preadv", shrinking)
        with pytest.raises(CheckpointError, match=r"model.safetensors: truncated: \d+ bytes needed, the file has \d+$"):
            folder.read("a")


def test_a_disk_that_fails(tmp_path, monkeypatch):
    write(tmp_path, {"a": np.zeros(4, np.float32)})
    with SafetensorsFolder(tmp_path) as folder:

        def failing(*_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(CheckpointError, match="model.safetensors: cannot be read: Input/output error"):
            folder.read("a")


def recorded(folder, *lines):
    path = folder / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def test_the_recorded_checksum(tmp_path):
    path = write(tmp_path, {"a": np.arange(4, dtype=np.float32)}) / "model.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with SafetensorsFolder(tmp_path) as folder:
        assert folder.recorded_sha256("model.safetensors") is None and not folder.check_sha256("model.safetensors")
        for etag in ("", "5d41402abc4b2a76b9719d911017c592", "g" * 64, digest[:-1]):
            recorded(tmp_path, "commit", etag, "1712345678.9")  # files that aren't large have another kind of etag
            assert folder.recorded_sha256("model.safetensors") is None
        recorded(tmp_path, "commit", digest, "1712345678.9")
        seen = []
        assert folder.recorded_sha256("model.safetensors") == digest
        assert folder.check_sha256("model.safetensors", lambda *now: seen.append(now))
        assert seen == [(path.stat().st_size, path.stat().st_size, "model.safetensors")]


def test_a_checksum_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_reader, "_HASH_BYTES", 7)
    path = write(tmp_path, {"a": np.arange(4, dtype=np.float32)}) / "model.safetensors"
    raw = bytearray(path.read_bytes())
    recorded(tmp_path, "commit", hashlib.sha256(raw).hexdigest(), "1712345678.9")
    with SafetensorsFolder(tmp_path) as folder:
        assert folder.check_sha256("model.safetensors")
    raw[-1] ^= 1
    path.write_bytes(raw)
    with SafetensorsFolder(tmp_path) as folder:
        with pytest.raises(CheckpointError, match="model.safetensors: damaged: SHA-256 .*, the download recorded .*: download it again"):
            folder.check_sha256("model.safetensors")


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


INDEXES = [
    b"{",
    b"",
    b"[]",
    b"{}",
    b"null",
    b'{"weight_map": 3}',
    b'{"weight_map": ["one.safetensors"]}',
    b'{"weight_map": {"a": 1}}',
    b'{"weight_map": {"a": null}}',
    b'{"weight_map": {"a": {}}}',
    b'{"weight_map": {"a\\nb": "one.safetensors"}}',
    b'{"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}}',
    b'{"weight_map": {"a": "one.safetensors"}, "weight_map": {"a": "one.safetensors"}}',
    b'{"metadata": NaN, "weight_map": {"a": "one.safetensors"}}',
    b'{"weight_map": {"\xff": "one.safetensors"}}',
    b'{"weight_map": ' * 100_000,
    b"[" * 100_000,
]


@pytest.mark.parametrize("text", INDEXES, ids=[repr(text[:60]) for text in INDEXES])
def test_damaged_index(tmp_path, text):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(CheckpointError, match="index.json: damaged") as caught:
        SafetensorsFolder(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_index_that_lists_a_tensor_twice_names_it(tmp_path):
    text = '{"weight_map": {"some.name": "one.safetensors", "some.name": "two.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="tensor 'some.name' is listed twice"):
        SafetensorsFolder(tmp_path)


AWAY = ["../one.safetensors", "/{}/one.safetensors", "./one.safetensors", "..", ".", "", "a\0b", "a\nb", "\udc80", "x" * 300]


@pytest.mark.parametrize("name", AWAY, ids=range(len(AWAY)))
def test_index_may_not_leave_the_folder(tmp_path, name):
    inner = tmp_path / "inner"
    inner.mkdir()
    for folder in (tmp_path, inner):
        save_file({"a": np.zeros(2, np.float32)}, folder / "one.safetensors")
    (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name.format(tmp_path)}}))
    with pytest.raises(CheckpointError, match="not a file name") as caught:
        SafetensorsFolder(inner)
    assert len(str(caught.value).splitlines()) == 1


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
