"""Replay of many equally long sequences at once, each from an empty cache: rates with an interval need hundreds of them.

Residents are those of `jaxmoe.offload.replay`, sequence by sequence. A shared pool is not sorted here: as few leave as there is too much, found one
after another, which takes a small part of the time on a processor.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxmoe.offload import replay
from jaxmoe.offload.knowledge import high_steps
from jaxmoe.offload.predictors.interface import Params, Predictor
from jaxmoe.offload.sequences import by_sequence
from jaxmoe.offload.trace import PROMPT, Trace, used_steps
from jaxmoe.residency import Knowledge, Shape, find_policy
from jaxmoe.residency.ahead import next_uses
from jaxmoe.residency.policy import FORESEEN, Keep, layer_row, with_row

CHUNKS = (1, 16, 64)
"""Sequences that a program takes."""

UNKNOWN = -1
"""As `jaxmoe.offload.predictors.foresee` has it."""


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Texts of one length, or groups of such texts that decode side by side.

    Attributes:
        used: what each step asks for.
        high: uses that matter (`jaxmoe.offload.knowledge.high_steps`).
        counted: steps that are not prompt, of all alike.
        tokens: that each step reads; of groups, of their first members.
        ids: the experts that each token asked for; likewise.
        active: experts of a token (A).
        names: where each sequence is from.
    """

    used: Bool[np.ndarray, "N S L E"]
    high: Bool[np.ndarray, "N S L E"]
    counted: Bool[np.ndarray, "S"]
    tokens: Int[np.ndarray, "N S"]
    ids: Int[np.ndarray, "N S L A"]
    names: tuple[str, ...]

    @property
    def active(self) -> int:
        """Experts of a token (A)."""
        return self.ids.shape[3]

    def take(self, which: Sequence[int] | np.ndarray) -> Sequences:
        """Some of the sequences."""
        chosen = np.asarray(which)
        names = tuple(self.names[i] for i in chosen)
        return dataclasses.replace(self, **{k: getattr(self, k)[chosen] for k in ("used", "high", "tokens", "ids")}, names=names)


def sequences_of(traces: Sequence[Trace], names: Sequence[str] = ()) -> Sequences:
    """All sequences of some traces, each by itself.

    Args:
        traces: of one model.
        names: of the traces.

    Raises:
        ValueError: the sequences are not all of one length and one prompt length.
    """
    names = list(names) or [""] * len(traces)
    found = [(name, own) for name, trace in zip(names, traces, strict=True) for own in by_sequence(trace)]
    counted = found[0][1].phase != PROMPT
    for name, own in found:
        if len(own.phase) != len(counted) or ((own.phase != PROMPT) != counted).any():
            raise ValueError(f"sequences of {len(counted)} and {len(own.phase)} tokens ({name}): give sequences of one length and one prompt length")
    columns = {
        "used": [used_steps(own)[0] for _, own in found],
        "high": [high_steps(own) for _, own in found],
        "tokens": [own.tokens for _, own in found],
        "ids": [own.ids for _, own in found],
    }
    return Sequences(**{k: np.stack(v) for k, v in columns.items()}, counted=counted, names=tuple(name for name, _ in found))  # type: ignore[arg-type]


def side_by_side(seen: Sequences, groups: Sequence[Sequence[int]]) -> Sequences:
    """Groups of sequences whose t-th tokens make one step together, prompts too; decode steps are those of `jaxmoe.offload.sequences.batched`."""
    first = seen.take([group[0] for group in groups])
    used, high = (np.stack([column[list(group)].any(0) for group in groups]) for column in (seen.used, seen.high))
    return dataclasses.replace(first, used=used, high=high)


# --- What predictors say


