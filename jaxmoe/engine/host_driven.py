"""The host-driven mode: the step cut in two at every MoE layer, with the host sending experts between the halves.

    front   attention, router, and which experts are missing; one small read of their ids is the only thing that blocks
    hits    the experts that are there are computed, while the missing ones are on their way
    land    per missing expert: its record into its slot, then its tokens; the next record is on its way meanwhile
    front   of the next layer, which begins by combining what the experts of this one gave

The portable fallback, where a compiled step can't read host memory; the mode whose link can be emulated and timed anywhere; and the one that reads
experts from a disk. It gives the fused step's bits: resolving, filling and computing are the slot bank's own functions.

With prefetching, the one read of a layer also brings its routing, what is resident, and what the next layers' routers make of its input. While the
layer's experts are computed the host asks a foresight what the next layers will want, and queues what they lack. Records that were sent ahead are
landed like others, first of those that were missing; which they are changes when a layer's experts are computed, and no bit of what comes out.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.cache.batch import Batch
from jaxmoe.decode.sampling import SamplingParams, sample
from jaxmoe.engine import steps
from jaxmoe.engine.foresight import Lookout
from jaxmoe.engine.seen import Seen
from jaxmoe.experts.dispatch import weighted_sum
from jaxmoe.experts.lossy import STORED
from jaxmoe.experts.planes import unpack_planes
from jaxmoe.experts.ranked import Ranked, in_order, rank, row_counts
from jaxmoe.experts.slots import Pools, SlotBank, uses
from jaxmoe.nn.layers import FINISHING
from jaxmoe.nn.transformer import decoder_layer, embed, head, layer_tables
from jaxmoe.offload.link import Link
from jaxmoe.offload.prefetch import OFF, Prefetch
from jaxmoe.offload.staging import Staged, Staging
from jaxmoe.residency import find_policy
from jaxmoe.residency.policy import FORESEEN
from jaxmoe.routing.ahead import Gates, gate_scores, stack_gates
from jaxmoe.routing.route import initial_state
from jaxmoe.spec import LayerSpec, ModelSpec
from pallas_kernels.dispatch import Kernels
from pallas_kernels.expert_fill.api import land
from pallas_kernels.grouped_matmul.glu import GLUS

IN_FLIGHT = 4
"""Records on their way at a time: enough to keep a link busy, few enough that they take little of the device's memory."""


@flax.struct.dataclass
class Routed:
    """What an MoE layer's front leaves for the halves that compute its experts. Attributes: `ranked` the experts and their rows; `ids`, `weights` and
    `valid`, the router's choice.
    """

    ranked: Ranked
    ids: Int[Array, "T A"]
    weights: Float[Array, "T A"]
    valid: Bool[Array, "T"]


@flax.struct.dataclass
class _PlanningBank(SlotBank):
    """A slot bank that resolves and ranks, and leaves the computing to others: what it returns as results is not to be used.

    Attributes: `planned` see below; `staged` the layer's experts that were sent ahead, of which those that are missing come before the others that
    are, or None.
    """

    planned: Any = None
    staged: Bool[Array, "E"] | None = None

    def expert_ffn(self, moe_layer, x_TD, ids_TA, weights_TA, valid_T, kernels, biases=None):
        """See `jaxmoe.experts.expert_ffn`; `planned` of the bank that comes back is `(Routed, misses [1 + E])`; of a lossy bank [1 + 2 E]."""
        used_SE = uses(ids_TA, valid_T, self.experts, self.ordered)
        state, choice, place = self.resolve(moe_layer, used_SE, ids_TA, valid_T, weights_TA)
        if self.staged is None:
            ranked = rank(choice, place.slot, x_TD, ids_TA, valid_T, biases)
        else:
            rows = row_counts(ids_TA, valid_T, self.experts)
            order = jnp.lexsort((-rows, ~self.staged, choice.enter | choice.stream, place.slot < 0))
            ranked = in_order(order, choice, place.slot, x_TD, ids_TA, valid_T, biases)
        missing = jnp.roll(ranked.experts, -ranked.hits)
        misses = jnp.concatenate([ranked.misses[None], missing])
        if self.lossy is not None:  # and at how many bits each is wanted
            misses = jnp.concatenate([misses, state.marks["width"][moe_layer][missing]])
        routed = Routed(ranked, ids_TA, weights_TA, valid_T)
        return x_TD, dataclasses.replace(self, state=state, planned=(routed, misses)), {}


