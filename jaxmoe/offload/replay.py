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

from jaxmoe.offload.trace import PROMPT, Trace, used_steps
from jaxmoe.residency import POLICIES, choose, find_policy

Used = tuple[Bool[np.ndarray, "S L E"], UInt8[np.ndarray, "S"]]
"""What `used_steps` returns."""

Cost = Callable[[int, np.ndarray], np.ndarray]
"""`(step, last step that asked for each expert [L, E], -1 for none) -> integers [L, E]`."""

OPT = "opt"
NAMES = (*POLICIES, OPT)


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
) -> Replay:
    """Runs a trace through a policy, every layer on its own.

    Args:
        trace: a trace, or what `used_steps` makes of it.
        slots: experts that a layer holds; one number, or one a layer.
        policy: one of `NAMES`.
        profile: how often each expert is used, for the static policy. The trace's own prompt, if not given.
        warm: whether the prompt runs through the cache first; its steps count either way as prompt.

    Raises:
        ValueError: no such policy, slots that are negative, more than the experts or of another number of layers, or nothing but prompt.
    """
    (used_SLE, phase_S), sizes_L = (used_steps(trace), trace.expert_bytes) if isinstance(trace, Trace) else (trace, None)
    counted_S = phase_S != PROMPT
    if not used_SLE[counted_S].any():
        raise ValueError("the trace holds nothing but its prompt: there is no hit rate to find")
    slots_L = slots_by_layer(slots, used_SLE.shape[1], used_SLE.shape[2])
    if policy == "static" and profile is None:
        profile = prompt_profile(used_SLE, phase_S)
    if not warm:
        used_SLE, counted_S = used_SLE[counted_S], counted_S[counted_S]
    hits_SL = opt_hits(used_SLE, slots_L) if policy == OPT else policy_hits(used_SLE, slots_L, policy, profile)
    return Replay(policy, slots_L, hits_SL, used_SLE.sum(2), first_uses(used_SLE).sum(2), counted_S, sizes_L)


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


def policy_hits(used_SLE: np.ndarray, slots_L: np.ndarray, policy: str, profile: np.ndarray | None = None) -> Int[np.ndarray, "S L"]:
    """Hits of every step and layer under a policy of `jaxmoe.residency`.

    Raises:
        ValueError: no such policy, or it lacks its profile.
    """
    found = find_policy(policy)
    tables = found.init(used_SLE.shape[1], used_SLE.shape[2], None if profile is None else jnp.asarray(profile, jnp.float32))
    return np.asarray(_scan(policy, tables, jnp.asarray(slots_L, jnp.int32), jnp.asarray(used_SLE.swapaxes(0, 1)))).T


@functools.partial(jax.jit, static_argnums=0)
def _scan(name: str, tables: dict, slots_L: jax.Array, used_LSE: jax.Array) -> jax.Array:
    """[L, S] hits."""
    policy = find_policy(name)

    def layer(tables: dict, slots: jax.Array, used_SE: jax.Array) -> jax.Array:
        def step(carry, need_E):
            tables, resident_E = carry
            tables = policy.touch(tables, need_E[None])
            choice = choose(policy.keep(tables), resident_E, need_E, slots, policy.bypass)
            return (tables, (resident_E | choice.enter) & ~choice.leave), choice.hit.sum()

        return jax.lax.scan(step, (tables, jnp.zeros(used_SE.shape[1], bool)), used_SE)[1]

    return jax.vmap(layer)(tables, slots_L, used_LSE)


def next_uses(used_SLE: np.ndarray) -> Int[np.ndarray, "S L E"]:
    """The next step after each that asks for each expert; the number of steps where none does."""
    steps = len(used_SLE)
    out_SLE = np.empty(used_SLE.shape, np.int32)
    coming_LE = np.full(used_SLE.shape[1:], steps, np.int32)
    for s in range(steps - 1, -1, -1):
        out_SLE[s] = coming_LE
        coming_LE[used_SLE[s]] = s
    return out_SLE


def opt_hits(used_SLE: np.ndarray, slots_L: np.ndarray) -> Int[np.ndarray, "S L"]:
    """The most hits that any cache can have: of what is there and what was asked for, the soonest used again stays (Belady, with bypass).

    An expert that was asked for need not stay, so no policy that brings experts only when they are asked for does better.
    """
    next_SLE = next_uses(used_SLE)
    return foresight_hits(used_SLE, slots_L, lambda s, _: next_SLE[s])


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
