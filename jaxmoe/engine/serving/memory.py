"""What a serving engine's device memory goes to: experts, pages of keys and values, and everything else, each with its bytes.

Every array that an engine will ever hold is counted here before any of them exists, so that it runs out of pages, and queues, and never out of
memory. Shapes and numbers: no arrays on a device, no checkpoint, no clock. How a budget is shared out is `jaxmoe.engine.serving.fitting`'s business.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from jaxmoe import formats
from jaxmoe.cache.contiguous import KEY_BLOCK
from jaxmoe.cache.layers import init_paged_layers
from jaxmoe.cache.paged import PagedKV
from jaxmoe.decode.adjust import words
from jaxmoe.engine.host_driven import IN_FLIGHT
from jaxmoe.engine.model import Offload, slot_bank
from jaxmoe.engine.serving.activations import activation_bytes
from jaxmoe.engine.serving.host_store import IN_FLIGHT as BLOCKS_IN_FLIGHT
from jaxmoe.engine.serving.programs import nothing_parked
from jaxmoe.engine.serving.routing import PENDING, DecodeCounts
from jaxmoe.engine.serving.types import PrefillMode, ServeSpec
from jaxmoe.engine.steps import ROW_BUCKETS
from jaxmoe.experts.host_store import entry_shapes
from jaxmoe.nn.transformer import layer_groups
from jaxmoe.offload.budget import BudgetError, BudgetPlan, ExpertShapes, format_bytes, parse_memory
from jaxmoe.residency import Knowledge
from jaxmoe.residency.policies import DEFAULT
from jaxmoe.spec import DeltaSpec, ModelSpec
from pallas_kernels.dispatch import Kernels
from sharding.memory import Held, weights
from sharding.padding import padded_size
from sharding.split import ALONE

NAMES = (
    "parameters", "experts", "expert staging", "KV pages", "recurrent states", "parked wave", "swap blocks in flight", "activations",
    "sampling adjustments", "tables",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ServeMemory:
    """What is asked for.

    Attributes:
        total: device memory for everything, as `budget.parse_memory` reads it; 'auto' is what the device has.
        kv: of it for pages of keys and values; None: as `fit` finds best.
        experts: of it for routed experts, slots and staging together; a share is one of all experts. None: as `fit` finds best.
        expert_slots: slots of each layer, in the place of `experts`.
        slots, positions, page, batch, chunk, wave, groups, burst, run, move, sharing, mixed: as in `ServeSpec`; `positions` is rounded up to whole
            pages, and `batch` is `slots` if not given.
        prefill: how prompts are computed, which says what programs there are; 'layered' where experts are streamed and 'chunked' where they are all
            resident, if None.
        kv_dtype: 'float32', 'bfloat16' or 'int8'; the model's own if not given.
        host: host memory for pages that were put aside; None for none.
        staging, policy, knowledge: of streamed experts, as in `jaxmoe.engine.model.Offload`.
        host_driven: the host sends experts, so that some are on their way beside those in staging.
        expected: tokens of a sequence, prompt and answer, on average; half of `positions` if not given.
        link_gbps, memory_gbps: of the link from the host and of the device's memory, 10^9 bytes a second, where they are known.
        activations: bytes, where they were measured, in the place of the formula.
        unrolled: layers are arrays of their own, as `load_model` has them on the CPU if not told otherwise; None for the backend's way.
    """

    total: str = "auto"
    kv: str | None = None
    experts: str | None = None
    expert_slots: int | None = None
    slots: int = 16
    positions: int = 4096
    page: int = 32
    batch: int | None = None
    chunk: int = 512
    wave: int = 4096
    groups: int = 8
    burst: int = 8
    run: int = 32
    move: int = 16
    sharing: bool = True
    mixed: bool = True
    prefill: PrefillMode | None = None
    kv_dtype: str | None = None
    host: str | None = None
    staging: int = 2
    policy: str = DEFAULT
    knowledge: Knowledge = dataclasses.field(default_factory=Knowledge, compare=False)
    host_driven: bool = False
    expected: int | None = None
    link_gbps: float | None = None
    memory_gbps: float | None = None
    activations: int | None = None
    unrolled: bool | None = None


@dataclasses.dataclass(frozen=True)
class MemoryTable:
    """Where the device's memory goes. Attributes: `items` name and bytes, in the order of `NAMES`; `budget` bytes, None where nobody knows."""

    items: tuple[tuple[str, int], ...]
    budget: int | None

    @property
    def total(self) -> int:
        """Bytes of all items."""
        return sum(n for _, n in self.items)

    @property
    def left(self) -> int | None:
        """Bytes of the budget that nothing takes."""
        return None if self.budget is None else self.budget - self.total

    @property
    def largest(self) -> tuple[tuple[str, int], ...]:
        """The items, the largest first."""
        return tuple(sorted(self.items, key=lambda item: -item[1]))

    def __getitem__(self, name: str) -> int:
        """Bytes of an item."""
        return dict(self.items)[name]

    def lines(self) -> tuple[tuple[str, str, str], ...]:
        """Rows of a table: name, bytes and share of the total; then the total, and of a budget what it is and what is left."""
        rows = [(name, format_bytes(n), f"{n / self.total:.1%}") for name, n in self.items]
        rows.append(("total", format_bytes(self.total), "100.0%"))
        if self.budget is not None:
            left = self.budget - self.total
            rows += [("budget", format_bytes(self.budget), ""), ("left", f"{'-' if left < 0 else ''}{format_bytes(abs(left))}", "")]
        return tuple(rows)

    def to_json(self) -> dict[str, int | None]:
        """Plain JSON."""
        return {**dict(self.items), "total": self.total, "budget": self.budget, "left": self.left}


