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
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those trained on.

    Attributes:
        kind: 'linear' divides all by `factor`; 'llama3' and 'yarn' (arXiv:2309.00071) divide the slow ones and blend in between; 'longrope'
            (arXiv:2402.13753) divides each by its own number.
        factor: see `kind`.
        original: positions trained on.
        low, high: where blending begins and ends: yarn's beta_slow and beta_fast, llama3's low_freq_factor and high_freq_factor.
        truncate: yarn rounds the blended range outwards to whole frequencies.
        magnitude, long_magnitude: cosines and sines are multiplied by the first; by the second where longrope's `long` factors are used.
        short, long: longrope's factors, one a frequency.
        extended: longrope uses `long`: the sequences may be longer than `original` (`ModelSpec.for_positions`).
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 32.0
    truncate: bool = True
    magnitude: float = 1.0
    long_magnitude: float = 1.0
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    extended: bool = False


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """Rotary positions: `theta` is the base, `width` how many of a head's channels turn, `style` how pairs are formed.

    `pairs`: only the first so many of the `width / 2` pairs turn, the others have frequency zero (None: all turn). `wide`: they turn in float32, and
    are rounded afterwards.
    """

    theta: float = 10000.0
    width: int = 0
    style: Literal["half", "interleaved"] = "half"
    pairs: int | None = None
    scaling: RopeScaling | None = None
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class LatentSpec:
    """The low-rank parts of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Attributes:
        kv_rank: width of the latent that keys and values are made of; it is what is cached, with the rotary channels beside it.
        q_rank: width of the queries' latent; None for queries projected at once.
        plain: channels of a head's query and key that have no position; `AttentionSpec.rope.width` more have one.
        value: channels of a head's value.
        eps: of the latents' norms.
    """

    kv_rank: int
    q_rank: int | None
    plain: int
    value: int
    eps: float = 1e-6


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Queries at position p are multiplied by `1 + scale * log(1 + floor((p + 1) / every))` (arXiv:2501.19399, as Llama 4 has it)."""

    every: float
    scale: float


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Attention of one layer, as data.

    Attributes:
        heads, kv_heads, head_dim: H, K and C; `head_dim` is a query's and a key's width.
        latent: multi-head latent attention, cached as one head.
        rope: rotary positions; None for a layer without.
        qk_norm: 'head' normalises each head's C channels, 'full' the whole projection before it is split into heads, 'after_rope' each head without
            a learned scale when it has been turned.
        v_norm: values are normalised per head, without a learned scale.
        values: 'own' projects values, 'keys' takes the projected keys (before their norm).
        qkv_bias, out_bias: of the projections.
        window: how many positions are visible, including the query's own; None is full attention.
        chunk: only positions of the query's own chunk of so many are visible.
        clip: bounds q, k and v after the projection (and after a 'full' norm), as OLMoE's clip_qkv does.
        scale: what scores are multiplied by; None for C^-0.5.
        sinks: a learned logit per head takes part in the softmax and adds nothing.
        gate: the output is multiplied by the sigmoid of a projection as wide as the queries.
        temperature: see `Temperature`.
    """

    heads: int
    kv_heads: int
    head_dim: int
    latent: LatentSpec | None = None
    rope: RopeSpec | None = RopeSpec()
    qk_norm: Literal["head", "full", "after_rope"] | None = None
    v_norm: bool = False
    values: Literal["own", "keys"] = "own"
    qkv_bias: bool = False
    out_bias: bool = False
    window: int | None = None
    chunk: int | None = None
    clip: float | None = None
    scale: float | None = None
    sinks: bool = False
    gate: bool = False
    temperature: Temperature | None = None

    @property
    def softmax_scale(self) -> float:
        """What scores are multiplied by before the softmax."""
        return self.scale if self.scale is not None else self.head_dim**-0.5

    @property
    def cached(self) -> tuple[int, int, int | None]:
        """What a position takes in a cache: heads, channels of a key, and channels of a value (None: the key's first `latent.kv_rank`)."""
        if self.latent is None:
            return self.kv_heads, self.head_dim, self.head_dim
        return 1, self.latent.kv_rank + (self.rope.width if self.rope else 0), None


@dataclasses.dataclass(frozen=True)
class DeltaSpec:
    """A gated delta-rule layer (arXiv:2412.06464) with a short convolution before it, in the place of attention.

    Attributes:
        k_heads, v_heads: heads of queries and keys, and of values; each of the former serves `v_heads / k_heads` of the latter.
        k_dim, v_dim: channels of a head; the carried state of a head is [k_dim, v_dim].
        conv: positions that the causal depthwise convolution sees, the present one included.
    """

    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    conv: int


