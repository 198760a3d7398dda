"""How a family's tensor names and layouts map to ours, as data that reads both ways.

A `Layout` holds name templates. `pieces_of(spec, layout)` goes from the spec outward: for each canonical leaf, the
rows of which Hugging Face tensors fill it. Nothing here touches a file. Two ways of arranging numbers cover what
there is:

- *copy*: the leaf is the tensor with its axes split (a norm's `[H*C]` into `[H, C]`, an embedding `[V, D]` as it is);
- *linear*: torch keeps `y = W x` as `W [out, in]`, ours is `[in, out]`, either side perhaps split into heads.

Leaf paths are dotted: `params.layers.0.attn.q.kernel`, `experts.0.gate`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from jaxmoe.spec import Leaf, ModelSpec, abstract_experts, abstract_params


@dataclasses.dataclass(frozen=True)
class Rule:
    """One leaf's template.

    Args:
        hf: name of the Hugging Face tensor; `{layer}` and `{expert}` are filled in.
        in_axes: 0 for a copy; n for a linear map whose leaf begins with n input axes.
        matrix: a copied leaf is a matrix on disk as well; otherwise a vector, which the leaf's axes split.
        part: (i, n): the tensor stacks n things of this leaf's shape along its rows, and this is the i-th (gate and
            up in one tensor).
        experts: the tensor has all experts of a layer, along its first axis.
    """

    hf: str
    in_axes: int = 0
    matrix: bool = False
    part: tuple[int, int] = (0, 1)
    experts: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way in which a family's weights lie on disk: rules by leaf path (without `params.` and the layer), and
    names to pass over."""

    name: str
    top: Mapping[str, Rule]
    layer: Mapping[str, Rule]
    experts: Mapping[str, Rule]
    ignored: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows of a Hugging Face tensor that fill a leaf, or one expert of it.

    The tensor (`hf_shape`) is seen as a matrix `[rows, cols]` (`cols` = its last axis, or 1 for a vector); the piece
    is `rows` of it from `first` on. `shape` is that of the leaf, without the expert axis.
    """

    hf: str
    hf_shape: tuple[int, ...]
    first: int
    rows: int
    cols: int
    shape: tuple[int, ...]
    in_axes: int
    expert: int | None = None

    @property
    def op(self) -> str:
        """Name of the arrangement, a key of `OPS`."""
        return "linear" if self.in_axes else "copy"

    @property
    def row_axis(self) -> int:
        """The axis of `shape` along which the tensor's rows run."""
        return self.in_axes

    @property
    def rows_per_step(self) -> int:
        """How many of the tensor's rows one step along `row_axis` takes."""
        return self.rows // self.shape[self.row_axis]

    def to_leaf(self, matrix: np.ndarray) -> np.ndarray:
        """Rows `[n, cols]` (all, or whole steps of them) as the leaf has them: `shape` with `n / rows_per_step` at
        `row_axis`; a view where it can be."""
        return OPS[self.op][0](self, matrix)

    def to_hf(self, leaf: np.ndarray) -> np.ndarray:
        """The inverse of `to_leaf`: `[n, cols]`."""
        return OPS[self.op][1](self, leaf)


def _split(piece: Piece, n: int) -> tuple[int, ...]:
    shape = list(piece.shape)
    shape[piece.row_axis] = n // piece.rows_per_step
    return tuple(shape)


OPS: dict[str, tuple[Callable, Callable]] = {
    "copy": (
        lambda piece, matrix: matrix.reshape(_split(piece, matrix.shape[0])),
        lambda piece, leaf: leaf.reshape(-1, piece.cols),
    ),
    "linear": (
        lambda piece, matrix: matrix.T.reshape(_split(piece, matrix.shape[0])),
        lambda piece, leaf: leaf.reshape(piece.cols, -1).T,
    ),
}
"""Each arrangement and its inverse."""


def leaf_paths(spec: ModelSpec) -> dict[str, Leaf]:
    """Every leaf of a checkpoint by its dotted path, in the order in which they are written."""
    out = {f"params.{path}": leaf for path, leaf in flatten(abstract_params(spec)).items()}
    out.update({f"experts.{path}": leaf for path, leaf in flatten(abstract_experts(spec)).items()})
    return out


def flatten(tree: Mapping, prefix: str = "") -> dict:
    """A nested dict as `{dotted path: leaf}`."""
    out: dict = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        out.update(flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value})
    return out


def unflatten(leaves: Mapping) -> dict:
    """The inverse of `flatten`."""
    out: dict = {}
    for path, value in leaves.items():
        *parents, last = path.split(".")
        node = out
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return out


def pieces_of(spec: ModelSpec, layout: Layout) -> dict[str, tuple[Piece, ...]]:
    """For each leaf path, what fills it: one piece, or for experts one per expert, in order."""
    return {path: _pieces(path, leaf, layout) for path, leaf in leaf_paths(spec).items()}