class TooSmall(BudgetError):
    """A budget that nothing runs in. Attributes: `smallest` bytes that would do with the rest as it was asked for, `table` what they go to."""

    def __init__(self, message: str, smallest: int, table: MemoryTable):
        super().__init__(message)
        self.smallest, self.table = smallest, table


# --- What things weigh


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a request weighs whatever is shared out. Attributes: `spec` without pages; `page` bytes; `host_page` bytes of one in the host's memory;
    `sent` experts on their way while they are streamed; `others` items beside experts and pages, by whether they are."""

    spec: ServeSpec
    shapes: ExpertShapes
    page: int
    host_page: int
    sent: int
    others: dict[bool, dict[str, int]]

    def table(self, plan: BudgetPlan, pages: int, budget: int | None) -> MemoryTable:
        staging, sent = (n * max(plan.expert_bytes) for n in (plan.staging, 0 if plan.all_resident else self.sent))
        items = self.others[not plan.all_resident] | {
            "experts": plan.device_bytes - staging, "expert staging": staging + sent, "KV pages": (pages + 1) * self.page,
        }  # fmt: skip
        return MemoryTable(tuple((name, items[name]) for name in NAMES), budget)


def weigh(model: ModelSpec, asked: ServeMemory, kernels: Kernels) -> Sizes:
    """Exact for all that lives longer than a step, from the shapes that the engine will ask for; activations are a bound."""
    serve = _serve_spec(model, asked)
    model = dataclasses.replace(model.for_positions(serve.positions), extra_heads=())

    def nbytes(tree: Any) -> int:
        return sum(_held(leaf, kernels) for leaf in jax.tree.leaves(tree))

    layers = jax.eval_shape(lambda: init_paged_layers(model, serve.slots, 0, serve.page, kernels, asked.kv_dtype))
    pools = [state for state in layers.states if isinstance(state, PagedKV)]
    states = [state for state in layers.states if not isinstance(state, PagedKV)]
    page, plain = nbytes(pools), sum(_plain(leaf) for leaf in jax.tree.leaves(pools))  # no page but the trash page
    host = 0 if asked.host is None else in_bytes(asked.host, "host") // plain
    serve = dataclasses.replace(serve, host_pages=host)
    block = serve.move * page + nbytes(states) // serve.slots
    parked = jax.eval_shape(lambda: nothing_parked(model, serve.wave, formats.compute_dtype(model.precision.compute)))
    unrolled = kernels.backend == "cpu" if asked.unrolled is None else asked.unrolled

    def others(streamed: bool) -> dict[str, int]:
        prefill = asked.prefill or ("layered" if streamed else "chunked")
        bound = activation_bytes(model, serve, kernels, prefill, streamed, unrolled, block)
        return {
            "parameters": _parameters(model, kernels),
            "recurrent states": nbytes(states),
            "parked wave": nbytes(parked) if prefill == "layered" else 0,
            "swap blocks in flight": (BLOCKS_IN_FLIGHT + 1 if host else 1) * block,  # a warm-up moves one
            "activations": bound if asked.activations is None else asked.activations,
            "sampling adjustments": _adjustments(model.vocab, serve, prefill),
            "tables": _tables(model, serve, asked, kernels, streamed),
        }

    sent, either = IN_FLIGHT + 1 if asked.host_driven else 0, {streamed: others(streamed) for streamed in (False, True)}
    return Sizes(serve, _shapes(model, kernels), page, plain, sent, either)


def _serve_spec(model: ModelSpec, asked: ServeMemory) -> ServeSpec:
    """Sizes without pages.

    Raises:
        ValueError: sizes that don't go together.
    """
    least = ("slots", "positions", "page", "chunk", "wave", "groups", "burst", "run", "move", "staging")
    wrong = [name for name in least if getattr(asked, name) < 1]
    batch = asked.slots if asked.batch is None else asked.batch
    if wrong:
        raise ValueError(f"{wrong[0]} = {getattr(asked, wrong[0])} must be at least 1")
    if not 1 <= batch <= asked.slots:
        raise ValueError(f"batch = {batch} sequences that decode in a step: give 1 to slots = {asked.slots}")
    if asked.page % asked.run or asked.chunk % asked.run or asked.wave % asked.run:
        raise ValueError(f"page = {asked.page}, chunk = {asked.chunk} and wave = {asked.wave} must be multiples of run = {asked.run}")
    if asked.expected is not None and asked.expected < 1:
        raise ValueError(f"expected = {asked.expected} tokens of a sequence: give at least 1")
    layer_groups(model, asked.groups)  # refuses more than there are
    return ServeSpec(
        slots=asked.slots, page=asked.page, pages=0, positions=-(-asked.positions // asked.page) * asked.page, batch=batch, chunk=asked.chunk,
        wave=asked.wave, groups=asked.groups, burst=asked.burst, run=asked.run, move=asked.move, mixed=asked.mixed,
        sharing=asked.sharing and not any(isinstance(kind, DeltaSpec) for kind in model.state_kinds),
    )  # fmt: skip


def in_bytes(text: str, name: str) -> int:
    """An amount that has to be one of bytes.

    Raises:
        ValueError: a share, or 'auto'.
    """
    amount = parse_memory(text)
    if amount.kind != "bytes":
        raise ValueError(f"{name} = {text!r}: give an amount, like 4GB or 512MiB")
    return amount.bytes


def _plain(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _held(leaf: Any, kernels: Kernels) -> int:
    """Bytes of an array on the device: on TPUs with its last two axes filled up to tiles."""
    order = tuple(range(len(leaf.shape))) if kernels.backend == "tpu" and len(leaf.shape) > 1 else None
    return _plain(leaf) if kernels.backend != "tpu" else padded_size(leaf.shape, leaf.dtype.itemsize, order) * leaf.dtype.itemsize


def _parameters(model: ModelSpec, kernels: Kernels) -> int:
    """All but routed experts; on the CPU a tied embedding has a transposed copy (`load_model`)."""
    total = sum(leaf.nbytes("tpu" if kernels.backend == "tpu" else "cpu") for leaf in weights(model, ALONE))
    copy = model.vocab * model.width * formats.leaf_dtype(model.precision.params).itemsize
    return total + (copy if model.tied and kernels.backend == "cpu" else 0)


def _shapes(model: ModelSpec, kernels: Kernels) -> ExpertShapes:
    """What experts weigh as they lie on the device."""
    item = formats.leaf_dtype(model.precision.params).itemsize
    one = sum(Held((1, *shape), item).nbytes("tpu" if kernels.backend == "tpu" else "cpu") for shape in entry_shapes(model, kernels.expert_layout))
    found = ExpertShapes.from_spec(model)
    return dataclasses.replace(found, expert_bytes=tuple(max(one, n) for n in found.expert_bytes))


def _adjustments(vocab: int, serve: ServeSpec, prefill: PrefillMode) -> int:
    """Those that change nothing, which stay, for every number of rows; and those of a decoding step and of prompts on their way."""
    row = 4 * vocab + 2 * 4 * words(vocab) + 4
    prompts = serve.slots + (serve.batch if serve.mixed and prefill != "layered" else 0)
    kept = {n for n in ROW_BUCKETS if n < serve.batch} | {serve.batch, prompts}
    return row * (sum(kept) + serve.batch + prompts)


def _tables(model: ModelSpec, serve: ServeSpec, asked: ServeMemory, kernels: Kernels, streamed: bool) -> int:
    """Where experts are and what the policy counts, what it was told, counters to be read, and what two steps are told of their batch."""
    tokens = max(serve.chunk, serve.wave, serve.positions if asked.prefill == "whole" else 0)
    wide = -(-serve.positions // KEY_BLOCK) * KEY_BLOCK // serve.page  # as `batches.page_tables` has them
    batch = 4 * (serve.slots * wide + 16 * (tokens + serve.batch + serve.slots + serve.move))
    if not streamed:
        return 2 * batch
    router, _ = model.moe
    bank = slot_bank(model, None, Offload(router.experts, asked.staging, asked.policy, asked.knowledge), kernels.expert_layout)
    state = jax.eval_shape(bank.init_state)
    told = [leaf for leaf in jax.tree.leaves((state, asked.knowledge)) if all(leaf is not pool for pool in state.pools)]
    counted = 2 * PENDING * _plain(jax.eval_shape(DecodeCounts().look, state))
    return 2 * batch + counted + sum(map(_plain, told))
