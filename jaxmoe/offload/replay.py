"""Replay of a trace through a residency policy, and Belady's optimum beside it.

The policies and `choose` are those of the compiled step. Every prompt token is a step of its own here; the compiled step sees a prompt in blocks.
Hits are counted per step and layer over the set of experts asked for. Caches start empty.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxmoe.offload.knowledge import high_steps, new_texts
from jaxmoe.offload.trace import PROMPT, Trace, used_steps
from jaxmoe.residency import POLICIES, UNTOLD, Knowledge, Policy, Shape, choose, choose_shared, find_policy
from jaxmoe.residency.ahead import next_uses
from jaxmoe.residency.policy import FORESEEN, Tables, layer_row, with_row

Used = tuple[Bool[np.ndarray, "S L E"], UInt8[np.ndarray, "S"]]
"""What `used_steps` returns."""

Cost = Callable[[int, np.ndarray], np.ndarray]
"""`(step, last step that asked for each expert [L, E], -1 for none) -> integers [L, E]`."""

OPT = "opt"
NAMES = tuple(POLICIES)

Foreseen = Float[np.ndarray, "S M L E"]
"""For every step: probabilities of use in it (index 0) and in the steps after it, as known before it; -1 where nothing is."""


@dataclasses.dataclass(frozen=True)
class Steps:
    """What a policy sees of a trace.

    Attributes:
        used: what every step asks for.
        high: uses that matter (`jaxmoe.offload.knowledge.high_steps`).
        new_text: steps with which another text begins.
        foreseen: what a predictor says, for policies that look ahead.
    """

    used: Bool[np.ndarray, "S L E"]
    high: Bool[np.ndarray, "S L E"]
    new_text: Bool[np.ndarray, "S"]
    foreseen: Foreseen | None = None

    def __getitem__(self, kept: np.ndarray) -> Steps:
        """Some of the steps."""
        return Steps(self.used[kept], self.high[kept], self.new_text[kept], None if self.foreseen is None else self.foreseen[kept])


def steps_of(used_SLE: np.ndarray, foreseen: Foreseen | None = None) -> Steps:
    """Steps of one text all of whose uses matter alike."""
    new = np.arange(len(used_SLE)) == 0
    return Steps(used_SLE, used_SLE, new, foreseen)


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a policy did with a trace.

    Counts are of the steps that are not prompt (decode and teacher-forced ones), unless they say otherwise; `_SL` are those of every step.

    Attributes:
        policy: one of `NAMES`.
        slots_L: experts that each layer holds.
        hits_SL: experts that were asked for and were there.
        requests_SL: distinct experts asked for.
        compulsory_SL: experts asked for that had never been asked for before: no policy has them.
        counted_S: steps that count.
        expert_bytes_L: bytes of an expert; None where they are not known.
    """

    policy: str
    slots_L: Int[np.ndarray, "L"]
    hits_SL: Int[np.ndarray, "S L"]
    requests_SL: Int[np.ndarray, "S L"]
    compulsory_SL: Int[np.ndarray, "S L"]
    counted_S: Bool[np.ndarray, "S"]
    expert_bytes_L: Int[np.ndarray, "L"] | None = None

    def _count(self, counts_SL: np.ndarray) -> np.ndarray:
        return counts_SL[self.counted_S].sum(0, dtype=np.int64)

    @property
    def hits_L(self) -> np.ndarray:
        """Hits of each layer."""
        return self._count(self.hits_SL)

    @property
    def requests_L(self) -> np.ndarray:
        """Requests of each layer."""
        return self._count(self.requests_SL)

    @property
    def compulsory_L(self) -> np.ndarray:
        """Compulsory misses of each layer."""
        return self._count(self.compulsory_SL)

    @property
    def loads_L(self) -> np.ndarray:
        """Misses of each layer: experts that had to be brought."""
        return self.requests_L - self.hits_L

    @property
    def prompt_loads_L(self) -> np.ndarray:
        """Misses of each layer in the steps that don't count."""
        return (self.requests_SL - self.hits_SL)[~self.counted_S].sum(0, dtype=np.int64)

    @property
    def bytes_L(self) -> np.ndarray | None:
        """Bytes that `loads_L` bring, None where sizes are not known."""
        return None if self.expert_bytes_L is None else self.loads_L * self.expert_bytes_L

    @property
    def steps(self) -> int:
        """Steps that count."""
        return int(self.counted_S.sum())

    @property
    def hit_rate(self) -> float:
        """Share of requests that hit, over all layers."""
        return float(self.hits_L.sum() / self.requests_L.sum())


