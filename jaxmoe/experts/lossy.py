"""What a step may give up to bring fewer bytes: routing by what is there, leaving experts out, and bringing them at fewer bits.

All of it is off in `Lossy()`, whose decisions give back ids and weights as they came. A decision is made of what the router chose and what is on the
device, before the bank resolves: `degrade` gives the ids and weights to compute with and writes into the bank's *marks* at how many bits each
expert is wanted; `settle` then turns a hit that is held at too few bits into a miss. Knows neither slots nor sources: bits are numbers here, and 0
stands for an expert as it is stored.

Sources: HOBBIT (arXiv:2411.01433) for the thresholds; Helldez/BigMoeOnEdge for drop-cold; cache-conditional experts (arXiv:2412.00099) for routing
by what is there; EdgeMoE (arXiv:2308.14352) for one width an expert; Fate (arXiv:2502.12224) for the widths of unpopular experts in prompts.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.experts.ranked import row_counts
from jaxmoe.residency import Choice
from jaxmoe.routing import stages
from jaxmoe.routing.route import RouterOut
from jaxmoe.spec import RouterSpec
from pallas_kernels.dispatch import Kernels

STORED = 0
"""Bits of an expert that is as it is stored."""

WIDTHS = range(2, 9)
"""Bits that a low-precision expert can have (`jaxmoe.experts.planes`)."""

_ALL = 127  # what `STORED` counts as, when widths are compared
SKIP, LOW, HIGH = 0, 1, 2

Marks = dict[str, Array]
"""What a bank carries for its ladder; see `init_marks`."""


@dataclasses.dataclass(frozen=True)
class Lossy:
    """A setting of the ladder; `Lossy()` is lossless. Hashable, so that it can be a static part of a bank.

    Shares are of a token's weights, by size, normalised to a sum of one. A token's strongest expert is never left out.

    Attributes:
        high: T1 of HOBBIT: a missing expert comes as it is stored if the experts stronger than it have at most this share together. 1: all do.
        low: T2: beyond `high` it comes at `low_bits` up to this share, and beyond this one it is left out.
        low_bits: of those.
        cold: F of drop-cold: a missing expert with a share below F / A is left out. 0: none is.
        prior: lambda of cache-prior: experts that are there are chosen as if their logits were higher by lambda times the range of the token's.
            0: none; 1 puts all of them before all others.
        kept: experts of the router's choice, the best ones, that `prior` leaves alone.
        reach: `prior` lifts only experts among the so many best by logits ("max-rank", with a `prior` of 1); 0 for all.
        widths: [L][E] bits at which a missing expert comes; `STORED` or 2 to 8. Empty: all as stored.
        unpopular: share of the missing experts of a step of tokens in order, those that fewest tokens ask for, that come at `unpopular_bits`.
        unpopular_bits: of those.

    Raises:
        ValueError: a number that can't be.
    """

    high: float = 1.0
    low: float = 1.0
    low_bits: int = 4
    cold: float = 0.0
    prior: float = 0.0
    kept: int = 1
    reach: int = 0
    widths: tuple[tuple[int, ...], ...] = ()
    unpopular: float = 0.0
    unpopular_bits: int = 2

    def __post_init__(self):
        if not 0 <= self.high <= self.low <= 1:
            raise ValueError(f"thresholds of {self.high} and {self.low}: give 0 <= high <= low <= 1")
        for name in ("cold", "prior", "unpopular"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: give 0 (off) to 1")
        if self.kept < 0 or self.reach < 0:
            raise ValueError(f"kept = {self.kept}, reach = {self.reach}: give 0 or more")
        for bits in (self.low_bits, self.unpopular_bits, *(b for row in self.widths for b in row if b != STORED)):
            if bits not in WIDTHS:
                raise ValueError(f"{bits} bits: experts come at {WIDTHS[0]} to {WIDTHS[-1]} bits")

    @property
    def lossless(self) -> bool:
        """Whether nothing is given up."""
        return self.high >= 1 and not (self.cold or self.prior or self.bits)

    @property
    def bits(self) -> tuple[int, ...]:
        """The numbers of bits at which experts may come, apart from `STORED`; a bank needs a source of them."""
        found = {b for row in self.widths for b in row if b != STORED}
        found |= {self.low_bits} if self.high < self.low else set()
        found |= {self.unpopular_bits} if self.unpopular else set()
        return tuple(sorted(found))


class Decision(NamedTuple):
    """Of one layer and step.

    Attributes: `ids` and `weights` to compute with, an assignment that is left out having its token's strongest expert and the weight 0; `skipped`
    which those are; `width` bits that each expert is to have at least, `STORED` for all; `degraded` the assignments whose expert has fewer than all.
    """

    ids: Int[Array, "T A"]
    weights: Float[Array, "T A"]
    skipped: Bool[Array, "T A"]
    width: Int[Array, "E"]
    degraded: Bool[Array, "T A"]


def init_marks(lossy: Lossy | None, layers: int, experts: int) -> Marks:
    """What a bank carries from step to step.

    Args:
        lossy: the setting; None gives `{}`.
        layers, experts: L and E.

    Returns:
        `held` int8 [L, E], bits of every expert that is on the device (`STORED` of others); `width` int8 [L, E], those wanted by the last step; and
        counters int32 [L] since the start: `pairs` (tokens times experts that the router chose), of which `degraded` were computed at fewer bits,
        `skipped` were left out and `rerouted` went to an expert that the router had not chosen; `exact`, experts that the router's own
        choice would have brought, what is there being the same; and int32 [L, 9] `loads`, experts that were brought, by bits.
    """
    if lossy is None:
        return {}
    counters = {name: jnp.zeros(layers, jnp.int32) for name in ("pairs", "degraded", "skipped", "rerouted", "exact")}
    tables = {name: jnp.zeros((layers, experts), jnp.int8) for name in ("held", "width")}
    return tables | counters | {"loads": jnp.zeros((layers, WIDTHS[-1] + 1), jnp.int32)}


def counted(marks: Marks) -> dict[str, np.ndarray]:
    """The counters among the marks on the host, `loads` under the name `loads_by_bits`."""
    names = {name: name for name in ("pairs", "degraded", "skipped", "rerouted", "exact")} | {"loads_by_bits": "loads"}
    return {ours: np.array(marks[name]) for ours, name in names.items() if name in marks}


def degrade(
    lossy: Lossy,
    marks: Marks,
    moe_layer: Int[Array, ""] | int,
    resident: Bool[Array, "E"],
    routed: RouterOut,
    spec: RouterSpec,
    params: dict,
    valid_T: Bool[Array, "T"],
    ordered: bool,
    dtype,
    kernels: Kernels,
) -> tuple[Int[Array, "T A"], Float[Array, "T A"], Marks]:
    """What a layer computes with in place of the router's choice.

    Args:
        lossy: the setting.
        marks: of `init_marks`.
        moe_layer: which MoE layer; may be traced.
        resident: what is on the device, at any precision.
        routed: the router's choice.
        spec, params: the router's (`params` holds "select_bias" and "expert_scale", where it has them).
        valid_T: False for padding tokens.
        ordered: the tokens come one after another, as in a prompt.
        dtype: of the activations.
        kernels: static choice of implementations.

    Returns:
        `(ids, weights, marks)`; with a lossless setting ids and weights are the router's.
    """
    ids, weights = routed.ids, routed.weights
    if lossy.prior:
        ids, weights = reroute(lossy, spec, params, routed, resident, valid_T, dtype, kernels)
    held = jax.lax.dynamic_index_in_dim(marks["held"], moe_layer, 0, keepdims=False)
    found = decide(lossy, moe_layer, ids, weights, valid_T, resident, held, ordered)
    chosen = (ids[:, :, None] == routed.ids[:, None, :]).any(2)
    exact = (row_counts(routed.ids, valid_T, resident.shape[0]) > 0) & ~resident
    counts = {
        "pairs": jnp.broadcast_to(valid_T[:, None], ids.shape),
        "degraded": found.degraded,
        "skipped": found.skipped,
        "rerouted": ~chosen & ~found.skipped & valid_T[:, None],
        "exact": exact,
    }
    marks = marks | {name: marks[name].at[moe_layer].add(which.sum(dtype=jnp.int32)) for name, which in counts.items()}
    marks["width"] = jax.lax.dynamic_update_index_in_dim(marks["width"], found.width.astype(jnp.int8), moe_layer, 0)
    return found.ids, found.weights, marks


def reroute(
    lossy: Lossy, spec: RouterSpec, params: dict, routed: RouterOut, resident: Bool[Array, "E"], valid_T: Bool[Array, "T"], dtype, kernels: Kernels
) -> tuple[Int[Array, "T A"], Float[Array, "T A"]]:
    """The choice that favours experts that are there: the router's selection over lifted logits, its weights of the logits as they were.

    A token whose set of experts stays the same keeps its ids and weights, bit for bit. Others have the router's `kept` best experts and the best of
    the lifted ones, ordered by the scores as they were. Where the router limits groups, these are chosen by the lifted scores too.

    Args: see `degrade`.

    Raises:
        ValueError: a router that does not choose by top-k.
    """
    if spec.select != "topk":
        raise ValueError(f"prior = {lossy.prior} needs a router that chooses by top-k, not {spec.select!r}: give prior = 0")
    kept = min(lossy.kept, spec.active)
    favoured, _ = stages.select(spec, params, stages.scores_of(spec, lifted(lossy, routed.logits, resident), kernels))
    again = (favoured[:, :, None] == routed.ids[:, None, :kept]).any(2)
    turn = jnp.cumsum(~again, axis=1)
    taken = ~again & (turn <= spec.active - kept)
    experts = jnp.arange(spec.experts)
    chosen = ((favoured[:, :, None] == experts) & taken[:, :, None]).any(1) | (routed.ids[:, :kept, None] == experts).any(1)
    scores = stages.scores_of(spec, routed.logits, kernels)
    ids = jax.lax.top_k(jnp.where(chosen, stages.with_bias(spec, params, scores), -jnp.inf), spec.active)[1]
    weights = stages.finished(spec, params, stages.chosen_weights(spec, routed.logits, scores, None, ids, kernels), ids)
    if spec.weights_dtype == "model":
        weights = weights.astype(dtype).astype(jnp.float32)
    same = jnp.take_along_axis(chosen, routed.ids, axis=1).all(1, keepdims=True)
    ids = jnp.where(same, routed.ids, ids)
    return ids, jnp.where(same, routed.weights, jnp.where(valid_T[:, None], weights, 0.0))


def lifted(lossy: Lossy, logits: Float[Array, "T E"], resident: Bool[Array, "E"]) -> Float[Array, "T E"]:
    """Logits, those of experts that are there higher by `prior` times the range of their token's, as far as `reach` goes."""
    lift = jnp.broadcast_to(resident, logits.shape)
    if lossy.reach:
        best = jnp.argsort(jnp.argsort(-logits, axis=1, stable=True), axis=1)
        lift = lift & (best < lossy.reach)
    span = logits.max(1, keepdims=True) - logits.min(1, keepdims=True)
    return logits + jnp.where(lift, lossy.prior * span, 0.0)


