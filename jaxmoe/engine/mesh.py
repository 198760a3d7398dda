"""Steps on a mesh of devices: where each array of a model and its state lies, and the `shard_map` around a whole step.

Inside it every device computes `sharding.split.local_spec` of the model with its own part of each array; see `sharding.split`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as Order
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Int

from jaxmoe.cache.batch import Batch
from jaxmoe.cache.layers import LayerStates
from jaxmoe.decode.sampling import SamplingParams, first_largest, sample
from jaxmoe.experts.placed import PlacedBank
from jaxmoe.experts.resident import ResidentBank
from jaxmoe.experts.sharded import ShardedBank
from jaxmoe.experts.slots import SlotBank
from jaxmoe.spec import LayerSpec, Leaf, ModelSpec, abstract_params, stack_layers
from sharding.padding import held_order
from sharding.split import ALONE, AXES, Layout, Split, SplitError, layout_of, local_spec

P = PartitionSpec


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where steps run; a jit key. Attributes: `layout` how the model is split, `mesh` over which devices; None for the default device alone."""

    layout: Layout = ALONE
    mesh: Mesh | None = None

    @property
    def spread(self) -> bool:
        """Whether the devices are those of several processes."""
        return self.mesh is not None and len({device.process_index for device in self.mesh.devices.flat}) > 1

    def readable(self, tree: Any) -> Any:
        """What the host is going to read, inside a jitted function: whole on every device where another process has a part of it."""
        return jax.lax.with_sharding_constraint(tree, self.sharding(P())) if self.spread else tree

    def sharding(self, partition: PartitionSpec, memory_kind: str | None = None) -> NamedSharding:
        """Where an array that is split so goes."""
        assert self.mesh is not None
        return NamedSharding(self.mesh, partition, memory_kind=memory_kind)


HERE = Devices()
"""The default device alone."""


def devices_for(spec: ModelSpec, split: Split, devices: Any = None) -> Devices:
    """The first of the process's devices (or of `devices`) that a split takes.

    Raises:
        SplitError: the model can't be split so, or there are fewer devices.
    """
    mesh = split.mesh(devices)
    if devices is None and len({device.process_index for device in mesh.devices.flat}) < jax.process_count():
        every = len(jax.devices())
        raise SplitError(f"{split} takes {split.devices} devices, which leaves a process without one: use all {every}")
    return Devices(layout_of(spec, split), mesh)


def bank_spec(spec: ModelSpec, layout: Layout) -> ModelSpec:
    """The model as a device's own bank sees it: routers know the device's experts alone."""
    share = layout.size(layout.experts)

    def layer(x: LayerSpec) -> LayerSpec:
        if x.router is None:
            return x
        count = x.router.experts // share
        return dataclasses.replace(x, router=dataclasses.replace(x.router, experts=count, active=min(x.router.active, count)))

    own = local_spec(spec, layout)
    segments = [dataclasses.replace(segment, pattern=tuple(map(layer, segment.pattern))) for segment in own.segments]
    return dataclasses.replace(own, segments=tuple(segments))


# --- which mesh axes the axes of each array are split over


def params_leaves(spec: ModelSpec, params: dict) -> dict:
    """The leaves, with their logical axes, of the segmented tree `params` (arrays or shapes), which is stacked or has tuples of layers."""
    unrolled = isinstance(params["segments"][0][0]["norm_attn"]["scale"], tuple)  # with stages they have to be stacked

    def stacked(leaves: list[Leaf]) -> Any:
        first = leaves[0]
        return tuple(leaves) if unrolled else Leaf((len(leaves), *first.shape), first.dtype, ("layers", *first.axes))

    tree = stack_layers(spec, abstract_params(dataclasses.replace(spec, extra_heads=())), stacked)
    if spec.tied and "lm_head" in params:
        table = tree["embed"]["table"]
        tree["lm_head"] = {"kernel": Leaf(table.shape[::-1], table.dtype, table.axes[::-1])}
    return tree


def params_partition(spec: ModelSpec, layout: Layout, params: dict) -> dict:
    """Partition specs of the segmented tree `params`."""
    return jax.tree.map(lambda leaf: layout.partition(*leaf.axes), params_leaves(spec, params))


