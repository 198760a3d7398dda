"""Super experts: the few whose outputs are so large that they make the model's massive activations, and the file that names them for pinning.

Pruning or coarsely quantizing one of them ruins a model (arXiv 2507.23279); here they are experts that had better not leave the device. Nothing here
runs a model: `jaxmoe.engine.measuring` does.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from jaxmoe.offload.trace import Trace, model_hash
from jaxmoe.residency import Shape, find_policy
from jaxmoe.spec import ModelSpec
from sharding.placement.rows import read_hash, read_object, whole

FORMAT = "jaxmoe-pinned-experts"
VERSION = 1
_WHAT = "file of pinned experts"


@dataclasses.dataclass(frozen=True)
class Criterion:
    """What makes an expert a super expert. Source: arXiv 2507.23279, its definition; `layers` as REAP (arXiv 2510.13999) has it.

    The largest of all experts always meets it, unless others equal it: how far it is above the median says whether it is out of the ordinary.

    Attributes:
        quantile: its largest output is above this quantile of all experts',
        share: and above this share of the largest of all.
        layers: only the first so large a share of the layers that have experts is looked at; quantile and largest are those of all layers.

    Raises:
        ValueError: a number outside of 0 to 1.
    """

    quantile: float = 0.995
    share: float = 0.1
    layers: float = 1.0

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value <= 1 or (name == "layers" and value == 0):
                raise ValueError(f"{name} = {value} of super experts: give {'more than 0 and at most 1' if name == 'layers' else '0 to 1'}")

    def threshold(self, max_abs_LE: Float[np.ndarray, "L E"]) -> float:
        """What a super expert's largest output is above."""
        values = np.asarray(max_abs_LE, np.float64)
        return float(max(np.quantile(values, self.quantile), self.share * values.max()))


def super_experts(max_abs_LE: Float[np.ndarray, "L E"], criterion: Criterion = Criterion()) -> Bool[np.ndarray, "L E"]:
    """Which experts are super experts.

    Args:
        max_abs_LE: the largest |output| of each expert's down projection over all tokens, before the router's weight (where that scales the
            experts' input, as in Llama 4, after it); 0 of one that no token had.
            Absolute, for an outlier may be negative.
        criterion: what makes one.

    Raises:
        ValueError: numbers that are no largest absolute values, or that are all 0, or a share of the layers that is none of them.
    """
    values = np.asarray(max_abs_LE, np.float64)
    wrong = np.argwhere(~(np.isfinite(values) & (values >= 0)))
    if len(wrong):
        layer, expert = wrong[0]
        raise ValueError(f"layer {layer}: expert {expert} has {values[layer, expert]} as its largest |output|, which is no such number")
    if not values.any():
        raise ValueError("no expert has given anything: there is nothing to tell super experts by")
    first = math.floor(len(values) * criterion.layers + 1e-9)  # 0.58 of 50 are 29, if not in binary
    if not first:
        raise ValueError(f"layers = {criterion.layers} of {len(values)} layers is none: give at least {math.ceil(1000 / len(values)) / 1000}")
    found = values > criterion.threshold(values)
    found[first:] = False
    return found


def times_median(max_abs_LE: Float[np.ndarray, "L E"]) -> Float[np.ndarray, "L E"]:
    """Each expert's largest |output| over the median of those that any token had."""
    values = np.asarray(max_abs_LE, np.float64)
    return values / np.median(values[values > 0])