def _pieces(path: str, leaf: Leaf, layout: Layout) -> tuple[Piece, ...]:
    kind, *rest = path.split(".")
    if kind == "experts":
        layer, name = rest
        rule, shape, count = layout.experts[name], leaf.shape[1:], leaf.shape[0]
        return tuple(_piece(rule, shape, int(layer), e, count) for e in range(count))
    if rest[0] == "layers":
        return (_piece(layout.layer[".".join(rest[2:])], leaf.shape, int(rest[1])),)
    return (_piece(layout.top[".".join(rest)], leaf.shape),)


def _piece(rule: Rule, shape: tuple[int, ...], layer: int = 0, expert: int | None = None, count: int = 1) -> Piece:
    name = rule.hf.format(layer=layer, expert=expert)
    part, parts = rule.part
    inputs = shape[: rule.in_axes] if rule.in_axes else shape[1:] if rule.matrix else ()
    cols = math.prod(inputs)
    rows = math.prod(shape) // cols
    hf_shape = (parts * rows, cols) if inputs else (parts * rows,)
    first = part * rows
    if rule.experts:
        first += (expert or 0) * parts * rows
        hf_shape = (count, *hf_shape)
    return Piece(name, hf_shape, first, rows, cols, shape, rule.in_axes, expert)


def hf_tensors(spec: ModelSpec, layout: Layout) -> dict[str, tuple[tuple[int, ...], tuple[tuple[str, Piece], ...]]]:
    """The view from the other side: for each Hugging Face tensor its shape, and which leaves (path, piece) make it
    up. Exporters go by it."""
    out: dict[str, tuple[tuple[int, ...], tuple[tuple[str, Piece], ...]]] = {}
    for path, pieces in pieces_of(spec, layout).items():
        for piece in pieces:
            before = out.get(piece.hf, (piece.hf_shape, ()))[1]
            out[piece.hf] = (piece.hf_shape, (*before, (path, piece)))
    return out


TOP = {
    "embed.table": Rule("model.embed_tokens.weight", matrix=True),
    "final_norm.scale": Rule("model.norm.weight"),
    "lm_head.kernel": Rule("lm_head.weight", in_axes=1),
}
"""What is outside the layers; the same for every family so far."""

_L = "model.layers.{layer}."

ATTENTION = {
    "norm_attn.scale": Rule(_L + "input_layernorm.weight"),
    "norm_mlp.scale": Rule(_L + "post_attention_layernorm.weight"),
    "attn.q.kernel": Rule(_L + "self_attn.q_proj.weight", in_axes=1),
    "attn.k.kernel": Rule(_L + "self_attn.k_proj.weight", in_axes=1),
    "attn.v.kernel": Rule(_L + "self_attn.v_proj.weight", in_axes=1),
    "attn.o.kernel": Rule(_L + "self_attn.o_proj.weight", in_axes=2),
    "attn.q.bias": Rule(_L + "self_attn.q_proj.bias"),
    "attn.k.bias": Rule(_L + "self_attn.k_proj.bias"),
    "attn.v.bias": Rule(_L + "self_attn.v_proj.bias"),
    "attn.o.bias": Rule(_L + "self_attn.o_proj.bias"),
    "attn.q_norm.scale": Rule(_L + "self_attn.q_norm.weight"),
    "attn.k_norm.scale": Rule(_L + "self_attn.k_norm.weight"),
}
"""Norms and grouped-query attention, as Llama named them."""

MLP = {
    "router.kernel": Rule(_L + "mlp.gate.weight", in_axes=1),
    "mlp.gate.kernel": Rule(_L + "mlp.gate_proj.weight", in_axes=1),
    "mlp.up.kernel": Rule(_L + "mlp.up_proj.weight", in_axes=1),
    "mlp.down.kernel": Rule(_L + "mlp.down_proj.weight", in_axes=1),
}
"""Router and dense feed-forward layers, as Qwen named them."""

EXPERTS = {
    "gate": Rule(_L + "mlp.experts.{expert}.gate_proj.weight", in_axes=1),
    "up": Rule(_L + "mlp.experts.{expert}.up_proj.weight", in_axes=1),
    "down": Rule(_L + "mlp.experts.{expert}.down_proj.weight", in_axes=1),
}
"""One tensor per expert and matrix, as Qwen named them."""

FUSED_EXPERTS = {
    "gate": Rule(_L + "mlp.experts.gate_up_proj", in_axes=1, part=(0, 2), experts=True),
    "up": Rule(_L + "mlp.experts.gate_up_proj", in_axes=1, part=(1, 2), experts=True),
    "down": Rule(_L + "mlp.experts.down_proj", in_axes=1, experts=True),
}
"""All experts of a layer in `[E, 2F, D]` and `[E, D, F]`: transformers 5's modules, saved by
`save_pretrained(save_original_format=False)`."""

IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
"""Buffers that older conversions saved and nothing needs: the positions' frequencies follow from the config."""
