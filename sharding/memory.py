"""How many bytes of a device a plan takes, predicted from shapes: what XLA's compiler would report of the step's programs, without compiling.

Arguments are exact: every leaf of the parameters, experts and layer states in a device's share, in the tiles of `sharding.padding` on TPUs. What a
program needs beside them is the larger of what its layers need one after another (`sharding.temporaries`). It knows no arrays and no machine.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from jaxmoe import formats
from jaxmoe.formats import ExpertLayout
from jaxmoe.spec import ModelSpec, abstract_params
from jaxmoe.spec.types import DeltaSpec, LayerSpec, Segment
from sharding.padding import held_order, padded_size
from sharding.placement.replicas import MOST_TURNS
from sharding.split import Layout, local_spec
from sharding.temporaries import Temporaries, coherent, places, step_of, temporaries
from sharding.workload import WIDTH, Workload

Backend = Literal["tpu", "gpu", "cpu"]
Phase = Literal["prefill", "decode", "both"]

EXPERT_LAYOUTS: dict[Backend, ExpertLayout] = {"tpu": "2df", "gpu": "2fd", "cpu": "d2f"}
"""Order of axes of an expert's leaves (`pallas_kernels.dispatch.Kernels.expert_layout`)."""


class Held(NamedTuple):
    """An array of one device: `times` such ones of `shape` with numbers of `itemsize` bytes; `axes` are logical names, () where none matter."""

    shape: tuple[int, ...]
    itemsize: int
    axes: tuple[str | None, ...] = ()
    times: int = 1

    def nbytes(self, backend: Backend) -> int:
        """Bytes in a device's memory."""
        if backend != "tpu":
            return self.times * math.prod(self.shape) * self.itemsize
        order = held_order(self.shape, self.axes, self.itemsize) if self.axes else None
        return self.times * padded_size(self.shape, self.itemsize, order) * self.itemsize


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes of one device, by what they are for, and of its host.

    Attributes:
        weights: parameters but for routed experts.
        experts: routed experts that stay on the device: all of its own, or the slots of each layer.
        kv: layer states: cached keys and values, latents, delta rules' memories.
        tables: which expert lies in which slot, and what the residency policy counts.
        staging: slots that all layers share, for experts that pass through.
        activations: what a step computes: residual stream, expert rows, attention, logits.
        temporaries: what the compiler adds: a layer's weights cut out of the stack, and copies of them in another order.
        batch: tokens and what a step is told of them.
        host_store: experts in the host's memory, of this device.
    """

    weights: int
    experts: int
    kv: int
    tables: int = 0
    staging: int = 0
    activations: int = 0
    temporaries: int = 0
    batch: int = 0
    host_store: int = 0

    @property
    def total(self) -> int:
        """All of the device's memory."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "host_store")

    @property
    def arguments(self) -> int:
        """Of these, what lives longer than a step."""
        return self.total - self.activations - self.temporaries

    @property
    def items(self) -> tuple[tuple[str, int], ...]:
        """Name and bytes of everything on the device, the largest first."""
        found = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self) if field.name != "host_store"]
        return tuple(sorted(found, key=lambda item: -item[1]))

    def to_json(self) -> dict[str, int]:
        """Plain JSON."""
        return dataclasses.asdict(self) | {"total": self.total}


def device_bytes(
    spec: ModelSpec, layout: Layout, workload: Workload, backend: Backend, hardware: Any = None, phase: Phase = "both"
) -> Bytes:  # fmt: skip
    """What one device of a split holds.

    Args:
        spec: the model; its precision is replaced by the workload's.
        layout: how it is split.
        workload: sequences, lengths, dtypes, slots.
        backend: whose layouts and compiler.
        hardware: of the devices (`sharding.hardware.Hardware`); TPU7x compilers copy what others don't.
        phase: of which step the activations and temporaries are; 'both': of the one that needs more.

    Raises:
        SplitError: the workload's sequences don't divide among the devices.
    """
    spec = _as_run(spec, workload)
    own = local_spec(spec, layout)
    phases: tuple[Literal["prefill", "decode"], ...] = ("prefill", "decode") if phase == "both" else (phase,)
    wide = _with_copies(own, workload.copies)
    most: Temporaries = max((temporaries(wide, spec.vocab, layout, workload, backend, p) for p in phases), key=sum)
    pool, staging, tables, store = _experts(own, layout, workload, backend)
    return Bytes(
        weights=_weights(own, layout, backend, workload.copies),
        experts=pool,
        kv=sum(x.nbytes(backend) for x in layer_states(own, layout, workload)),
        tables=tables,
        staging=staging,
        activations=most.activations,
        temporaries=most.copies + (_retiled(own, layout, workload) if getattr(hardware, "name", "") == "tpu7x" else 0),
        batch=_batch(workload, layout, backend, phase),
        host_store=store,
    )


def _with_copies(own: ModelSpec, copies: int) -> ModelSpec:
    """A device's model as exchanges make room for it: with experts' copies as experts."""
    if not copies:
        return own

    def layer(x: LayerSpec) -> LayerSpec:
        return x if x.router is None else dataclasses.replace(x, router=dataclasses.replace(x.router, experts=x.router.experts + copies))

    return dataclasses.replace(own, segments=tuple(dataclasses.replace(s, pattern=tuple(map(layer, s.pattern))) for s in own.segments))


def _as_run(spec: ModelSpec, workload: Workload) -> ModelSpec:
    spec = spec.with_precision(workload.dtype)
    return dataclasses.replace(spec, precision=dataclasses.replace(spec.precision, kv=workload.kv_dtype), extra_heads=())


