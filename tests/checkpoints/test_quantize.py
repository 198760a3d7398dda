"""Experts that are quantized on the way: each number the nearest step of its group, on disk as `formats.Quantized` has them."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import units
from checkpoints.convert import convert
from checkpoints.errors import CheckpointError
from checkpoints.load import open_checkpoint
from checkpoints.quantizer import Quantizer
from checkpoints.verify import verify
from jaxmoe import formats
from jaxmoe.compress.round_to_nearest import quantize_columns, quantizer
from tests.checkpoints import hf_folders
from tests.more import mostly

CONFIG = {**hf_folders.CONFIGS["qwen3_moe"], "hidden_size": 32, "moe_intermediate_size": 64}


def folder(path, config=CONFIG, dtype="bfloat16", fused=False):
    tensors = hf_folders.random_tensors(config, dtype)
    return hf_folders.write_folder(path, config, hf_folders.fuse(config, tensors) if fused else tensors)


def reference(w, bits, group):
    """Numbers and scales of [E, K, N], written out."""
    e, k, n = w.shape
    grouped = w.reshape(e, k // group, group, n)
    scales = (np.abs(grouped).max(2) / np.float32(2 ** (bits - 1) - 1)).astype(np.float32)
    numbers = np.rint(grouped / np.where(scales == 0, np.float32(1), scales)[:, :, None]).astype(np.int8).reshape(w.shape)
    return formats.Quantized(jnp.asarray(formats.pack_int4(numbers, 1) if bits == 4 else numbers), jnp.asarray(scales), bits, group, -2)


def plain_matrices(tmp_path, **how):
    convert(folder(tmp_path / "plain_hf", **how), tmp_path / "plain")
    return open_checkpoint(tmp_path / "plain")


PAIRS = [(8, "float32", False), (8, "bfloat16", True), (4, "bfloat16", False), (4, "float32", True)]
"""Every two of bits, dtype, and whether experts are fused."""


@pytest.mark.parametrize("bits, dtype, fused", mostly(itertools.product((8, 4), ("float32", "bfloat16"), (False, True)), PAIRS))
def test_numbers_and_scales(tmp_path, bits, dtype, fused, monkeypatch):
    monkeypatch.setattr(units, "BLOCK_BYTES", 5 * 64 * 4)  # several blocks of columns
    plain = plain_matrices(tmp_path, dtype=dtype)
    hf = folder(tmp_path / "hf", dtype=dtype, fused=fused)
    manifest = convert(hf, tmp_path / "out", quantizer=quantizer(bits, 16))
    got = open_checkpoint(tmp_path / "out")
    assert manifest.quantization == {"method": "round_to_nearest", "bits": bits, "group": 16} and manifest.dtype == dtype
    for path in (f"experts.{layer}.{name}" for layer in (0, 2) for name in ("gate", "up", "down")):
        w = formats.load_numpy(plain.read(path))
        wanted = reference(w, bits, 16)
        values, scales = got.read(f"{path}.values"), got.read(f"{path}.scales")
        np.testing.assert_array_equal(values, np.asarray(wanted.values), path)
        np.testing.assert_array_equal(scales, np.asarray(wanted.scales), path)
        exact = np.asarray(formats.dequantize(wanted))
        np.testing.assert_array_equal(formats.load_numpy(got.read(path, dtype="float32")), exact, path)
        assert np.abs(exact - w).max() <= np.asarray(wanted.scales).max() / 2 * 1.0001
    verify(tmp_path / "out", hf, quantizer(bits, 16))
    other = {p: r.crc32 for p, r in plain.manifest.leaves.items() if not p.startswith("experts.")}
    assert other == {p: r.crc32 for p, r in manifest.leaves.items() if not p.startswith("experts.")}


def test_bytes_are_saved(tmp_path):
    hf = folder(tmp_path / "hf", dtype="float32")
    sizes = {}
    for name, how in (("plain", None), ("int8", quantizer(8, 32)), ("int4", quantizer(4, 32))):
        manifest = convert(hf, tmp_path / name, quantizer=how)
        sizes[name] = sum(record.nbytes for path, record in manifest.leaves.items() if path.startswith("experts."))
    assert sizes["int8"] == sizes["plain"] * (1 + 4 / 32) / 4
    assert sizes["int4"] == sizes["plain"] * (1 / 2 + 4 / 32) / 4


@pytest.mark.parametrize(("width", "group", "bits", "rows"), [(64, 16, 8, 16), (64, 8, 8, 8), (64, 8, 4, 64), (256, 32, 4, 128)])
def test_chunks_along_k_hold_whole_groups(tmp_path, width, group, bits, rows):
    """With 4 bits, whole blocks of packed numbers too: 64 numbers are packed as one block."""
    config = {**CONFIG, "moe_intermediate_size": width}
    manifest = convert(folder(tmp_path / "hf", config), tmp_path / "out", quantizer=quantizer(bits, group))
    assert manifest.leaves["experts.0.down.values"].chunk == (1, rows * bits // 8, 32)
    assert manifest.leaves["experts.0.down.scales"].chunk == (1, rows // group, 32)
    assert manifest.leaves["experts.0.gate.values"].chunk == (1, 32 * bits // 8, width // 8)


def test_columns_come_in_pieces_that_cover_them(tmp_path):
    seen: dict = {}

    def spy(path, expert, w, columns):
        seen.setdefault((path, expert), []).extend(range(columns.start, columns.stop))
        assert w.dtype == np.float32 and w.shape[1] == columns.stop - columns.start
        return quantize_columns(w, 8, 16)

    convert(folder(tmp_path / "hf"), tmp_path / "out", quantizer=Quantizer("spy", 8, 16, spy))
    assert len(seen) == 2 * 3 * 4
    assert all(columns == list(range(64 if "down" not in path else 32)) for (path, _), columns in seen.items())


@pytest.mark.parametrize("bits", [8, 4])
def test_as_formats_quantizes(bits):
    """XLA multiplies by 1 / 127 where numpy divides: scales may differ in their last bit, and with them a number between two steps."""
    w = np.random.default_rng(0).normal(size=(64, 33)).astype(np.float32)
    numbers, scales = quantize_columns(w, bits, 16)
    wanted = formats.quantize(jnp.asarray(w)[None], bits, 16, -2)
    np.testing.assert_allclose(scales, wanted.scales[0], rtol=1.2e-7)
    held = np.asarray(wanted.values)
    assert np.abs(numbers - (formats.unpack_int4(held, 1) if bits == 4 else held)[0]).max() <= 1


def test_a_group_of_zeros_stays_zero():
    w = np.zeros((32, 3), np.float32)
    w[0, 1] = -2.0
    numbers, scales = quantize_columns(w, 8, 16)
    assert numbers[0, 1] == -127 and np.count_nonzero(numbers) == 1
    np.testing.assert_array_equal(scales, np.array([[0, 2 / 127, 0], [0, 0, 0]], np.float32))


def test_resumes(tmp_path):
    hf = folder(tmp_path / "hf")
    straight = convert(hf, tmp_path / "straight", quantizer=quantizer(4, 16))
    calls = 0

    def stopping(done, total, path):
        nonlocal calls
        calls += 1
        if calls == 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(hf, tmp_path / "out", progress=stopping, quantizer=quantizer(4, 16))
    with pytest.raises(CheckpointError, match="unfinished conversion of another model or dtype .quantization differs"):
        convert(hf, tmp_path / "out")
    steps = []
    assert convert(hf, tmp_path / "out", progress=lambda done, *_: steps.append(done), quantizer=quantizer(4, 16)) == straight
    assert steps[0] > 0


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (quantizer(8, 128), "experts.0.gate has 32 numbers along K, no whole number of groups of 128: groups of 16, 32 would do .and 5 more leaves"),
        (quantizer(8, 48), "no whole number of groups of 48"),
        (Quantizer("bad", 8, 16, lambda path, expert, w, columns: (w, w)), "the quantizer 'bad' gave float32"),
        (Quantizer("bad", 8, 16, lambda *a: (np.zeros((1, 1), np.int8), np.zeros((1, 1), np.float32))), r"gave int8\[1, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, how, message):
    with pytest.raises(CheckpointError, match=message):
        convert(folder(tmp_path / "hf"), tmp_path / "out", quantizer=how)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_weights_that_are_not_finite(tmp_path, value):
    tensors = hf_folders.random_tensors(CONFIG, "float32")
    tensors["model.layers.2.mlp.experts.3.down_proj.weight"][3, 5] = value
    hf = hf_folders.write_folder(tmp_path / "hf", CONFIG, tensors)
    with pytest.raises(CheckpointError, match="experts.2.down, expert 3: has weights that are not finite"):
        convert(hf, tmp_path / "out", quantizer=quantizer(8, 16))


@pytest.mark.parametrize(("bits", "group"), [(5, 16), (8, 0)])
def test_quantizers_that_make_no_sense(bits, group):
    with pytest.raises(ValueError, match=str(bits if bits == 5 else group)):
        quantizer(bits, group)


def test_another_quantization_is_another_folder(tmp_path):
    hf = folder(tmp_path / "hf")
    convert(hf, tmp_path / "out", quantizer=quantizer(8, 16))
    with pytest.raises(CheckpointError, match="holds another model or dtype .quantization"):
        convert(hf, tmp_path / "out", quantizer=quantizer(8, 32))
    renamed = dataclasses.replace(quantizer(8, 16), method="other")
    with pytest.raises(CheckpointError, match="holds another model or dtype .quantization"):
        convert(hf, tmp_path / "out", quantizer=renamed)


def test_arrays_that_a_quantizer_fills_again(tmp_path):
    """What it gave before is still being written."""
    kept: dict = {}

    def again(path, expert, w, columns):
        numbers, scales = kept.setdefault(w.shape, (np.empty(w.shape, np.int8), np.empty((w.shape[0] // 16, w.shape[1]), np.float32)))
        numbers[...], scales[...] = quantize_columns(w, 8, 16)
        return numbers, scales

    hf = folder(tmp_path / "hf")
    one = convert(hf, tmp_path / "one", quantizer=Quantizer("same", 8, 16, again))
    two = convert(hf, tmp_path / "two", quantizer=Quantizer("same", 8, 16, lambda path, expert, w, columns: quantize_columns(w, 8, 16)))
    assert {p: r.crc32 for p, r in one.leaves.items()} == {p: r.crc32 for p, r in two.leaves.items()}


@pytest.mark.parametrize(
    ("bits", "spoil", "message"),
    [
        (4, lambda numbers, scales: (numbers * 0 + 8, scales), "gave 8 to 8 for .*: 4 bits hold -8 to 7"),
        (8, lambda numbers, scales: (numbers, scales * np.float32(np.nan)), "scales that are not finite"),
        (8, lambda numbers, scales: int("many"), "the quantizer 'bad' failed at experts.0.gate, expert 0: invalid literal"),
    ],
)
def test_quantizers_that_break_their_contract(tmp_path, bits, spoil, message):
    def bad(path, expert, w, columns):
        return spoil(*quantize_columns(w, bits, 16))

    with pytest.raises(CheckpointError, match=message):
        convert(folder(tmp_path / "hf"), tmp_path / "out", quantizer=Quantizer("bad", bits, 16, bad))
