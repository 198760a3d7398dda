"""Folders saved on one device, restored on 2, 4 and 8 under many splits, plain and quantized: the same bits, the same outputs, no byte twice."""

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import NamedSharding, PartitionSpec

from checkpoints import leaves as leaves_module
from checkpoints.errors import CheckpointError
from checkpoints.families import flatten
from checkpoints.load import open_checkpoint
from checkpoints.reading import box_of
from jaxmoe import formats
from jaxmoe.compress.round_to_nearest import quantizer
from jaxmoe.formats import Quantized
from tests.checkpoints import hf_folders
from tests.checkpoints.restore_process import CONFIGS, SPLITS, check_shards, counted, driver_bytes, logits, make_mesh, placed, restore, write
from tests.more import more

TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory):
    """(open folder, every leaf as one device has it) of a family."""
    checkpoint = write(tmp_path_factory.mktemp(request.param), CONFIGS[request.param])
    return checkpoint, restore(checkpoint, None)


@pytest.fixture(scope="module")
def on_one(saved):
    """Logits on one device."""
    return logits(saved[0].spec, saved[1])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_the_split(saved, split, dtype):
    checkpoint, whole = saved
    expected = {path: np.asarray(leaf) for path, leaf in whole.items()}
    if dtype == "bfloat16":
        expected = {path: np.asarray(leaf) for path, leaf in restore(checkpoint, None, dtype).items()}
    mesh, place = placed(split)
    got = restore(checkpoint, place, dtype)
    assert check_shards(got, expected) == len(expected) * mesh.size
    assert any(not leaf.is_fully_replicated for leaf in got.values())


@pytest.mark.parametrize("split", [more("2 experts"), more("4 data, tensor"), "8 experts, data, tensor"])
def test_outputs_do_not_depend_on_the_split(saved, on_one, split):
    mesh, place = placed(split)
    got = logits(saved[0].spec, restore(saved[0], place), mesh)
    assert got.shape == on_one.shape and on_one.std() > 0.3
    assert np.abs(got - on_one).max() <= TOLERANCE


@pytest.mark.parametrize("split", SPLITS)
def test_no_chunk_is_read_twice(saved, split):
    """One process reads the whole folder once, however its devices share it, by the file driver's own count."""
    folder = saved[0].folder
    _, counts = counted(folder, placed(split)[1])
    files = sum(path.stat().st_size for path in folder.glob("*/*") if path.name != "zarr.json")
    assert counts["read"] == counts["driver"] == files
    assert counts["owned"] == counts["held"] == saved[0].manifest.nbytes
    assert counts["ratio"] == files / saved[0].manifest.nbytes < 1.1