def weights(own: ModelSpec, layout: Layout, copies: int = 0) -> Iterator[Held]:
    """Every leaf of a device's parameters, those of a segment's repeats stacked; `own` is its local spec. `copies` of experts have biases too."""
    once, first = [], 0
    for segment in own.segments:
        once.append(Segment(segment.pattern, 1, first))
        first += len(segment.pattern)
    tree = abstract_params(dataclasses.replace(own, segments=tuple(once)))
    share = layout.size(layout.experts)

    def leaves(tree, repeats: int | None) -> Iterator[Held]:
        if isinstance(tree, dict):
            for branch in tree.values():
                yield from leaves(branch, repeats)
            return
        shape = tuple((n + copies) // share if axis == "experts" else n for n, axis in zip(tree.shape, tree.axes, strict=True))
        stacked = ((), ()) if repeats is None else ((repeats,), ("layers",))
        yield Held((*stacked[0], *shape), tree.dtype.itemsize, (*stacked[1], *tree.axes))

    for name, branch in tree.items():
        if name != "layers":
            yield from leaves(branch, None)
    for segment, single in zip(own.segments, once, strict=True):
        for j in range(len(segment.pattern)):
            yield from leaves(tree["layers"][str(single.first + j)], segment.repeats)


@functools.lru_cache(maxsize=4096)
def _weights(own: ModelSpec, layout: Layout, backend: Backend, copies: int) -> int:
    return sum(leaf.nbytes(backend) for leaf in weights(own, layout, copies))


def layer_states(own: ModelSpec, layout: Layout, workload: Workload) -> Iterator[Held]:
    """Every leaf of a device's layer states (`jaxmoe.cache.layers.init_layers`, or `jaxmoe.cache.split_kv` where positions are split)."""
    width, rows, length = WIDTH[workload.kv_dtype], workload.local_rows(layout), places(layout, workload)
    if coherent(layout):  # caches of all sequences of a group on each of its devices
        rows *= layout.size(tuple(axis for axis in layout.experts if axis in layout.batch))
    for kind, layers in own.state_kinds.items():
        if isinstance(kind, DeltaSpec):
            channels = 2 * kind.k_heads * kind.k_dim + kind.v_heads * kind.v_dim
            yield Held((layers, rows, kind.conv - 1, channels), WIDTH[workload.dtype])
            yield Held((layers, rows, kind.v_heads, kind.k_dim, kind.v_dim), 4)
            continue
        heads, key, value = kind
        yield Held((layers, rows, heads, key, length), width)
        if value is not None:
            yield Held((layers, rows, heads, length, value), width)
        if layout.sequence:
            yield Held((rows, length), 4)


def _experts(own: ModelSpec, layout: Layout, workload: Workload, backend: Backend) -> tuple[int, int, int, int]:
    """Bytes of experts, of staging, of tables, and in the host's memory."""
    if not own.moe_layers:
        return 0, 0, 0, 0
    router, expert = own.moe
    layers, experts = len(own.moe_layers), workload.held_experts(router.experts, layout)
    width = WIDTH[workload.dtype]
    shapes = formats.expert_shapes(own.width, expert.width, EXPERT_LAYOUTS[backend])
    if workload.slots is None:
        axes = ("layers", "experts")
        # Where each expert stands, by turns among its copies, of which there may be so many.
        where = Held((layers, router.experts, MOST_TURNS), 4).nbytes(backend) if workload.copies else 0
        return sum(Held((layers, experts, *s), width, (*axes, *(None,) * len(s))).nbytes(backend) for s in shapes), 0, where, 0
    # Tables of the policy 'lfu': where each expert is, its count and its last use; of each layer a clock and three counters.
    slots, passing = layers * workload.slots, max(1, workload.staging)
    total = sum(Held((slots + passing, *s), width).nbytes(backend) for s in shapes)
    staging = total * passing // (slots + passing)
    by_expert, by_layer = Held((1, layers, experts), 4).nbytes(backend), Held((1, layers), 4).nbytes(backend)
    return total - staging, staging, 3 * by_expert + 4 * by_layer, layers * experts * 3 * own.width * expert.width * width


def _retiled(own: ModelSpec, layout: Layout, workload: Workload) -> int:
    """Bytes of 16-bit arrays that a TPU7x's compiler (libtpu of jax 0.10.2) copies into tiles of 16 rows, having been given them in tiles of 8.

    They are weights but for experts, embeddings and projections to one head, and caches whose positions come last.
    """
    total = 0
    for leaf in weights(own, layout):
        order = held_order(leaf.shape, leaf.axes, leaf.itemsize)
        one_head = leaf.axes[-2:-1] in (("heads",), ("kv_heads",)) and leaf.shape[-2] == 1
        if leaf.itemsize == 2 and len(order) > 1 and leaf.shape[order[-2]] % 16 == 0 and leaf.axes[0] != "vocab" and not one_head:
            total += leaf.nbytes("tpu") if math.prod(leaf.shape) > 1 << 20 else 0
    for state in layer_states(own, layout, workload):
        positions = state.shape[-1] if len(state.shape) == 5 and state.itemsize == 2 else 0
        last = positions == places(layout, workload) or (positions % 128 and state.shape[-2] % 128 == 0)
        total += state.nbytes("tpu") if last else 0
    return total


def _batch(workload: Workload, layout: Layout, backend: Backend, phase: Phase) -> int:
    """Arguments beside parameters, experts and states; the larger of both steps' with 'both'."""
    rows, tokens = step_of(layout, workload, "decode").tokens, workload.prefill_tokens
    decode = sum(Held((n,), 4).nbytes(backend) for n in (rows,) * 4 + (8,))
    prefill = 3 * Held((tokens,), 4).nbytes(backend) + 5 * Held((8,), 4).nbytes(backend)
    return {"decode": decode, "prefill": prefill, "both": max(decode, prefill)}[phase]
