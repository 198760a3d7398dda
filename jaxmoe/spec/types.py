"""The static description of a model: frozen, hashable dataclasses that the compiled graph depends on, and nothing else.

A `ModelSpec` is a jit key. It holds no arrays, no paths and no run-time settings; two checkpoints with equal specs run the same programs.
Layers come in *segments*, a pattern of `LayerSpec`s repeated some number of times, so that a model which alternates kinds of layers
(windows and full attention, dense and sparse) is scanned over the repeats instead of being unrolled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Literal

Score = Literal["softmax", "sigmoid", "sqrtsoftplus", "none"]
Select = Literal["topk", "top_p", "hash", "sparsemixer", "rank"]
WeightFrom = Literal["score", "softmax_selected_logits", "sigmoid_selected_logits", "sparsemixer"]


class SpecError(ValueError):
    """A model description that can't be run as it stands; the message names the field and its value."""


@dataclasses.dataclass(frozen=True)
class Precision:
    """Which dtype each kind of number has.

    `params` is how weights are held, `compute` the dtype of activations, `router` that of the router's matmul ('float32' or 'model'),
    `accum` that of sums inside a dot (always float32 here), `kv` that of cached keys and values.
    """

    params: str = "float32"
    compute: str = "float32"
    router: Literal["float32", "model"] = "model"
    accum: str = "float32"
    kv: str = "float32"


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """Rotary positions: `theta` is the base, `width` how many of a head's channels turn, `style` how pairs are formed."""

    theta: float = 10000.0
    width: int = 0
    style: Literal["half", "interleaved"] = "half"


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Attention of one layer, as data. `window` counts visible positions including the query's own; None is full attention.

    `qk_norm`: 'head' normalises each head's C channels, 'full' the whole projection before it is split into heads.
    `clip` bounds q, k and v after the projection (and after a 'full' norm), as OLMoE's clip_qkv does.
    """

    heads: int
    kv_heads: int
    head_dim: int
    kind: Literal["gqa", "mla"] = "gqa"
    rope: RopeSpec | None = RopeSpec()
    qk_norm: Literal["head", "full"] | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    window: int | None = None
    clip: float | None = None
    scale: float | None = None

    @property
    def softmax_scale(self) -> float:
        """What scores are multiplied by before the softmax."""
        return self.scale if self.scale is not None else self.head_dim**-0.5


@dataclasses.dataclass(frozen=True)
class GroupLimit:
    """Group-limited selection: only experts of the best `kept` of `groups` groups stay eligible."""

    groups: int
    kept: int
    score: Literal["max", "top2sum"]
    mask_value: float


@dataclasses.dataclass(frozen=True)
class RouterSpec:
    """Six stages: logits, score, selection (with bias and groups), weights, normalisation, application.

    Every Hugging Face MoE router is a choice per stage. `norm_eps` is added to the sum that the selected weights are divided by;
    `weights_dtype` 'model' casts the final weights to the activations' dtype, as most of the reference implementations do.
    """

    experts: int
    active: int
    matmul_dtype: Literal["float32", "model"] = "model"
    logits_bias: bool = False
    score: Score = "softmax"
    select_bias: bool = False
    group_limit: GroupLimit | None = None
    select: Select = "topk"
    weight_from: WeightFrom = "score"
    normalize: bool = False
    norm_eps: float = 0.0
    scale: float = 1.0
    weights_dtype: Literal["float32", "model"] = "model"
    apply: Literal["output", "input"] = "output"


@dataclasses.dataclass(frozen=True)
class ExpertSpec:
    """A gated feed-forward network: `down(act(gate(x)) * up(x))` of hidden width `width`."""

    width: int
    activation: Literal["silu", "gelu"] = "silu"
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One decoder layer. It is sparse when `router` and `experts` are set, dense when `dense` is; `shared` experts see every token."""

    attention: AttentionSpec
    router: RouterSpec | None = None
    experts: ExpertSpec | None = None
    dense: ExpertSpec | None = None
    shared: ExpertSpec | None = None

    @property
    def sparse(self) -> bool:
        """Whether the layer routes tokens to experts."""
        return self.router is not None


