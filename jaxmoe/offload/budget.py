"""How much device memory the routed experts get: what a budget buys in slots, what the rest of the model adds, and what speed the link then allows.

Plain integers and floats: no arrays on a device, no checkpoint, no engine. What a device has free, curves of hits and the function that shares out
slots by them come in as arguments. GB is 10^9 bytes and GiB 2^30 everywhere; link and memory speeds are in 10^9 bytes per second.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from jaxmoe.formats import leaf_dtype
from jaxmoe.offload.bounds import iid_distinct
from jaxmoe.spec import ModelSpec, abstract_params

UNITS = {"b": 1} | {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)} | {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}
Allocate = Callable[[np.ndarray, int, int], Sequence[int]]
"""`(curves_LC, total, minimum) -> slots [L]`: `total` slots shared out over layers of at least `minimum` each."""


class BudgetError(ValueError):
    """A budget that the experts can't run in; the message says how many bytes it is and how many are needed."""


# --- What was asked for


@dataclasses.dataclass(frozen=True)
class Amount:
    """A budget as given: `bytes` where `kind` is 'bytes', `share` (0 to 1) of the bytes of all routed experts where it is 'share', else 'auto'."""

    kind: Literal["bytes", "share", "auto"]
    bytes: int = 0
    share: Fraction = Fraction(0)

    def resolve(self, all_bytes: int, free_bytes: int | None) -> int:
        """The budget in bytes.

        Args:
            all_bytes: of all routed experts.
            free_bytes: what the device has left for experts, or None where nobody knows, which 'auto' takes for enough.
        """
        if self.kind == "bytes":
            return self.bytes
        if self.kind == "share":
            return math.floor(self.share * all_bytes)
        return all_bytes if free_bytes is None else min(free_bytes, all_bytes)


def parse_memory(text: str) -> Amount:
    """Reads '4GB' (10^9 bytes), '4GiB' (2^30), '512MB', '0.5 GB', '25%' or 'auto', in capitals or not.

    Raises:
        ValueError: none of these, nothing, or more than 100 %; the text is in the message.
    """
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(%|[a-z]+)", text.strip().lower(), re.ASCII)
    if text.strip().lower() == "auto":
        return Amount("auto")
    if found is None or found[2] not in UNITS | {"%": 0}:
        raise ValueError(f"{text!r} is not an amount of memory: write it like 4GB, 512MiB, 25% (of all experts) or auto")
    number = Fraction(found[1])
    if number == 0 or (found[2] == "%" and number > 100) or number * UNITS.get(found[2], 1) < 1:
        raise ValueError(f"{text!r} is no amount of memory to give: it has to be more than nothing, and at most 100%")
    if found[2] == "%":
        return Amount("share", share=number / 100)
    return Amount("bytes", bytes=math.floor(number * UNITS[found[2]]))