def replay(
    trace: Trace | Used,
    slots: int | Sequence[int],
    policy: str,
    profile: Float[np.ndarray, "L E"] | None = None,
    warm: bool = True,
    foreseen: Foreseen | None = None,
    known: Knowledge | None = None,
    pool: bool = False,
) -> Replay:
    """Runs a trace through a policy.

    Args:
        trace: a trace, or what `used_steps` makes of it.
        slots: experts that a layer holds; one number, or one a layer. A policy that shares one pool, or shares slots out itself, has as many in all.
        policy: one of `NAMES`.
        profile: how often each expert is used, for the static policy. The trace's own prompt, if not given.
        warm: whether the prompt runs through the cache first; its steps count either way as prompt.
        foreseen: what a predictor says at every step, for policies that look ahead; without it they go by recent rates.
        known: what else the policy is told beforehand; a profile in it goes before `profile`. Nothing is pinned for the optimum.
        pool: of the optimum, whether all layers share their slots.

    Raises:
        ValueError: no such policy, slots that are negative, more than the experts or of another number of layers, nothing but prompt, or a policy
            that lacks what it goes by.
    """
    (used_SLE, phase_S), sizes_L = (used_steps(trace), trace.expert_bytes) if isinstance(trace, Trace) else (trace, None)
    counted_S = phase_S != PROMPT
    if not used_SLE[counted_S].any():
        raise ValueError("the trace holds nothing but its prompt: there is no hit rate to find")
    slots_L = slots_by_layer(slots, used_SLE.shape[1], used_SLE.shape[2])
    known = known or Knowledge()
    if known.profile is None:
        if policy == "static" and profile is None:
            profile = prompt_profile(used_SLE, phase_S)
        known = dataclasses.replace(known, profile=None if profile is None else jnp.asarray(profile, jnp.float32))
    seen = Steps(used_SLE, high_steps(trace), new_texts(trace), foreseen) if isinstance(trace, Trace) else steps_of(used_SLE, foreseen)
    if not warm:
        seen, counted_S = seen[counted_S], counted_S[counted_S]
    found = find_policy(policy)
    if found.allocate is not None:
        active = int(max(1, np.median(seen.used.sum(2)[counted_S].max(1))))
        _, layers, experts = used_SLE.shape
        slots_L = np.array(found.allocate(int(slots_L.sum()), layers, experts, min(active, int(slots_L.min()))), np.int64)
    if policy == OPT:
        hits_SL = pool_opt_hits(seen.used, int(slots_L.sum())) if pool else opt_hits(seen.used, slots_L)
    else:
        hits_SL = policy_hits(seen, slots_L, policy, known)
    return Replay(policy, slots_L, hits_SL, seen.used.sum(2), first_uses(seen.used).sum(2), counted_S, sizes_L)


def optimum(trace: Trace | Used, found: Replay, warm: bool = True) -> Replay:
    """The optimum that bounds what was found: with each layer's own slots as they were, or in one pool where the policy shares it."""
    return replay(trace, found.slots_L.tolist(), OPT, warm=warm, pool=find_policy(found.policy).shared)


def regret(found: Replay, best: Replay) -> float:
    """The share of the optimum's hits that a policy misses."""
    hits = int(best.hits_L.sum())
    return 1 - int(found.hits_L.sum()) / hits if hits else 0.0


