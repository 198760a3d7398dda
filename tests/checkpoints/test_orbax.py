"""Stock Orbax restores a converted folder, knowing nothing of us; and what stock Orbax saved is read here."""

import copy
import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from checkpoints.convert import convert
from checkpoints.errors import CheckpointError
from checkpoints.families import leaf_paths, unflatten
from checkpoints.load import load_hf_or_checkpoint, open_checkpoint, read_spec
from checkpoints.orbax import open_orbax
from jaxmoe.compress.round_to_nearest import quantizer
from jaxmoe.engine.model import load_model, read_store
from jaxmoe.spec import ModelSpec
from pallas_kernels.dispatch import Kernels
from sharding.rules import Rules
from tests.checkpoints import hf_folders
from tests.checkpoints.restore_process import driver_bytes, make_mesh


@pytest.fixture(
    scope="module", params=[("mixtral", "float32"), ("olmoe", "bfloat16"), ("qwen3_moe", "bfloat16")], ids="-".join
)
def converted(request, tmp_path_factory):
    """(folder, tree) of a family in a dtype."""
    family, dtype = request.param
    folder = tmp_path_factory.mktemp("orbax")
    config = hf_folders.CONFIGS[family]
    tensors = hf_folders.random_tensors(config, dtype)
    convert(hf_folders.write_folder(folder / "hf", config, tensors), folder / "out")
    params, experts = hf_folders.expected_trees(config, tensors)
    return folder / "out", {"params": params, "experts": experts}


def abstract(folder, sharding):
    leaves = leaf_paths(open_checkpoint(folder).spec)
    return unflatten(
        {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(leaf)) for path, leaf in leaves.items()}
    )


def test_pytree_checkpointer_without_arguments(converted, assert_trees_equal):
    folder, tree = converted
    with ocp.PyTreeCheckpointer() as checkpointer:
        got = checkpointer.restore(folder)
    assert_trees_equal(got, tree)


def test_standard_checkpointer_with_an_abstract_tree(converted, assert_trees_equal):
    folder, tree = converted
    target = abstract(folder, lambda _: SingleDeviceSharding(jax.devices()[0]))
    with ocp.StandardCheckpointer() as checkpointer:
        got = checkpointer.restore(folder, target)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(got))
    assert_trees_equal(got, tree)


def test_standard_checkpointer_onto_eight_devices(converted, assert_trees_equal):
    folder, tree = converted
    mesh = Mesh(np.array(jax.devices()), ("x",))

    def place(leaf):
        return NamedSharding(
            mesh,
            PartitionSpec(
                *(
                    "x" if axis == "hidden" and n % 8 == 0 else None
                    for n, axis in zip(leaf.shape, leaf.axes, strict=True)
                )
            ),
        )

    with ocp.StandardCheckpointer() as checkpointer:
        got = checkpointer.restore(folder, abstract(folder, place))
    assert (
        got["experts"]["0"]["gate"].sharding.shard_shape(got["experts"]["0"]["gate"].shape)[2]
        == got["experts"]["0"]["gate"].shape[2] // 8
    )
    assert_trees_equal(got, tree)