def format_bytes(count: int) -> str:
    """A number of bytes as '3.25 GB', '512 MB' or '17 kB', to three digits."""
    size, unit = next(((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= s), (1, "bytes"))
    value = count / size
    return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {unit}" if size > 1 else f"{count} bytes"


# --- What there is to hold


@dataclasses.dataclass(frozen=True)
class ExpertShapes:
    """What a model weighs, as far as a budget needs it.

    Attributes:
        name: for messages.
        layers, experts, active: L layers that have experts, E experts in each, A of them active per token.
        expert_bytes: [L], bytes of one expert of each layer.
        dense_bytes: of all parameters but the routed experts.
        kv_bytes_per_token: keys and values of all layers, as if none had a window.
        lookup_bytes: the part of `dense_bytes` of which a step only looks up rows: the embedding, unless it is also the output matrix.
    """

    name: str
    layers: int
    experts: int
    active: int
    expert_bytes: tuple[int, ...]
    dense_bytes: int
    kv_bytes_per_token: int
    lookup_bytes: int = 0

    def __post_init__(self) -> None:
        if len(self.expert_bytes) != self.layers or not 1 <= self.active <= self.experts or min(self.expert_bytes, default=0) < 1:
            sizes = f"expert sizes {self.expert_bytes}"
            raise ValueError(f"{self.name}: {self.layers} layers, {self.active} of {self.experts} experts and {sizes} don't belong together")

    @property
    def all_bytes(self) -> int:
        """Bytes of all routed experts."""
        return self.experts * sum(self.expert_bytes)

    @staticmethod
    def from_spec(spec: ModelSpec, name: str | None = None) -> ExpertShapes:
        """The shapes of a model in its own `precision`; experts as they lie on the device, everything else from the leaves of `abstract_params`.

        Raises:
            SpecError: the model has no sparse layers, or several kinds of them.
        """
        router, _ = spec.moe
        params = {name: tree for name, tree in abstract_params(spec).items() if name != "extra"}  # heads for drafting are not loaded
        return ExpertShapes(
            name=name or spec.family, layers=len(spec.moe_layers), experts=router.experts, active=router.active, expert_bytes=spec.expert_bytes(),
            dense_bytes=_leaf_bytes(params), kv_bytes_per_token=spec.kept_per_token * leaf_dtype(spec.precision.kv).itemsize,
            lookup_bytes=0 if spec.tied else _leaf_bytes(params["embed"]),
        )  # fmt: skip


def _leaf_bytes(tree: Any) -> int:
    return sum(_leaf_bytes(branch) for branch in tree.values()) if isinstance(tree, dict) else tree.nbytes


# --- What a budget buys


@dataclasses.dataclass(frozen=True)
class BudgetPlan:
    """Where the budget goes.

    Attributes:
        slots: [L], experts that each layer holds on the device.
        staging: further slots of the largest expert's size that all layers share; 0 where all experts are resident.
        experts: E.
        expert_bytes: [L], bytes of one expert.
        device_bytes: of slots and staging.
        resident_bytes: of all routed experts, which the plan is to be compared with.
        budget_bytes: what was given; `unused_bytes` of it are left over.
    """

    slots: tuple[int, ...]
    staging: int
    experts: int
    expert_bytes: tuple[int, ...]
    device_bytes: int
    resident_bytes: int
    budget_bytes: int

    @property
    def unused_bytes(self) -> int:
        """Bytes of the budget that no slot takes."""
        return self.budget_bytes - self.device_bytes

    @property
    def all_resident(self) -> bool:
        """Whether every expert has a slot, so that nothing is streamed."""
        return min(self.slots) == self.experts

    @property
    def pool_slots(self) -> int:
        """Slots in all, with staging (Z)."""
        return sum(self.slots) + self.staging


def minimum_bytes(shapes: ExpertShapes, staging: int = 2) -> int:
    """The smallest budget: as many slots in each layer as a token has active experts, and staging; less where all experts are resident for less."""
    return min(shapes.active * sum(shapes.expert_bytes) + staging * max(shapes.expert_bytes), shapes.all_bytes)


def solve(
    shapes: ExpertShapes,
    amount: Amount,
    staging: int = 2,
    free_bytes: int | None = None,
    curves_LC: np.ndarray | None = None,
    allocate: Allocate | None = None,
    bypass: bool = False,
) -> BudgetPlan:
    """Turns a budget into slots: equally many in every layer as far as that goes, or shared out by how many hits each further slot brings.

    Args:
        shapes: the model.
        amount: device memory for routed experts, slots and staging together.
        staging: slots for experts that pass through, as most of a prompt's do; they count against the budget.
        free_bytes: what the device has left for experts after everything else, or None.
        curves_LC: hits by layer and number of slots, from a trace, for `allocate`; None gives every layer the same number of slots.
        allocate: shares the slots out; needed with `curves_LC`.
        bypass: the policy may turn away experts that a token needs, as 'static' does; staging is then raised to A, for all of a token's experts.

    Raises:
        BudgetError: less than `minimum_bytes`, or more than the device has free; the message has both numbers.
        ValueError: `staging` is not positive, `curves_LC` comes without `allocate`, or `allocate` gives slots that no layer can have.
    """
    if staging < 1:
        raise ValueError(f"staging = {staging} slots: a prompt that asks for more experts than a layer has slots needs at least 1")
    staging = max(staging, shapes.active) if bypass else staging
    given = amount.resolve(shapes.all_bytes, free_bytes)
    _check_minimum(shapes, given, staging)
    if given >= shapes.all_bytes:
        slots, used_staging = (shapes.experts,) * shapes.layers, 0
    else:
        rest, used_staging = given - staging * max(shapes.expert_bytes), staging
        slots = _uniform(shapes, rest) if curves_LC is None else _allocated(shapes, rest, curves_LC, allocate)
    device_bytes = _cost(shapes, slots) + used_staging * max(shapes.expert_bytes)
    if free_bytes is not None and device_bytes > free_bytes:
        _check_minimum(shapes, free_bytes, staging)
        raise BudgetError(
            f"{shapes.name}: {device_bytes:,} bytes of experts asked for ({_percent(device_bytes, shapes, math.floor)} of all), and the device has "
            f"{free_bytes:,} free for them: give at most {_percent(free_bytes, shapes, math.floor)}, or auto"
        )
    return BudgetPlan(slots, used_staging, shapes.experts, shapes.expert_bytes, device_bytes, shapes.all_bytes, given)


def _check_minimum(shapes: ExpertShapes, given: int, staging: int) -> None:
    need = minimum_bytes(shapes, staging)
    if given < need:
        why = "all experts" if need == shapes.all_bytes else f"{shapes.active} slots in each of {shapes.layers} layers and {staging} for staging"
        raise BudgetError(
            f"{shapes.name}: {max(given, 0):,} bytes ({_percent(given, shapes, math.floor)} of all experts) are too few for experts: "
            f"the minimum is {need:,} bytes ({_percent(need, shapes, math.ceil)}), for {why}"
        )


def _percent(count: int, shapes: ExpertShapes, rounded: Callable[[Fraction], int]) -> str:
    """Rounded to hundredths in the direction that keeps the number true as a budget."""
    return f"{rounded(Fraction(max(count, 0) * 10000, shapes.all_bytes)) / 100:.2f}%"


def _cost(shapes: ExpertShapes, slots: Sequence[int]) -> int:
    return sum(n * size for n, size in zip(slots, shapes.expert_bytes, strict=True))


def _uniform(shapes: ExpertShapes, rest: int) -> tuple[int, ...]:
    """Equally many, and one more for as many of the first layers as what is left over pays for: on traces they are the ones that hit least."""
    slots = [rest // sum(shapes.expert_bytes)] * shapes.layers
    left = rest - _cost(shapes, slots)
    for layer, size in enumerate(shapes.expert_bytes):
        if size > left or slots[layer] == shapes.experts:
            break
        slots[layer], left = slots[layer] + 1, left - size
    return tuple(slots)


def _allocated(shapes: ExpertShapes, rest: int, curves_LC: np.ndarray, allocate: Allocate | None) -> tuple[int, ...]:
    """The largest number of slots, shared out by `allocate`, whose bytes fit: `allocate` counts slots, and layers' experts may differ in size."""
    if allocate is None:
        raise ValueError("curves of hits came without a function that allocates slots by them")

    def tried(total: int) -> tuple[int, ...]:
        slots = tuple(int(n) for n in allocate(curves_LC, total, shapes.active))
        if len(slots) != shapes.layers or min(slots) < shapes.active or max(slots) > shapes.experts or sum(slots) > total:
            raise ValueError(f"allocating {total} slots to {shapes.layers} layers of {shapes.active} to {shapes.experts} gave {slots}")
        return slots

    low, high = shapes.layers * shapes.active, min(shapes.layers * shapes.experts, rest // min(shapes.expert_bytes))
    best = tried(high)
    if _cost(shapes, best) <= rest:
        return best
    while low < high - 1:  # `high` is known not to fit, `low` to fit
        middle = (low + high) // 2
        low, high = (middle, high) if _cost(shapes, tried(middle)) <= rest else (low, middle)
    return tried(low)


# --- What it will cost in speed


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Ceilings of decoding, of arithmetic and not of measurement.

    Attributes:
        tokens: rows in a step.
        hit_rate: of expert requests, weighted by bytes.
        even_routing: whether `hit_rate` is that of routing that has no favourites, slots / E, because none was given.
        link_bytes: that cross the link in a step.
        memory_bytes: that a step reads from device memory: parameters, experts, keys and values.
        link_seconds: of a step at the link's speed; 0 where that is not known.
        memory_seconds: of a step at the memory's speed; 0 where that is not known.
    """

    tokens: int
    hit_rate: float
    even_routing: bool
    link_bytes: float
    memory_bytes: float
    link_seconds: float
    memory_seconds: float

    @property
    def link_bytes_per_token(self) -> float:
        """Bytes over the link for each token."""
        return self.link_bytes / self.tokens

    @property
    def overlapped(self) -> float:
        """Tokens per second if link and memory work at the same time; infinite where neither limits."""
        return _rate(self.tokens, max(self.link_seconds, self.memory_seconds))

    @property
    def serial(self) -> float:
        """Tokens per second if they take turns."""
        return _rate(self.tokens, self.link_seconds + self.memory_seconds)


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else math.inf


def predict(
    plan: BudgetPlan,
    shapes: ExpertShapes,
    hit_rate: float | Sequence[float] | None,
    link_gbps: float | None,
    memory_gbps: float | None = None,
    tokens: int = 1,
    context: int = 0,
) -> Prediction:
    """The decoding speed that a plan cannot exceed at a given hit rate.

    Args:
        plan: of `solve`.
        shapes: the model it was made for.
        hit_rate: share of expert requests, distinct per layer and step, that find their expert on the device; one number, or one a layer. None takes
            slots / E, what any policy gets from even routing.
        link_gbps: of the link from host to device, in 10^9 bytes per second, as measured on copies of an expert's size; None leaves it out of the
            ceilings, as does no `memory_gbps`.
        memory_gbps: of the device's memory.
        tokens: rows in a step. Each is taken to choose its experts evenly and on its own (`iid_distinct`); rows of text ask for fewer.
        context: tokens of keys and values that each row reads.

    Raises:
        ValueError: a hit rate outside of 0 to 1, or a speed or number of tokens that isn't positive.
    """
    valid = (link_gbps is None or link_gbps > 0) and (memory_gbps is None or memory_gbps > 0) and tokens >= 1 and context >= 0
    hits = np.broadcast_to([n / plan.experts for n in plan.slots] if hit_rate is None or plan.all_resident else hit_rate, shapes.layers)
    if not (valid and ((hits >= 0) & (hits <= 1)).all()):
        speeds = f"link {link_gbps} GB/s, memory {memory_gbps} GB/s"
        raise ValueError(f"no prediction for hit rate {hit_rate}, {speeds}, {tokens} tokens in a step, {context} of context")
    sizes = np.array(shapes.expert_bytes, np.float64) * iid_distinct(shapes.experts, shapes.active, tokens)
    link = float(np.sum(sizes * (1 - hits)))
    memory = shapes.dense_bytes - shapes.lookup_bytes + float(np.sum(sizes)) + tokens * context * shapes.kv_bytes_per_token
    return Prediction(
        tokens=tokens, hit_rate=1 - link / float(np.sum(sizes)), even_routing=hit_rate is None, link_bytes=link, memory_bytes=memory,
        link_seconds=0.0 if link_gbps is None else link / link_gbps / 1e9, memory_seconds=0.0 if memory_gbps is None else memory / memory_gbps / 1e9,
    )  # fmt: skip


def total_bytes(plan: BudgetPlan | None, shapes: ExpertShapes, context: int, rows: int = 1) -> int:
    """Device bytes of parameters, experts, keys and values; of the resident model where `plan` is None. Activations and temporaries come on top."""
    experts = shapes.all_bytes if plan is None else plan.device_bytes
    return shapes.dense_bytes + experts + rows * context * shapes.kv_bytes_per_token


def describe(plan: BudgetPlan, shapes: ExpertShapes, context: int = 4096, prediction: Prediction | None = None, rows: int = 1) -> str:
    """One line about memory, and one about speed if there is a prediction and something to stream."""
    if plan.all_resident:
        return f"{shapes.name}: all {plan.experts} experts of {shapes.layers} layers on the device, {format_bytes(plan.device_bytes)}"
    slots = str(min(plan.slots)) if min(plan.slots) == max(plan.slots) else f"{min(plan.slots)} to {max(plan.slots)}"
    total, resident = (total_bytes(p, shapes, context, rows) for p in (plan, None))
    lines = [
        f"{shapes.name}: {slots} of {plan.experts} experts in each of {shapes.layers} layers and {plan.staging} in staging, "
        f"{format_bytes(plan.device_bytes)} of {format_bytes(plan.resident_bytes)} ({format_bytes(plan.unused_bytes)} of the budget unused); "
        f"{format_bytes(total)} with the other weights and {rows * context:,} tokens of KV, {100 * (1 - total / resident):.0f} % less than resident"
    ]
    if prediction is not None:
        source = " (even routing)" if prediction.even_routing else ""
        ceiling = f"at most {prediction.overlapped:,.1f} tok/s"
        if prediction.memory_seconds:
            ceiling += f" with link and memory overlapped, {prediction.serial:,.1f} one after the other"
        link = format_bytes(round(prediction.link_bytes_per_token))
        text = f"at {100 * prediction.hit_rate:.0f} % hits{source} {link} a token cross the link"
        lines.append(f"{text}: {ceiling}" if prediction.link_seconds else text)
    return "\n".join(lines)
