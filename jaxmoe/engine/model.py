"""A model ready to run: its spec, its arrays, and what they weigh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from checkpoints.load import Checkpoint
from jaxmoe import formats
from jaxmoe.engine import mesh
from jaxmoe.engine.mesh import HERE, Devices
from jaxmoe.experts import ResidentBank, SlotBank, host_store
from jaxmoe.experts.lossy import Lossy
from jaxmoe.experts.placed import PlacedBank
from jaxmoe.formats import ExpertLayout
from jaxmoe.residency import Knowledge, Shape, find_policy
from jaxmoe.residency.policies import DEFAULT
from jaxmoe.spec import ModelSpec, stack_layers
from pallas_kernels.dispatch import Kernels
from sharding.placement import Placement, Replicas
from sharding.split import AXES


@dataclasses.dataclass(frozen=True)
class Model:
    """Attributes: `spec`, `kernels` (static); `params` the segmented tree; `bank` the experts; `folder` the checkpoint it came from; `on` the
    devices it is on."""

    spec: ModelSpec
    params: dict
    bank: Any
    kernels: Kernels
    folder: Path | None = None
    on: Devices = HERE

    def for_positions(self, positions: int) -> Model:
        """The model for sequences of up to so many positions (`ModelSpec.for_positions`)."""
        return dataclasses.replace(self, spec=self.spec.for_positions(positions))

    def bytes(self) -> dict[str, int]:
        """Bytes of the arrays on the device, or on each of a mesh, by kind, counted from the leaves."""

        bank = self.bank.device_bytes if isinstance(self.bank, SlotBank) else device_bytes(self.bank)
        return {"params": device_bytes(self.params), "experts": bank}

    def bytes_per_token(self, rows: int = 1) -> int:
        """Bytes of weights that one decode step of `rows` sequences has to read, on each device, if no two sequences share an expert.

        The embedding counts when it is also the output matrix; else only its looked-up rows are read, which are few.
        """
        dense = self.bytes()["params"]
        if "lm_head" in self.params:
            dense -= device_bytes(self.params["embed"]["table"])
        router, _ = self.spec.moe
        layout = self.on.layout
        parts, rows = layout.size((*layout.experts, *layout.expert_hidden, *layout.stage)), -(-rows // layout.split.data)
        return dense + min(rows * router.active, router.experts) * sum(self.spec.expert_bytes()) // parts


def device_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on one of the devices that they are on."""

    def own(x: jax.Array) -> int:
        return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

    return sum(map(own, jax.tree.leaves(tree)))


@dataclasses.dataclass(frozen=True)
class Offload:
    """How a model's experts are kept in host memory and brought to the device.

    Attributes:
        slots: slots of each MoE layer; one number for all.
        staging: slots that all layers share, for experts that pass through.
        policy: a name of `jaxmoe.residency.POLICIES`.
        knowledge: what the policy is told beforehand (`jaxmoe.residency.Knowledge`).
        fill: a name of `pallas_kernels.expert_fill.api.METHODS`; None for the backend's.
        store: hold the experts in `pinned_host` memory for the compiled step; False where the host sends them itself.
        lossy: what may be left out or brought in fewer bits; None for nothing.
    """

    slots: int | tuple[int, ...]
    staging: int = 2
    policy: str = DEFAULT
    knowledge: Knowledge = Knowledge()
    fill: str | None = None
    store: bool = True
    lossy: Lossy | None = None


def load_model(
    checkpoint: Checkpoint,
    dtype: str,
    kernels: Kernels,
    unroll: bool | None = None,
    offload: Offload | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    on: Devices = HERE,
    placement: Placement | Replicas | None = None,
) -> Model:
    """Restores a converted checkpoint onto the default device, or onto a mesh of which each device reads its own part.

    Args:
        checkpoint: from `checkpoints.load.open_checkpoint`.
        dtype: 'float32' or 'bfloat16', how weights are held and activations computed.
        kernels: which implementations run.
        unroll: keep one array a layer instead of scanning over stacked ones; the CPU's default, where it spares copies.
        offload: keep the experts in host memory, and bring them to the device as they are asked for.
        progress: called with experts read and experts in all, with `offload`.
        on: the devices; `offload.slots` are those of each device, for its own experts.
        placement: in which order experts stand before they are divided among devices, and which stand there more than once.

    On the CPU a tied embedding gets a transposed copy as the output matrix: XLA there multiplies few rows with [V, D] at half the speed of [D, V].
    """
    spec = checkpoint.spec.with_precision(dtype)
    if placement is not None:
        _check_placement(spec, on, placement)
    unroll = kernels.backend == "cpu" and not on.layout.stage if unroll is None else unroll
    layered = checkpoint.restore_params(spec, mesh.leaf_sharding(on, placement is not None))
    if placement is not None and spec.moe[1].bias:
        layered = mesh.placed_biases(spec, layered, placement.order)
    params = stack_layers(spec, layered, tuple if unroll else _stacked)
    if kernels.backend == "cpu" and "lm_head" not in params:
        params["lm_head"] = {"kernel": jnp.array(params["embed"]["table"].T)}
    if on.mesh is not None or kernels.backend == "tpu":
        params = mesh.place_params(spec, on, params)
    if on.mesh is not None:
        if offload is not None:
            if placement is not None:
                raise ValueError("a placement is for experts that all stay on their devices: leave out the placement or the expert memory")
            bank: Any = sharded_slots(checkpoint, spec, offload, kernels, on, progress)
        else:
            bank = resident_bank(checkpoint, spec, kernels, on, placement)
        return Model(spec, params, bank, kernels, checkpoint.folder, on)
    if offload is not None:
        records = read_store(checkpoint, spec, progress, kernels.expert_layout) if offload.store else None
        return Model(spec, params, slot_bank(spec, records, offload, kernels.expert_layout), kernels, checkpoint.folder)
    return Model(spec, params, resident_bank(checkpoint, spec, kernels, on), kernels, checkpoint.folder)