def foresee_each(predictor: Predictor, params: Params, seen: Sequences, horizon: int = 1) -> Float[np.ndarray, "N S M1 L E"]:
    """What a predictor says before every step of each sequence by itself: `jaxmoe.offload.predictors.foresee`, of all at once.

    Args:
        predictor, params: as fitted; not one whose rows share what they learn.
        seen: single sequences.
        horizon: steps ahead of the current one (M).
    """
    if predictor.shared or not predictor.ahead:
        raise ValueError(f"the predictor {predictor.name!r} has nothing to say of a sequence by itself before a step")
    count, steps, layers, experts = seen.used.shape
    out = np.full((count, steps, horizon + 1, layers, experts), UNKNOWN, np.float16)
    rows, state = np.arange(count), predictor.init(params, count)
    for s in range(steps):
        said = predictor.before_each(params, state, rows, seen.tokens[:, s])[:, : horizon + 1]
        out[:, s, : said.shape[1]] = said
        state = predictor.after(params, state, rows, seen.tokens[:, s], seen.ids[:, s])
    return out


def future(seen: Sequences, horizon: int) -> Float[np.ndarray, "N S M1 L E"]:
    """What the oracle says: what is used in this step and the next ones, zeros past the end."""
    out = np.zeros((len(seen.used), seen.used.shape[1], horizon + 1, *seen.used.shape[2:]), np.float16)
    for m in range(horizon + 1):
        out[:, : seen.used.shape[1] - m, m] = seen.used[:, m:]
    return out


def together(foreseen: Float[np.ndarray, "N S M1 L E"], groups: Sequence[Sequence[int]]) -> Float[np.ndarray, "G S M1 L E"]:
    """What is said of groups: `1 - prod(1 - p)`; nothing where nothing is said of a member."""
    out = []
    for group in groups:
        p = foreseen[list(group)].astype(np.float32)
        out.append(np.where((p < 0).any(0), UNKNOWN, 1 - np.prod(1 - p, axis=0)).astype(np.float16))
    return np.stack(out)


# --- Replay


def hits_many(
    seen: Sequences, slots_L: np.ndarray, policy: str, known: Knowledge | None = None, foreseen: Float[np.ndarray, "N S M1 L E"] | None = None
) -> Int[np.ndarray, "N S L"]:
    """Hits of every sequence, step and layer; see `residents_many`."""
    return (seen.used & residents_many(seen, slots_L, policy, known, foreseen)).sum(3)


def residents_many(
    seen: Sequences, slots_L: np.ndarray, policy: str, known: Knowledge | None = None, foreseen: Float[np.ndarray, "N S M1 L E"] | None = None
) -> Bool[np.ndarray, "N S L E"]:
    """Which of a layer's experts are there when a step comes to it, in each sequence by itself.

    Args:
        seen: what is asked for; every sequence is one text.
        slots_L: experts that a layer holds; a shared pool has as many in all.
        policy: one of `jaxmoe.residency`, not opt.
        known: what it is told beforehand, of all sequences alike.
        foreseen: what a predictor says at every step, for policies that look ahead.

    Raises:
        ValueError: no such policy, or it lacks what it goes by.
    """
    found, known = find_policy(policy), known or Knowledge()
    looks = foreseen is not None and found.foresees
    if looks:
        known = known.replace(horizon=foreseen.shape[2] - 1)  # type: ignore[attr-defined,union-attr]
    layers, experts = seen.used.shape[2:]
    tables = found.tables(Shape(layers, experts, tuple(int(n) for n in slots_L)), known)
    columns = {"used": seen.used, "high": seen.high}
    if looks:
        columns["foreseen"] = foreseen.swapaxes(2, 3)  # type: ignore[union-attr]
    run = functools.partial(_many_pools if found.shared else _many, policy, jnp.asarray(slots_L, jnp.int32), tables)
    return _in_chunks(run, columns)


def _in_chunks(run: Callable[[dict], jax.Array], columns: dict[str, np.ndarray]) -> np.ndarray:
    """So many sequences at a time that there are few programs; empty ones fill up the last."""
    count = len(columns["used"])
    size = next((size for size in CHUNKS if size >= count), CHUNKS[-1])
    out = []
    for at in range(0, count, size):
        own = {name: column[at : at + size] for name, column in columns.items()}
        rest = size - len(own["used"])
        own = {name: np.concatenate([column, np.zeros((rest, *column.shape[1:]), column.dtype)]) for name, column in own.items()}
        out.append(np.asarray(run(own))[: size - rest])
    return np.concatenate(out)


