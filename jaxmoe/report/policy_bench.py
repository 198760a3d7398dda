"""Benchmarks of residency policies on recorded routing: hit rates beside the optimum, with intervals, of single sequences and of batches.

What a policy is told beforehand comes from other domains of text than it is judged on (`folds`); of a single prompt, from the prompt.
Rows are plain JSON values; `jaxmoe.report.policy_tables` makes tables and plots of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxmoe.offload.calibrate import hobbit_mix
from jaxmoe.offload.knowledge import patterns_of, profile_of
from jaxmoe.offload.predictors import PREDICTORS, sizes_of
from jaxmoe.offload.recall import domains_split
from jaxmoe.offload.replay_many import Sequences, foresee_each, future, hits_many, opt_many, opt_pool_many, sequences_of, side_by_side, together
from jaxmoe.offload.trace import Trace, concatenate
from jaxmoe.report import intervals
from jaxmoe.residency import Knowledge, find_policy

RATIOS = (1, 2, 4, 8)
"""Slots a layer in units of the experts that a token uses."""

PLAIN = ("lru", "lfu", "static", "arc", "fate", "edgemoe", "hobbit", "eam")
LOOKING = ("plec", "lookahead")
POOL, CALIBRATED, NONE = "one pool", "calibrated", "none"
OPT, OPT_POOL = ("opt", ""), ("opt", POOL)
ORACLES = {"oracle, 1 step": 1, "oracle, 4 steps": 4}
TRAINED = ("path", "readme")
BATCHES = (4, 8, 16)

Arm = tuple[str, str]
"""A policy and its variant: the predictor that feeds it, or how it was set."""

Train = Callable[[Mapping[str, Trace], str, int], Any]
"""`(traces to fit to, kind, fold) -> parameters` of a predictor that has to be trained."""

Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Sequences that are judged, and what policies are told of them beforehand.

    Attributes:
        seen: the sequences.
        profile: for static.
        patterns: for eam; None where there is nothing to take them from.
        foreseen: what each predictor says.
        fit: sequences that HOBBIT's weights are calibrated on; None for none.
    """

    seen: Sequences
    profile: Float[np.ndarray, "L E"]
    patterns: Float[np.ndarray, "N L E"] | None
    foreseen: Mapping[str, Float[np.ndarray, "N S M1 L E"]]
    fit: Sequences | None = None


@dataclasses.dataclass(frozen=True)
class Fold:
    """Domains that are fitted to, and others that are judged. Attributes: `fit`, `judged`, their traces; `number` of the fold."""

    fit: Mapping[str, Trace]
    judged: Mapping[str, Trace]
    number: int


def folds(traces: Mapping[str, Trace], seed: int = 0) -> list[Fold]:
    """Two halves of the domains, each judged with what the other knows."""
    one, other = domains_split(traces, seed, 0.5)
    return [Fold(one, other, 0), Fold(other, one, 1)]


def part_of(fold: Fold, params: Mapping[str, Any], tell: Tell = lambda what: None) -> Part:
    """A fold with what predictors say of it.

    Args:
        fold: see `folds`.
        params: of predictors, by name, as fitted to `fold.fit`; those that say nothing before a step are left out.
        tell: is told what is done next.
    """
    seen = sequences_of(list(fold.judged.values()), list(fold.judged))
    fit = concatenate(list(fold.fit.values()))
    foreseen = {}
    for name, fitted in params.items():
        if PREDICTORS[name].ahead and not PREDICTORS[name].shared:
            tell(f"what {name} foresees")
            foreseen[name] = foresee_each(PREDICTORS[name], fitted, seen)
    foreseen |= {name: future(seen, horizon) for name, horizon in ORACLES.items()}
    return Part(seen, profile_of(fit), patterns_of(fit), foreseen, sequences_of(list(fold.fit.values())))


def alone(trace: Trace) -> Part:
    """One prompt and what followed, without other text: static and eam go by the prompt, predictors learn as it goes."""
    seen = sequences_of([trace])
    online = {
        "frequency": foresee_each(PREDICTORS["frequency"], PREDICTORS["frequency"].fit([], sizes=sizes_of(trace)), seen),
    }
    prompt = seen.used[0, ~seen.counted].sum(0).astype(np.float32)
    name, horizon = list(ORACLES.items())[-1]
    return Part(seen, prompt, prompt[None], online | {name: future(seen, horizon)})


def fit_predictors(fold: Fold, train: Train) -> dict[str, Any]:
    """Parameters of all predictors but the oracle, fitted to a fold's other half."""
    traces = list(fold.fit.values())
    names = [name for name in PREDICTORS if name != "oracle"]
    return {name: train(fold.fit, name, fold.number) if name in TRAINED else PREDICTORS[name].fit(traces) for name in names}