def decide(
    lossy: Lossy,
    moe_layer: Int[Array, ""] | int,
    ids_TA: Int[Array, "T A"],
    weights_TA: Float[Array, "T A"],
    valid_T: Bool[Array, "T"],
    resident: Bool[Array, "E"],
    held: Int[Array, "E"],
    ordered: bool,
) -> Decision:
    """Which experts are brought, at how many bits, and which are left out.

    Demands are made token by token, and an expert's highest one wins: one that any token wants high comes as it is stored for all, and one is left
    out only if it is missing and nobody wants more of it than that. What is there is always used. The weights of those that remain stay as they are:
    HOBBIT does not share out what is left out.

    Args:
        held: bits of the experts that are there.
        The others: see `degrade`.
    """
    experts = resident.shape[0]
    asked_TAE = (ids_TA[:, :, None] == jnp.arange(experts)) & valid_T[:, None, None]
    best_E = jnp.max(jnp.where(asked_TAE, demands(lossy, weights_TA)[:, :, None], -1), axis=(0, 1))
    width = _wanted(lossy, moe_layer, best_E)
    if lossy.unpopular and ordered:
        missing = (best_E > SKIP) & ~(resident & (_size(held) >= _size(width)))
        few = _least_popular(row_counts(ids_TA, valid_T, experts), missing, lossy.unpopular)
        width = jnp.where(few, _narrower(width, lossy.unpopular_bits), width)
    there = resident & ((_size(held) >= _size(width)) | (best_E == SKIP))
    width = jnp.where(there, held, width)
    skipped = ((best_E == SKIP) & ~resident)[ids_TA] & valid_T[:, None]
    degraded = (width != STORED)[ids_TA] & valid_T[:, None] & ~skipped
    if lossy.lossless or (lossy.low >= 1 and not lossy.cold):  # nothing can be left out
        return Decision(ids_TA, weights_TA, jnp.zeros_like(skipped), width, degraded)
    strongest = jnp.take_along_axis(ids_TA, jnp.argmax(jnp.where(skipped, -1.0, jnp.abs(weights_TA)), axis=1, keepdims=True), axis=1)
    return Decision(jnp.where(skipped, strongest, ids_TA), jnp.where(skipped, 0.0, weights_TA), skipped, width, degraded)