@functools.partial(jax.jit, static_argnums=0)
def _many(name: str, slots_L, tables, columns) -> jax.Array:
    """`replay.scan_layers` of each."""

    def one(columns):
        new = jnp.arange(columns["used"].shape[0]) == 0
        return replay.scan_layers(name, slots_L, tables, columns | {"new": new})

    return jax.vmap(one)(columns)


@functools.partial(jax.jit, static_argnums=0)
def _many_pools(name: str, slots_L, tables, columns) -> jax.Array:
    """`replay._scan_shared` of each, by another way of choosing."""
    policy = find_policy(name)

    def touch(tables, step, at):
        tables = with_row(tables, at, policy.touch(layer_row(tables, at), step["used"][at][None], step["high"][at][None]))
        return tables, policy.worth(tables, at)

    def begin(tables, step):
        return tables if "foreseen" not in step else tables | {FORESEEN: step["foreseen"].astype(jnp.float32)}

    return jax.vmap(lambda own: _pool(own, tables, slots_L.sum(), policy.bypass, begin, touch))(columns)


def _pool(columns: dict, tables, slots, bypass: bool, begin: Callable, touch: Callable) -> jax.Array:
    """[S, L, E] residents in one pool, layer after layer."""
    layers = columns["used"].shape[1]

    def step(carry, step):
        tables, resident_LE = carry

        def layer(carry, at):
            tables, resident_LE = carry
            before_E = resident_LE[at]
            tables, keep = touch(tables, step, at)
            wanted = (jnp.arange(layers) == at)[:, None] & step["used"][at][None]
            return (tables, kept(keep, resident_LE | wanted, None if bypass else wanted, slots)), before_E

        return jax.lax.scan(layer, (begin(tables, step), resident_LE), jnp.arange(layers))

    return jax.lax.scan(step, (tables, jnp.zeros(columns["used"].shape[1:], bool)), columns)[1]


def kept(keep: Keep, there: Bool[jax.Array, "L E"], protected: Bool[jax.Array, "L E"] | None, slots) -> Bool[jax.Array, "L E"]:
    """`choose_shared`'s pool: of what is there the `slots` most worth keeping. What goes is found one by one: it is few."""
    worth = keep[0] if protected is None else jnp.where(protected, jnp.inf, keep[0])
    shape, flat, second, members = there.shape, worth.reshape(-1), keep[1].reshape(-1), there.reshape(-1)
    order = jnp.arange(flat.shape[0])

    def one(_, members):
        least = members & (flat == jnp.min(jnp.where(members, flat, jnp.inf)))
        least &= second == jnp.min(jnp.where(least, second, jnp.iinfo(second.dtype).max))
        return members & (order != jnp.max(jnp.where(least, order, -1)))

    return jax.lax.fori_loop(0, jnp.maximum(0, members.sum() - slots), one, members).reshape(shape)


# --- Optima


def opt_many(seen: Sequences, slots_L: np.ndarray) -> Int[np.ndarray, "N S L"]:
    """The most hits where every layer has its own slots (`replay.opt_hits`)."""
    count, steps, layers, experts = seen.used.shape
    flat = seen.used.swapaxes(0, 1).reshape(steps, count * layers, experts)
    return replay.opt_hits(flat, np.tile(slots_L, count)).reshape(steps, count, layers).swapaxes(0, 1)


def opt_pool_many(seen: Sequences, slots: int) -> Int[np.ndarray, "N S L"]:
    """The most hits of one pool for all layers: what is needed soonest stays, counted in turns of layers."""
    coming = np.stack([next_uses(used, used.shape[0]) for used in seen.used])
    found = _in_chunks(functools.partial(_many_opt_pools, jnp.int32(slots)), {"used": seen.used, "coming": coming})
    return (seen.used & found).sum(3)


@jax.jit
def _many_opt_pools(slots, columns) -> jax.Array:
    layers = columns["used"].shape[2]

    def touch(clock, step, at):
        later = (jnp.arange(layers) > at)[:, None] & step["used"]
        turn = jnp.where(later, clock, step["coming"]) * layers + jnp.arange(layers)[:, None]
        return clock, (-turn.astype(jnp.float32), turn)

    def begin(clock, step):
        return clock + 1

    return jax.vmap(lambda own: _pool(own, jnp.int32(-1), slots, True, begin, touch))(columns)