@flax.struct.dataclass
class Pending:
    """An MoE layer whose experts are computed, and not yet added.

    Attributes: `side` what `DecoderLayer` took apart from the experts; `tree` the weights that finishing the layer needs; `y` the experts' rows, of
    `routed`; `layer` its spec.
    """

    side: Any
    tree: dict
    y: Float[Array, "M D"]
    routed: Routed
    layer: LayerSpec = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class OnTheWay:
    """A batch between two layers.

    Attributes: `x` its residual stream, without what `before` has to add; `chosen` the routing so far, by MoE layer.
    """

    x: jax.Array
    router_state: Any
    before: Pending | None = None
    chosen: tuple = ()


class Programs:
    """The halves, each jitted once for a kind of layer and a batch size."""

    def __init__(self, spec: ModelSpec, bank: SlotBank, kernels: Kernels, depth: int = 0):
        """
        Args:
            spec, bank, kernels: of the model.
            depth: for how many layers ahead a front that looks evaluates routers.
        """
        self.spec, self.kernels, self._depth = spec, kernels, depth
        self._bank = _PlanningBank(**{f: getattr(bank, f) for f in bank.__dataclass_fields__} | {"store": None, "state": None})
        self._how, self.lossy = (GLUS[bank.activation], kernels, bank.layout), bank.lossy is not None
        self._options = kernels.compiler_options()
        self.front = functools.cache(self._front)
        self.hits = self._jit(self._hits)
        self.land = self._jit(self._land, donate=(0, 1))
        self.begin = self._jit(lambda params, batch: embed(spec, params, batch))
        self.tail = functools.cache(self._tail)
        self.logits = self._jit(lambda params, x, before, batch: head(spec, params, self._finish(x, before), batch, kernels))
        self.decode_batch = jax.jit(steps.decode_batch)

    def _jit(self, f: Callable, donate: tuple[int, ...] = ()) -> Callable:
        return jax.jit(f, donate_argnums=donate, compiler_options=self._options)

    def _front(self, layer: LayerSpec, stacked: bool) -> Callable:
        """The jitted `(tree, at, x, before, layers, tables, layer index, MoE layer, batch, router state, look)
        -> (x, layers, tables, router state, planned)`.

        `tree` holds a layer's weights, or with `stacked` those of all repeats, of which `at` is one. `before` is the last MoE layer's `Pending`, or
        None. The layer index counts layers with the same kind of state. `tables` is a `SlotState` without pools. `look` is None, or `(staged [E],
        gates)`. `planned` is `(Routed, read, side, weights for finishing, the router's ids and weights)`, or None of a dense layer; `read` is for
        the host: misses [1 + E], or of a front that looks `Seen.joined`.
        """
        module: Any = decoder_layer(self.spec, layer, self.kernels)

        def front(tree, at, x, before, layers, tables, index, moe_layer, batch, router_state, look):
            x = self._finish(x, before)
            if stacked:
                tree = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, at, 0, keepdims=False), tree)
            bank: Any = self._bank.join(tables)
            bank = bank.in_order() if batch.run > 1 else bank
            bank = bank if look is None else dataclasses.replace(bank, staged=look[0])
            angles = layer_tables(layer, batch, x.dtype)
            what = "front" if layer.sparse else "all"
            out = module.apply({"params": tree}, what, x, index, moe_layer, bank, layers, router_state, batch, angles)
            if not layer.sparse:
                return out[0], out[2], tables, router_state, None
            x, side, _, bank, layers, router_state, chosen = out
            routed, misses = bank.planned
            read = misses if look is None else self._seen(look[1], moe_layer, chosen.inputs, misses, routed, bank.state.slot_of_expert).joined()
            finishing = {name: tree[name] for name in FINISHING if name in tree}
            return x, layers, bank.state, router_state, (routed, read, side, finishing, (chosen.ids, chosen.weights))

        return self._jit(front, donate=(2, 4, 5))

    def _seen(self, gates: Gates | None, moe_layer, inputs, misses, routed: Routed, slot_of_expert) -> Seen:
        """What the host needs for looking ahead.

        All layers' residency is read, though few are asked about. A copy on the host could not follow what the misses say, which don't tell who left,
        and in a shared pool other layers' experts leave; of the layers ahead alone, the host would not know at a step's beginning how the last one
        ended. It is L E bytes in a read whose cost is that it blocks.
        """
        scores = None
        if gates is not None:
            scores = gate_scores(self.spec, gates, moe_layer, inputs, routed.valid, self._depth, self.kernels)
        return Seen(misses, routed.ids, slot_of_expert >= 0, scores)

    def _finish(self, x: jax.Array, before: Pending | None) -> jax.Array:
        """The residual stream with what the experts gave added, as the fused step adds it."""
        if before is None:
            return x
        routed, module = before.routed, decoder_layer(self.spec, before.layer, self.kernels)
        y = weighted_sum(before.y[routed.ranked.row].astype(x.dtype).astype(jnp.float32), routed.weights, routed.valid).astype(x.dtype)
        return module.apply({"params": before.tree}, "finish", x, before.side, y)  # type: ignore[return-value]

    def _hits(self, pools: Pools, ranked: Ranked) -> jax.Array:
        """The rows of the experts that are there; float32 [M, D]."""
        return ranked.compute_hits(pools, ranked.empty(), *self._how)

    def _land(self, pools: Pools, y: jax.Array, record: jax.Array, ranked: Ranked, turn) -> tuple[Pools, jax.Array]:
        """One missing expert into its slot, and its rows."""
        pools = land(pools, record, ranked.slots[ranked.hits + turn])  # type: ignore[assignment]
        return pools, ranked.compute_miss(pools, turn, y, *self._how)

    def _tail(self, greedy: bool) -> Callable:
        """The jitted `(params, x, before, batch, sampling, positions) -> (tokens, logits)`."""

        def tail(params, x, before, batch, sampling, positions):
            logits = head(self.spec, params, self._finish(x, before), batch, self.kernels)
            return sample(logits, sampling, positions, greedy_only=greedy), logits

        return self._jit(tail)


