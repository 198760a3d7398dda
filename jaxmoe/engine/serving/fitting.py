"""Shares one budget out among experts and pages of keys and values, and says what that brings.

What is needed to run at all comes first: `active` slots in each layer (or all experts, if that is less), staging, and the pages of one sequence of
the longest length. What is left goes where it saves more time: a slot spares a share of the bytes that cross the link, a sequence's pages let one
more sequence share a step, and not wait. Both are in one number, seconds a token of decoding (`budget.predict`, link and memory one after the
other, as many rows as sequences of the expected length fit); as there are few numbers of slots, each is tried with the pages that it leaves. Of equal
times the one with more pages is taken. That is the marginal rule (the next byte to whichever gains more by it) without its local optima.

What is monotone: with more bytes the seconds a token never rise; with the slots given, pages never fall, and with the pages given, slots never do.
Slots and pages that are both free may trade places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Num

from jaxmoe.engine.serving.memory import MemoryTable, ServeMemory, Sizes, TooSmall, in_bytes, weigh
from jaxmoe.engine.serving.types import ServeSpec
from jaxmoe.experts.host_store import record_bytes
from jaxmoe.offload import bounds, budget
from jaxmoe.offload.budget import Amount, BudgetError, BudgetPlan, ExpertShapes, Prediction, format_bytes, parse_memory
from jaxmoe.residency import find_policy
from jaxmoe.spec import ModelSpec
from pallas_kernels.dispatch import Kernels

LINK_GBPS, MEMORY_GBPS = 25.0, 1500.0
"""Of a link and a device's memory where nobody knows; only their ratio counts, and only for how bytes are shared out."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What a budget comes to.

    Attributes:
        spec: sizes of the engine.
        experts: slots of each layer and staging, or that all are resident.
        table: of the device's memory.
        host: bytes of the host's memory by name: experts that are streamed from it, and pages.
        asked, shapes: what it was made from.
        hits: share of requests that find their expert on the device, by layer, from a trace; None for that of even routing.
    """

    spec: ServeSpec
    experts: BudgetPlan
    table: MemoryTable
    host: dict[str, int]
    asked: ServeMemory
    shapes: ExpertShapes
    hits: tuple[float, ...] | None = None

    @property
    def resident(self) -> bool:
        """Whether all experts are on the device."""
        return self.experts.all_resident

    @property
    def slots(self) -> tuple[int, ...] | None:
        """Expert slots of each layer, for `Offload`; None where all experts are resident."""
        return None if self.resident else self.experts.slots

    @property
    def staging(self) -> int:
        """Slots for experts that pass through."""
        return self.experts.staging


def fit(model: ModelSpec, asked: ServeMemory, kernels: Kernels, free: int | None = None, curves_LC: Num[np.ndarray, "L C"] | None = None) -> Fitted:
    """Turns a budget into pages and slots.

    Args:
        model: in the precision that it is to run in.
        asked: the budget, and what it is for.
        kernels: of the device.
        free: bytes that the device has, weights not loaded yet; what a total of 'auto' is, and the most that any other may be. None where nobody
            knows: 'auto' is then enough.
        curves_LC: hits of each layer by its slots, 0 to E, from a trace (`bounds.marginal_hits`); None for even routing.

    Returns:
        Sizes, slots and the table, whose total is at most the budget.

    Raises:
        TooSmall: nothing runs in the budget; the message has its bytes, the smallest that would do, and the largest items.
        ValueError: sizes that don't go together.
    """
    sizes = weigh(model, asked, kernels)
    total = _total(asked.total, free)
    found = Search(sizes, asked, curves_LC)
    smallest = found.smallest()
    if total is not None and smallest.total > total:
        raise _too_small(total, smallest)
    plan, pages = found.best(total)
    spec = dataclasses.replace(sizes.spec, pages=pages)
    host = {} if plan.all_resident else {"experts": found.shapes.layers * found.shapes.experts * record_bytes(model)}
    host |= {"pages": spec.host_pages * sizes.host_page} if spec.host_pages else {}
    return Fitted(spec, plan, sizes.table(plan, pages, total), host, asked, sizes.shapes, _hits(plan, curves_LC))


def _total(text: str, free: int | None) -> int | None:
    amount = parse_memory(text)
    if amount.kind == "share":
        raise ValueError(f"total = {text!r}: a share is one of all experts, and this is memory for everything: give bytes, like 16GB, or auto")
    if amount.kind == "auto":
        return free
    if free is not None and amount.bytes > free:
        raise BudgetError(f"{amount.bytes:,} bytes ({text}) are more than the {free:,} ({format_bytes(free)}) that the device has free")
    return amount.bytes


def _too_small(total: int, smallest: MemoryTable) -> TooSmall:
    largest = ", ".join(f"{name} {format_bytes(n)}" for name, n in smallest.largest[:3])
    return TooSmall(
        f"{total:,} bytes ({format_bytes(total)}) are too few to serve with: the smallest that works is {smallest.total:,} bytes "
        f"({format_bytes(smallest.total)}), of which the largest are {largest}; fewer slots or positions, or a smaller chunk and wave, need less",
        smallest.total, dataclasses.replace(smallest, budget=total),
    )  # fmt: skip


# --- Sharing out


class Search:
    """The choices that a request leaves open."""

    def __init__(self, sizes: Sizes, asked: ServeMemory, curves_LC: np.ndarray | None):
        self.sizes, self.asked, self.shapes, self.curves = sizes, asked, sizes.shapes, curves_LC
        self.policy = find_policy(asked.policy)
        self.staging = max(asked.staging, self.shapes.active) if self.policy.bypass else asked.staging
        if curves_LC is not None and curves_LC.shape != (self.shapes.layers, self.shapes.experts + 1):
            raise ValueError(f"curves of hits {list(curves_LC.shape)}: this model's are {[self.shapes.layers, self.shapes.experts + 1]}")
        self.pages = None if asked.kv is None else self._pages_in(in_bytes(asked.kv, "kv"))
        self.plans = self._plans()

    @property
    def least_pages(self) -> int:
        return self.sizes.spec.table

    @property
    def most_pages(self) -> int:
        """All sequences at their longest, and as many pages again for prefixes that may come back."""
        return self.sizes.spec.slots * self.sizes.spec.table * (2 if self.sizes.spec.sharing else 1)

    def _pages_in(self, kv: int) -> int:
        pages = kv // self.sizes.page - 1  # one is the trash page
        if pages < self.least_pages:
            raise BudgetError(
                f"kv = {kv:,} bytes hold {max(pages, 0)} pages of {self.sizes.spec.page} tokens and the trash page: one sequence of "
                f"{self.sizes.spec.positions} positions needs {self.least_pages}, in {(self.least_pages + 1) * self.sizes.page:,} bytes"
            )
        return pages

    def _plans(self) -> list[BudgetPlan]:
        """What experts can be given: as it was asked for, or every number of slots and all."""
        shapes, asked = self.shapes, self.asked
        if asked.expert_slots is not None and asked.experts is not None:
            raise ValueError(f"expert_slots = {asked.expert_slots} and experts = {asked.experts!r}: give one of them")
        if asked.expert_slots is not None:
            if not shapes.active <= asked.expert_slots <= shapes.experts:
                raise ValueError(f"expert_slots = {asked.expert_slots} of each layer: the model needs {shapes.active} to {shapes.experts}")
            return [self.uniform(asked.expert_slots)]
        if asked.experts is not None and (amount := parse_memory(asked.experts)).kind != "auto":
            return [self.solved(amount.resolve(shapes.all_bytes, None))]
        return [self.uniform(n) for n in range(shapes.active, shapes.experts + 1)]

    def uniform(self, n: int) -> BudgetPlan:
        """So many slots in each layer."""
        shapes, staging = self.shapes, 0 if n == self.shapes.experts else self.staging
        used = n * sum(shapes.expert_bytes) + staging * max(shapes.expert_bytes)
        return BudgetPlan((n,) * shapes.layers, staging, shapes.experts, shapes.expert_bytes, used, shapes.all_bytes, used)

    def solved(self, nbytes: int) -> BudgetPlan:
        """So many bytes for experts, shared out over layers."""
        curves = None if self.policy.shared or self.policy.allocate is not None else self.curves
        found = budget.solve(self.shapes, Amount("bytes", nbytes), self.staging, None, curves, _allocate, self.policy.bypass)
        if self.policy.allocate is not None and not found.all_resident:
            shapes = self.shapes
            found = dataclasses.replace(found, slots=self.policy.allocate(sum(found.slots), shapes.layers, shapes.experts, shapes.active))
        return found

    def smallest(self) -> MemoryTable:
        """The least that works."""
        pages = self.least_pages if self.pages is None else self.pages
        return min((self.sizes.table(plan, pages, None) for plan in self.plans), key=lambda table: table.total)

    def best(self, total: int | None) -> tuple[BudgetPlan, int]:
        """Slots and pages of the least seconds a token within a total that something works in."""
        found = []
        for plan in self.plans:
            pages = self._pages_beside(plan, total)
            if pages is not None:
                found.append((self.seconds(plan, pages), -pages, -sum(plan.slots), plan))
        *_, plan = min(found, key=lambda one: one[:3])
        pages = self._pages_beside(plan, total)
        assert pages is not None, "it was found among those that have pages"
        if total is None or len(self.plans) == 1 or plan.all_resident:
            return plan, pages
        # What is too little for a slot in every layer, or for a page, is a slot in some; or a trace says which layers need them.
        rest = total - self.sizes.table(plan, pages, None).total
        return self.solved(plan.device_bytes + rest), pages

    def _pages_beside(self, plan: BudgetPlan, total: int | None) -> int | None:
        """Pages that there is room for; None where there are too few to run."""
        least = self.least_pages if self.pages is None else self.pages
        if total is None:
            return self.most_pages if self.pages is None else self.pages
        more = (total - self.sizes.table(plan, least, None).total) // self.sizes.page
        if more < 0:
            return None
        return least if self.pages is not None else min(least + more, max(least, self.most_pages))

    def seconds(self, plan: BudgetPlan, pages: int) -> float:
        """Of one token of a decoding step."""
        asked, expected = self.asked, expected_tokens(self.asked, self.sizes.spec)
        rows, link, memory = _rows(self.sizes.spec, pages, expected), asked.link_gbps or LINK_GBPS, asked.memory_gbps or MEMORY_GBPS
        return 1 / budget.predict(plan, self.shapes, _hits(plan, self.curves), link, memory, rows, expected).serial


def _rows(spec: ServeSpec, pages: int, expected: int) -> int:
    """Sequences that decode in a step, as many as there are pages for."""
    return max(1, min(spec.batch, pages // spec.pages_for(expected)))


def expected_tokens(asked: ServeMemory, spec: ServeSpec) -> int:
    """Of a sequence, on average."""
    return min(spec.positions, asked.expected or max(1, spec.positions // 2))


def _allocate(curves_LC: np.ndarray, total: int, minimum: int) -> Sequence[int]:
    return bounds.allocate(curves_LC, total, minimum).tolist()


def _hits(plan: BudgetPlan, curves_LC: np.ndarray | None) -> tuple[float, ...] | None:
    """Share of requests by layer that find their expert on the device; first uses, which pass, are left out."""
    if curves_LC is None:
        return None
    return tuple(float(curve[n] / curve[-1]) if curve[-1] else 1.0 for curve, n in zip(curves_LC, plan.slots, strict=True))


# --- The host, and what to tell


def check_host(fitted: Fitted, available: int | None, same: bool = False) -> None:
    """Refuses what does not fit into this machine's memory.

    Args:
        fitted: of `fit`.
        available: bytes that new arrays can take (`jaxmoe.engine.memory.available_host_memory`); None where nobody knows.
        same: the device's memory is the host's, as on the CPU.

    Raises:
        BudgetError: the message has both numbers.
    """
    needed = fitted.host | ({"the device's share": fitted.table.total} if same else {})
    if available is not None and sum(needed.values()) > available:
        parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in needed.items())
        raise BudgetError(
            f"{sum(needed.values()):,} bytes ({parts}) do not fit into the {available:,} of host memory that are available: give fewer pages to host "
            "memory, or more of the experts to the device"
        )


def predicted(fitted: Fitted, rows: int | None = None) -> Prediction:
    """What a decoding step of so many rows brings over the link, and the ceilings that follow.

    Args:
        fitted: of `fit`.
        rows: if not given, as many as there are pages for sequences of the expected length, at most the spec's batch.
    """
    asked, spec = fitted.asked, fitted.spec
    expected = expected_tokens(asked, spec)
    rows = _rows(spec, spec.pages, expected) if rows is None else rows
    return budget.predict(fitted.experts, fitted.shapes, fitted.hits, asked.link_gbps, asked.memory_gbps, rows, expected)


def describe(fitted: Fitted) -> tuple[str, ...]:
    """What a server says when it starts: its pages, its slots, and what crosses the link."""
    spec, shapes, plan = fitted.spec, fitted.shapes, fitted.experts
    expected, tokens = expected_tokens(fitted.asked, spec), spec.pages * spec.page

    def at_a_time(length: int) -> int:
        return min(spec.slots, spec.pages // spec.pages_for(length))

    lines = [
        f"{tokens:,} tokens at a time in {spec.pages:,} pages of {spec.page}: {at_a_time(spec.positions)} sequences of {spec.positions:,}, "
        f"the longest, or {at_a_time(expected)} of {expected:,}, of at most {spec.slots}"
    ]
    if spec.host_pages:
        lines.append(f"{spec.host_pages * spec.page:,} tokens put aside in {format_bytes(fitted.host['pages'])} of host memory")
    if plan.all_resident:
        return (*lines, f"all {plan.experts} experts of {shapes.layers} layers on the device, {format_bytes(plan.device_bytes)}")
    slots = _between(plan.slots)
    lines.append(
        f"{slots} of {plan.experts} experts in each of {shapes.layers} layers and {plan.staging} in staging, {format_bytes(plan.device_bytes)} of "
        f"{format_bytes(plan.resident_bytes)}; the others in host memory"
    )
    for found in (predicted(fitted, 1), predicted(fitted)):
        source = "even routing" if found.even_routing else "as in the trace"
        bytes_each = format_bytes(round(found.link_bytes_per_token))
        text = f"{found.tokens} in a step: {found.hit_rate:.0%} of experts are there ({source}), {bytes_each} a token cross the link"
        lines.append(text + (f": at most {found.overlapped:,.1f} tokens/s" if found.link_seconds else ""))
    return tuple(lines)


def _between(slots: Sequence[int]) -> str:
    return str(min(slots)) if min(slots) == max(slots) else f"{min(slots)} to {max(slots)}"