def demands(lossy: Lossy, weights_TA: Float[Array, "T A"]) -> Int[Array, "T A"]:
    """What each assignment wants of an expert that is missing: `HIGH`, `LOW` or `SKIP`.

    Experts are ordered by weight, and of two alike the first is the stronger.
    """
    share, stronger = shares(weights_TA)
    level = jnp.full(weights_TA.shape, HIGH)
    if lossy.high < 1:
        level = jnp.where(stronger <= lossy.high, HIGH, jnp.where(stronger <= lossy.low, LOW, SKIP) if lossy.low < 1 else LOW)
    if lossy.cold:
        level = jnp.where(share < lossy.cold / weights_TA.shape[1], SKIP, level)
    return jnp.where(_stronger(weights_TA).any(2), level, HIGH)


def shares(weights_TA: Float[Array, "T A"]) -> tuple[Float[Array, "T A"], Float[Array, "T A"]]:
    """Each weight's share of its token's, by size, and that of the stronger ones together (HOBBIT's s_i)."""
    size = jnp.abs(weights_TA)
    share = size / jnp.maximum(size.sum(1, keepdims=True), jnp.finfo(size.dtype).tiny)
    return share, jnp.where(_stronger(weights_TA), share[:, None, :], 0.0).sum(2)


def settle(marks: Marks, moe_layer: Int[Array, ""] | int, choice: Choice) -> tuple[Choice, Marks]:
    """What becomes of a choice where hits are held at fewer bits than they are wanted at: they are misses, to be brought into the slots they have.

    One that has to make room in the same step is used as it lies instead: its slot has a new owner by the end of the step.

    Args:
        marks: of `degrade`.
        moe_layer: which MoE layer; may be traced.
        choice: of `choose`, slots having been given out by it.

    Returns:
        The choice, with such hits in `enter`, and the marks with `held` and `loads`.
    """
    held, width = (jax.lax.dynamic_index_in_dim(marks[name], moe_layer, 0, keepdims=False) for name in ("held", "width"))
    short = choice.hit & ~choice.leave & (_size(held) < _size(width))
    choice = choice._replace(hit=choice.hit & ~short, enter=choice.enter | short)
    brought = choice.enter | choice.stream
    held = jnp.where(choice.enter, width, jnp.where(choice.leave, jnp.int8(STORED), held))
    by_width = (width[:, None] == jnp.arange(WIDTHS[-1] + 1)) & brought[:, None]
    return choice, marks | {
        "held": jax.lax.dynamic_update_index_in_dim(marks["held"], held, moe_layer, 0),
        "loads": marks["loads"].at[moe_layer].add(by_width.sum(0, dtype=jnp.int32)),
    }