class HostDriven:
    """Runs prefill and decode layer by layer, with experts from a source; in the place of `steps.Fused`.

    Attributes: `programs` the halves; `source`, `link` where experts come from; `ahead` what prefetching has under way, None without it.
    """

    def __init__(self, spec: ModelSpec, bank: SlotBank, kernels: Kernels, greedy: bool, source: Any, link: Link | None = None,
                 record: bool = False, overlap: bool = True, cold: Collection[int] = (), prefetch: Prefetch | None = None,
                 foresight: Any = None):  # fmt: skip
        """
        Args:
            spec, kernels: of the model.
            bank: its slot bank; it needs no store.
            greedy: every request has temperature 0.
            source: where records come from (`jaxmoe.experts.source`).
            link: what they cross; a real one if not given.
            record: return the routing.
            overlap: send while computing. Without it every expert is waited for before anything else is done, as engines do that load on demand.
            cold: MoE layers that forget their experts after every step: what a cache is compared with.
            prefetch: send records before they are asked for, over the same link.
            foresight: what says which (`jaxmoe.engine.foresight`). Without `prefetch` it feeds policies that go by predicted uses, and nothing else.

        The bank's counter `loads` is of demand: records that were sent when they were asked for, queued ones that had not started included. What was
        sent ahead is counted by `ahead`, in `held_bytes` from when it is sent and in one of `counters` when it is known what became of it. So every
        byte that crosses is counted once.

        Raises:
            ValueError: prefetching without overlap, or without a foresight; or a bank that wants experts at fewer bits than its source has.
        """
        if bank.lossy is not None and bank.lossy.bits and not hasattr(source, "bytes_at"):
            raise ValueError(f"experts at {bank.lossy.bits[0]} bits need a source that has them: give a LadderSource")
        if prefetch is not None and bank.lossy is not None and bank.lossy.bits:
            raise ValueError(f"prefetch sends experts as they are stored, the bank brings some in {bank.lossy.bits[0]} bits: leave out one of them")
        if cold and find_policy(bank.policy).shared and len(set(cold)) < len(spec.moe_layers):
            raise ValueError(f"cold = {sorted(cold)} would leave holes in the pool that {bank.policy!r} shares: give all layers, or another policy")
        if prefetch is not None and not overlap:
            raise ValueError("overlap = False sends nothing before it is asked for: leave out prefetch")
        if prefetch is not None and foresight is None:
            raise ValueError("prefetch needs a foresight, which says what will be asked for: give one, or leave out prefetch")
        self.source, self.link = source, link or Link()
        self._spec, self._greedy, self._record, self._overlap = spec, greedy, record, overlap
        self._loads = np.zeros(len(spec.moe_layers), np.int32)
        self._listed: tuple | None = None
        self._device = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # a bare device would keep a pinned record's memory kind
        self._on_cpu = jax.devices()[0].platform == "cpu"
        self._sizes = len(spec.moe_layers), spec.moe[0].experts
        self.ahead = None if prefetch is None else Staging(prefetch, self.link, source, *self._sizes, put=self._send)
        self._lookout = None if foresight is None else Lookout(self.ahead, foresight, find_policy(bank.policy).foresees)
        self.programs = Programs(spec, bank, kernels, 0 if self._lookout is None else self._lookout.depth)
        self._gates: tuple | None = None
        forgotten = np.isin(np.arange(len(spec.moe_layers)), list(cold))
        self._forget = jax.jit(lambda there: jnp.where(forgotten[:, None], -1, there), donate_argnums=0) if cold else None

    def ways(self) -> Iterator[None]:
        """Every way of stepping that a run can come to, one after another, for warming up: as it begins, and with prefetching switched off."""
        yield
        if self.ahead is not None and self.ahead.settings.switching:
            self.ahead.switch = OFF
            yield

    def restart(self) -> None:
        """What looks ahead forgets what has run, for another run to begin as this one did."""
        if self._lookout is not None:
            self._lookout.restart()

    @property
    def stalled(self) -> float:
        """Seconds that the host waited for the link."""
        return self.link.stalled

    def prefill(self, params, bank, state: steps.EngineState, batch: Batch, sampling: SamplingParams, positions):
        """See `steps.prefill_step`."""
        tokens, _, state, routed = self.step(params, state, batch, sampling, positions)
        return tokens, state, routed

    def decode(self, params, bank, state: steps.EngineState, rows, tokens, positions, budget, eos, sampling: SamplingParams):
        """See `steps.decode_step`."""
        n, left = len(rows), np.array(budget)
        out = np.full((steps.CHUNK, n), -1, np.int32)
        seen = []
        for i in range(steps.CHUNK):
            live = left > 0
            if not live.any():
                break
            began = time.perf_counter()
            batch = self.programs.decode_batch(rows, tokens, positions, live)
            new, _, state, routed = self.step(params, state, batch, sampling, positions + 1)
            new = np.asarray(new)
            if self.ahead is not None:
                self.ahead.end(time.perf_counter() - began, int(live.sum()))
            seen.append(routed)
            out[i] = np.where(live, new, -1)
            tokens, positions = np.where(live, new, tokens), np.where(live, positions + 1, positions)
            left = np.where(live & ~np.isin(new, eos), left - 1, 0)
        return out, state, self._stack(seen)

    def _stack(self, seen: list):
        if not self._record or not seen:
            return ()
        return tuple(np.stack([np.asarray(r[k]) for r in seen] + [np.zeros_like(seen[0][k])] * (steps.CHUNK - len(seen))) for k in range(2))

    def step(self, params, state: steps.EngineState, batch: Batch, sampling: SamplingParams, positions):
        """One forward pass: `(tokens, logits, state, routed)`."""
        way, state = self.through(params, state, self.start(params, batch), batch, 0, self._spec.n_layers)
        tokens, logits = self.programs.tail(self._greedy)(params, way.x, way.before, batch, sampling, positions)
        if self._lookout is not None:
            self._lookout.end([ids for ids, _ in way.chosen])
        return tokens, logits, state, self._routing(way.chosen)

    def start(self, params, batch: Batch) -> OnTheWay:
        """A batch before the first layer."""
        x = self.programs.begin(params, batch)
        return OnTheWay(x, initial_state(self._spec, x))

    def through(
        self, params, state: steps.EngineState, way: OnTheWay, batch: Batch, first: int, last: int
    ) -> tuple[OnTheWay, steps.EngineState]:
        """Takes a batch through the layers from `first` up to `last`.

        Other batches may go through layers between two calls for the same one, if nothing looks ahead.
        """
        self._loads[:] = 0  # a step that failed has left some
        layers, carried = state.layers, state.bank
        pools, tables = carried.pools, dataclasses.replace(carried, pools=None)
        x, before, router_state, chosen = way.x, way.before, way.router_state, list(way.chosen)
        if first == 0:
            tables = self._begin(batch, tables)
        moe_layer = sum(layer.sparse for layer in self._spec.layers[:first])
        for i, (layer, tree, at, index) in enumerate(self._layers(params)[first:last], first):
            front = self.programs.front(layer, at is not None)
            look = self._look(params, moe_layer) if layer.sparse else None
            x, layers, tables, router_state, planned = front(tree, at, x, before, layers, tables, index, moe_layer, batch, router_state, look)
            before = None
            if i == 0 and self._lookout is not None and FORESEEN not in tables.tables:
                self._lookout.before()  # while the device computes
            if planned is not None:
                routed, read, side, finishing, own = planned
                pools, y = self._experts(pools, routed, read, moe_layer)
                before = Pending(side, finishing, y, routed, layer)
                chosen.append(own)  # the router's choice, which a lossy bank, or an expert that scales its input, is not given
                moe_layer += 1
        if last == self._spec.n_layers and self._forget is not None:
            tables = dataclasses.replace(tables, slot_of_expert=self._forget(tables.slot_of_expert))
        carried = dataclasses.replace(tables, pools=pools, loads=tables.loads + self._loads.copy())
        return OnTheWay(x, router_state, before, tuple(chosen)), steps.EngineState(layers, carried)

    def logits(self, params, way: OnTheWay, batch: Batch) -> jax.Array:
        """float32 logits of a batch that has been through all layers."""
        return self.programs.logits(params, way.x, way.before, batch)

    def _begin(self, batch: Batch, tables: Any) -> Any:
        """The lookout begins its step; the tables with what it foresees, where the policy goes by that."""
        if self._lookout is None:
            return tables
        self._lookout.begin(batch)
        if FORESEEN not in tables.tables:
            return tables
        scores = self._lookout.before()
        table = np.full(tables.tables[FORESEEN].shape, -1, np.float32)  # what is not predicted
        if scores is not None:
            known = min(len(scores), table.shape[1])
            table[:, :known] = scores[:known].swapaxes(0, 1)
        return dataclasses.replace(tables, tables=tables.tables | {FORESEEN: jax.device_put(table, self._device)})

    def _look(self, params, moe_layer: int) -> tuple | None:
        """What a front that looks takes."""
        if self._lookout is None or not self._lookout.looking:
            return None
        if self._lookout.depth and (self._gates is None or self._gates[0] is not params):
            self._gates = params, stack_gates(self._spec, params)
        return self._lookout.staged(moe_layer), None if self._gates is None else self._gates[1]

    def _layers(self, params) -> list[tuple]:
        """Every layer in order: its spec, its weights or its segment's, which of those it is, and its index among layers with its kind of state."""
        if self._listed is None or self._listed[0] is not params:
            self._listed = params, list(self._list_layers(params))
        return self._listed[1]

    def _list_layers(self, params) -> Iterator[tuple]:
        for segment, trees in zip(self._spec.segments, params["segments"], strict=True):
            unrolled = isinstance(trees[0]["norm_attn"]["scale"], tuple)
            for r in range(segment.repeats):
                for j, layer in enumerate(segment.pattern):
                    tree = jax.tree.map(lambda t, r=r: t[r], trees[j], is_leaf=lambda t: isinstance(t, tuple)) if unrolled else trees[j]
                    yield layer, tree, None if unrolled else r, self._spec.state_index(segment.layer_index(r, j))

    def _routing(self, chosen: Sequence[tuple]):
        if not self._record:
            return ()
        ids, weights = (np.stack([np.asarray(c[k]) for c in chosen], axis=1) for k in range(2))
        return ids.astype(np.int16), weights.astype(np.float16)

    def _experts(self, pools: Pools, routed: Routed, read: jax.Array, moe_layer: int) -> tuple[Pools, jax.Array]:
        """Computes a layer's experts, those that are there while the others are sent."""
        misses, seen = np.asarray(read), None  # the one read that blocks
        if self._lookout is not None and self._lookout.looking:
            seen = Seen.parted(misses, routed.ids.shape, self._sizes, 2 if self.programs.lossy else 1, self._lookout.depth)
            misses = seen.misses
        count, *ids = misses.tolist()
        bits = dict(zip(ids, ids[len(ids) // 2 :], strict=False)) if self.programs.lossy else {}
        ids = ids[:count]
        held: dict[int, Staged] = {}
        if self.ahead is not None:
            held, promoted = self.ahead.ask(moe_layer, ids)
            self._loads[moe_layer] += promoted
        waiting = deque(expert for expert in ids if expert not in held)
        asked: deque = deque()

        def send() -> None:
            while waiting and len(asked) < IN_FLIGHT:
                expert = waiting.popleft()
                low = bits.get(expert, STORED)
                give = self.source.ask(moe_layer, expert, low) if low else self.source.ask(moe_layer, expert)
                if getattr(give, "ready", lambda: True)():  # to the device now, before anything that is sent ahead
                    give = functools.partial(_same, self._send(give()))
                asked.append((give, self.link.send(self.source.bytes_at(low) if low else self.source.record_bytes)))
                self._loads[moe_layer] += 1
                if self.ahead is not None:
                    self.ahead.demanded()

        if self._overlap:
            send()
        y = self.programs.hits(pools, routed.ranked)
        if seen is not None and self._lookout is not None:
            self._lookout.routed(moe_layer, seen.ids, seen.resident, seen.scores)
        for turn, expert in enumerate(ids):
            if expert in held:
                assert self.ahead is not None
                record = self.ahead.land(held[expert])
            else:
                if not self._overlap:
                    jax.block_until_ready(y)
                    send()
                give, arrival = asked.popleft()
                record = self._send(give())
                if low := bits.get(expert, STORED):
                    record = unpack_planes(self.source.fmt, record, low)
                if self._overlap:
                    send()
                self.link.wait(arrival)
            pools, y = self.programs.land(pools, y, record, routed.ranked, turn)
        return pools, y

    def _send(self, record: Any) -> Any:
        """A record on the device. On the CPU it is there as it is, and what is dispatched with it takes it from where it lies: to copy it first would
        take several times as long as to land it."""
        sent = isinstance(record, jax.Array) and record.sharding == self._device
        return record if sent or self._on_cpu else jax.device_put(record, self._device)


def _same(value: Any) -> Any:
    return value