def bank_partition(layout: Layout, bank: Any) -> Any:
    """Partition specs of a bank's fixed part."""
    if isinstance(bank, ResidentBank):
        return _with(bank, {name: layout.partition(*axes) for name, axes in bank.logical_axes().items()})
    if isinstance(bank, PlacedBank):
        return PlacedBank(bank_partition(layout, bank.own), layout.partition("layers", None))  # type: ignore[arg-type]
    assert isinstance(bank, SlotBank), f"a bank of the kind {type(bank).__name__} can't be split"
    return _with(bank, {"store": None if bank.store is None else P(AXES)})


def layers_partition(layout: Layout, layers: LayerStates) -> LayerStates:
    """Partition specs of the layers' states."""
    states = [_with(state, {name: layout.partition(*axes) for name, axes in state.logical_axes().items()}) for state in layers.states]
    return dataclasses.replace(layers, states=tuple(states))


def state_partition(layout: Layout, state: Any) -> Any:
    """Partition specs of an `EngineState`; what a bank carries is each device's own, one after another along a first axis."""
    return dataclasses.replace(state, layers=layers_partition(layout, state.layers), bank=jax.tree.map(lambda _: P(AXES), state.bank))


def _with(tree: Any, leaves: dict[str, Any]) -> Any:
    return dataclasses.replace(tree, **leaves)


# --- the step


def on_mesh(step: Callable, spec: ModelSpec, on: Devices, inputs: tuple[PartitionSpec, ...], outputs: Any) -> Callable:
    """A step over all devices.

    Args:
        step: `(params, bank, state, *rest) -> (first, state, *more)`, for one device's part of everything.
        spec: the model.
        on: the devices.
        inputs: how each of `rest` is split; a `Batch` is one of `join_batches`.
        outputs: how `first` and `more` are split: `(first, *more)`, each a partition spec for all leaves.

    Returns:
        The same function of whole arrays; `step` itself on one device.
    """
    if on.mesh is None:
        return step
    layout, experts = on.layout, spec.moe[0].experts if spec.moe_layers else 0

    @functools.wraps(step)
    def whole(params, bank, state, *rest):
        split = state_partition(layout, state)
        into = (params_partition(spec, layout, params), bank_partition(layout, bank), split, *inputs)

        def one(params, bank, state, *rest):
            own = dataclasses.replace(state, bank=jax.tree.map(lambda x: x[0], state.bank))
            rest = tuple(dataclasses.replace(x, n_runs=x.n_runs[0]) if isinstance(x, Batch) else x for x in rest)
            first, own, *more = step(params, _sharded(bank, layout, experts), own, *rest)
            return first, dataclasses.replace(own, bank=jax.tree.map(lambda x: x[None], own.bank)), *more

        out = (outputs[0], split, *outputs[1:])
        first, state, *more = jax.shard_map(one, mesh=on.mesh, in_specs=into, out_specs=out, check_vma=False)(params, bank, state, *rest)
        return on.readable(first), state, *map(on.readable, more)

    return whole


def _sharded(bank: Any, layout: Layout, experts: int) -> ShardedBank:
    if getattr(bank, "lossy", None) is not None:
        raise SplitError("lossy: experts in fewer bits are for one device: leave it or the split out")
    if isinstance(bank, PlacedBank):
        held = bank.own.w_in.shape[1] * layout.size(layout.experts)  # more than the model has, where some have copies
        return ShardedBank(bank.own, layout, held, bank.position_of_expert)
    return ShardedBank(bank, layout, experts)


def anywhere(flag: jax.Array, layout: Layout) -> jax.Array:
    """Whether a flag is up on any of the devices that have different sequences."""
    return jax.lax.pmax(flag.astype(jnp.int32), layout.batch) > 0 if layout.batch else flag


def whole_logits(logits: jax.Array, layout: Layout) -> jax.Array:
    """Logits [R, V] of each device's part of the vocabulary."""
    return jax.lax.all_gather(logits, layout.vocab, axis=1, tiled=True) if layout.vocab else logits


def chosen_tokens(logits: jax.Array, sampling: SamplingParams, positions: jax.Array, greedy: bool, layout: Layout) -> jax.Array:
    """`sample` of logits that devices have parts of; the likeliest token is found with one number and one id of each."""
    if not (greedy and layout.vocab):
        return sample(whole_logits(logits, layout), sampling, positions, greedy_only=greedy)
    own = first_largest(logits)
    best = jnp.take_along_axis(logits, own[:, None], 1)[:, 0]
    ids = own + jax.lax.axis_index(layout.vocab).astype(jnp.int32) * logits.shape[1]
    best, ids = (jax.lax.all_gather(x, layout.vocab) for x in (best, ids))
    first = jnp.argmax(best, axis=0)  # the first of equals, as `sample` takes it: parts are in the vocabulary's order
    return jnp.take_along_axis(ids, first[None], 0)[0]