# --- Hits


def arms(part: Part) -> list[Arm]:
    """All that can be judged on a part, the optima last."""
    plain = [(name, "") for name in PLAIN if name != "eam" or part.patterns is not None]
    mixed = [("hobbit", CALIBRATED)] if part.fit is not None else []
    return [*plain, *mixed, *((name, by) for name in LOOKING for by in (NONE, *part.foreseen)), OPT, OPT_POOL]


def arm_hits(part: Part, arm: Arm, slots: int) -> Int[np.ndarray, "N S L"]:
    """Hits of one policy; all policies have as many slots in all."""
    policy, variant = arm
    layers, experts = part.seen.used.shape[2:]
    slots_L = np.full(layers, slots, np.int64)
    if arm == OPT:
        return opt_many(part.seen, slots_L)
    if arm == OPT_POOL:
        return opt_pool_many(part.seen, slots * layers)
    allocate = find_policy(policy).allocate
    if allocate is not None:
        slots_L = np.asarray(allocate(slots * layers, layers, experts, min(part.seen.active, slots)), np.int64)
    weights = mix(part, slots) if variant == CALIBRATED else None
    known = Knowledge(jnp.asarray(part.profile), patterns=None if part.patterns is None else jnp.asarray(part.patterns), mix=weights)
    return hits_many(part.seen, slots_L, policy, known, part.foreseen.get(variant))


@functools.lru_cache(maxsize=32)
def mix(part: Part, slots: int) -> tuple[float, ...]:
    """HOBBIT's weights, calibrated on what is not judged."""
    assert part.fit is not None
    return hobbit_mix(part.fit, slots)[0]


def units(seen: Sequences, counts_NSL: np.ndarray) -> Int[np.ndarray, "U"]:
    """Counts by what is resampled: whole sequences, or the steps of the only one."""
    counted = counts_NSL[:, seen.counted].sum(2)
    return counted[0] if len(counted) == 1 else counted.sum(1)


def measure(
    parts: Sequence[Part], chosen: Sequence[Arm], slots: int, tell: Tell = lambda what: None, seed: int = 0, versus: str = "lfu"
) -> list[dict[str, Any]]:
    """Hit rates of some arms at one number of slots.

    Args:
        parts: that are judged; their units are put together.
        chosen: arms, the optima and `versus` among them.
        slots: a layer.
        tell: is told what is done next.
        seed: of the bootstrap.
        versus: the policy that others are compared with, unit by unit.

    Returns:
        A row an arm: `policy`, `variant`, `slots`, `hit` with limits `low` and `high`, `regret` (the share of its own kind of optimum's hits that it
        misses), `loads` a step, and `gain` in hit rate over `versus`, with its limits.
    """
    hits = {}
    for arm in chosen:
        tell(f"{' '.join(arm)}, {slots} slots")
        hits[arm] = np.concatenate([units(part.seen, arm_hits(part, arm, slots)) for part in parts])
    requests = np.concatenate([units(part.seen, part.seen.used.sum(3)) for part in parts])
    steps = sum(len(part.seen.used) * int(part.seen.counted.sum()) for part in parts)
    counts = intervals.resample(len(requests), seed, 1 if len(parts[0].seen.used) > 1 else intervals.BLOCK)
    return [_row(arm, slots, found, hits, requests, steps, counts, versus) for arm, found in hits.items()]