def slots_by_layer(slots: int | Sequence[int], layers: int, experts: int) -> Int[np.ndarray, "L"]:
    """One number of slots a layer.

    Raises:
        ValueError: a number is impossible, or there is not one a layer.
    """
    given = np.asarray(slots, np.int64).reshape(-1)
    if len(given) not in (1, layers):
        raise ValueError(f"{len(given)} numbers of slots for {layers} layers: give one, or one a layer")
    wrong = given[(given < 0) | (given > experts)]
    if len(wrong):
        raise ValueError(f"{wrong[0]} slots in a layer of {experts} experts: give 0 to {experts}")
    return np.broadcast_to(given, layers).copy()


def prompt_profile(used_SLE: np.ndarray, phase_S: np.ndarray) -> Float[np.ndarray, "L E"]:
    """How often the prompt used each expert.

    Raises:
        ValueError: there is no prompt.
    """
    if not (phase_S == PROMPT).any():
        raise ValueError("the static policy needs a profile, and this trace has no prompt to take it from: give another trace as profile")
    return used_SLE[phase_S == PROMPT].sum(0).astype(np.float32)


def first_uses(used_SLE: np.ndarray) -> Bool[np.ndarray, "S L E"]:
    """Requests for experts that no earlier step asked for."""
    first_LE = used_SLE.argmax(0)
    return used_SLE & (np.arange(len(used_SLE))[:, None, None] == first_LE)


def policy_hits(seen: Steps | np.ndarray, slots_L: np.ndarray, policy: str, known: Knowledge = UNTOLD) -> Int[np.ndarray, "S L"]:
    """Hits of every step and layer under a policy of `jaxmoe.residency`.

    Raises:
        ValueError: no such policy, or it lacks what it goes by.
    """
    seen = seen if isinstance(seen, Steps) else steps_of(seen)
    return (seen.used & residents(seen, slots_L, policy, known)).sum(2)


def residents(seen: Steps | np.ndarray, slots_L: np.ndarray, policy: str, known: Knowledge = UNTOLD) -> Bool[np.ndarray, "S L E"]:
    """Which of a layer's experts are there when a step comes to it; see `policy_hits`."""
    seen, found = seen if isinstance(seen, Steps) else steps_of(seen), find_policy(policy)
    shape = Shape(seen.used.shape[1], seen.used.shape[2], tuple(int(n) for n in slots_L))
    if seen.foreseen is not None and found.foresees:
        known = known.replace(horizon=seen.foreseen.shape[1] - 1)  # type: ignore[attr-defined]
    tables = found.tables(shape, known)
    given = {"used": seen.used, "high": seen.high, "new": seen.new_text}
    if seen.foreseen is not None and found.foresees:
        given["foreseen"] = seen.foreseen.swapaxes(1, 2)
    columns = {name: jnp.asarray(column) for name, column in given.items()}
    slots = jnp.asarray(slots_L, jnp.int32)
    if found.shared:
        return np.asarray(_scan_shared(policy, int(seen.used.sum(2).max(initial=1)), slots, tables, columns))
    return np.asarray(scan_layers(policy, slots, tables, columns))


def _prepared(policy: Policy, tables: Tables, step: dict) -> Tables:
    """The tables as a step finds them."""
    if policy.restart is not None:
        again = policy.restart(tables)
        tables = {name: jnp.where(step["new"], again[name], table) for name, table in tables.items()}
    return tables if "foreseen" not in step else tables | {FORESEEN: step["foreseen"].astype(jnp.float32)}