def test_metadata(converted):
    folder, tree = converted
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata.tree
    gate = metadata["experts"]["0"]["gate"]
    expected = tree["experts"]["0"]["gate"]
    assert gate.shape == expected.shape
    assert gate.storage.chunk_shape == (1, expected.shape[1], expected.shape[2] // 8)


SPLITS = [
    ({"x": 8}, {"vocab": "x", "embed": "x", "hidden": "x"}),
    ({"x": 2, "y": 4}, {"experts": "y", "hidden": "x", "heads": "y"}),
    ({"x": 2, "y": 2, "z": 2}, {"experts": ("x", "y"), "hidden": "z"}),
]


@pytest.mark.parametrize(("sizes", "table"), SPLITS)
def test_quantized_folder_onto_eight_devices(tmp_path, sizes, table):
    """Values and scales are leaves like others to it."""
    config = {**hf_folders.CONFIGS["mixtral"], "hidden_size": 32, "intermediate_size": 64, "num_local_experts": 4}
    hf_folders.write_folder(tmp_path / "hf", config, hf_folders.random_tensors(config))
    convert(tmp_path / "hf", tmp_path / "out", "bfloat16", quantizer=quantizer(4, 16))
    checkpoint = open_checkpoint(tmp_path / "out")
    rules = Rules({name: over for name, over in table.items() if name != "embed"}, uneven="replicate")
    place = functools.partial(rules.sharding, make_mesh(sizes))
    target = unflatten(
        {
            path: jax.ShapeDtypeStruct(record.shape, np.dtype(record.stored), sharding=place(record))
            for path, record in checkpoint.manifest.leaves.items()
        }
    )
    with ocp.StandardCheckpointer() as checkpointer:
        got = checkpointer.restore(tmp_path / "out", target)
    ours = checkpoint.restore_experts(quantized=True, sharding=place)
    for layer, leaves in got["experts"].items():
        for name, parts in leaves.items():
            for part, array in parts.items():
                mine = getattr(ours[layer][name], part)
                assert array.sharding == mine.sharding
                np.testing.assert_array_equal(np.asarray(array), np.asarray(mine))
                np.testing.assert_array_equal(np.asarray(array), checkpoint.read(f"experts.{layer}.{name}.{part}"))


# --- what stock Orbax saved -------------------------------------------------------------------------------------------

CONFIG = hf_folders.CONFIGS["qwen3_moe"]


def saved_tree(dtype: str = "float32", native: bool = True, sharding=None) -> dict:
    """A model's tree as jax arrays; bfloat16 as itself or as uint16."""
    params, experts = hf_folders.expected_trees(CONFIG, hf_folders.random_tensors(CONFIG, dtype))

    def put(x):
        x = np.ascontiguousarray(x)
        return jax.device_put(x if native or x.dtype != ml_dtypes.bfloat16 else x.view(np.uint16), sharding)

    return jax.tree.map(put, {"params": params, "experts": experts})


def by_standard(folder, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)


def by_pytree(ocdbt: bool, zarr3: bool):
    def save(folder, tree):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)) as checkpointer:
            checkpointer.save(folder, tree)

    return save


def by_manager(folder, tree, steps=(3,)):
    with ocp.CheckpointManager(folder) as manager:
        for step in steps:
            manager.save(step, args=ocp.args.StandardSave(tree))
            manager.wait_until_finished()


def by_manager_with_items(folder, tree):
    with ocp.CheckpointManager(folder, item_names=("state", "about")) as manager:
        manager.save(7, args=ocp.args.Composite(state=ocp.args.StandardSave(tree), about=ocp.args.JsonSave({"a": 1})))
        manager.wait_until_finished()


SAVERS = {
    "standard": by_standard,
    "pytree": lambda folder, tree: ocp.PyTreeCheckpointer().save(folder, tree),
    "ocdbt, zarr2": by_pytree(True, False),
    "ocdbt, zarr3": by_pytree(True, True),
    "files, zarr2": by_pytree(False, False),
    "files, zarr3": by_pytree(False, True),
    "manager": by_manager,
    "manager with items": by_manager_with_items,
}


def check_save(save, tree, assert_trees_equal):
    """All ways to restore it, whole and on eight devices."""
    place = functools.partial(Rules({"experts": "e", "hidden": "h"}, uneven="replicate").sharding, make_mesh({"e": 4, "h": 2}))
    for sharding in (None, place):
        assert_trees_equal(save.restore_params(sharding=sharding), tree["params"])
        assert_trees_equal(save.restore_experts(sharding=sharding), tree["experts"])
        bank = save.restore_bank(sharding=sharding)
        for i, layer in enumerate(save.spec.moe_layers):
            gate, up, down = (tree["experts"][str(layer)][name] for name in ("gate", "up", "down"))
            assert_trees_equal([bank["w_in"][i], bank["w_out"][i]], [jnp.stack([gate, up], axis=2), down])
    assert_trees_equal(save.read_expert(2, 3, verify=True), jax.tree.map(lambda x: x[3], tree["experts"]["2"]))


@pytest.mark.parametrize("saver", SAVERS)
def test_reads_every_kind_of_stock_save(tmp_path, saver, assert_trees_equal):
    tree = saved_tree()
    SAVERS[saver](tmp_path / "save", tree)
    save = open_orbax(tmp_path / "save", ModelSpec.from_hf(CONFIG).with_precision("bfloat16"))
    assert save.spec == ModelSpec.from_hf(CONFIG) and save.quantization is None
    check_save(save, tree, assert_trees_equal)


