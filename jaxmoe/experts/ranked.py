"""A layer's experts one after another: those that are there first, then the missing ones, those first that most tokens ask for.

So a prompt computes with what it has while the rest is on its way, and each missing expert crosses the link once, with all of its tokens waiting for
it. Both the compiled step that reads ahead and the host-driven mode go by it.
"""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from jaxmoe.experts.dispatch import dispatch, of_experts, rows_of
from jaxmoe.formats import ExpertLayout
from jaxmoe.residency import Choice
from pallas_kernels.dispatch import ROW_SLACK, Kernels
from pallas_kernels.grouped_matmul.api import grouped_swiglu
from pallas_kernels.grouped_matmul.biases import Biases
from pallas_kernels.grouped_matmul.glu import Glu


@flax.struct.dataclass
class Ranked:
    """Attributes:
    x: [M + slack, D], the tokens' rows sorted by the rank of their expert.
    row: where each token's assignments went.
    experts: the expert of each rank.
    slots: and the slot that it is computed in.
    starts, sizes: rows of each rank.
    hits, misses: how many ranks are hits, and how many after them are misses.
    biases: of each rank's expert, where experts have any.
    """

    x: Float[Array, "M D"]
    row: Int[Array, "T A"]
    experts: Int[Array, "E"]
    slots: Int[Array, "E"]
    starts: Int[Array, "E"]
    sizes: Int[Array, "E"]
    hits: Int[Array, ""]
    misses: Int[Array, ""]
    biases: Biases | None = None

    def empty(self) -> Float[Array, "M D"]:
        """What results are written into, rank by rank."""
        # A plain constant would be shared by all layers, and copied for each.
        return jnp.full(self.x.shape, jnp.minimum(self.hits, 0), jnp.float32)

    def compute(
        self,
        pools: tuple[Num[Array, "Z D two F"], Num[Array, "Z F D"]],
        ranks: Bool[Array, "E"],
        y: Float[Array, "M D"],
        glu: Glu,
        kernels: Kernels,
        layout: ExpertLayout,
    ) -> Float[Array, "M D"]:
        """`y` with the rows of these ranks, which come after those that are in it already."""
        sizes = jnp.where(ranks, self.sizes, 0)
        return grouped_swiglu(self.x, pools[0], pools[1], self.slots, sizes, glu, kernels, self.starts, y, layout, self.slots.shape[0], self.biases)

    def compute_hits(self, pools, y, glu: Glu, kernels: Kernels, layout: ExpertLayout) -> Float[Array, "M D"]:
        """The rows of the experts that are there."""
        return self.compute(pools, jnp.arange(self.slots.shape[0]) < self.hits, y, glu, kernels, layout)

    def compute_miss(self, pools, i: Int[Array, ""], y, glu: Glu, kernels: Kernels, layout: ExpertLayout) -> Float[Array, "M D"]:
        """The rows of the i-th missing expert, which is in its slot by now."""
        return self.compute(pools, jnp.arange(self.slots.shape[0]) == self.hits + i, y, glu, kernels, layout)


def rank(
    choice: Choice,
    slot_E: Int[Array, "E"],
    x_TD: Float[Array, "T D"],
    ids_TA: Int[Array, "T A"],
    valid_T: Bool[Array, "T"],
    biases: Biases | None = None,
) -> Ranked:
    """Ranks the experts of a step: hits, then misses by popularity, then those that nobody asks for.

    Args:
        choice: which of them are there, and which are missing.
        slot_E: where each is to be computed, -1 for those that nobody asks for. One after another, several may have the same slot.
        x_TD, ids_TA, valid_T, biases: as for `expert_ffn`.
    """
    rows = row_counts(ids_TA, valid_T, slot_E.shape[0])
    order = jnp.lexsort((-rows, choice.enter | choice.stream, slot_E < 0))
    return in_order(order, choice, slot_E, x_TD, ids_TA, valid_T, biases)


def in_order(
    order: Int[Array, "E"], choice: Choice, slot_E: Int[Array, "E"], x_TD, ids_TA: Int[Array, "T A"], valid_T, biases: Biases | None = None
) -> Ranked:
    """The experts ranked in a given order; see `rank`."""
    experts = slot_E.shape[0]
    place = jnp.zeros(experts, jnp.int32).at[order].set(jnp.arange(experts, dtype=jnp.int32), unique_indices=True)
    plan = dispatch(place[ids_TA], valid_T, experts)
    x = jnp.pad(rows_of(x_TD, plan), ((0, ROW_SLACK), (0, 0)))
    starts, slots = jnp.cumsum(plan.sizes_E) - plan.sizes_E, jnp.maximum(slot_E[order], 0)
    hits, misses = choice.hit.sum(dtype=jnp.int32), (choice.enter | choice.stream).sum(dtype=jnp.int32)
    return Ranked(x, plan.row_TA, order.astype(jnp.int32), slots, starts, plan.sizes_E, hits, misses, of_experts(biases, order))


def row_counts(ids_TA: Int[Array, "T A"], valid_T: Bool[Array, "T"], experts: int) -> Int[Array, "E"]:
    """How many token-expert pairs each expert has."""
    return jnp.sum((ids_TA[:, :, None] == jnp.arange(experts)) & valid_T[:, None, None], axis=(0, 1), dtype=jnp.int32)
