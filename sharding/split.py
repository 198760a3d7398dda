"""How a model is split over a mesh of devices: what a user chooses (`Split`), and what follows for each part of a model (`Layout`).

A step runs under `shard_map`: every device computes a smaller model (`local_spec`), and where a result is only part of one, a collective of ours
joins the parts. So what is communicated stands in the code, and compilers add nothing to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxmoe.spec import ModelSpec
from jaxmoe.spec.types import AttentionSpec, DeltaSpec, ExpertSpec, LayerSpec, Segment
from sharding.rules import Rules

AXES = ("stage", "data", "expert", "sequence", "tensor")
"""The mesh's axes, outermost first: devices that differ only in `tensor`, which communicate most, are neighbours."""

Attention = Literal["data", "tensor"]
Exchange = Literal["tokens", "gather", "weights", "coherent"]


class SplitError(ValueError):
    """A split that is impossible, or that a model can't be split by; one line that names the field and its value."""


@dataclasses.dataclass(frozen=True)
class Split:
    """What a user chooses.

    Attributes:
        data: groups of devices that each serve their own sequences with their own copy of the dense weights.
        expert: each MoE layer's experts are divided among so many.
        tensor: heads, hidden widths (those of experts too) and the vocabulary are divided among so many.
        sequence: the positions of each sequence are divided among so many, in the cache as in prompts.
        stage: the layers are divided among so many, one group after another.
        attention: what the `expert` axis does outside the experts. 'data': each device has its own sequences, and tokens or weights travel to meet
            (`exchange`). 'tensor': heads, dense networks and the vocabulary are divided among them too, every one sees all tokens, and the experts'
            results are summed.
        exchange: how tokens and experts meet where attention = 'data', all over the same arrays. 'tokens': two all-to-alls carry tokens to their
            experts' devices and results back. 'gather': every device sees the tokens of all. 'weights': experts that are asked for are sent to every
            device (Hecate, sparse materialisation). 'coherent': the caches are whole on every device, and a token goes on where its expert was, by
            one all-to-all a layer (ExFlow; one active expert).

    Raises:
        SplitError: a number below one, or a name that isn't known.
    """

    data: int = 1
    expert: int = 1
    tensor: int = 1
    sequence: int = 1
    stage: int = 1
    attention: Attention = "data"
    exchange: Exchange = "tokens"

    def __post_init__(self):
        for axis in AXES:
            n = getattr(self, axis)
            if isinstance(n, bool) or not isinstance(n, int) or n < 1:
                raise SplitError(f"{axis} = {n!r}: a split needs a whole number of devices, at least 1")
        for field, known in (("attention", get_args(Attention)), ("exchange", get_args(Exchange))):
            if getattr(self, field) not in known:
                raise SplitError(f"{field} = {getattr(self, field)!r}: choose from {', '.join(known)}")

    @property
    def devices(self) -> int:
        """How many devices it takes."""
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The mesh's sizes, in the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """A mesh of these sizes with automatic axis types, over the first of `devices` (the process's, if not given).

        Raises:
            SplitError: there are fewer devices.
        """
        found = jax.devices() if devices is None else devices
        if len(found) < self.devices:
            raise SplitError(f"{self} takes {self.devices} devices, there are {len(found)}")
        return Mesh(_arranged(self.shape, found[: self.devices]), AXES, axis_types=(AxisType.Auto,) * len(AXES))

    def __str__(self) -> str:
        """As `parse_split` reads it."""
        parts = [f"{axis}={getattr(self, axis)}" for axis in ("data", "expert", "tensor", "sequence", "stage") if getattr(self, axis) > 1]
        if self.expert > 1:
            parts += [f"attention={self.attention}"] + ([f"exchange={self.exchange}"] if self.attention == "data" else [])
        return ",".join(parts) or "data=1"


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices such that those which differ in an inner axis are near each other: on a torus their order says nothing of that."""
    if devices[0].platform == "tpu":
        with contextlib.suppress(NotImplementedError, ValueError, AssertionError):  # a part of a torus, or a shape that doesn't fit it
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.asarray(devices).reshape(shape)


