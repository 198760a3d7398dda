"""Rules: names to mesh axes, and everything that can't be."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe.cache.contiguous import KVState
from jaxmoe.cache.recurrent import RecurrentState
from jaxmoe.experts import ResidentBank
from jaxmoe.formats import LAYOUTS
from jaxmoe.spec import Leaf, abstract_experts, abstract_params
from jaxmoe.spec.published import names, published
from sharding.rules import LOGICAL, Rules, RulesError

GATE = Leaf((8, 16, 12), np.dtype(np.float32), ("experts", "embed", "hidden"))


def mesh(shape=(2, 4), names=("data", "model")):
    return Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), names)


def test_each_axis_goes_where_its_rule_says():
    rules = Rules({"experts": "data", "hidden": "model", "heads": ("data", "model"), "embed": None})
    assert rules.spec(GATE.axes) == PartitionSpec("data", None, "model")
    assert rules.spec(("heads", None, "embed")) == PartitionSpec(("data", "model"), None, None)
    assert rules.spec(()) == PartitionSpec()
    assert rules.sharding(mesh(), GATE) == NamedSharding(mesh(), PartitionSpec("data", None, "model"))
    assert Rules({}).sharding(mesh(), GATE).is_fully_replicated


def test_rules_are_values():
    """They go into caches and static arguments; the order in which they were written is nothing."""
    a, b = Rules({"experts": "x", "hidden": "y"}), Rules((("hidden", "y"), ("experts", "x")))
    assert a == b and hash(a) == hash(b) and a != Rules({"experts": "x"})


def test_a_mesh_axis_twice_in_a_leaf():
    rules = Rules({"experts": "model", "hidden": ("data", "model")})
    with pytest.raises(RulesError, match=r"\(experts, embed, hidden\) would be split over 'model' twice: by 'experts' and by 'hidden'"):
        rules.spec(GATE.axes)
    assert rules.spec(("embed", "hidden")) == PartitionSpec(None, ("data", "model")), "elsewhere both may be used"
    with pytest.raises(RulesError, match="over 'data' twice: by 'heads' and by 'heads'"):
        Rules({"heads": ("data", "data")}).spec(("heads",))


def test_unknown_names():
    with pytest.raises(RulesError, match="'hidden' is to be split over 'tensor', and the mesh has only 'data', 'model'"):
        Rules({"hidden": "tensor"}).sharding(mesh(), Leaf((4,), np.dtype(np.float32), ("embed",)))
    with pytest.raises(RulesError, match="no axis is called 'expert': choose from layers, experts"):
        Rules({"expert": "model"})
    with pytest.raises(RulesError, match="uneven='pad'"):
        Rules({}, uneven="pad")


def test_sizes_that_do_not_divide():
    table = {"experts": "data", "hidden": ("data", "model"), "embed": "model"}
    leaf = Leaf((16, 12), np.dtype(np.float32), ("embed", "hidden"))
    with pytest.raises(RulesError, match="twice"):
        Rules(table, uneven="replicate").sharding(mesh(), leaf)
    del table["embed"]
    message = r"the axis 'hidden' of 12 in a leaf \[16, 12\] \(embed, hidden\) doesn't divide by 2 \(data\) \* 4 \(model\)"
    with pytest.raises(RulesError, match=message):
        Rules(table).sharding(mesh(), leaf)
    assert Rules(table, uneven="replicate").sharding(mesh(), leaf).spec == PartitionSpec(None, None)
    even = Leaf((16, 24), np.dtype(np.float32), ("embed", "hidden"))
    assert Rules(table, uneven="replicate").sharding(mesh(), even).spec == PartitionSpec(None, ("data", "model"))


def test_every_axis_that_a_model_has_is_known():
    """All published configs, the bank in every layout, and what layers carry."""
    found = set()
    for name in names():
        spec = published(name)
        for leaf in jax.tree.leaves((abstract_params(spec), abstract_experts(spec)), is_leaf=lambda x: isinstance(x, Leaf)):
            found |= set(leaf.axes)
    for layout in LAYOUTS:
        for axes in ResidentBank(None, None, layout=layout).logical_axes().values():
            found |= set(axes)
    for state in (KVState(None, 0), RecurrentState(None, None)):
        for axes in state.logical_axes().values():
            found |= set(axes)
    assert found - {None} == set(LOGICAL)


def test_places_a_tree():
    place = functools.partial(Rules({"experts": "data", "hidden": "model"}).sharding, mesh())
    array = jax.device_put(np.arange(np.prod(GATE.shape), dtype=np.float32).reshape(GATE.shape), place(GATE))
    assert {shard.data.shape for shard in array.addressable_shards} == {(4, 16, 3)}