@dataclasses.dataclass(frozen=True)
class GroupLimit:
    """Group-limited selection: only experts of the best `kept` of `groups` groups stay eligible. The others' scores become `mask_value`, or with None
    they can't be chosen at all."""

    groups: int
    kept: int
    score: Literal["max", "top2sum"]
    mask_value: float | None


@dataclasses.dataclass(frozen=True)
class RouterSpec:
    """Six stages: logits, score, selection (with bias and groups), weights, normalisation, application.

    Every Hugging Face MoE router is a choice per stage.

    Attributes:
        experts, active: E and A.
        input_norm: the router normalises its input itself: without a learned scale, then times a learned one and D^-0.5 (Gemma 4).
        matmul_dtype: of the logits; with 'float32' the weights are held in float32 too, whatever the model's precision.
        logits_bias: logits have a learned bias.
        score: what becomes of the logits.
        select_bias: a learned bias is added to the scores for selection only; held in float32.
        group_limit: see `GroupLimit`.
        select: how experts are chosen.
        weight_from: what the chosen experts' weights are made of.
        jitter: of 'sparsemixer': how far below the largest a logit may be, relatively, and still take part (times two).
        normalize: the weights are divided by their sum, to which `norm_eps` is added, and which is at least `norm_min`.
        expert_scale: the weights are multiplied by a learned number of their expert.
        scale: the weights are multiplied by it.
        weights_dtype: 'model' casts the final weights to the activations' dtype, as most of the reference implementations do.
        apply: whether a weight multiplies its expert's output or input.
        pregated: the router reads what the last MoE layer's router was given, the first one its own: a choice is known a layer ahead (Pre-gated MoE,
            arXiv:2308.12066, which counts such a gate to the layer before).
    """

    experts: int
    active: int
    input_norm: bool = False
    matmul_dtype: Literal["float32", "model"] = "model"
    logits_bias: bool = False
    score: Score = "softmax"
    select_bias: bool = False
    group_limit: GroupLimit | None = None
    select: Select = "topk"
    weight_from: WeightFrom = "score"
    jitter: float = 0.0
    normalize: bool = False
    norm_eps: float = 0.0
    norm_min: float = 0.0
    expert_scale: bool = False
    scale: float = 1.0
    weights_dtype: Literal["float32", "model"] = "model"
    apply: Literal["output", "input"] = "output"
    pregated: bool = False


