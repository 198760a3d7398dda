"""Stock Orbax restores a converted folder, knowing nothing of us."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from checkpoints.convert import convert
from checkpoints.families import leaf_paths, unflatten
from checkpoints.load import open_checkpoint
from tests.checkpoints import hf_folders


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
