"""A bank whose experts live in host memory and are computed with from a few device slots, inside the compiled step.

A layer learns which experts its tokens ask for, brings those that are not in one of its slots over the link, and runs the grouped matmul by slot id
on the flat pool: the kernel knows nothing of the cache, so that the results are the resident bank's, bit for bit.

Slots are numbered globally, layer after layer (layers may have different numbers of them), and staging slots, which all layers share, come last.
`slot_of_expert` is the only table of what lies where. A layer's slots fill up from its first to its last and are never emptied, only taken over, so
that the number of experts a layer holds says which of its slots are free. Under a policy that shares one pool all of that holds of all layers' slots
together: whose they are changes as the experts of one layer make room for those of another.

A step may ask a layer for more experts than it has slots, as a prompt does. Then it goes by *waves*: first the experts that are there and those whose
slots are free, then those that take the slots of experts which have been used. Experts that do not stay pass through the staging slots, those that
most tokens ask for first. Or, where the compiler lets a read of host memory run beside computing, missing experts go one by one, each read while the
one before it is computed. Every expert crosses the link at most once a step, and outputs are combined once, in one order, so that the result is the
same bits either way.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from jaxmoe import formats
from jaxmoe.experts import lossy as ladder
from jaxmoe.experts.dispatch import dispatch, of_experts, outputs_of, rows_of, weighted_sum
from jaxmoe.experts.ranked import in_order, rank, row_counts
from jaxmoe.residency import Choice, Knowledge, Shape, choose, choose_shared, find_policy
from jaxmoe.residency.distance import HIGH
from jaxmoe.residency.policy import Tables, layer_row, with_row
from pallas_kernels.dispatch import Kernels
from pallas_kernels.expert_fill.api import fill, land, read_record
from pallas_kernels.grouped_matmul.api import grouped_swiglu, swiglu_rows
from pallas_kernels.grouped_matmul.biases import Biases
from pallas_kernels.grouped_matmul.glu import GLUS

Pools = tuple[Num[Array, "Z D two F"], Num[Array, "Z F D"]]


@flax.struct.dataclass
class SlotState:
    """What a slot bank carries from step to step, donated and updated in place.

    Attributes:
        pools: [Z, D, 2, F] and [Z, F, D]; slots that hold nothing hold NaN.
        slot_of_expert: int32 [L, E], -1 for an expert that is not on the device.
        tables: the residency policy's.
        requests, hits, loads: int32 [L] since the start: distinct experts asked for per step, those of them that were there, and records read from
            the store, which are counted where they are read.
        marks: of a lossy bank (`jaxmoe.experts.lossy`); else empty.
    """

    pools: Pools
    slot_of_expert: Int[Array, "L E"]
    tables: Tables
    requests: Int[Array, "L"]
    hits: Int[Array, "L"]
    loads: Int[Array, "L"]
    marks: dict[str, Array] = flax.struct.field(default_factory=dict)


class Placement(NamedTuple):
    """Where the experts that a step asks a layer for are computed: `slot` (-1 for others) and `wave`."""

    slot: Int[Array, "E"]
    wave: Int[Array, "E"]
    resident: Int[Array, "E"]
    """`slot_of_expert` after the step."""


@flax.struct.dataclass
class SlotBank:
    """Attributes:
    store: [L * E, rows, columns] in `pinned_host`, one record an expert (`jaxmoe.experts.host_store`); None where the host sends experts itself.
    state: what is carried; None in the fixed part.
    knowledge: what the policy is told beforehand.
    slots: how many each layer has.
    staging: slots that all layers share, for experts that pass through.
    experts: E.
    entries: shapes of one expert's entries in the pools.
    layout: the order of their axes (`jaxmoe.formats.ExpertLayout`).
    dtype: in which weights are held, 'float32' or 'bfloat16'.
    activation: what joins gate and up (`GLUS`).
    policy: which experts stay.
    fill: how misses are brought (`pallas_kernels.expert_fill`); None lets the backend choose.
    ordered: the tokens of a step come one after another, as in a prompt, rather than side by side.
    read_ahead: where a step asks for more experts than there are slots, read each missing one while the one before it is computed, instead of going
        by waves; None for what suits the backend: prompts on a TPU, where reads of host memory run beside computing.
    lossy: what may be left out or brought in fewer bits (`jaxmoe.experts.lossy.Lossy`); None for nothing.
    poison: staging slots are overwritten with NaN when they have been used, so that a wrong read shows. For tests.
    """

    store: Num[Array, "X R C"] | None
    state: SlotState | None = None
    knowledge: Knowledge = Knowledge()
    slots: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    staging: int = flax.struct.field(pytree_node=False, default=2)
    experts: int = flax.struct.field(pytree_node=False, default=0)
    entries: tuple[tuple[int, ...], ...] = flax.struct.field(pytree_node=False, default=())
    layout: formats.ExpertLayout = flax.struct.field(pytree_node=False, default="d2f")
    dtype: str = flax.struct.field(pytree_node=False, default="float32")
    activation: str = flax.struct.field(pytree_node=False, default="silu")
    policy: str = flax.struct.field(pytree_node=False, default="lfu")
    fill: str | None = flax.struct.field(pytree_node=False, default=None)
    ordered: bool = flax.struct.field(pytree_node=False, default=False)
    read_ahead: bool | None = flax.struct.field(pytree_node=False, default=None)
    lossy: Any = flax.struct.field(pytree_node=False, default=None)
    poison: bool = flax.struct.field(pytree_node=False, default=False)

    def logical_axes(self) -> dict[str, tuple[str | None, ...]]:
        """The logical name of every axis of every leaf of the fixed part."""
        return {"store": ("experts", None, None)}

    def split(self) -> tuple[SlotBank, SlotState | None]:
        """`(fixed, moving)`: the store and what is carried."""
        return dataclasses.replace(self, state=None), self.state

    def join(self, moving: SlotState) -> SlotBank:
        """The bank with this state."""
        return dataclasses.replace(self, state=moving)

    def in_order(self) -> SlotBank:
        """The bank for steps whose tokens come one after another."""
        return dataclasses.replace(self, ordered=True)

    @property
    def _carried(self) -> SlotState:
        assert self.state is not None, "a bank's fixed part can't compute: join it with a state"
        return self.state

    @property
    def base(self) -> tuple[int, ...]:
        """Each layer's first slot, and at last the first staging slot."""
        return tuple(int(b) for b in np.cumsum((0, *self.slots)))

    def init_state(self) -> SlotState:
        """A state with nothing on the device: pools of NaN."""
        total = self.base[-1] + self.staging
        dtype = formats.leaf_dtype(self.dtype)
        pools = tuple(jnp.full((total, *entry), _nan(dtype), dtype) for entry in self.entries)
        return self._without_experts(pools)  # type: ignore[arg-type]

    def forget(self, state: SlotState) -> SlotState:
        """The state with empty tables and counters, and the pools as they are."""
        return self._without_experts(state.pools)

    def new_text(self, state: SlotState) -> SlotState:
        """The state for another text: experts stay where they are, and policies that count by text begin anew."""
        restart = find_policy(self.policy).restart
        return state if restart is None else dataclasses.replace(state, tables=restart(state.tables))

    def counters(self, state: SlotState) -> dict[str, np.ndarray]:
        """`requests`, `hits` and `loads` by layer since the start, on the host; of a lossy bank also what it gave up."""
        return {name: np.array(getattr(state, name)) for name in ("requests", "hits", "loads")} | ladder.counted(state.marks)

    def _without_experts(self, pools: Pools) -> SlotState:
        layers = len(self.slots)
        tables = find_policy(self.policy).tables(Shape(layers, self.experts, self.slots), self.knowledge)
        requests, hits, loads = (jnp.zeros(layers, jnp.int32) for _ in range(3))
        marks = ladder.init_marks(self.lossy, layers, self.experts)
        return SlotState(pools, jnp.full((layers, self.experts), -1, jnp.int32), tables, requests, hits, loads, marks)

    def expert_ffn(
        self,
        moe_layer: Int[Array, ""] | int,
        x_TD: Float[Array, "T D"],
        ids_TA: Int[Array, "T A"],
        weights_TA: Float[Array, "T A"],
        valid_T: Bool[Array, "T"],
        kernels: Kernels,
        biases: Biases | None = None,
    ) -> tuple[Float[Array, "T D"], SlotBank, dict]:
        """See `jaxmoe.experts.expert_ffn`."""
        with jax.named_scope("resolve"):
            used_SE = uses(ids_TA, valid_T, self.experts, self.ordered)
            state, choice, place = self.resolve(moe_layer, used_SE, ids_TA, valid_T, weights_TA)
        ahead = self.ordered and kernels.backend == "tpu" if self.read_ahead is None else self.read_ahead
        run = self._run_at_once if self._at_once(ids_TA.size) else self._run_ahead if ahead else self._run_in_waves
        y, pools, loads = run(moe_layer, state.pools, choice, place, x_TD, ids_TA, valid_T, kernels, biases)
        y_TD = weighted_sum(y.astype(x_TD.dtype).astype(jnp.float32), weights_TA, valid_T)
        state = dataclasses.replace(state, pools=pools, loads=state.loads.at[moe_layer].add(loads))
        return y_TD.astype(x_TD.dtype), dataclasses.replace(self, state=state), {}

    def degrade(
        self, moe_layer, routed, router, params, valid_T, dtype, kernels: Kernels
    ) -> tuple[Int[Array, "T A"], Float[Array, "T A"], SlotBank]:
        """What a lossy bank makes of a layer's routing: ids, weights, and the bank with its marks; see `jaxmoe.experts.lossy`."""
        there = jax.lax.dynamic_index_in_dim(self._carried.slot_of_expert, moe_layer, 0, keepdims=False) >= 0
        ids, weights, marks = ladder.degrade(
            self.lossy, self._carried.marks, moe_layer, there, routed, router, params, valid_T, self.ordered, dtype, kernels
        )
        return ids, weights, dataclasses.replace(self, state=dataclasses.replace(self._carried, marks=marks))

    # --- Which expert goes where

    def resolve(self, moe_layer, used_SE, ids_TA, valid_T, weights_TA=None) -> tuple[SlotState, Choice, Placement]:
        """Updates tables and counters, and says where each expert that the step asks for is to be computed."""
        state, policy = self._carried, find_policy(self.policy)
        need = used_SE.any(0)
        high_SE = used_SE if weights_TA is None else high_uses(ids_TA, weights_TA, valid_T, self.experts, self.ordered)
        tables = with_row(state.tables, moe_layer, policy.touch(layer_row(state.tables, moe_layer), used_SE, high_SE))
        worth, where_LE = policy.worth(tables, moe_layer), state.slot_of_expert
        if policy.shared:
            choice, leave_LE = choose_shared(worth, where_LE >= 0, need, moe_layer, self.base[-1], policy.bypass, ids_TA.size)
            place, where_LE = place_shared(choice, leave_LE, where_LE, need, moe_layer, self.base[-1])
        else:
            slots, base = (_of_layer(values, moe_layer) for values in (self.slots, self.base))
            where = jax.lax.dynamic_index_in_dim(where_LE, moe_layer, 0, keepdims=False)
            choice = choose(worth, where >= 0, need, slots, policy.bypass)
            place = place_all(choice, where, need, base, base + slots)
            where_LE = jax.lax.dynamic_update_index_in_dim(where_LE, place.resident, moe_layer, 0)
        if not self._at_once(ids_TA.size):
            place = self._in_waves(choice, place, row_counts(ids_TA, valid_T, self.experts))
        marks = state.marks
        if self.lossy is not None:  # after slots were given out: an expert that is brought again, at more bits, keeps its own
            choice, marks = ladder.settle(marks, moe_layer, choice)
        state = dataclasses.replace(
            state,
            marks=marks,
            slot_of_expert=where_LE,
            tables=tables,
            requests=state.requests.at[moe_layer].add(need.sum(dtype=jnp.int32)),
            hits=state.hits.at[moe_layer].add(choice.hit.sum(dtype=jnp.int32)),
        )
        return state, choice, place

    @property
    def _own_slots(self) -> int:
        """Slots that every layer can fill by itself: of a shared pool all."""
        return self.base[-1] if find_policy(self.policy).shared else min(self.slots)

    def _at_once(self, assignments: int) -> bool:
        """Whether a step of so many token-expert pairs has a slot for every expert it asks for."""
        return assignments <= self._own_slots and self._all_enter

    @property
    def _all_enter(self) -> bool:
        """Whether experts that are asked for enter as far as there are slots: none is turned away, and no slot is kept by a pinned one."""
        return not find_policy(self.policy).bypass and self.knowledge.pinned is None

    def _in_waves(self, choice: Choice, first: Placement, rows: Int[Array, "E"]) -> Placement:
        """Staging slots for what streams: by popularity, `staging` experts a wave."""
        before = (rows[None, :] > rows[:, None]) | ((rows[None, :] == rows[:, None]) & _earlier(self.experts))
        turn = jnp.sum(before & choice.stream[None, :], axis=1, dtype=jnp.int32)
        slot = jnp.where(choice.stream, self.base[-1] + turn % self.staging, first.slot)
        return Placement(slot, jnp.where(choice.stream, turn // self.staging, first.wave), first.resident)

    # --- Filling and computing

    def _run_at_once(self, moe_layer, pools, choice: Choice, place: Placement, x_TD, ids_TA, valid_T, kernels, biases: Biases | None):
        """Every expert that is asked for has a slot: fill, then compute."""
        assert self.store is not None
        ids, n = _compact(choice.enter, min(ids_TA.size, self.experts))
        pools, loads = fill(pools, self.store, moe_layer * self.experts + ids, place.slot[ids], 0, n, kernels, self.fill)
        glu = GLUS[self.activation]
        with jax.named_scope("compute"):
            if x_TD.shape[0] == 1:
                slots, own = jnp.maximum(place.slot[ids_TA[0]], 0), of_experts(biases, ids_TA[0])
                return swiglu_rows(x_TD, pools[0], pools[1], slots, glu, kernels, self.layout, own)[None], pools, loads
            plan = dispatch(ids_TA, valid_T, self.experts)
            slots = jnp.maximum(place.slot, 0)
            y = grouped_swiglu(rows_of(x_TD, plan), pools[0], pools[1], slots, plan.sizes_E, glu, kernels, layout=self.layout, biases=biases)
            return outputs_of(y, plan), pools, loads

    def _run_in_waves(self, moe_layer, pools, choice: Choice, place: Placement, x_TD, ids_TA, valid_T, kernels, biases: Biases | None):
        """Fills and computes wave by wave; rows lie in the order of the waves."""
        assert self.store is not None
        store, e, glu = self.store, self.experts, GLUS[self.activation]
        miss, need = choice.enter | choice.stream, place.slot >= 0
        wave = jnp.where(need, place.wave, e)
        order = jnp.lexsort((-row_counts(ids_TA, valid_T, e), wave))  # experts, wave by wave, the most asked for first
        ranked, waves = in_order(order, choice, place.slot, x_TD, ids_TA, valid_T, biases), wave[order]
        missed, _ = _compact(miss[order], min(ids_TA.size, e))  # ranks of the misses, in order
        until = jnp.cumsum(jnp.zeros(e + 1, jnp.int32).at[wave].add(miss, mode="drop"))  # misses up to and including each wave
        most = self.base[-1] if find_policy(self.policy).shared else max(self.slots)
        groups = min(e, most + self.staging)

        def one_wave(w, carry):
            y, pools, loads = carry
            if self.poison:
                pools = self._poisoned(pools)
            low = jnp.where(w == 0, 0, until[jnp.maximum(w - 1, 0)])
            pools, n = fill(pools, store, moe_layer * e + order[missed], ranked.slots[missed], low, until[w], kernels, self.fill)
            first = jnp.minimum(jnp.sum(waves < w, dtype=jnp.int32), e - groups)

            def part(values):
                return jax.lax.dynamic_slice_in_dim(values, first, groups)

            sizes = jnp.where(part(waves) == w, part(ranked.sizes), 0)
            with jax.named_scope("compute"):
                slots, starts, own = jax.tree.map(part, (ranked.slots, ranked.starts, ranked.biases))
                y = grouped_swiglu(ranked.x, pools[0], pools[1], slots, sizes, glu, kernels, starts, y, self.layout, e, own)
            y, pools = _after(y, pools, kernels)
            return y, pools, loads + n

        count = jnp.max(jnp.where(need, place.wave, -1)) + 1
        # On a GPU a loop of unknown length would read its predicate back to the host.
        length = self.most_waves(ids_TA.size) if kernels.backend == "gpu" else count
        y, pools, loads = jax.lax.fori_loop(0, length, one_wave, (ranked.empty(), pools, jnp.int32(0)))
        if self.poison:
            pools = self._poisoned(pools)
        return y[ranked.row], pools, loads

    def _run_ahead(self, moe_layer, pools, choice: Choice, place: Placement, x_TD, ids_TA, valid_T, kernels, biases: Biases | None):
        """Computes the experts that are there, then the missing ones one by one, reading each while the one before it is computed."""
        assert self.store is not None
        store, how = self.store, (GLUS[self.activation], kernels, self.layout)
        ranked = rank(choice, place.slot, x_TD, ids_TA, valid_T, biases)
        records = moe_layer * self.experts + jnp.roll(ranked.experts, -ranked.hits)
        slots = jnp.roll(ranked.slots, -ranked.hits)
        y, some = ranked.compute_hits(pools, ranked.empty(), *how), jnp.minimum(ranked.misses, 1)
        y, pools = _after(y, pools, kernels)
        pools, loads = fill(pools, store, records, slots, 0, some, kernels, self.fill)

        def one_miss(i, carry):
            y, pools, loads = carry
            record = read_record(store, records[i + 1])
            with jax.named_scope("compute"):
                y = ranked.compute_miss(pools, i, y, *how)
            y, pools = _after(y, pools, kernels)
            return y, land(pools, record, slots[i + 1]), loads + 1

        y, pools, loads = jax.lax.fori_loop(0, ranked.misses - 1, one_miss, (y, pools, loads))
        last = (jnp.arange(self.experts) == ranked.hits + ranked.misses - 1) & (ranked.misses > 0)
        y = ranked.compute(pools, last, y, *how)
        if self.poison:
            pools = self._poisoned(pools)
        return y[ranked.row], pools, loads

    def most_waves(self, assignments: int) -> int:
        """The most waves that a step with so many token-expert pairs can need."""
        asked = min(assignments, self.experts)
        stay = min(self._own_slots, asked) if self._all_enter else 0
        return max(2, -(-(asked - stay) // self.staging))

    def _poisoned(self, pools: Pools) -> Pools:
        """The pools with NaN in the staging slots."""
        return tuple(p.at[self.base[-1] :].set(_nan(p.dtype)) for p in pools)  # type: ignore[return-value]

    @property
    def device_bytes(self) -> int:
        """Bytes of the pools: all slots of all layers, and staging."""
        return (self.base[-1] + self.staging) * self.record_bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of one expert."""
        return sum(map(math.prod, self.entries)) * formats.leaf_dtype(self.dtype).itemsize


def _after(y, pools: tuple[Any, ...], kernels: Kernels) -> tuple[Any, Any]:
    """Pools that are changed only when y is there, which was computed from them. Without it XLA for TPUs may copy them, so as to be free to change
    them earlier: it does where memory is short, in every turn of a loop."""
    return jax.lax.optimization_barrier((y, pools)) if kernels.backend == "tpu" else (y, pools)


def uses(ids_TA: Int[Array, "T A"], valid_T: Bool[Array, "T"], experts: int, ordered: bool) -> Bool[Array, "S E"]:
    """Which experts each step asks for: one step for all tokens, or one for each where they come in order."""
    chosen = (ids_TA[:, :, None] == jnp.arange(experts)) & valid_T[:, None, None]
    return chosen.any(1) if ordered else chosen.any((0, 1))[None]


def high_uses(ids_TA, weights_TA: Float[Array, "T A"], valid_T, experts: int, ordered: bool) -> Bool[Array, "S E"]:
    """`uses` that matter: of a token's experts, those whose stronger ones have at most `HIGH` of its weight."""
    share = weights_TA / jnp.maximum(weights_TA.sum(1, keepdims=True), 1e-9)
    stronger = jnp.sum(jnp.where(share[:, None, :] > share[:, :, None], share[:, None, :], 0.0), axis=2)
    return uses(jnp.where(stronger <= HIGH, ids_TA, -1), valid_T, experts, ordered)


def place_all(choice: Choice, where: Int[Array, "E"], need: Bool[Array, "E"], first, stop) -> Placement:
    """Slots for the experts that stay: hits where they are, those that enter in slots that leavers give up or that are free.

    Slots that can be taken at once come first: those of leavers nobody asked for, then the free ones. A leaver that was asked for gives its slot up
    when it has been used, so that whoever takes it is computed in the second wave.
    """
    early, late = choice.leave & ~need, choice.leave & need
    n_early, n_free = early.sum(dtype=jnp.int32), stop - first - jnp.sum(where >= 0, dtype=jnp.int32)
    given_up = jnp.where(early, _nth(early), n_early + n_free + _nth(late))
    turn = _nth(choice.enter)
    takes = (given_up[None, :] == turn[:, None]) & choice.leave[None, :]
    taken = jnp.sum(jnp.where(takes, where[None, :], 0), axis=1, dtype=jnp.int32)
    free = (turn >= n_early) & (turn < n_early + n_free)
    slot = jnp.where(free, stop - n_free + turn - n_early, taken)
    entering = jnp.where(choice.enter, slot, -1)
    resident = jnp.where(choice.enter, slot, jnp.where(choice.leave, -1, where))
    wave = jnp.where(choice.enter & (turn >= n_early + n_free), 1, 0)
    return Placement(jnp.where(choice.hit, where, entering), wave, resident)


def place_shared(
    choice: Choice, leave_LE: Bool[Array, "L E"], where_LE: Int[Array, "L E"], need: Bool[Array, "E"], layer, slots: int
) -> tuple[Placement, Int[Array, "L E"]]:
    """`place_all` in one pool of all layers; the table of slots afterwards comes with it."""
    layers, experts = where_LE.shape
    where = jax.lax.dynamic_index_in_dim(where_LE, layer, 0, keepdims=False)
    late_LE = leave_LE & (jnp.arange(layers) == layer)[:, None] & need[None, :]
    early = (leave_LE & ~late_LE).reshape(-1)
    n_early, held = early.sum(dtype=jnp.int32), jnp.sum(where_LE >= 0, dtype=jnp.int32)
    n_free = slots - held
    turn_of_slot = jnp.where(early, _nth(early), jnp.where(late_LE.reshape(-1), n_early + n_free + _nth(late_LE.reshape(-1)), experts))
    given_up = jnp.zeros(experts, jnp.int32).at[turn_of_slot].set(where_LE.reshape(-1), mode="drop")
    turn = _nth(choice.enter)
    free = (turn >= n_early) & (turn < n_early + n_free)
    slot = jnp.where(free, held + turn - n_early, given_up[jnp.minimum(turn, experts - 1)])
    resident_LE = jnp.where(leave_LE, -1, where_LE)
    own = jnp.where(choice.enter, slot, jax.lax.dynamic_index_in_dim(resident_LE, layer, 0, keepdims=False))
    wave = jnp.where(choice.enter & (turn >= n_early + n_free), 1, 0)
    place = Placement(jnp.where(choice.hit, where, jnp.where(choice.enter, slot, -1)), wave, own)
    return place, jax.lax.dynamic_update_index_in_dim(resident_LE, own, layer, 0)


def _nth(members: Bool[Array, "E"]) -> Int[Array, "E"]:
    """How many members come before each element."""
    return jnp.cumsum(members, dtype=jnp.int32) - members


def _earlier(n: int) -> Bool[Array, "n n"]:
    """[i, j]: j < i."""
    return jnp.arange(n)[None, :] < jnp.arange(n)[:, None]


def _compact(members: Bool[Array, "E"], most: int) -> tuple[Int[Array, "M"], Int[Array, ""]]:
    """Members' indices in order, in a list of length `most` (0 past the last), and how many there are."""
    at = (_nth(members)[None, :] == jnp.arange(most)[:, None]) & members[None, :]
    return jnp.sum(jnp.where(at, jnp.arange(members.shape[0])[None, :], 0), axis=1, dtype=jnp.int32), members.sum(dtype=jnp.int32)


def _of_layer(values: tuple[int, ...], layer):
    """values[layer], for a layer that may be traced."""
    if isinstance(layer, int) or len(set(values)) == 1:
        return values[layer if isinstance(layer, int) else 0]
    return jnp.asarray(values, jnp.int32)[layer]


def _nan(dtype) -> Array:
    """NaN as a leaf of this dtype holds it."""
    return jnp.uint16(0x7FC0) if dtype == jnp.uint16 else jnp.float32("nan")