def parse_split(text: str) -> Split:
    """A split from 'data=2,expert=4,attention=tensor'.

    Raises:
        SplitError: a field that isn't known, given twice, or a value that isn't a number.
    """
    fields: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, value = part.partition("=")
        if name not in {f.name for f in dataclasses.fields(Split)}:
            raise SplitError(f"{part!r} in the split {text!r}: choose from {', '.join(f.name + '=' for f in dataclasses.fields(Split))}")
        if name in fields:
            raise SplitError(f"{name} is given twice in the split {text!r}")
        if name in AXES:
            try:
                fields[name] = int(value)
            except ValueError:
                raise SplitError(f"{name} = {value!r} in the split {text!r} is not a whole number") from None
        else:
            fields[name] = value
    return Split(**fields)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which mesh axes each part of a model is split over; a jit key. Axes of one device are left out, so an empty tuple means whole.

    Attributes:
        split: what was chosen.
        batch: of sequences, and of tokens outside the experts.
        heads: of attention and delta rules; what the output projections give is summed over them.
        mlp, shared: of the hidden widths of dense networks and of shared experts.
        experts: of the experts.
        expert_hidden: of the experts' hidden width.
        vocab: of embedding and output matrix.
        sequence: of the positions of a sequence.
        stage: of the layers.
    """

    split: Split
    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    expert_hidden: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    stage: tuple[str, ...] = ()

    def size(self, axes: tuple[str, ...]) -> int:
        """Devices along some axes."""
        return math.prod(getattr(self.split, axis) for axis in axes)

    def index(self, axes: tuple[str, ...], at: Sequence[int]) -> int:
        """Which part along some axes the device at a place of the mesh has; `at` in the order of `AXES`."""
        out = 0
        for axis in axes:
            out = out * getattr(self.split, axis) + int(at[AXES.index(axis)])
        return out

    def copies(self, kv_heads: int) -> int:
        """How many neighbouring devices of `heads` hold each of so many key-value heads: more than one where there are more devices than heads."""
        return max(1, self.size(self.heads) // kv_heads)

    @property
    def alone(self) -> bool:
        """Whether there is one device."""
        return self.split.devices == 1

    @property
    def shards(self) -> int:
        """Groups of devices that each have their own sequences."""
        return self.size(self.batch)

    @property
    def summed(self) -> tuple[str, ...]:
        """The axes over which experts' results are summed: each device has computed those of its own experts for all tokens."""
        return (*(self.experts if self.split.attention == "tensor" else ()), *self.expert_hidden)

    def rules(self) -> Rules:
        """The logical axes' rules, for parameters, experts and layer states alike."""
        table = {
            "layers": self.stage, "batch": self.batch, "heads": self.heads, "kv_heads": self.heads, "mlp_hidden": self.mlp,
            "shared_hidden": self.shared, "experts": self.experts, "hidden": self.expert_hidden, "vocab": self.vocab, "positions": self.sequence,
        }  # fmt: skip
        return Rules({name: axes for name, axes in table.items() if axes})

    def partition(self, *axes: str | None) -> PartitionSpec:
        """How an array with these logical axes is split."""
        return self.rules().spec(axes)


ALONE = Layout(Split())
"""One device."""


