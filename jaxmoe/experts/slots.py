"""A bank whose experts live in host memory and are computed with from a few device slots, inside the compiled step.

A layer learns which experts its tokens ask for, brings those that are not in one of its slots over the link, and runs the grouped matmul by slot id
on the flat pool: the kernel knows nothing of the cache, so that the results are the resident bank's, bit for bit.

Slots are numbered globally, layer after layer (layers may have different numbers of them), and staging slots, which all layers share, come last.
`slot_of_expert` is the only table of what lies where. A layer's slots fill up from its first to its last and are never emptied, only taken over, so
that the number of experts a layer holds says which of its slots are free.

A step may ask a layer for more experts than it has slots, as a prompt does. Then it goes by *waves*: first the experts that are there and those whose
slots are free, then those that take the slots of experts which have been used. Experts that do not stay pass through the staging slots, those that
most tokens ask for first. Or, where the compiler lets a read of host memory run beside computing, missing experts go one by one, each read while the
one before it is computed. Every expert crosses the link at most once a step, and outputs are combined once, in one order, so that the result is the
same bits either way.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from jaxmoe import formats
from jaxmoe.experts.dispatch import dispatch, of_experts, rows_of, weighted_sum
from jaxmoe.experts.ranked import in_order, rank, row_counts
from jaxmoe.residency import Choice, choose, find_policy
from jaxmoe.residency.policies import Tables, layer_row, with_row
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
    """

    pools: Pools
    slot_of_expert: Int[Array, "L E"]
    tables: Tables
    requests: Int[Array, "L"]
    hits: Int[Array, "L"]
    loads: Int[Array, "L"]


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
    profile: [L, E] how much each expert is used, for policies that need it.
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
    poison: staging slots are overwritten with NaN when they have been used, so that a wrong read shows. For tests.
    """

    store: Num[Array, "X R C"] | None
    state: SlotState | None = None
    profile: Float[Array, "L E"] | None = None
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

    def counters(self, state: SlotState) -> dict[str, np.ndarray]:
        """`requests`, `hits` and `loads` by layer since the start, on the host."""
        return {name: np.array(getattr(state, name)) for name in ("requests", "hits", "loads")}

    def _without_experts(self, pools: Pools) -> SlotState:
        layers = len(self.slots)
        tables = find_policy(self.policy).init(layers, self.experts, self.profile)
        zeros = [jnp.zeros(layers, jnp.int32) for _ in range(3)]
        return SlotState(pools, jnp.full((layers, self.experts), -1, jnp.int32), tables, *zeros)

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
            state, choice, place = self.resolve(moe_layer, used_SE, ids_TA, valid_T)
        ahead = self.ordered and kernels.backend == "tpu" if self.read_ahead is None else self.read_ahead
        run = self._run_at_once if self._at_once(ids_TA.size) else self._run_ahead if ahead else self._run_in_waves
        y, pools, loads = run(moe_layer, state.pools, choice, place, x_TD, ids_TA, valid_T, kernels, biases)
        y_TD = weighted_sum(y.astype(x_TD.dtype).astype(jnp.float32), weights_TA, valid_T)
        state = dataclasses.replace(state, pools=pools, loads=state.loads.at[moe_layer].add(loads))
        return y_TD.astype(x_TD.dtype), dataclasses.replace(self, state=state), {}

    # --- Which expert goes where

    def resolve(self, moe_layer, used_SE, ids_TA, valid_T) -> tuple[SlotState, Choice, Placement]:
        """Updates tables and counters, and says where each expert that the step asks for is to be computed."""
        state, policy = self._carried, find_policy(self.policy)
        slots, base = (_of_layer(values, moe_layer) for values in (self.slots, self.base))
        need = used_SE.any(0)
        row = policy.touch(layer_row(state.tables, moe_layer), used_SE)
        where = jax.lax.dynamic_index_in_dim(state.slot_of_expert, moe_layer, 0, keepdims=False)
        choice = choose(policy.keep(row), where >= 0, need, slots, policy.bypass)
        place = place_all(choice, where, need, base, base + slots)
        if not self._at_once(ids_TA.size):
            place = self._in_waves(choice, place, row_counts(ids_TA, valid_T, self.experts))
        state = dataclasses.replace(
            state,
            slot_of_expert=jax.lax.dynamic_update_index_in_dim(state.slot_of_expert, place.resident, moe_layer, 0),
            tables=with_row(state.tables, moe_layer, row),
            requests=state.requests.at[moe_layer].add(need.sum(dtype=jnp.int32)),
            hits=state.hits.at[moe_layer].add(choice.hit.sum(dtype=jnp.int32)),
        )
        return state, choice, place

    def _at_once(self, assignments: int) -> bool:
        """Whether a step of so many token-expert pairs has a slot for every expert it asks for."""
        return assignments <= min(self.slots) and not find_policy(self.policy).bypass

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
            return y[plan.row_TA], pools, loads

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
        groups = min(e, max(self.slots) + self.staging)

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
        pools, loads = fill(pools, store, records, slots, 0, some, kernels, self.fill)

        def one_miss(i, carry):
            y, pools, loads = carry
            record = read_record(store, records[i + 1])
            with jax.named_scope("compute"):
                y = ranked.compute_miss(pools, i, y, *how)
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
        stay = 0 if find_policy(self.policy).bypass else min(self.slots)
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


def uses(ids_TA: Int[Array, "T A"], valid_T: Bool[Array, "T"], experts: int, ordered: bool) -> Bool[Array, "S E"]:
    """Which experts each step asks for: one step for all tokens, or one for each where they come in order."""
    chosen = (ids_TA[:, :, None] == jnp.arange(experts)) & valid_T[:, None, None]
    return chosen.any(1) if ordered else chosen.any((0, 1))[None]


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
