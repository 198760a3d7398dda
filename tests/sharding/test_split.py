"""Splits as users write them, what they mean for a model, and the model that is left for each device."""

import jax
import numpy as np
import pytest

from jaxmoe.spec import abstract_params
from jaxmoe.spec.published import names, published
from sharding.rules import RulesError
from sharding.split import ALONE, Layout, Split, SplitError, layout_of, local_spec, parse_split

TEXTS = ("data=1", "data=2,expert=4,attention=data,exchange=gather", "expert=8,tensor=2,attention=tensor", "sequence=4,stage=2")


@pytest.mark.parametrize("text", TEXTS)
def test_a_split_reads_as_it_is_written(text):
    assert str(parse_split(text)) == text
    assert parse_split(str(parse_split(text))) == parse_split(text)


@pytest.mark.parametrize(
    "text, message",
    [
        ("data=0", "data = 0: a split needs a whole number of devices, at least 1"),
        ("expert=-2", "expert = -2"),
        ("tensor=two", "tensor = 'two' in the split 'tensor=two' is not a whole number"),
        ("model=2", "'model=2' in the split 'model=2': choose from data=, expert="),
        ("data=2,data=4", "data is given twice"),
        ("expert=2,attention=both", "attention = 'both': choose from data, tensor"),
        ("exchange=mail", "exchange = 'mail': choose from tokens, gather, weights, coherent"),
    ],
)
def test_nonsense_names_the_field(text, message):
    with pytest.raises(SplitError, match=message):
        parse_split(text)


def test_a_mesh_has_neighbours_along_tensor():
    mesh = parse_split("data=2,expert=2,tensor=2").mesh()
    assert dict(mesh.shape) == {"stage": 1, "data": 2, "expert": 2, "sequence": 1, "tensor": 2}
    ids = np.vectorize(lambda d: d.id)(mesh.devices)
    assert (np.diff(ids, axis=-1) == 1).all()
    with pytest.raises(SplitError, match="takes 16 devices, there are 8"):
        parse_split("data=16").mesh()


def test_parts_of_a_model_go_by_the_attention_that_is_chosen():
    spec = published("deepseek_v3")
    own = layout_of(spec, parse_split("data=2,expert=16,tensor=8"))
    assert own.batch == ("data", "expert") and own.heads == own.mlp == own.shared == ("tensor",) and own.summed == ("tensor",)
    shared = layout_of(spec, parse_split("data=2,expert=16,tensor=8,attention=tensor"))
    assert shared.batch == ("data",) and shared.heads == ("expert", "tensor") and shared.summed == ("expert", "tensor")
    assert shared.shards == 2 and own.shards == 32
    assert ALONE.alone and not own.alone and ALONE.partition("experts", "embed") == jax.sharding.PartitionSpec(None, None)


def test_rules_that_collide_raise():
    layout = Layout(Split(tensor=2), heads=("tensor",), mlp=("tensor",))
    with pytest.raises(RulesError, match="'tensor' twice"):
        layout.partition("heads", "mlp_hidden")


@pytest.mark.parametrize("name", names())
def test_devices_hold_the_model_between_them(name):
    """Bytes of what each device computes with, times the devices that share it, are those of the model, but for what all of them have."""
    spec = published(name)
    try:
        layout = layout_of(spec, Split(tensor=2))
    except SplitError as error:
        pytest.fail(f"every published model has even heads: {error}")
    own = local_spec(spec, layout)
    for i in (0, spec.n_layers - 1):
        whole, part = (jax.tree.flatten_with_path(abstract_params(s)["layers"][str(i)])[0] for s in (spec, own))
        for (path, a), (_, b) in zip(whole, part, strict=True):
            splits = layout.partition(*a.axes)
            parts = np.prod([layout.size((over,) if isinstance(over, str) else tuple(over)) for over in splits if over] or [1])
            experts = "experts" in a.axes  # biases of experts stand for all of the model's
            assert a.nbytes == b.nbytes * parts or experts, path


def test_few_key_value_heads_are_copied():
    spec = published("qwen3_30b_a3b")
    assert spec.layers[0].attention.kv_heads == 4
    layout = layout_of(spec, Split(tensor=16))
    assert layout.copies(4) == 4 and layout.copies(16) == 1
    assert local_spec(spec, layout).layers[0].attention.kv_heads == 1
    with pytest.raises(SplitError, match="tensor = 3 doesn't divide the model's 32 heads"):
        layout_of(spec, Split(tensor=3))