@pytest.mark.parametrize("native", [True, False], ids=["bfloat16", "uint16"])
@pytest.mark.parametrize("saver", ["standard", "files, zarr3"])
def test_reads_bfloat16(tmp_path, saver, native, assert_trees_equal):
    tree = saved_tree("bfloat16", native)
    SAVERS[saver](tmp_path / "save", tree)
    save = open_orbax(tmp_path / "save", ModelSpec.from_hf(CONFIG))
    assert save.spec.precision.params == "bfloat16"
    check_save(save, tree, assert_trees_equal)
    wide = jax.tree.map(lambda x: (x if native else jax.lax.bitcast_convert_type(x, jnp.bfloat16)).astype(jnp.float32), tree)
    assert_trees_equal(save.restore_experts(dtype="float32"), wide["experts"])


def test_reads_float16_and_mixed_dtypes(tmp_path):
    tree = saved_tree()
    tree["params"]["embed"]["table"] = tree["params"]["embed"]["table"].astype(jnp.float16)
    by_standard(tmp_path / "save", tree)
    save = open_orbax(tmp_path / "save", ModelSpec.from_hf(CONFIG))
    expected = np.asarray(tree["params"]["embed"]["table"]).astype(np.float32)
    np.testing.assert_array_equal(save.read("params.embed.table"), expected)
    np.testing.assert_array_equal(save.restore_params()["embed"]["table"], expected)


def test_reads_our_own_folders_too(tmp_path, assert_trees_equal):
    convert(hf_folders.tiny(tmp_path / "hf", "qwen3_moe", "bfloat16"), tmp_path / "out")
    save = open_orbax(tmp_path / "out", ModelSpec.from_hf(CONFIG))
    ours = open_checkpoint(tmp_path / "out")
    assert save.spec == ours.spec
    assert_trees_equal(save.restore_params(), ours.restore_params())


def test_a_model_is_made_of_it(tmp_path):
    """The engine asks for no more than both kinds of folders have."""
    by_standard(tmp_path / "save", saved_tree())
    convert(hf_folders.tiny(tmp_path / "hf", "qwen3_moe"), tmp_path / "out")
    save, ours = open_orbax(tmp_path / "save", ModelSpec.from_hf(CONFIG)), open_checkpoint(tmp_path / "out")
    models = [load_model(folder, "bfloat16", Kernels("cpu")) for folder in (save, ours)]
    for a, b in zip(*(jax.tree.leaves((model.params, model.bank)) for model in models), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    np.testing.assert_array_equal(*(read_store(folder, models[0].spec) for folder in (save, ours)))


@pytest.mark.parametrize("saver", ["files, zarr2", "files, zarr3", "ocdbt, zarr2"])
def test_reads_only_the_slices_asked_for(tmp_path, saver):
    """Saved from eight devices, a chunk a device."""
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("x",)), PartitionSpec("x"))
    tree = saved_tree()
    big = jax.random.normal(jax.random.key(0), (4, 16, 16384))
    config = {**CONFIG, "moe_intermediate_size": 16384, "num_hidden_layers": 2}
    tree["params"]["layers"].pop("2")
    tree["experts"] = {"0": {"gate": big, "up": big, "down": big.swapaxes(1, 2)}}
    tree["experts"] = jax.tree.map(lambda x: jax.device_put(x, sharding), tree["experts"])
    SAVERS[saver](tmp_path / "save", tree)
    save = open_orbax(tmp_path / "save", ModelSpec.from_hf(config))
    before = driver_bytes()
    save.read_expert(0, 1)
    read = driver_bytes() - before
    assert save.bytes_read == save.bytes_owned == 3 * big[0].nbytes and save.read_ratio() == 1
    assert 0.8 * save.bytes_read < read < 1.1 * save.bytes_read, "random numbers don't compress"


def test_all_that_is_wrong_is_listed(tmp_path):
    tree = saved_tree()
    del tree["experts"]["2"]["up"]
    tree["params"]["lm_head"]["kernel"] = jnp.zeros((16, 38))
    tree["params"]["final_norm"]["scale"] = jnp.zeros(16, jnp.int32)
    tree["step"] = jnp.zeros(())
    by_standard(tmp_path / "save", tree)
    with pytest.raises(CheckpointError) as caught:
        open_orbax(tmp_path / "save", ModelSpec.from_hf(CONFIG))
    said = str(caught.value)
    assert "missing: experts.2.up; unexpected: step; " in said and "\n" not in said
    assert "params.lm_head.kernel has shape [16, 38], the model needs [16, 37]" in said
    assert "params.final_norm.scale has dtype int32" in said


