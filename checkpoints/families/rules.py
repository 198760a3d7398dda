"""How one tensor of a Hugging Face folder and one of our leaves hold the same numbers, as data that reads both ways.

A `Rule` is a template, a `Layout` holds a family's rules, and `pieces_of(spec, layout)` goes from the spec outward: for each canonical leaf, the part
of which Hugging Face tensors fills it. Nothing here touches a file.

Every arrangement is one of these. The tensor is seen as a matrix. Of it, one axis is taken whole; of the other, `stop - start` neighbours of every
`period` (which covers stacking, interleaving and grouping by heads). What is taken, split into axes and with those in another order, is the leaf:

- *copy*: the same order (a norm's `[H*C]` is split into `[H, C]`, an embedding `[V, D]` stays as it is);
- *linear*: torch keeps `y = W x` as `W [out, in]`, ours is `[in, out]`, either side perhaps split into heads.

Leaf paths are dotted: `params.layers.0.attn.q.kernel`, `experts.0.gate`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from checkpoints.errors import CheckpointError
from jaxmoe.spec import Leaf, ModelSpec, abstract_experts, abstract_params
from jaxmoe.spec.types import LayerSpec

Rows = tuple[int, int, int]
"""(start, stop, period): of every `period` neighbours, those from `start` to `stop`."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One leaf's template.

    Args:
        hf: name of the Hugging Face tensor; `{layer}`, `{expert}` and, for extra heads, `{head}` are filled in. An extra head's `{layer}` is
            n_layers + head.
        in_axes: 0 for a copy; n for a linear map whose leaf begins with n input axes.
        matrix: of a copy: how many axes make up the rows of a tensor that is a matrix; the others are its columns. 0: a vector, which all axes split.
        order: of a copy: the leaf's axes in the order in which the tensor has them, if that is another.
        part: (i, n): the tensor stacks n things of this leaf's shape along its rows (columns if `transposed`), and this is the i-th.
        rows: instead of `part`: of every `period` rows of the tensor (columns if `transposed`), those from `start` to `stop` are the leaf's; numbers,
            or a function of the layer that gives them.
        transposed: the tensor of a linear map is `[in, out]`.
        unit_axis: where the tensor has an axis of size 1 that the leaf lacks (counted without the experts' axis).
        experts: the tensor has all experts of a layer, along its first axis.
    """

    hf: str
    in_axes: int = 0
    matrix: int = 0
    order: tuple[int, ...] | None = None
    part: tuple[int, int] = (0, 1)
    rows: Rows | Callable[[LayerSpec], Rows] | None = None
    transposed: bool = False
    unit_axis: int | None = None
    experts: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way in which a family's weights lie on disk.

    Attributes:
        name: kept in manifests.
        top: rules by leaf path, without `params.`, for what is outside the layers.
        layer: rules by leaf path within a layer.
        experts: rules for gate, up and down.
        ignored: patterns of whole names to pass over; `{n_layers}` is filled in.
        extra: rules by leaf path within an extra head, `experts.gate` and so on for its experts. What is missing here under `layer.` and `experts.`
            is as in the model's own layers.
        prefixes: (how names here begin, how they begin on disk): the first pair that fits is exchanged. `ignored` sees names as on disk.
        packed: the quantized form ('mxfp4') that has names or axes of its own, which this layout is for.
    """

    name: str
    top: Mapping[str, Rule]
    layer: Mapping[str, Rule]
    experts: Mapping[str, Rule]
    ignored: tuple[str, ...] = ()
    extra: Mapping[str, Rule] = dataclasses.field(default_factory=dict)
    prefixes: tuple[tuple[str, str], ...] = ()
    packed: str = ""

    def on_disk(self, name: str) -> str:
        """A rule's name as it is in the files."""
        for ours, theirs in self.prefixes:
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name


def moved(rules: Mapping[str, Rule], ours: str, theirs: str, under: str = "") -> dict[str, Rule]:
    """The same rules for tensors whose names begin otherwise, and for leaves below `under`: `moved(LAYER, "model.layers.{layer}.",
    "mtp.layers.{head}.", "layer.")` for an extra head's layer."""
    return {under + path: dataclasses.replace(rule, hf=theirs + rule.hf.removeprefix(ours)) for path, rule in rules.items()}


@dataclasses.dataclass(frozen=True)
class Block:
    """Neighbouring rows of a piece, and where they are: rows `at` of the rows `first` to `stop` of the tensor."""

    rows: slice
    first: int
    stop: int
    at: slice | np.ndarray


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a Hugging Face tensor that fills a leaf, or one expert of it.

    The tensor (`hf_shape`) is seen as a matrix; the piece lies in `height` rows of `width` from row `base` on. Along axis `along` of these it takes
    `take`, along the other one everything: `[rows, cols]`.

    Attributes:
        shape: of the leaf, without the expert axis.
        order: the leaf's axes as the tensor has them; the first `row_axes` of them make up the rows.
    """

    hf: str
    hf_shape: tuple[int, ...]
    shape: tuple[int, ...]
    order: tuple[int, ...]
    row_axes: int
    height: int
    width: int
    take: Rows
    along: int = 0
    base: int = 0
    expert: int | None = None

    @property
    def rows(self) -> int:
        """Rows that are taken."""
        return math.prod(self.shape[axis] for axis in self.order[: self.row_axes])

    @property
    def cols(self) -> int:
        """Columns that are taken."""
        return math.prod(self.shape[axis] for axis in self.order[self.row_axes :])

    @property
    def op(self) -> str:
        """The arrangement in words: 'copy' or 'linear' (the axes in another order), and what is taken if not everything."""
        start, stop, period = self.take
        some = "" if stop - start == period else f", {('rows', 'columns')[self.along]} {start}:{stop} of {period}"
        return ("copy" if self.order == tuple(range(len(self.order))) else "linear") + some

    @property
    def row_axis(self) -> int:
        """The axis of `shape` along which the tensor's rows run."""
        return self.order[0]

    @property
    def rows_per_step(self) -> int:
        """How many rows one step along `row_axis` takes."""
        return self.rows // self.shape[self.row_axis]

    def to_leaf(self, matrix: np.ndarray) -> np.ndarray:
        """Rows `[n, cols]` (all, or whole steps of them) as the leaf has them: `shape` with `n / rows_per_step` at `row_axis`; a view where it can
        be."""
        sizes = [self.shape[axis] for axis in self.order]
        sizes[0] = matrix.shape[0] // self.rows_per_step
        return matrix.reshape(sizes).transpose(np.argsort(self.order))

    def to_hf(self, leaf: np.ndarray) -> np.ndarray:
        """The inverse of `to_leaf`: `[n, cols]`."""
        return leaf.transpose(self.order).reshape(-1, self.cols)

    def view(self, tensor: np.ndarray) -> np.ndarray:
        """The elements of a whole, contiguous tensor that are the piece's, in C order: a view with three axes of what is `[rows, cols]`."""
        start, stop, period = self.take
        matrix = tensor.reshape(-1, self.width)[self.base : self.base + self.height]
        if self.along == 0:
            return matrix.reshape(-1, period, self.width)[:, start:stop]
        return matrix.reshape(self.height, -1, period)[:, :, start:stop]

    def take_columns(self, rows: np.ndarray) -> np.ndarray:
        """Whole rows `[n, width]` as `[n, cols]`."""
        if self.along == 0:
            return rows
        start, stop, period = self.take
        return rows.reshape(len(rows), -1, period)[:, :, start:stop].reshape(len(rows), -1)

    def blocks(self, start: int, stop: int, most: int) -> Iterator[Block]:
        """Rows `start` to `stop` of the piece in blocks, each of which lies within at most `most` (at least 1) rows of the tensor."""
        first, last, period = (0, self.height, self.height) if self.along else self.take
        each = last - first

        def row_of(row: int) -> int:
            return row // each * period + first + row % each

        while start < stop:
            groups = max(1, most // period)
            end = min(stop, (start // each + groups) * each, start + most)
            low, high = row_of(start), row_of(end - 1) + 1
            at: slice | np.ndarray = slice(None)
            if high - low != end - start:
                rows = np.arange(start, end)
                at = rows // each * period + first + rows % each - low
            yield Block(slice(start, end), self.base + low, self.base + high, at)
            start = end


def leaf_paths(spec: ModelSpec) -> dict[str, Leaf]:
    """Every leaf of a checkpoint by its dotted path, in the order in which they are written."""
    out = {f"params.{path}": leaf for path, leaf in flatten(abstract_params(spec)).items()}
    out.update({f"experts.{path}": leaf for path, leaf in flatten(abstract_experts(spec)).items()})
    return out


def leaf_dtype_name(leaf: Leaf) -> str:
    """What a leaf's numbers are: 'float32', or 'bfloat16', which is held as uint16."""
    return "bfloat16" if leaf.dtype == np.uint16 else str(leaf.dtype)


def held_in(spec: ModelSpec, dtype: str) -> ModelSpec:
    """The same model with its weights, and nothing else, in another dtype."""
    return dataclasses.replace(spec, precision=dataclasses.replace(spec.precision, params=dtype))


def pinned_paths(spec: ModelSpec) -> frozenset[str]:
    """The leaves that are float32 even in a bfloat16 model."""
    return frozenset(path for path, leaf in leaf_paths(held_in(spec, "bfloat16")).items() if leaf.dtype == np.float32)


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
    """For each leaf path, what fills it: one piece, or for experts one per expert, in order.

    Raises:
        CheckpointError: the layout has no rule for a leaf of the model, or one that its shape doesn't go with; the message names the leaf.
    """
    layers = (*spec.layers, *spec.extra_heads)
    return {path: _pieces(path, leaf, layout, layers, spec.n_layers) for path, leaf in leaf_paths(spec).items()}


def _pieces(path: str, leaf: Leaf, layout: Layout, layers: tuple[LayerSpec, ...], n_layers: int) -> tuple[Piece, ...]:
    """`layers` holds the extra heads' after the model's own."""
    rule, index = _rule_of(path, layout, n_layers)
    if rule is None:
        raise CheckpointError(f"layout {layout.name!r} has no rule for the leaf {path}")
    layer = None if index is None else layers[index]
    names = {} if index is None else {"layer": index, "head": index - n_layers}
    experts = range(leaf.shape[0]) if path.startswith("experts.") else (None,)
    shape = leaf.shape[1:] if path.startswith("experts.") else leaf.shape
    try:
        return tuple(_piece(rule, layout.on_disk(rule.hf.format(expert=e, **names)), shape, layer, e, leaf.shape[0]) for e in experts)
    except (ValueError, IndexError, AttributeError, KeyError, TypeError, AssertionError) as error:
        raise CheckpointError(f"the rule of layout {layout.name!r} for the leaf {path} {list(leaf.shape)} doesn't go with it: {error}") from error


def _rule_of(path: str, layout: Layout, n_layers: int) -> tuple[Rule | None, int | None]:
    """The rule of a leaf, and the layer it belongs to, if any."""
    kind, *rest = path.split(".")
    if kind == "experts":
        index, name = int(rest[0]), ".".join(rest[1:])
        own = layout.experts.get(name)
        return (own if index < n_layers else layout.extra.get(f"experts.{name}", own)), index
    if rest[0] == "layers":
        return layout.layer.get(".".join(rest[2:])), int(rest[1])
    if rest[0] == "extra":
        name = ".".join(rest[2:])
        own = layout.layer.get(name.removeprefix("layer.")) if name.startswith("layer.") else None
        return layout.extra.get(name, own), n_layers + int(rest[1])
    return layout.top.get(".".join(rest)), None


def _piece(rule: Rule, name: str, shape: tuple[int, ...], layer: LayerSpec | None = None, expert: int | None = None, count: int = 1) -> Piece:
    order, row_axes = _arrangement(rule, len(shape))
    sizes = [shape[axis] for axis in order]
    rows, cols = math.prod(sizes[:row_axes]), math.prod(sizes[row_axes:])
    along = int(rule.transposed)
    take = _take(rule, (rows, cols)[along], layer)
    whole = (rows, cols)[along] // (take[1] - take[0]) * take[2]
    height, width = (rows, whole) if along else (whole, cols)
    hf_shape: tuple[int, ...] = (height,) if row_axes == len(shape) else (height, width)
    if rule.unit_axis is not None:
        hf_shape = (*hf_shape[: rule.unit_axis], 1, *hf_shape[rule.unit_axis :])
    base = 0
    if rule.experts:
        hf_shape, base = (count, *hf_shape), (expert or 0) * height
    return Piece(name, hf_shape, shape, order, row_axes, height, width, take, along, base, expert)


def _arrangement(rule: Rule, axes: int) -> tuple[tuple[int, ...], int]:
    """The leaf's axes as the tensor has them, and how many of them make up its rows."""
    same = tuple(range(axes))
    if not rule.in_axes:
        order = rule.order or same
        if tuple(sorted(order)) != same:
            raise ValueError(f"order {order} of {axes} axes")
        return order, rule.matrix or axes
    if rule.transposed:
        return same, rule.in_axes
    return (*same[rule.in_axes :], *same[: rule.in_axes]), axes - rule.in_axes


def _take(rule: Rule, length: int, layer: LayerSpec | None) -> Rows:
    if rule.rows is None:
        part, parts = rule.part
        return part * length, (part + 1) * length, parts * length
    start, stop, period = rule.rows(layer) if callable(rule.rows) else rule.rows  # type: ignore[arg-type]
    if not 0 <= start < stop <= period or length % (stop - start):
        raise ValueError(f"{length} rows of {start}:{stop} of every {period}")
    return (0, length, length) if stop - start == period else (start, stop, period)


def hf_tensors(spec: ModelSpec, layout: Layout) -> dict[str, tuple[tuple[int, ...], tuple[tuple[str, Piece], ...]]]:
    """The view from the other side: for each Hugging Face tensor its shape, and which leaves (path, piece) make it up. Exporters go by it.

    Raises:
        CheckpointError: as `pieces_of`, or rules that disagree about a tensor's shape.
    """
    parts: dict[str, list[tuple[str, Piece]]] = {}
    for path, pieces in pieces_of(spec, layout).items():
        for piece in pieces:
            parts.setdefault(piece.hf, []).append((path, piece))
    for name, made_of in parts.items():
        shapes = {piece.hf_shape for _, piece in made_of}
        if len(shapes) > 1:
            raise CheckpointError(f"layout {layout.name!r}: {name} would have the shapes {' and '.join(str(list(s)) for s in sorted(shapes))}")
    return {name: (made_of[0][1].hf_shape, tuple(made_of)) for name, made_of in parts.items()}
