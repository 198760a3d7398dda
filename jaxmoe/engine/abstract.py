"""A step and the shapes it takes, before any array exists: what planners compile for machines that aren't there.

Every argument has the place that it has in a run: its sharding, its memory, and on TPUs its order of axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxmoe import formats
from jaxmoe.cache.batch import Batch, join_batches, make_batch
from jaxmoe.cache.deal import deal_batch
from jaxmoe.cache.layers import init_layers
from jaxmoe.decode.sampling import sampling_params
from jaxmoe.engine import mesh, steps
from jaxmoe.engine.mesh import Devices
from jaxmoe.engine.model import Offload, slot_bank
from jaxmoe.experts import ResidentBank, host_store
from jaxmoe.experts.placed import PlacedBank
from jaxmoe.spec import Leaf, ModelSpec, abstract_params, stack_layers
from pallas_kernels.dispatch import Kernels
from sharding.placement.replicas import MOST_TURNS
from sharding.split import AXES, Layout, local_spec
from sharding.workload import Workload

Phase = Literal["prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """Attributes: `step` the jitted function, `args` its arguments as `jax.ShapeDtypeStruct`s, `spec` the model as it is run."""

    step: Any
    args: tuple[Any, ...]
    spec: ModelSpec

    def lower(self) -> Any:
        """The step lowered for the devices that its arguments are on."""
        return self.step.lower(*self.args)


def abstract_step(spec: ModelSpec, on: Devices, workload: Workload, kernels: Kernels, phase: Phase, greedy: bool = True) -> AbstractStep:
    """The step that a run takes.

    Args:
        spec: the model; its precision is replaced by the workload's.
        on: the devices, which may be compile-only ones.
        workload: sequences, lengths, dtypes, and how many experts stay on a device.
        kernels: of the devices' backend.
        phase: one prefill step of `prefill_tokens`, or one call of the decode program.
        greedy: leave out sampling with a temperature.

    Raises:
        SplitError, ValueError: a workload that the split or the model can't have.
    """
    spec = spec.with_precision(workload.dtype).for_positions(workload.positions)
    spec = dataclasses.replace(spec, precision=dataclasses.replace(spec.precision, kv=workload.kv_dtype))
    params = _abstract_params(spec, on, workload.copies)
    bank, init = _abstract_bank(spec, on, workload, kernels)
    state = _abstract_state(spec, on, workload, init)
    if phase == "prefill":
        step = steps.prefill_step(spec, kernels, greedy, False, False, on)
        rest = _prefill_rest(on, workload)
    else:
        step = steps.decode_step(spec, kernels, greedy, False, False, on)
        rest = _decode_rest(on, workload)
    return AbstractStep(step, (params, bank, state, *rest), spec)


def placed(x: Any, on: Devices, partition: P, memory_kind: str | None = None) -> jax.ShapeDtypeStruct:
    """A shape with its place."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on.sharding(partition, memory_kind))