def layout_of(spec: ModelSpec, split: Split) -> Layout:
    """What a split means for a model.

    Raises:
        SplitError: the model doesn't divide so; the message names the part and its size.
    """

    def used(*axes: str) -> tuple[str, ...]:
        return tuple(axis for axis in axes if getattr(split, axis) > 1)

    def size(axes: tuple[str, ...]) -> int:
        return math.prod(getattr(split, axis) for axis in axes)

    if split.expert > 1 and not any(layer.sparse for segment in spec.segments for layer in segment.pattern):
        raise SplitError(f"expert = {split.expert}: the model has no experts")
    both = used("expert", "tensor") if split.attention == "tensor" else used("tensor")
    own = split.attention == "data" and split.exchange != "coherent"
    batch = used("data", "expert") if own else used("data")
    n, layers = size(both), tuple(dict.fromkeys(layer for segment in spec.segments for layer in segment.pattern))
    for layer in layers:
        for what, have in _heads(layer):
            if have % n and not (what == "key-value heads" and n % have == 0):
                raise SplitError(f"{' * '.join(both)} = {n} doesn't divide the model's {have} {what}")
        for what, part in (("dense networks' hidden width", layer.dense), ("shared experts' hidden width", layer.shared)):
            if part is not None and part.width % n:
                raise SplitError(f"{' * '.join(both)} = {n} doesn't divide the model's {what} of {part.width}")
        if layer.router is not None and layer.experts is not None:
            if layer.router.experts % split.expert:
                raise SplitError(f"expert = {split.expert} doesn't divide the model's {layer.router.experts} experts")
            if layer.experts.width % split.tensor:
                raise SplitError(f"tensor = {split.tensor} doesn't divide the experts' hidden width of {layer.experts.width}")
            if split.exchange == "coherent" and split.expert > 1 and split.attention == "data" and layer.router.active != 1:
                raise SplitError(f"exchange = 'coherent' is for one active expert a token, the model has {layer.router.active}: choose 'tokens'")
        if split.exchange == "coherent" and split.expert > 1 and split.attention == "data":
            for axis in ("sequence", "stage"):
                parts = getattr(split, axis)
                if parts > 1:
                    raise SplitError(f"{axis} = {parts}: with exchange = 'coherent' every device has whole caches: choose another exchange")
            beside = layer.router is not None and (layer.dense is not None or layer.router.pregated)
            if layer.delta is not None or beside:
                raise SplitError("exchange = 'coherent' is for attention followed by experts alone: choose another exchange")
        if layer.delta is not None and split.sequence > 1:
            raise SplitError(f"sequence = {split.sequence}: delta-rule layers pass a state along their positions, which isn't split")
    if split.stage > 1 and any(segment.repeats % split.stage for segment in spec.segments):
        counts = ", ".join(str(segment.repeats) for segment in spec.segments)
        raise SplitError(f"stage = {split.stage} doesn't divide the model's segments, which have {counts} repeats")
    if split.stage > 1 and sum(any(layer.sparse for layer in segment.pattern) for segment in spec.segments) > 1:
        raise SplitError(f"stage = {split.stage}: the model has experts in several segments of layers, which can't be divided among stages")
    vocab = next((axes for axes in (both, used("tensor"), ()) if spec.vocab % size(axes) == 0), ())
    has_dense = any(layer.dense is not None for layer in layers)
    has_shared = any(layer.shared is not None for layer in layers)
    return Layout(
        split, batch, both, both if has_dense else (), both if has_shared else (), used("expert"), used("tensor"), vocab, used("sequence"),
        used("stage"),
    )  # fmt: skip


def _heads(layer: LayerSpec) -> list[tuple[str, int]]:
    if layer.delta is not None:
        return [("delta rule's key heads", layer.delta.k_heads), ("delta rule's value heads", layer.delta.v_heads)]
    assert layer.attention is not None, "a layer has attention or a delta rule"
    own = [("heads", layer.attention.heads)]
    return own if layer.attention.latent is not None else [*own, ("key-value heads", layer.attention.kv_heads)]


def local_spec(spec: ModelSpec, layout: Layout) -> ModelSpec:
    """The model that each device computes: its share of heads, hidden widths, vocabulary and layers.

    Routers know all experts; a device's own are `experts / layout.size(layout.experts)` of each layer.
    """
    if layout.alone:
        return spec
    heads, stages = layout.size(layout.heads), layout.split.stage

    def attention(a: AttentionSpec | None) -> AttentionSpec | None:
        return None if a is None else dataclasses.replace(a, heads=a.heads // heads, kv_heads=max(1, a.kv_heads // heads))

    def delta(d: DeltaSpec | None) -> DeltaSpec | None:
        return None if d is None else dataclasses.replace(d, k_heads=d.k_heads // heads, v_heads=d.v_heads // heads)

    def narrow(e: ExpertSpec | None, axes: tuple[str, ...]) -> ExpertSpec | None:
        return None if e is None else dataclasses.replace(e, width=e.width // layout.size(axes))

    def layer(x: LayerSpec) -> LayerSpec:
        return dataclasses.replace(
            x, attention=attention(x.attention), delta=delta(x.delta), dense=narrow(x.dense, layout.mlp), shared=narrow(x.shared, layout.shared),
            experts=narrow(x.experts, layout.expert_hidden),
        )  # fmt: skip

    segments, first = [], 0
    for segment in spec.segments:
        segments.append(Segment(tuple(map(layer, segment.pattern)), segment.repeats // stages, first))
        first += segments[-1].repeats * len(segment.pattern)
    return dataclasses.replace(spec, vocab=spec.vocab // layout.size(layout.vocab), segments=tuple(segments), extra_heads=())