def _stacked(layers: list[jax.Array]) -> jax.Array:
    """Arrays of layers as one; what they were is given up, so that a model isn't held twice."""
    out = jnp.stack(layers)
    for layer in layers:
        layer.delete()
    return out


def resident_bank(
    checkpoint: Checkpoint, spec: ModelSpec, kernels: Kernels, on: Devices = HERE, placement: Placement | Replicas | None = None
) -> ResidentBank | PlacedBank:
    """All experts on the device, or each device's on it."""
    order = None if placement is None else placement.order
    whole = on.mesh is None and kernels.backend != "tpu"
    place = None if whole else lambda leaf: mesh.held(leaf, on, leaf.axes)
    arrays = checkpoint.restore_bank(spec, sharding=place, layout=kernels.expert_layout, order=order)
    bank = ResidentBank(arrays["w_in"], arrays["w_out"], spec.moe[1].activation, kernels.expert_layout)
    if placement is None:
        return bank
    return PlacedBank(bank, jax.device_put(placement.position_of_expert, on.sharding(P(on.layout.stage or None))))


def _check_placement(spec: ModelSpec, on: Devices, placement: Placement | Replicas) -> None:
    if on.mesh is None:
        raise ValueError(f"a placement of experts on {placement.devices} devices is for a model that is divided among them: leave it out")
    placement.check_model(len(spec.moe_layers), spec.moe[0].experts, None)
    if placement.devices != on.layout.split.expert:
        raise ValueError(f"the placement is for {placement.devices} devices, the split {on.layout.split} has expert = {on.layout.split.expert}")


def sharded_slots(
    checkpoint: Checkpoint, spec: ModelSpec, offload: Offload, kernels: Kernels, on: Devices, progress: Callable[[int, int], None]
) -> SlotBank:
    """A slot bank for each device's own experts, whose records lie in its host's pinned memory, device after device along the first axis."""
    own, layout = mesh.bank_spec(spec, on.layout), kernels.expert_layout
    bank = slot_bank(own, None, offload, layout)
    if not offload.store:
        raise ValueError("experts of a mesh are brought by compiled steps: choose the mode fused or layer-grouped")
    assert on.mesh is not None
    layers, experts, width = own.moe_layers, own.moe[0].experts, own.moe[1].width
    shape, dtype = (len(layers) * experts, *host_store.record_shape(own)), formats.leaf_dtype(spec.precision.params)
    total, done = len(on.mesh.local_devices) * shape[0], 0

    def records(index: Any) -> np.ndarray:
        nonlocal done
        at = np.unravel_index((index[0].start or 0) // shape[0], on.layout.split.shape)
        stage, first, part = (on.layout.index(axes, at) for axes in (on.layout.stage, on.layout.experts, on.layout.expert_hidden))
        hidden, out = slice(part * width, (part + 1) * width), formats.aligned_empty(shape, dtype)
        for i in range(shape[0]):
            layer = spec.moe_layers[stage * len(layers) + i // experts]
            read = checkpoint.read_expert(layer, first * experts + i % experts, spec.precision.params, verify=True)
            mine = {"gate": read["gate"][:, hidden], "up": read["up"][:, hidden], "down": read["down"][hidden]}
            host_store.pack_record(own, mine, out[i], layout)
            done += 1
            progress(done, total)
        return out

    whole = (shape[0] * on.layout.split.devices, *shape[1:])
    store = jax.make_array_from_callback(whole, on.sharding(P(AXES), "pinned_host"), records)
    return dataclasses.replace(bank, store=store)


def read_store(
    checkpoint: Checkpoint, spec: ModelSpec, progress: Callable[[int, int], None] = lambda done, total: None, layout: ExpertLayout = "d2f"
) -> np.ndarray:
    """Every expert's record in host memory, in `layout`; each is compared with its checksum as it is read."""

    def read(moe_layer: int, expert: int):
        return checkpoint.read_expert(spec.moe_layers[moe_layer], expert, spec.precision.params, verify=True)

    return host_store.read_records(spec, read, progress, layout)


def slot_bank(spec: ModelSpec, records: np.ndarray | None, offload: Offload, layout: ExpertLayout = "d2f") -> SlotBank:
    """A slot bank over records of `read_store`, which are in `layout`, or without a store.

    Raises:
        ValueError: slots that the model can't run with, or an unknown policy.
    """
    router, experts = spec.moe
    layers = len(spec.moe_layers)
    slots = (offload.slots,) * layers if isinstance(offload.slots, int) else offload.slots
    if len(slots) != layers:
        raise ValueError(f"slots are given for {len(slots)} layers, the model has {layers} with experts")
    if not all(router.active <= n <= router.experts for n in slots):
        raise ValueError(f"{min(slots)} to {max(slots)} slots a layer: the model needs {router.active} to {router.experts}")
    if offload.staging < 1:
        raise ValueError(f"{offload.staging} staging slots: at least one is needed")
    policy = find_policy(offload.policy)
    policy.tables(Shape(layers, router.experts, tuple(slots)), offload.knowledge)  # says what it lacks
    return SlotBank(
        None if records is None else host_store.pinned(records), knowledge=offload.knowledge, slots=tuple(slots), staging=offload.staging,
        experts=router.experts, entries=host_store.entry_shapes(spec, layout), layout=layout, dtype=spec.precision.params,
        activation=experts.activation, policy=offload.policy, fill=offload.fill, lossy=offload.lossy,
    )  # fmt: skip