@dataclasses.dataclass(frozen=True)
class PinnedExperts:
    """Experts to be pinned, by their layer's place among the layers that have experts.

    Attributes:
        model: what the model is called.
        spec_hash: of it (`jaxmoe.offload.trace.model_hash`); None if not known.
        layers, experts: its layers that have experts, and the experts of each.
        pinned: `(layer, expert, largest |output|)` of each.
        criterion: how they were found; plain JSON values.

    Raises:
        ValueError: an expert that there is not, or one that stands there twice; names it.
    """

    model: str
    spec_hash: str | None
    layers: int
    experts: int
    pinned: tuple[tuple[int, int, float], ...]
    criterion: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for layer, expert, _ in self.pinned:
            if not (0 <= layer < self.layers and 0 <= expert < self.experts):
                raise ValueError(f"there is no expert {expert} of layer {layer}: there are {self.layers} layers of {self.experts} experts")
        if len({row[:2] for row in self.pinned}) < len(self.pinned):
            places = [row[:2] for row in self.pinned]
            layer, expert = next(place for place in places if places.count(place) > 1)
            raise ValueError(f"expert {expert} of layer {layer} is pinned twice")

    @property
    def mask(self) -> Bool[np.ndarray, "L E"]:
        """`Knowledge.pinned`."""
        out = np.zeros((self.layers, self.experts), bool)
        for layer, expert, _ in self.pinned:
            out[layer, expert] = True
        return out

    def check_model(self, spec: ModelSpec) -> None:
        """Refuses another model.

        Raises:
            ValueError: it is another one; both are named.
        """
        self._check(spec.family, len(spec.moe_layers), spec.moe[0].experts, model_hash(spec))

    def check_trace(self, trace: Trace) -> None:
        """Refuses a trace of another model; one whose hash isn't known is compared by its sizes. Raises: ValueError, see `check_model`."""
        self._check(trace.meta["model"], trace.layers, trace.experts, trace.meta["spec_hash"])

    def _check(self, model: str, layers: int, experts: int, spec_hash: str | None) -> None:
        known = None not in (self.spec_hash, spec_hash)
        if (layers, experts) == (self.layers, self.experts) and not (known and self.spec_hash != spec_hash):
            return
        raise ValueError(
            f"pins experts of {self.model} ({self.layers} layers of {self.experts} experts, spec {self.spec_hash or 'not known'}), "
            f"the model is {model} ({layers} layers of {experts} experts, spec {spec_hash or 'not known'})"
        )

    def to_json(self) -> str:
        """A small file's text, a line an expert; `from_json` reads it."""
        head = {
            "format": FORMAT, "version": VERSION, "model": self.model, "spec_hash": self.spec_hash, "layers": self.layers,
            "experts_a_layer": self.experts, "criterion": dict(self.criterion),
        }  # fmt: skip
        fields = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
        rows = ",".join(f"\n  {json.dumps(row)}" for row in self.pinned)
        return "{\n" + ",\n".join([*fields, f' "experts": [{rows}\n ]']) + "\n}\n"

    @staticmethod
    def from_json(text: str) -> PinnedExperts:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: it is something else, or damaged; names the field.
        """
        found = read_object(text, FORMAT, VERSION, _WHAT)
        layers, experts = (whole(found, name, _WHAT) for name in ("layers", "experts_a_layer"))
        rows, criterion = found.get("experts"), found.get("criterion", {})
        if not isinstance(found.get("model"), str) or not isinstance(criterion, dict):
            raise ValueError(f"not a {_WHAT}: its model and its criterion are {found.get('model')!r} and {criterion!r}, not a text and an object")
        if not isinstance(rows, list):
            raise ValueError(f"not a {_WHAT}: its experts are {rows!r}, not a list")
        return PinnedExperts(found["model"], read_hash(found, _WHAT), layers, experts, tuple(map(_read_row, rows)), criterion)


def _read_row(row: Any) -> tuple[int, int, float]:
    def number(value: Any, kinds: tuple[type, ...]) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool)

    if not (isinstance(row, list) and len(row) == 3 and all(number(n, (int,)) for n in row[:2]) and number(row[2], (int, float))):
        raise ValueError(f"experts: {row!r} is not layer, expert and largest |output|")
    if not (math.isfinite(row[2]) and row[2] >= 0):
        raise ValueError(f"experts: {row[2]!r} of expert {row[1]} of layer {row[0]} is no largest |output|")
    return row[0], row[1], float(row[2])


def pinned_experts(
    spec: ModelSpec, model: str, max_abs_LE: Float[np.ndarray, "L E"], criterion: Criterion = Criterion(), **more: Any
) -> PinnedExperts:
    """A model's super experts, the largest first.

    Args:
        spec: the model.
        model: a name for people.
        max_abs_LE, criterion: see `super_experts`.
        more: what else is to be said of how they were found; plain JSON values.
    """
    found = np.argwhere(super_experts(max_abs_LE, criterion)).tolist()
    rows = sorted(((layer, expert, float(max_abs_LE[layer, expert])) for layer, expert in found), key=lambda row: -row[2])
    about = dataclasses.asdict(criterion) | {"threshold": criterion.threshold(max_abs_LE)} | more
    layers, experts = max_abs_LE.shape
    return PinnedExperts(model, model_hash(spec), layers, experts, tuple(rows), about)


def load(path: str | Path) -> PinnedExperts:
    """Reads a file of pinned experts.

    Raises:
        OSError: it can't be read.
        ValueError: it is none, or damaged; the message begins with the path.
    """
    raw = Path(path).read_bytes()
    try:
        return PinnedExperts.from_json(raw.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def read_mask(path: str | Path, check: Callable[[PinnedExperts], None]) -> Bool[np.ndarray, "L E"] | None:
    """Which experts a file pins, if it passes a check; None if it pins none. Raises OSError and ValueError, which names the file."""
    read = load(path)
    try:
        check(read)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return read.mask if read.pinned else None


def read_pinned(path: str | Path, spec: ModelSpec, policy: str, slots: Sequence[int] | None) -> Bool[np.ndarray, "L E"] | None:
    """Which experts a file pins, for a policy that has so many slots a layer.

    Args:
        path: of the file.
        spec: the model.
        policy: a name of `jaxmoe.residency.POLICIES`.
        slots: of each layer; None where all experts are on the device anyway, or it is not known yet.

    Returns:
        The mask; None if none is pinned.

    Raises:
        OSError, ValueError: as `load`; another model's, a policy that can't pin, or more experts than there are slots.
    """

    def check(read: PinnedExperts) -> None:
        read.check_model(spec)
        if policy == "opt":
            raise ValueError("pins experts, and the policy opt is the bound of what a policy can do without: choose another one")
        if slots is not None:
            find_policy(policy).check_pinned(Shape(read.layers, read.experts, tuple(slots)), read.mask)

    return read_mask(path, check)