@dataclasses.dataclass(frozen=True)
class Segment:
    """`pattern` repeated `repeats` times; `first` is the index of its first layer in the model."""

    pattern: tuple[LayerSpec, ...]
    repeats: int
    first: int

    def layer_index(self, repeat: int, position: int) -> int:
        """The model's index of the layer at `position` of the pattern in repetition `repeat`."""
        return self.first + repeat * len(self.pattern) + position


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything the graph depends on, read from a checkpoint's config.json by `ModelSpec.from_hf`."""

    family: str
    vocab: int
    width: int
    segments: tuple[Segment, ...]
    norm_eps: float
    max_positions: int
    tied: bool = False
    norm: Literal["rms", "layer"] = "rms"
    extra_heads: tuple[str, ...] = ()
    precision: Precision = Precision()

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Every layer in order."""
        return tuple(layer for seg in self.segments for _ in range(seg.repeats) for layer in seg.pattern)

    @property
    def n_layers(self) -> int:
        """How many decoder layers there are (L)."""
        return sum(len(seg.pattern) * seg.repeats for seg in self.segments)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts; position in this tuple is the layer's `moe_layer`."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.sparse)

    @property
    def moe(self) -> tuple[RouterSpec, ExpertSpec]:
        """The router and the expert shape that all sparse layers share.

        Raises:
            SpecError: there is no sparse layer, or they differ.
        """
        kinds = {(layer.router, layer.experts) for layer in self.layers if layer.router is not None}
        if len(kinds) != 1:
            raise SpecError(f"sparse layers of one kind are needed, found {len(kinds)} kinds")
        ((router, experts),) = kinds
        assert router is not None and experts is not None
        return router, experts

    def expert_bytes(self) -> tuple[int, ...]:
        """Bytes of one expert of each MoE layer, as held in `precision.params`; by `moe_layer`."""
        size = {"float32": 4, "bfloat16": 2}[self.precision.params]
        out = []
        for layer in self.layers:
            if layer.experts is not None:
                out.append(3 * self.width * layer.experts.width * size)
        return tuple(out)

    def with_precision(self, dtype: str) -> ModelSpec:
        """The same model held and computed in `dtype` ('float32' or 'bfloat16').

        Raises:
            SpecError: another dtype.
        """
        if dtype not in ("float32", "bfloat16"):
            raise SpecError(f"unsupported dtype {dtype!r}: choose float32 or bfloat16")
        precision = dataclasses.replace(self.precision, params=dtype, compute=dtype, kv=dtype)
        return dataclasses.replace(self, precision=precision)

    def to_json(self) -> dict:
        """A plain-data form that `from_json` reads back to an equal spec."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict) -> ModelSpec:
        """The inverse of `to_json` (lists of JSON become tuples again).

        Raises:
            SpecError: a key that no field has.
        """
        return _build(ModelSpec, data)

    @staticmethod
    def from_hf(config: dict) -> ModelSpec:
        """Reads a Hugging Face config.json (as a dict); see `jaxmoe.spec.hf`."""
        from jaxmoe.spec import hf

        return hf.from_hf(config)

    def hash(self) -> str:
        """Twelve hex digits that name this spec in records and cache folders."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:12]


_NESTED = {
    "precision": Precision,
    "rope": RopeSpec,
    "attention": AttentionSpec,
    "router": RouterSpec,
    "group_limit": GroupLimit,
    "experts": ExpertSpec,
    "dense": ExpertSpec,
    "shared": ExpertSpec,
    "segments": Segment,
    "pattern": LayerSpec,
}


def _build(cls, data: dict):
    names = {f.name for f in dataclasses.fields(cls)}
    unknown = set(data) - names
    if unknown:
        raise SpecError(f"{cls.__name__} has no field {sorted(unknown)[0]!r}")
    kwargs = {}
    for key, value in data.items():
        kind = _NESTED.get(key)
        if kind is not None and isinstance(value, dict):
            value = _build(kind, value)
        elif kind is not None and isinstance(value, list | tuple):
            value = tuple(_build(kind, v) for v in value)
        elif isinstance(value, list):
            value = tuple(value)
        kwargs[key] = value
    return cls(**kwargs)


def segments_of(layers: list[LayerSpec]) -> tuple[Segment, ...]:
    """Groups a list of layers into repeated patterns: the shortest period that covers the whole list, else runs of equal layers.

    A run is the fallback, so that a model of three dense layers followed by fifty sparse ones becomes two segments.
    """
    n = len(layers)
    for period in range(1, min(8, n) + 1):
        if n % period == 0 and n > period and all(layers[i] == layers[i % period] for i in range(n)):
            return (Segment(tuple(layers[:period]), n // period, 0),)
    out: list[Segment] = []
    start = 0
    for i in range(1, n + 1):
        if i == n or layers[i] != layers[start]:
            out.append(Segment((layers[start],), i - start, start))
            start = i
    return tuple(out)