def test_another_model(tmp_path):
    by_standard(tmp_path / "save", saved_tree())
    with pytest.raises(CheckpointError, match="missing: .* and [0-9]+ more; unexpected: params.layers.0.attn.k.bias"):
        open_orbax(tmp_path / "save", ModelSpec.from_hf({**CONFIG, "num_hidden_layers": 9, "attention_bias": False}))


def test_extra_heads_may_be_absent(tmp_path):
    by_standard(tmp_path / "save", saved_tree())
    spec = ModelSpec.from_hf(CONFIG)
    assert open_orbax(tmp_path / "save", dataclasses.replace(spec, extra_heads=(spec.layers[0],))).spec == spec


@pytest.mark.parametrize("saver", ["standard", "files, zarr2", "files, zarr3", "manager", "manager with items"])
def test_taken_for_ours_it_says_what_it_is(tmp_path, saver):
    SAVERS[saver](tmp_path / "save", saved_tree())
    for open_ in (open_checkpoint, read_spec, lambda folder: load_hf_or_checkpoint(folder, tmp_path / "cache")):
        with pytest.raises(CheckpointError, match="saved by Orbax itself, .* reshard .* --config config.json`, or .*open_orbax"):
            open_(tmp_path / "save")


def test_ours_without_its_manifest_is_not_taken_for_stock(tmp_path):
    convert(hf_folders.tiny(tmp_path / "hf", "mixtral"), tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="manifest.json is missing"):
        open_checkpoint(tmp_path / "out")


def test_folders_that_leave_a_choice(tmp_path):
    spec, tree = ModelSpec.from_hf(CONFIG), saved_tree()
    by_manager(tmp_path / "save", tree, steps=(3, 12))
    with pytest.raises(CheckpointError, match="holds the steps 3, 12: name one"):
        open_orbax(tmp_path / "save", spec)
    assert open_orbax(tmp_path / "save" / "12", spec).folder == tmp_path / "save" / "12" / "default"
    shutil.copytree(tmp_path / "save" / "3" / "default", tmp_path / "save" / "3" / "other")
    assert open_orbax(tmp_path / "save" / "3", spec).folder.name == "default"
    (tmp_path / "save" / "3" / "default").rename(tmp_path / "save" / "3" / "one")
    with pytest.raises(CheckpointError, match="holds the items one, other: name one"):
        open_orbax(tmp_path / "save" / "3", spec)


def test_folders_that_are_no_saves(tmp_path):
    spec = ModelSpec.from_hf(CONFIG)
    with pytest.raises(CheckpointError, match="none: no such folder"):
        open_orbax(tmp_path / "none", spec)
    with pytest.raises(CheckpointError, match="_METADATA is missing"):
        open_orbax(tmp_path, spec)
    by_pytree(False, True)(tmp_path / "save", saved_tree())
    shutil.copytree(tmp_path / "save", tmp_path / "x.orbax-checkpoint-tmp-1")
    with pytest.raises(CheckpointError, match="an unfinished Orbax save"):
        open_orbax(tmp_path / "x.orbax-checkpoint-tmp-1", spec)
    whole = json.loads((tmp_path / "save" / "_METADATA").read_text())
    lame = copy.deepcopy(whole)
    del next(iter(lame["tree_metadata"].values()))["key_metadata"]
    for damaged in ("{", "[]", "{}", json.dumps(lame)):
        (tmp_path / "save" / "_METADATA").write_text(damaged)
        with pytest.raises(CheckpointError, match="_METADATA: damaged"):
            open_orbax(tmp_path / "save", spec)
    (tmp_path / "save" / "_METADATA").write_text(json.dumps(whole))
    (tmp_path / "save" / "params.embed.table" / "zarr.json").write_text("{")
    shutil.rmtree(tmp_path / "save" / "params.final_norm.scale")
    with pytest.raises(CheckpointError, match="params.embed.table is missing or damaged: .*; params.final_norm.scale is missing"):
        open_orbax(tmp_path / "save", spec)


def test_a_chunk_that_is_gone(tmp_path):
    """Stock Orbax gives zeros for it."""
    by_pytree(False, False)(tmp_path / "save", saved_tree())
    (tmp_path / "save" / "experts.2.down" / "0.0.0").unlink()
    save = open_orbax(tmp_path / "save", ModelSpec.from_hf(CONFIG))
    with pytest.raises(CheckpointError, match="leaf experts.2.down is damaged"):
        save.restore_experts()