def _row(arm: Arm, slots: int, found: np.ndarray, hits: Mapping[Arm, np.ndarray], requests, steps: int, counts, versus: str) -> dict[str, Any]:
    best = hits[OPT_POOL if arm == OPT_POOL or find_policy(arm[0]).shared else OPT].sum()
    rate = intervals.share(found, requests, counts)
    gain = intervals.difference(found, hits[versus, ""], requests, counts)
    numbers = {"hit": rate.value, "low": rate.low, "high": rate.high, "regret": float(1 - found.sum() / max(best, 1))}
    numbers |= {"loads": float((requests - found).sum() / steps), "gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
    return {"policy": arm[0], "variant": arm[1], "slots": slots} | {name: round(value, 5) for name, value in numbers.items()}


def slots_of(active: int, experts: int) -> list[int]:
    """Numbers of slots to compare at: `RATIOS`, as far as they are fewer than the experts."""
    return [ratio * active for ratio in RATIOS if ratio * active < experts]


def policies(parts: Sequence[Part], tell: Tell = lambda what: None) -> list[dict[str, Any]]:
    """Every policy at every number of slots; see `measure`."""
    seen = parts[0].seen
    return [row for slots in slots_of(seen.active, seen.used.shape[3]) for row in measure(parts, arms(parts[0]), slots, tell)]


# --- Batches


def mixed_groups(names: Sequence[str], size: int, seed: int = 0) -> list[list[int]]:
    """Groups of so many sequences, of as many domains as there are; a rest that fills no group is left out."""
    rng = np.random.default_rng(seed)
    turn: dict[str, int] = {}
    order = []
    for i in rng.permutation(len(names)):
        turn[names[i]] = turn.get(names[i], -1) + 1
        order.append((turn[names[i]], rng.random(), int(i)))
    chosen = [i for *_, i in sorted(order)]
    return [chosen[at : at + size] for at in range(0, len(chosen) - size + 1, size)]


def grouped(part: Part, size: int, seed: int = 0) -> Part:
    """The part as batches of mixed domains."""
    groups = mixed_groups(part.seen.names, size, seed)
    seen = side_by_side(part.seen, groups)
    foreseen = {name: future(seen, ORACLES[name]) if name in ORACLES else together(said, groups) for name, said in part.foreseen.items()}
    return dataclasses.replace(part, seen=seen, foreseen=foreseen, fit=None)


def batches(parts: Sequence[Part], slots: Sequence[int], sizes: Sequence[int] = BATCHES, tell: Tell = lambda what: None) -> list[dict[str, Any]]:
    """Policies on batches, with the same bytes: rows as those of `measure` with `batch` and the `distinct` experts that a layer's step asks for."""
    out = []
    for size in sizes:
        made = [grouped(part, size) for part in parts]
        distinct = float(np.mean(np.concatenate([part.seen.used[:, part.seen.counted].sum(3).reshape(-1) for part in made])))
        chosen = [arm for arm in arms(made[0]) if arm[0] in ("lru", "lfu", "plec", "opt") or arm == ("lookahead", "path")]
        for count in slots:
            rows = measure(made, chosen, count, lambda what, size=size: tell(f"batch {size}: {what}"), versus="lru")  # type: ignore[misc]
            out += [{"batch": size, "distinct": round(distinct, 3)} | row for row in rows]
    return out


def ahead_rows(
    parts: Sequence[Part],
    slots: Sequence[int],
    sizes: Sequence[int] = BATCHES,
    names: Sequence[str] = ("frequency", "path"),
    tell: Tell = lambda what: None,
) -> list[dict[str, Any]]:
    """`brought_ahead` on batches: rows of `batch`, `slots`, `predictor`, `hit` with limits, and experts `brought` and `missed` a step."""
    out = []
    for size in sizes:
        made = [grouped(part, size) for part in parts]
        requests = np.concatenate([units(part.seen, part.seen.used.sum(3)) for part in made])
        steps = sum(len(part.seen.used) * int(part.seen.counted.sum()) for part in made)
        for count in slots:
            for name in (name for name in names if name in made[0].foreseen):
                tell(f"batch {size}: brought ahead by {name}, {count} slots")
                found = [brought_ahead(part, name, count) for part in made]
                hits = np.concatenate([units(part.seen, own) for part, (own, _) in zip(made, found, strict=True)])
                rate = intervals.share(hits, requests, intervals.resample(len(requests)))
                numbers = {"hit": rate.value, "low": rate.low, "high": rate.high}
                numbers |= {"brought": sum(n for _, n in found) / steps, "missed": float((requests - hits).sum() / steps)}
                out.append({"batch": size, "slots": count, "predictor": name} | {key: round(value, 5) for key, value in numbers.items()})
    return out


def brought_ahead(part: Part, name: str, slots: int) -> tuple[Int[np.ndarray, "N S L"], int]:
    """Hits as ExpertFlow counts them: before a layer runs its slots are refilled with the predicted experts, the most probable first.

    Returns:
        Hits [N, S, L], and the experts that were brought ahead in counted steps: refilling isn't free.
    """
    said = part.foreseen[name][:, :, 0].astype(np.float32)
    resident = np.zeros(part.seen.used.shape[:1] + part.seen.used.shape[2:], bool)
    hits, brought = np.zeros(part.seen.used.shape[:3], np.int64), 0
    for s in range(said.shape[1]):
        order = np.argsort(-(said[:, s] + 1e-6 * resident), axis=-1, kind="stable")[..., :slots]
        wanted = np.zeros_like(resident)
        np.put_along_axis(wanted, order, True, -1)
        if part.seen.counted[s]:
            brought += int((wanted & ~resident).sum())
        hits[:, s] = (wanted & part.seen.used[:, s]).sum(-1)
        resident = wanted
    return hits, brought
