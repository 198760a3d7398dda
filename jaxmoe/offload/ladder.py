"""Plans for the precision ladder: which expert gets how many bits, how far a setting may go, in which order planes cross the link, and what a setting
would have brought in a trace that was recorded.

Pure functions. What a plan costs in quality comes in as a callable, for nothing here runs a model.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxmoe.experts.lossy import HIGH, LOW, SKIP, STORED, Lossy, decide, demands, init_marks, settle
from jaxmoe.experts.slots import high_uses, uses
from jaxmoe.offload.trace import PROMPT, Trace
from jaxmoe.residency import Knowledge, Shape, choose, find_policy
from jaxmoe.residency.policy import layer_row, with_row

Widths = Int[np.ndarray, "L E"]
"""Bits of every expert; `STORED` for one as it is stored."""

Loss = Callable[[Widths], float]
"""What a table of widths costs, in any unit, against everything as stored."""

# --- Bits of every expert


def sensitivities(error: Callable[[int, int, int], float], frequency: Float[np.ndarray, "L E"], bits: int) -> Float[np.ndarray, "L E"]:
    """What it costs to have each expert at `bits`: how wrong its output is then, times how often it is used.

    EdgeMoE (arXiv:2308.14352) lowers one expert at a time and measures the whole model; an expert's own output error stands in for that here.

    Args:
        error: `(layer, expert, bits) -> error of the output`, measured.
        frequency: how often each is used, in any unit.
        bits: the precision in question.
    """
    layers, experts = frequency.shape
    return np.array([[error(layer, expert, bits) for expert in range(experts)] for layer in range(layers)]) * frequency


def edgemoe_widths(sensitivity: Float[np.ndarray, "L E"], loss: Loss, bound: float, bits: Sequence[int] = (8, 4, 2)) -> Widths:
    """Lowers the least sensitive experts until the loss reaches its bound.

    As EdgeMoE has it, first all experts get the fewest bits that, given to all, keep the loss within the bound (or stay as stored); then the least
    sensitive ones get the next fewer, as many as can be, and of those the next fewer again. How many is found by bisection, for which the loss should
    not fall as more experts are lowered; what is returned was measured to be within the bound in any case.

    Args:
        sensitivity: of `sensitivities`.
        loss: of a table.
        bound: the most that the loss may be.
        bits: precisions, from the highest down.
    """
    widths = np.full(sensitivity.shape, STORED)
    order = np.argsort(sensitivity, axis=None, kind="stable")
    for b in bits:
        if loss(np.full_like(widths, b)) <= bound:
            widths[:] = b
            continue
        count = _most(len(order), functools.partial(_within, loss, bound, widths, order, b))
        widths, order = _lowered(widths, order[:count], b), order[:count]
    return widths


def _within(loss: Loss, bound: float, widths: Widths, order: np.ndarray, bits: int, count: int) -> bool:
    return loss(_lowered(widths, order[:count], bits)) <= bound


def _lowered(widths: Widths, which: np.ndarray, bits: int) -> Widths:
    out = widths.copy()
    out.reshape(-1)[which] = bits
    return out


def _most(n: int, fits: Callable[[int], bool]) -> int:
    """The largest k up to n for which `fits` was true, by bisection; 0 is taken to fit."""
    low, high = 0, n
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def popularity_widths(rows: Int[np.ndarray, "E"], missing: Bool[np.ndarray, "E"], share: float, bits: int) -> Int[np.ndarray, "E"]:
    """Fate's widths of the missing experts of a prompt: the share of them that fewest tokens ask for comes at `bits` (arXiv:2502.12224).

    Args:
        rows: how many tokens ask for each expert.
        missing: which are to be brought.
        share: of them, rounded down. Of experts alike, those with the highest ids.
        bits: of those.
    """
    ids = [e for e in np.lexsort((np.arange(len(rows)), -rows)) if missing[e]]
    out = np.full(len(rows), STORED)
    out[ids[len(ids) - int(share * len(ids)) :]] = bits
    return out


# --- How far a setting may go


class Calibrated(NamedTuple):
    """`value` of the setting, its `loss`, and `tried`: what was measured, in order."""

    value: float
    loss: float
    tried: tuple[tuple[float, float], ...]


def calibrate(loss: Callable[[float], float], bound: float, low: float = 0.0, high: float = 1.0, steps: int = 6) -> Calibrated:
    """The largest value of a setting whose loss stays within a bound, by bisection.

    Args:
        loss: what the setting costs on text for calibration, such as its change of log perplexity; more of the setting should not cost less.
        bound: the most that it may cost.
        low: a value that costs nothing; it is not measured.
        high: the largest value.
        steps: halvings of the interval, once `high` was too much.

    Returns:
        A value that was measured to be within the bound, or `low`.
    """
    tried: list[tuple[float, float]] = []

    def measured(value: float) -> float:
        tried.append((value, loss(value)))
        return tried[-1][1]

    if (cost := measured(high)) <= bound:
        return Calibrated(high, cost, tuple(tried))
    best = Calibrated(low, 0.0, ())
    for _ in range(steps):
        middle = (best.value + high) / 2
        if (cost := measured(middle)) <= bound:
            best = Calibrated(middle, cost, ())
        else:
            high = middle
    return best._replace(tried=tuple(tried))


# --- The order of planes on the link

Job = tuple[int, int]
"""An expert and one of its chunks, 0 being the base."""


def hebf(demand: Float[np.ndarray, "E P"], sizes: Sequence[int], budget: int | None = None) -> list[Job]:
    """D2MoE's "hottest expert bit first" (arXiv:2504.15299): the chunk that most tokens wait for goes next, a low plane before a higher one.

    Departs from the paper's description in two points. Planes are nested, so that a plane's demand is that of its own tokens and of all that want
    more of the expert. And chunks are weighed by demand per byte, for a base is larger than a plane; of chunks of one size that is the paper's order.

    Args:
        demand: tokens that want exactly so many chunks of each expert: [e, p] want chunks 0 to p.
        sizes: bytes of each chunk.
        budget: bytes of this step; a chunk that no longer fits is left out with all above it, and smaller ones may still go. None for all.

    Returns:
        What goes, in order; chunks that nobody wants don't.
    """
    needed = np.cumsum(np.asarray(demand)[:, ::-1], axis=1)[:, ::-1]
    worth = needed / np.asarray(sizes)
    heads = [(-worth[e, 0], e, 0) for e in range(len(needed)) if needed[e, 0] > 0]
    heapq.heapify(heads)
    left, jobs = np.inf if budget is None else budget, []
    while heads:
        _, e, p = heapq.heappop(heads)
        if sizes[p] > left:
            continue
        left -= sizes[p]
        jobs.append((e, p))
        if p + 1 < needed.shape[1] and needed[e, p + 1] > 0:
            heapq.heappush(heads, (-worth[e, p + 1], e, p + 1))
    return jobs


def fifo(demand: Float[np.ndarray, "E P"]) -> list[Job]:
    """All chunks that are wanted, expert after expert: what `hebf` is compared with."""
    needed = np.cumsum(np.asarray(demand)[:, ::-1], axis=1)[:, ::-1]
    return [(e, p) for e in range(len(needed)) for p in range(needed.shape[1]) if needed[e, p] > 0]


def idle_seconds(jobs: Sequence[Job], demand: Float[np.ndarray, "E P"], sizes: Sequence[int], byte_s: float, token_s: float) -> float:
    """Seconds for which the computing unit waits, if chunks cross one after the other and tokens are computed as soon as their last chunk is there.

    Args:
        jobs: the order on the link.
        demand, sizes: see `hebf`.
        byte_s, token_s: seconds that a byte takes on the link, and a token to be computed.
    """
    arrived = free = idle = 0.0
    for e, p in jobs:
        arrived += sizes[p] * byte_s
        work = float(demand[e][p]) * token_s
        if work:
            idle += max(0.0, arrived - free)
            free = max(free, arrived) + work
    return idle


# --- Replay


@dataclasses.dataclass(frozen=True)
class LadderReplay:
    """What a setting did with a trace, in the steps that are not prompt.

    Triples are assignments by what they demand of a missing expert: as it is stored, at fewer bits, nothing.

    Attributes:
        pairs, degraded, skipped: assignments of tokens to experts, those computed at fewer bits, and those left out.
        demanded: triple of all assignments.
        missed: triple of those whose expert is missing in a run that gives nothing up.
        loads: experts brought, by bits ([0] as stored). Those are counted that were there at too few bits and were brought again.
        exact: experts that the router's own choice would have brought, what was there being the same.
        exact_run: experts that the policy brings in a run that gives nothing up.
    """

    pairs: int
    degraded: int
    skipped: int
    demanded: tuple[int, int, int]
    missed: tuple[int, int, int]
    loads: tuple[int, ...]
    exact: int
    exact_run: int

    def miss_byte_ratio(self, size: Callable[[int], float], of_run: bool = False) -> float:
        """Bytes brought over those that exact serving would have brought: of the same misses, or with `of_run` in a run of its own.

        Args:
            size: an expert's by bits (`STORED` for as it is stored), in any unit.
            of_run: see above.
        """
        whole = (self.exact_run if of_run else self.exact) * size(STORED)
        return sum(n * size(bits) for bits, n in enumerate(self.loads) if n) / whole if whole else 1.0

    def missed_ratio(self, low: float) -> float:
        """The ratio as if nothing low had to be brought again: of `missed`, with low-precision experts at the share `low` of the bytes."""
        return (self.missed[0] + low * self.missed[1]) / sum(self.missed)


def replay_ladder(trace: Trace, slots: int, policy: str, lossy: Lossy, warm: bool = True) -> LadderReplay:
    """Runs a trace through a policy and the ladder, every layer on its own, with the decisions of the compiled step.

    A trace holds no logits, and what it holds of later layers would have been routed otherwise: this counts bytes, not quality.

    Args:
        trace: ids and weights.
        slots: experts that each layer holds.
        policy: of `jaxmoe.residency`, not one of a shared pool.
        lossy: the setting; `prior` is not possible.
        warm: whether the prompt runs through the cache first.

    Raises:
        ValueError: a setting or a policy that can't be replayed, or nothing but prompt.
    """
    if lossy.prior:
        raise ValueError(f"prior = {lossy.prior} can't be replayed: a trace holds no logits")
    if find_policy(policy).shared:
        raise ValueError(f"the policy {policy!r} shares one pool over all layers, and the ladder is replayed layer by layer")
    given = _by_step(trace, warm)
    run = jax.jit(_replayed, static_argnums=(0, 1, 2, 3, 4))
    found = [run(setting, lossy, slots, policy, trace.experts, *given) for setting in (lossy, Lossy())]
    (marks, demanded, _), (exact, _, missed) = jax.tree.map(np.asarray, found)
    totals = {name: int(marks[name].sum()) for name in ("pairs", "degraded", "skipped", "exact")}
    triples = {name: tuple(int(n) for n in found) for name, found in (("demanded", demanded), ("missed", missed))}
    loads = tuple(int(n) for n in marks["loads"].sum((0, 1)))
    return LadderReplay(**totals, **triples, loads=loads, exact_run=int(exact["loads"].sum()))  # type: ignore[arg-type]


def _by_step(trace: Trace, warm: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids and weights [L, S, T, A], -1 in padding, and which steps count."""
    steps, first, index = np.unique(trace.step, return_index=True, return_inverse=True)
    place = np.arange(len(index)) - first[index]
    shape = (len(steps), int(place.max()) + 1, *trace.ids.shape[1:])
    ids, weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    ids[index, place], weights[index, place] = trace.ids, trace.weights
    counted = trace.phase[first] != PROMPT
    if not counted.any():
        raise ValueError("the trace holds nothing but its prompt")
    if not warm:
        ids, weights, counted = ids[counted], weights[counted], counted[counted]
    return ids.transpose(2, 0, 1, 3), weights.transpose(2, 0, 1, 3), counted