# --- arrays


def first_state(
    spec: ModelSpec, on: Devices, init: Callable[[ModelSpec], LayerStates], bank_state: Callable[[], Any], make: Callable
) -> Callable[[], Any]:
    """What makes the state to begin with, where it will be; jitted once.

    Args:
        spec: the model.
        on: the devices.
        init: one device's layer states, of its local spec.
        bank_state: one device's `init_state`.
        make: of layer states and a bank's moving part, the state.
    """

    def one():
        return make(init(local_spec(spec, on.layout)), jax.tree.map(lambda x: x[None], bank_state()))

    split = state_partition(on.layout, jax.eval_shape(one))
    return jax.jit(jax.shard_map(one, mesh=on.mesh, in_specs=(), out_specs=split, check_vma=False))


def leaf_sharding(on: Devices, placed: bool = False) -> Callable[[Leaf], NamedSharding] | None:
    """Where leaves of a checkpoint go as they are read; key-value heads that are going to be copied are whole on every device until then, and so are
    experts' biases that are going to be `placed`."""
    if on.mesh is None:
        return None

    def whole(axis: str | None, size: int) -> bool:
        return (axis == "kv_heads" and on.layout.copies(size) > 1) or (axis == "experts" and placed)

    def place(leaf: Leaf) -> NamedSharding:
        return on.sharding(on.layout.partition(*(None if whole(*sized) else sized[0] for sized in zip(leaf.axes, leaf.shape, strict=True))))

    return place


def placed_biases(spec: ModelSpec, layered: dict, order: Int[np.ndarray, "L C"]) -> dict:
    """Parameters by layer, experts' biases in a placement's order (`Placement.order`, `Replicas.order`), as their weights are in the bank."""
    layers = dict(layered["layers"])
    for i, own in zip(spec.moe_layers, order, strict=True):
        layer = layers[str(i)]
        layers[str(i)] = layer | {"expert_bias": {name: jnp.take(bias, own, axis=0) for name, bias in layer["expert_bias"].items()}}
    return layered | {"layers": layers}


def place_params(spec: ModelSpec, on: Devices, params: dict) -> dict:
    """Parameters on their devices, key-value heads copied where there are more devices than heads."""
    params = params | {"segments": _copied(spec, on.layout, params["segments"])}
    return jax.tree.map(lambda x, leaf: jax.device_put(x, held(x, on, leaf.axes)), params, params_leaves(spec, params))


def place_bank(on: Devices, bank: ResidentBank) -> ResidentBank:
    """Experts on their devices."""
    return _with(bank, {name: jax.device_put(getattr(bank, name), held(getattr(bank, name), on, axes)) for name, axes in bank.logical_axes().items()})


def held(x: Any, on: Devices, axes: tuple[str | None, ...]) -> NamedSharding | SingleDeviceSharding | Format:
    """Where a weight goes; on TPUs with the order of axes that steps compute in.

    XLA's own choice of an order for an argument is the one that pads least, and where that isn't the order a step computes in, the step would copy
    whole weights each time it runs.
    """
    sharding: NamedSharding | SingleDeviceSharding
    sharding = SingleDeviceSharding(jax.local_devices()[0]) if on.mesh is None else on.sharding(on.layout.partition(*axes))
    device: Any = next(iter(sharding.device_set))
    if device.platform != "tpu":
        return sharding
    return Format(Order(held_order(sharding.shard_shape(x.shape), axes, x.dtype.itemsize)), sharding)


def _copied(spec: ModelSpec, layout: Layout, segments: Any) -> Any:
    """Each key-value head as often, in a row, as there are devices for it."""

    def leaf(leaf: Leaf, x: Any) -> Any:
        if "kv_heads" not in leaf.axes:
            return x
        axis = leaf.axes.index("kv_heads")
        copies = layout.copies(leaf.shape[axis])
        if copies == 1:
            return x
        repeat = functools.partial(jnp.repeat, repeats=copies, axis=axis - len(leaf.axes))
        return tuple(map(repeat, x)) if isinstance(x, tuple) else repeat(x)

    leaves = stack_layers(spec, {"layers": abstract_params(spec)["layers"]}, lambda leaves: leaves[0])
    return jax.tree.map(leaf, leaves["segments"], segments, is_leaf=lambda x: isinstance(x, Leaf))