def _wanted(lossy: Lossy, moe_layer, best_E: Int[Array, "E"]) -> Int[Array, "E"]:
    """Bits by the demand and by the table of widths."""
    width = jnp.full(best_E.shape, STORED, jnp.int32)
    if lossy.widths:
        width = jnp.asarray(lossy.widths, jnp.int32)[moe_layer]
    return jnp.where(best_E == LOW, _narrower(width, lossy.low_bits), width)


def _least_popular(rows_E: Int[Array, "E"], missing: Bool[Array, "E"], share: float) -> Bool[Array, "E"]:
    """The share (rounded down) of the missing experts that fewest tokens ask for; of those alike, the ones with the highest ids."""
    order = jnp.arange(rows_E.shape[0])
    less = (rows_E[None, :] < rows_E[:, None]) | ((rows_E[None, :] == rows_E[:, None]) & (order[None, :] > order[:, None]))
    turn = jnp.sum(less & missing[None, :], axis=1)
    return missing & (turn < jnp.floor(share * missing.sum()))


def _stronger(weights_TA: Float[Array, "T A"]) -> Bool[Array, "T A A"]:
    """[t, i, j]: j is stronger than i."""
    size, order = jnp.abs(weights_TA), jnp.arange(weights_TA.shape[1])
    tie = (size[:, None, :] == size[:, :, None]) & (order[None, :] < order[:, None])
    return (size[:, None, :] > size[:, :, None]) | tie


def _size(width: Int[Array, "..."]) -> Int[Array, "..."]:
    """Bits as a number to compare."""
    return jnp.where(width == STORED, _ALL, width)


def _narrower(width: Int[Array, "..."], bits: int) -> Int[Array, "..."]:
    return jnp.where(_size(width) > bits, bits, width)