def _replayed(lossy: Lossy, judge: Lossy, slots: int, policy_name: str, experts: int, ids_LSTA, weights_LSTA, counted_S):
    """The marks' counters, and the triples of demands on `judge`'s terms: of all assignments, and of those whose expert was missing."""
    policy = find_policy(policy_name)

    def step(moe_layer, carry, given):
        tables, resident, marks, triples = carry
        ids, weights, counts = given
        valid, ids = ids[:, 0] >= 0, jnp.maximum(ids, 0)
        found = decide(lossy, moe_layer, ids, weights, valid, resident, marks["held"][0], False)
        used, high = uses(found.ids, valid, experts, False), high_uses(found.ids, found.weights, valid, experts, False)
        tables = with_row(tables, 0, policy.touch(layer_row(tables, 0), used, high))
        choice = choose(policy.worth(tables, 0), resident, used.any(0), slots, policy.bypass)
        _, new = settle(marks | {"width": found.width.astype(jnp.int8)[None]}, 0, choice)
        demand, pairs = demands(judge, weights), jnp.broadcast_to(valid[:, None], ids.shape)
        of = jnp.stack([demand == level for level in (HIGH, LOW, SKIP)])
        now = jnp.stack([(of & pairs).sum((1, 2)), (of & pairs & ~resident[ids]).sum((1, 2))])
        whole = uses(ids, valid, experts, False).any(0) & ~resident
        sums = {"pairs": pairs, "degraded": found.degraded, "skipped": found.skipped, "exact": whole}
        new |= {name: new[name] + which.sum(dtype=jnp.int32) for name, which in sums.items()}
        kept = {name: jnp.where(counts | (name in ("held", "width")), value, marks[name]) for name, value in new.items()}
        return (tables, (resident | choice.enter) & ~choice.leave, kept, triples + jnp.where(counts, now, 0)), None

    def layer(moe_layer, ids_STA, weights_STA):
        tables = policy.tables(Shape(1, experts, (slots,)), Knowledge())
        start = tables, jnp.zeros(experts, bool), init_marks(lossy, 1, experts), jnp.zeros((2, 3), jnp.int32)
        return jax.lax.scan(functools.partial(step, moe_layer), start, (ids_STA, weights_STA, counted_S))[0][2:]

    marks, triples = jax.vmap(layer)(jnp.arange(ids_LSTA.shape[0]), ids_LSTA, weights_LSTA)
    return marks, triples[:, 0].sum(0), triples[:, 1].sum(0)