@dataclasses.dataclass(frozen=True)
class ExpertSpec:
    """A gated feed-forward network: `down(glu(gate(x), up(x)))` of hidden width `width`; `activation` names the glu (`GLUS`)."""

    width: int
    activation: Literal["silu", "gelu", "clamped_swiglu"] = "silu"
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: attention or a delta rule, then experts or a dense network or both.

    Attributes:
        attention, delta: exactly one of them.
        router, experts: routed experts, if any.
        dense: a dense network; beside experts, it runs in parallel with them.
        shared: an expert that sees every token, added to the routed ones.
        shared_gate: its output is multiplied by the sigmoid of a learned projection to one number.
        post_norms: norms after attention and after the feed-forward part too; where dense and experts run in parallel, each is normalised before and
            after (Gemma 4).
        layer_scale: the residual stream is multiplied by a learned number at the end.
    """

    attention: AttentionSpec | None = None
    router: RouterSpec | None = None
    experts: ExpertSpec | None = None
    dense: ExpertSpec | None = None
    shared: ExpertSpec | None = None
    shared_gate: bool = False
    delta: DeltaSpec | None = None
    post_norms: bool = False
    layer_scale: bool = False

    @property
    def sparse(self) -> bool:
        """Whether the layer routes tokens to experts."""
        return self.router is not None

    @property
    def state(self) -> tuple[int, int, int | None] | DeltaSpec:
        """What the layer carries from token to token: `AttentionSpec.cached`, or a delta rule's memory. Layers of one kind share their arrays."""
        if self.delta is not None:
            return self.delta
        assert self.attention is not None, "a layer has attention or a delta rule"
        return self.attention.cached


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
    """Everything the graph depends on, read from a checkpoint's config.json by `ModelSpec.from_hf`.

    Attributes:
        family: the `model_type`; it names the map of weight names and changes nothing else.
        vocab, width: V and D.
        segments: the layers.
        norm_eps, norm: of the norms, root-mean-square or with a mean and a bias ('layer').
        norm_offset: what is added to a norm's scale before it is used.
        norm_wide: norms multiply by their scale in float32, and round afterwards.
        max_positions: the longest sequence.
        tied: the output matrix is the embedding.
        head_bias: logits have a learned bias.
        embed_scale, residual_scale, logit_divisor: embeddings and what a layer's halves add are multiplied by the first two, logits divided by the
            last.
        logit_cap: logits are bounded by `cap * tanh(logits / cap)`.
        extra_heads: layers of multi-token prediction, kept for drafting.
        precision: see `Precision`.
    """

    family: str
    vocab: int
    width: int
    segments: tuple[Segment, ...]
    norm_eps: float
    max_positions: int
    tied: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    norm_wide: bool = False
    head_bias: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    logit_cap: float | None = None
    extra_heads: tuple[LayerSpec, ...] = ()
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
    def kept_per_token(self) -> int:
        """How many numbers all layers together keep of each token, as if none had a window: keys and values, or latents."""
        kinds = [layer.attention.cached for layer in self.layers if layer.attention is not None]
        return sum(heads * (key + (value or 0)) for heads, key, value in kinds)

    @property
    def state_kinds(self) -> dict[tuple[int, int, int | None] | DeltaSpec, int]:
        """The kinds of `LayerSpec.state` in order of appearance, and how many layers have each."""
        out: dict = {}
        for layer in self.layers:
            out[layer.state] = out.get(layer.state, 0) + 1
        return out

    def state_index(self, index: int) -> int:
        """Which of the layers with its kind of state the layer `index` is."""
        layers = self.layers
        return sum(layer.state == layers[index].state for layer in layers[:index])

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

    def for_positions(self, positions: int) -> ModelSpec:
        """The model for sequences of up to so many positions: longrope takes its long factors where that is more than it was trained on.

        One choice for all sequences, so that cached keys stay those that later queries need.
        """

        def of_layer(layer: LayerSpec) -> LayerSpec:
            rope = layer.attention.rope if layer.attention else None
            if layer.attention is None or rope is None or rope.scaling is None or rope.scaling.kind != "longrope":
                return layer
            scaling = dataclasses.replace(rope.scaling, extended=positions > rope.scaling.original)
            rope = dataclasses.replace(rope, scaling=scaling)
            return dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, rope=rope))

        segments = tuple(dataclasses.replace(s, pattern=tuple(map(of_layer, s.pattern))) for s in self.segments)
        return dataclasses.replace(self, segments=segments)

    def to_json(self) -> dict:
        """A plain-data form that `from_json` reads back to an equal spec. Fields at their defaults are left out, so that a spec keeps its form,
        and its hash, when specs learn to say more."""
        return _plain(self)

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


def _plain(value):
    if dataclasses.is_dataclass(value):
        fields = [f for f in dataclasses.fields(value) if f.default is dataclasses.MISSING or getattr(value, f.name) != f.default]
        return {f.name: _plain(getattr(value, f.name)) for f in fields}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


_NESTED = {
    "precision": Precision,
    "rope": RopeSpec,
    "scaling": RopeScaling,
    "latent": LatentSpec,
    "temperature": Temperature,
    "attention": AttentionSpec,
    "delta": DeltaSpec,
    "router": RouterSpec,
    "group_limit": GroupLimit,
    "experts": ExpertSpec,
    "dense": ExpertSpec,
    "shared": ExpertSpec,
    "segments": Segment,
    "pattern": LayerSpec,
    "extra_heads": LayerSpec,
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


_LONGEST_PATTERN = 8


def segments_of(layers: list[LayerSpec]) -> tuple[Segment, ...]:
    """Groups a list of layers into repeated patterns, from the first on: each time the pattern that repeats over the most layers, the shortest among
    equals; a layer that begins none stands alone.

    So a model of three dense layers followed by fifty sparse ones becomes two segments, and one that alternates windows and full attention becomes
    one.
    """
    out: list[Segment] = []
    at, n = 0, len(layers)
    while at < n:
        best = (1, 1)  # repeats, layers in the pattern
        for period in range(1, _LONGEST_PATTERN + 1):
            repeats = 1
            while at + (repeats + 1) * period <= n and all(layers[at + i] == layers[at + repeats * period + i] for i in range(period)):
                repeats += 1
            if repeats > 1 and repeats * period > best[0] * best[1]:
                best = (repeats, period)
        repeats, period = best
        out.append(Segment(tuple(layers[at : at + period]), repeats, at))
        at += repeats * period
    return tuple(out)