def _held(x: Any, on: Devices, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
    """A weight's shape with its place."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh.held(x, on, axes))


def _abstract_params(spec: ModelSpec, on: Devices, copies: int) -> dict:
    def size(n: int, axis: str | None) -> int:
        return n * on.layout.copies(n) if axis == "kv_heads" else n + copies if axis == "experts" else n

    def whole(leaf: Leaf) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(map(size, leaf.shape, leaf.axes)), leaf.dtype)

    def stack(leaves: list) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)

    layered = jax.tree.map(whole, abstract_params(dataclasses.replace(spec, extra_heads=())))
    params = stack_layers(spec, layered, stack)
    return jax.tree.map(lambda x, leaf: _held(x, on, leaf.axes), params, mesh.params_leaves(spec, params))


def _abstract_bank(spec: ModelSpec, on: Devices, workload: Workload, kernels: Kernels) -> tuple[Any, Callable[[], Any]]:
    """The fixed part of the bank, and what gives one device's moving part."""
    layout = kernels.expert_layout
    if workload.slots is None:
        router, experts = spec.moe
        dtype, layers = formats.leaf_dtype(spec.precision.params), len(spec.moe_layers)
        shapes = formats.expert_shapes(spec.width, experts.width, layout)
        workload.held_experts(router.experts, on.layout)
        w_in, w_out = (jax.ShapeDtypeStruct((layers, router.experts + workload.copies, *shape), dtype) for shape in shapes)
        axes = formats.expert_axis_names(layout)
        w_in, w_out = (_held(x, on, ("layers", "experts", *names)) for x, names in zip((w_in, w_out), axes, strict=True))
        bank = ResidentBank(w_in, w_out, experts.activation, layout)  # type: ignore[arg-type]
        if not workload.copies:
            return bank, lambda: ()
        where = jax.ShapeDtypeStruct((layers, router.experts, MOST_TURNS), jnp.int32)
        return PlacedBank(bank, placed(where, on, P(on.layout.stage or None))), lambda: ()  # type: ignore[arg-type]
    own = mesh.bank_spec(spec, on.layout)
    local = slot_bank(own, None, Offload(workload.slots, max(1, workload.staging)), layout)
    records = len(own.moe_layers) * own.moe[0].experts * on.layout.split.devices
    store = jax.ShapeDtypeStruct((records, *host_store.record_shape(own)), formats.leaf_dtype(spec.precision.params))
    return dataclasses.replace(local, store=placed(store, on, P(AXES), "pinned_host")), local.init_state  # type: ignore[arg-type]


def _abstract_state(spec: ModelSpec, on: Devices, workload: Workload, init: Callable[[], Any]) -> steps.EngineState:
    rows = workload.local_rows(on.layout)

    def cache(own: ModelSpec):
        return init_layers(own, rows, workload.positions, steps.run_length(steps.TOKEN_BUCKETS[-1]), on.layout.size(on.layout.sequence))

    own = jax.eval_shape(lambda: steps.EngineState(cache(local_spec(spec, on.layout)), jax.tree.map(lambda x: x[None], init())))
    split = mesh.state_partition(on.layout, own)
    return jax.tree.map(lambda x, p: placed(_whole(x, on.layout, p), on, p), own, split)


def _whole(x: Any, layout: Layout, partition: P) -> jax.ShapeDtypeStruct:
    """The whole array of which each device has `x`."""
    sizes = [layout.size((axes,) if isinstance(axes, str) else tuple(axes or ())) for axes in partition]
    sizes += [1] * (len(x.shape) - len(sizes))
    return jax.ShapeDtypeStruct(tuple(n * by for n, by in zip(x.shape, sizes, strict=True)), x.dtype)


def _prefill_rest(on: Devices, workload: Workload) -> tuple[Any, ...]:
    layout = on.layout
    parts, ended = layout.size(layout.sequence), steps.LOGIT_ROWS * layout.shards
    tokens = workload.prefill_tokens
    one = make_batch([], steps.run_length(tokens), tokens, [0], steps.LOGIT_ROWS)
    batch = join_batches((deal_batch(one, parts) if parts > 1 else [one]) * layout.shards, over_devices=True)
    over, rows = P((*layout.batch, *layout.sequence)), P(layout.batch)
    shape: Batch = jax.tree.map(lambda x: placed(x, on, over), batch)
    return shape, _sampling(on, ended), placed(np.zeros(ended, np.int32), on, rows)


def _decode_rest(on: Devices, workload: Workload) -> tuple[Any, ...]:
    rows = steps.bucket(workload.local_rows(on.layout), steps.ROW_BUCKETS) * on.layout.shards
    row = placed(np.zeros(rows, np.int32), on, P(on.layout.batch))
    return row, row, row, row, placed(np.zeros(steps.EOS_SLOTS, np.int32), on, P()), _sampling(on, rows)


def _sampling(on: Devices, rows: int) -> Any:
    return jax.tree.map(lambda x: placed(x, on, P(on.layout.batch)), jax.eval_shape(lambda: sampling_params(rows)))