@functools.partial(jax.jit, static_argnums=0)
def scan_layers(name: str, slots_L: jax.Array, tables: Tables, columns: dict) -> jax.Array:
    """[S, L, E] residents, every layer on its own."""
    policy = find_policy(name)

    def layer(row: Tables, slots, resident_E, used_E, high_E):
        row = policy.touch(row, used_E[None], high_E[None])
        choice = choose(policy.worth({k: v[None] for k, v in row.items()}, 0), resident_E, used_E, slots, policy.bypass)
        return row, (resident_E | choice.enter) & ~choice.leave

    def step(carry, step):
        tables, resident_LE = carry
        tables = _prepared(policy, tables, step)
        tables, after_LE = jax.vmap(layer)(tables, slots_L, resident_LE, step["used"], step["high"])
        return (tables, after_LE), resident_LE

    return jax.lax.scan(step, (tables, jnp.zeros(columns["used"].shape[1:], bool)), columns)[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scan_shared(name: str, most: int, slots_L: jax.Array, tables: Tables, columns: dict) -> jax.Array:
    """[S, L, E] residents in one pool, layer after layer; no step asks a layer for more than `most` experts."""
    policy, layers = find_policy(name), columns["used"].shape[1]

    def step(carry, step):
        tables, resident_LE = carry

        def layer(carry, at):
            tables, resident_LE = carry
            used_E, before_E = step["used"][at], resident_LE[at]
            tables = with_row(tables, at, policy.touch(layer_row(tables, at), used_E[None], step["high"][at][None]))
            choice, leave_LE = choose_shared(policy.worth(tables, at), resident_LE, used_E, at, slots_L.sum(), policy.bypass, most)
            entered = resident_LE.at[at].set(before_E | choice.enter) & ~leave_LE
            return (tables, entered), before_E

        return jax.lax.scan(layer, (_prepared(policy, tables, step), resident_LE), jnp.arange(layers))

    return jax.lax.scan(step, (tables, jnp.zeros(columns["used"].shape[1:], bool)), columns)[1]


def opt_hits(used_SLE: np.ndarray, slots_L: np.ndarray) -> Int[np.ndarray, "S L"]:
    """The most hits that any cache can have: of what is there and what was asked for, the soonest used again stays (Belady, with bypass).

    An expert that was asked for need not stay, so no policy that brings experts only when they are asked for does better.
    """
    next_SLE = next_uses(used_SLE, len(used_SLE))
    return foresight_hits(used_SLE, slots_L, lambda s, _: next_SLE[s])


def pool_opt_hits(used_SLE: np.ndarray, slots: int) -> Int[np.ndarray, "S L"]:
    """The most hits of one pool that all layers share: `opt_hits` layer after layer, each a step of one layer that has all experts."""
    steps, layers, experts = used_SLE.shape
    one_SLE = np.zeros((steps, layers, layers, experts), bool)
    one_SLE[:, np.arange(layers), np.arange(layers)] = used_SLE
    return opt_hits(one_SLE.reshape(steps * layers, 1, -1), np.array([slots])).reshape(steps, layers)


def foresight_hits(used_SLE: np.ndarray, slots_L: np.ndarray, cost: Cost) -> Int[np.ndarray, "S L"]:
    """Hits of a cache that knows what comes.

    Args:
        used_SLE: what every step asks for.
        slots_L: experts that a layer holds.
        cost: after a step, the `slots_L` lowest of what is there or was asked for stay.
    """
    steps, layers, experts = used_SLE.shape
    resident_LE = np.zeros((layers, experts), bool)
    last_LE = np.full((layers, experts), -1, np.int64)
    place_E = np.broadcast_to(np.arange(experts), (layers, experts))
    rank_LE = np.empty((layers, experts), np.int64)
    hits_SL = np.empty((steps, layers), np.int64)
    for s, need_LE in enumerate(used_SLE):
        hits_SL[s] = (need_LE & resident_LE).sum(1)
        last_LE[need_LE] = s
        there_LE = resident_LE | need_LE
        order_LE = np.argsort(np.where(there_LE, cost(s, last_LE).astype(np.int64), np.iinfo(np.int64).max), axis=1, kind="stable")
        np.put_along_axis(rank_LE, order_LE, place_E, axis=1)
        resident_LE = there_LE & (rank_LE < slots_L[:, None])
    return hits_SL