def test_a_part_reads_its_part(saved):
    """Two devices of eight, as one process of four would have them; what their chunks hold besides is in the ratio."""
    checkpoint = open_checkpoint(saved[0].folder)
    assert checkpoint.read_ratio() == 1.0, "nothing was asked for"
    layer = checkpoint.spec.moe_layers[0]
    e, d, f = checkpoint.manifest.leaves[f"experts.{layer}.gate"].shape
    checkpoint.leaves.reader.array(f"experts.{layer}.gate")
    before = driver_bytes()
    assert checkpoint.read(f"experts.{layer}.gate", (slice(2, 4), slice(None), slice(f // 4, f // 2))).shape == (2, d, f // 4)
    chunk = 4 * d * f // 8 + 4
    assert driver_bytes() - before == checkpoint.bytes_read == 2 * 2 * chunk
    assert checkpoint.read_ratio() == chunk / (chunk - 4)
    checkpoint.read(f"experts.{layer}.gate", (0, 0, 0))  # one number: all of its chunk
    assert driver_bytes() - before == checkpoint.bytes_read == 5 * chunk
    assert checkpoint.bytes_owned == 4 * (chunk - 4) + 4


@pytest.mark.parametrize("layout", formats.LAYOUTS)
def test_gate_and_up_on_different_devices(saved, layout):
    checkpoint = saved[0]
    mesh = make_mesh({"e": 4, "pair": 2})

    def place(leaf):
        return NamedSharding(mesh, PartitionSpec(*({"experts": "e", None: "pair"}.get(axis) for axis in leaf.axes)))

    whole = {name: np.asarray(array) for name, array in checkpoint.restore_bank(layout=layout).items()}
    assert check_shards(checkpoint.restore_bank(sharding=place, layout=layout), whole) == 16


def test_expert_by_expert_for_the_host(saved):
    """What the host store reads: each expert's chunks and no others, checked."""
    checkpoint, whole = open_checkpoint(saved[0].folder), saved[1]
    for layer in checkpoint.spec.moe_layers:
        for e in range(checkpoint.spec.moe[0].experts):
            for name, matrix in checkpoint.read_expert(layer, e, verify=True).items():
                np.testing.assert_array_equal(matrix, np.asarray(whole[f"experts.{layer}.{name}"])[e])
    experts = [path for path in checkpoint.folder.glob("experts.*/*") if path.name != "zarr.json"]
    assert checkpoint.bytes_read == sum(path.stat().st_size for path in experts)


def test_splits_of_every_size(saved):
    """Slices that fall anywhere, overlap, or are empty: as numpy cuts them."""
    checkpoint, whole = saved
    path = f"experts.{checkpoint.spec.moe_layers[0]}.down"
    expected, rng = np.asarray(whole[path]), np.random.default_rng(0)
    for _ in range(40):
        index = tuple(
            int(rng.integers(-n, n)) if rng.random() < 0.2 else slice(*sorted(map(int, rng.integers(0, n + 1, 2))), int(rng.integers(1, 4)))
            for n in expected.shape
        )[: int(rng.integers(1, 4))]
        np.testing.assert_array_equal(checkpoint.read(path, index), expected[index], err_msg=str(index))
    np.testing.assert_array_equal(checkpoint.read(path, (slice(None, None, -2),)), expected[::-2])
    for index, error in [((0, 0, 0, 0), IndexError), ((99,), IndexError), ((-99,), IndexError), ((..., 0), TypeError), (([0],), TypeError)]:
        with pytest.raises(error):
            checkpoint.read(path, index)
    assert box_of((), ()) == ((), ())


# --- quantized folders ------------------------------------------------------------------------------------------------

QUANTIZED = {"8 bits": (8, 16), "4 bits": (4, 16), "4 bits, groups of 8": (4, 8)}

UNEVEN = {**hf_folders.CONFIGS["qwen3_moe"], "hidden_size": 48, "moe_intermediate_size": 96, "num_experts": 4}
"""K is 48 and 96: packed blocks of 16 and 32 numbers, which a part of K doesn't tell."""


@pytest.fixture(scope="module", params=QUANTIZED)
def quantized(request, tmp_path_factory):
    """(folder, its experts' float32 weights as `formats.dequantize` gives them, in jax, from whole leaves)."""
    bits, group = QUANTIZED[request.param]
    checkpoint = write(tmp_path_factory.mktemp("quantized"), UNEVEN, "float32", quantizer(bits, group))
    expected = {}
    for layer in checkpoint.spec.moe_layers:
        for name in ("gate", "up", "down"):
            parts = (jnp.asarray(checkpoint.read(f"experts.{layer}.{name}.{part}")) for part in ("values", "scales"))
            expected[f"{layer}.{name}"] = np.asarray(formats.dequantize(Quantized(*parts, bits=bits, group=group, axis=-2)))
    return checkpoint, expected


def held(x: np.ndarray, dtype: str) -> np.ndarray:
    return formats.store_numpy(x, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_weights_are_those_of_the_format(quantized, dtype):
    checkpoint, expected = quantized
    assert checkpoint.quantization is not None and checkpoint.quantization["bits"] in (4, 8)
    got = flatten(checkpoint.restore_experts(dtype=dtype))
    assert got.keys() == expected.keys()
    for path, weights in expected.items():
        np.testing.assert_array_equal(np.asarray(got[path]), held(weights, dtype), err_msg=path)
    w_in, w_out = checkpoint.restore_bank(dtype=dtype, layout="2fd").values()
    for i, layer in enumerate(checkpoint.spec.moe_layers):
        for j, name in enumerate(("gate", "up")):
            np.testing.assert_array_equal(np.asarray(w_in)[i, :, j].swapaxes(1, 2), held(expected[f"{layer}.{name}"], dtype))
        np.testing.assert_array_equal(np.asarray(w_out)[i].swapaxes(1, 2), held(expected[f"{layer}.down"], dtype))
        for e in range(4):
            for name, matrix in checkpoint.read_expert(layer, e, dtype, verify=True).items():
                np.testing.assert_array_equal(matrix, held(expected[f"{layer}.{name}"][e], dtype))


def test_slices_of_quantized_weights(quantized):
    """Along K as well, within a group and within a packed block."""
    checkpoint, expected = quantized
    rng = np.random.default_rng(1)
    for path, weights in expected.items():
        for _ in range(8):
            index = tuple(slice(*sorted(map(int, rng.choice(n + 1, 2, replace=False)))) for n in weights.shape)
            np.testing.assert_array_equal(checkpoint.read(f"experts.{path}", index), weights[index], err_msg=str(index))
        np.testing.assert_array_equal(checkpoint.read(f"experts.{path}", (1, 5), "bfloat16"), held(weights[1, 5], "bfloat16"))


SHARDED = {"experts and hidden": {"experts": "a", "hidden": "b"}, "width and hidden": {"embed": "a", "hidden": "b"}}


@pytest.mark.parametrize("table", SHARDED)
def test_quantized_weights_sharded(quantized, table, monkeypatch):
    checkpoint, expected = quantized
    mesh = make_mesh({"a": 4, "b": 2})

    def place(leaf):
        return NamedSharding(mesh, PartitionSpec(*(SHARDED[table].get(axis) for axis in leaf.axes)))

    monkeypatch.setattr(leaves_module, "WIDEN_BYTES", 1)  # one expert at a time
    assert check_shards(flatten(checkpoint.restore_experts(sharding=place)), expected) == 8 * len(expected)
    whole = {name: np.asarray(array) for name, array in checkpoint.restore_bank().items()}
    check_shards(checkpoint.restore_bank(sharding=place), whole)


def test_quantized_leaves_as_they_are(quantized):
    checkpoint, expected = quantized
    mesh = make_mesh({"a": 4, "b": 2})

    def place(leaf):
        split = {"experts": "a"} if leaf.axes[1] == "hidden" else {"experts": "a", "hidden": "b"}
        return NamedSharding(mesh, PartitionSpec(*(split.get(axis) for axis in leaf.axes)))

    fresh = open_checkpoint(checkpoint.folder)
    tree = fresh.restore_experts(quantized=True, sharding=place)
    assert fresh.bytes_owned == sum(r.nbytes for path, r in fresh.manifest.leaves.items() if path.startswith("experts."))
    for path, weights in expected.items():
        layer, name = path.split(".")
        leaf = tree[layer][name]
        assert isinstance(leaf, Quantized) and leaf.shape == weights.shape and leaf.axis == -2
        assert leaf.values.dtype == np.int8 and leaf.values.sharding.spec[0] == "a"
        np.testing.assert_array_equal(np.asarray(leaf.values), checkpoint.read(f"experts.{path}.values"))
        np.testing.assert_array_equal(np.asarray(formats.dequantize(leaf)), weights)
        one = checkpoint.read_expert(int(layer), 2, verify=True, quantized=True)[name]
        assert isinstance(one.values, np.ndarray) and one.bits == leaf.bits and one.group == leaf.group
        np.testing.assert_array_equal(one.values, np.asarray(leaf.values)[2])
        np.testing.assert_array_equal(one.scales, np.asarray(leaf.scales)[2])


def test_a_quantized_folder_owns_its_small_bytes(quantized):
    """Weights that are multiplied out own what they take on disk."""
    fresh = open_checkpoint(quantized[0].folder)
    fresh.restore_experts(dtype="float32")
    records = {path: record for path, record in fresh.manifest.leaves.items() if path.startswith("experts.")}
    assert fresh.bytes_owned == sum(record.nbytes for record in records.values())
    chunks = sum(int(np.prod([n // c for n, c in zip(r.shape, r.chunk, strict=True)])) for r in records.values())
    assert fresh.bytes_read == fresh.bytes_owned + 4 * chunks


@pytest.mark.parametrize("part", ["values", "scales"])
def test_altered_numbers_of_a_quantized_expert(quantized, part):
    """Rewritten with a right CRC; only the manifest's checksum knows."""
    folder, path = quantized[0].folder, f"experts.0.down.{part}"
    array = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/{path}/"}}, open=True).result()
    was = array[1, 2, 3].read().result()
    array[1, 2, 3].write(was + was.dtype.type(1)).result()
    try:
        with pytest.raises(CheckpointError, match="is not the one that was written|has checksum"):
            open_checkpoint(folder).read_expert(0, 1, verify=True)
    finally:
        array[1, 2, 3].write(was).result()
    open_checkpoint(folder).read_expert(0, 1, verify=True)


def test_what_quantized_and_plain_folders_refuse(quantized, saved):
    checkpoint = quantized[0]
    for ask in (checkpoint.restore_experts, lambda **kwargs: checkpoint.read_expert(0, 0, **kwargs)):
        with pytest.raises(CheckpointError, match="as they are on disk, not as float32"):
            ask(quantized=True, dtype="float32")
    with pytest.raises(CheckpointError, match="leaf experts.0.gate.values holds int. numbers of quantized weights, which mean nothing as float32"):
        checkpoint.read("experts.0.gate.values", dtype="float32")
    with pytest.raises(CheckpointError, match="there is no leaf experts.1.gate"):
        checkpoint.read("experts.1.gate")
    with pytest.raises(CheckpointError, match="are not quantized"):
        saved[0].restore_experts(quantized=True)
    with pytest.raises(CheckpointError, match="are not quantized"):
        saved[0].read_expert(saved[0].spec.moe_layers[0], 0, quantized=True)
