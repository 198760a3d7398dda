"""What a trace allows, whatever the policy: LRU at every size in one pass, reuse, windows of foresight, distinct experts of a batch, slots by layer.

Numbers are of the steps that are not prompt; the prompt goes first and warms the cache, as in `replay`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from jaxmoe.offload.replay import foresight_hits
from jaxmoe.offload.trace import PROMPT, Trace, used_steps
from jaxmoe.residency.ahead import next_uses

LAGS = tuple(range(1, 17))
BATCHES = (1, 2, 4, 8, 16, 32)
WINDOWS = (4, 16, 64, 256)
DRAWS = 256
"""Random batches drawn of each size."""


# --- LRU at every size


def stack_distances(used_SLE: Bool[np.ndarray, "S L E"]) -> Int[np.ndarray, "S L E"]:
    """How many slots LRU needs for each request to hit: 1 to E; E + 1 for a first use, 0 where an expert isn't asked for.

    All experts of a step are looked up before any of them moves to the front, and those of one step lie there by their number: the order in which
    `choose` ranks them. What LRU holds at C slots is then the first C of this list, at every C and however many experts a step asks for, so that
    the distances give exactly the hits of `replay`.
    """
    steps, layers, experts = used_SLE.shape
    out_SLE = np.zeros(used_SLE.shape, np.int32)
    last_LE = np.full((layers, experts), -1, np.int64)
    place_LE = np.broadcast_to(np.arange(1, experts + 1), (layers, experts))
    distance_LE = np.empty((layers, experts), np.int64)
    for s, need_LE in enumerate(used_SLE):
        np.put_along_axis(distance_LE, np.argsort(-last_LE, axis=1, kind="stable"), place_LE, axis=1)
        out_SLE[s] = np.where(need_LE, np.where(last_LE < 0, experts + 1, distance_LE), 0)
        last_LE[need_LE] = s
    return out_SLE


def distance_histogram(trace: Trace) -> Int[np.ndarray, "L E+2"]:
    """Requests of each layer by stack distance; the last column is first uses, column 0 is empty."""
    used_SLE, phase_S = used_steps(trace)
    distances_SLE = stack_distances(used_SLE)[phase_S != PROMPT]
    rows = [np.bincount(distances_SLE[:, layer].ravel(), minlength=trace.experts + 2) for layer in range(trace.layers)]
    return np.stack(rows) * (np.arange(trace.experts + 2) > 0)


def marginal_hits(trace: Trace) -> Int[np.ndarray, "L E+1"]:
    """LRU's hits of each layer by the number of its slots, 0 to E."""
    return distance_histogram(trace)[:, :-1].cumsum(1)


def allocate(curves_LC: np.ndarray, total: int, minimum: int = 0) -> Int[np.ndarray, "L"]:
    """Slots of each layer for the most hits altogether.

    Exact for any curves (dynamic programming over the layers): LRU's are not always concave, and a greedy choice is optimal only where they are.

    Args:
        curves_LC: hits of each layer by its slots, 0 to C - 1.
        total: slots in all.
        minimum: slots that every layer gets.

    Raises:
        ValueError: the total is too small for the minimum, or more than all layers can hold.
    """
    layers, sizes = curves_LC.shape
    if not 0 <= minimum < sizes or not layers * minimum <= total <= layers * (sizes - 1):
        raise ValueError(f"{total} slots for {layers} layers of {minimum} to {sizes - 1}: give {layers * minimum} to {layers * (sizes - 1)}")
    spare = total - layers * minimum
    best = np.where(np.arange(spare + 1) == 0, 0.0, -np.inf)  # [spare + 1], of the layers so far, by the spare slots that they use
    taken = np.zeros((layers, spare + 1), np.int64)
    for layer, curve_C in enumerate(curves_LC):
        found = np.full(spare + 1, -np.inf)
        for extra in range(min(sizes - 1 - minimum, spare) + 1):
            with_extra = best[: spare + 1 - extra] + curve_C[minimum + extra]
            better = with_extra > found[extra:]
            found[extra:][better] = with_extra[better]
            taken[layer, extra:][better] = extra
        best = found
    slots = np.empty(layers, np.int64)
    for layer in range(layers - 1, -1, -1):
        slots[layer] = minimum + taken[layer, spare]
        spare -= taken[layer, spare]
    return slots


# --- Reuse


def reuse(trace: Trace) -> dict[str, float]:
    """Steps between an expert's uses in one layer.

    Returns:
        `median` steps since the last use, of the requests that have one; `within_1` and `within_8`, the share of all requests whose last use lies
        at most so many steps back; `first`, the share of requests that have none (compulsory misses).
    """
    used_SLE, phase_S = used_steps(trace)
    last_LE = np.full(used_SLE.shape[1:], -1, np.int64)
    gaps = []
    for s, need_LE in enumerate(used_SLE):
        if phase_S[s] != PROMPT:
            gaps.append(np.where(last_LE < 0, 0, s - last_LE)[need_LE])
        last_LE[need_LE] = s
    gap = np.concatenate(gaps) if gaps else np.zeros(0, np.int64)
    if not len(gap):
        raise ValueError("the trace holds nothing but its prompt")
    again = gap[gap > 0]
    within = {f"within_{n}": float(((gap > 0) & (gap <= n)).mean()) for n in (1, 8)}
    return {"median": float(np.median(again)) if len(again) else 0.0, **within, "first": float((gap == 0).mean())}


def used_tokens(trace: Trace) -> list[Bool[np.ndarray, "T L E"]]:
    """The experts that each token asked for, prompt left out, sequence by sequence."""
    out = []
    for sequence in np.unique(trace.sequence):
        ids_TLA = trace.ids[(trace.sequence == sequence) & (trace.phase != PROMPT)]
        used_TLE = np.zeros((len(ids_TLA), trace.layers, trace.experts), bool)
        t, layer, slot = np.nonzero(ids_TLA >= 0)
        used_TLE[t, layer, ids_TLA[t, layer, slot]] = True
        if len(used_TLE):
            out.append(used_TLE)
    return out


def overlap(trace: Trace, lags: Sequence[int] = LAGS) -> list[float | None]:
    """By lag, the share of a token's experts that the token so far back in its sequence asked for too; None where no sequence is that long."""
    runs = used_tokens(trace)
    out: list[float | None] = []
    for lag in lags:
        both = sum(int((run[lag:] & run[:-lag]).sum()) for run in runs if len(run) > lag)
        asked = sum(int(run[lag:].sum()) for run in runs if len(run) > lag)
        out.append(both / asked if asked else None)
    return out


# --- Batches


def iid_distinct(experts: int, active: int, batch: int) -> float:
    """Distinct experts that a layer would be asked for by `batch` tokens that chose evenly and on their own."""
    return experts * (1 - (1 - active / experts) ** batch)


def distinct_experts(trace: Trace, batches: Sequence[int] = BATCHES, seed: int = 0) -> list[dict[str, float | None]]:
    """Distinct experts a layer of a batch of tokens.

    Returns:
        By batch size, as far as the trace has so many tokens: `batch`; `consecutive`, of all stretches of a sequence (None where none is that
        long); `random`, of `DRAWS` random sets of the trace's tokens; `iid`, by the formula.
    """
    runs = used_tokens(trace)
    tokens_TLE = np.concatenate(runs) if runs else np.zeros((0, trace.layers, trace.experts), bool)
    rng = np.random.default_rng(seed)
    out: list[dict[str, float | None]] = []
    for batch in batches:
        if batch > len(tokens_TLE):
            break
        stretches = [(window_counts(run, batch) > 0).sum(2).mean(1) for run in runs if len(run) >= batch]
        drawn = [tokens_TLE[rng.choice(len(tokens_TLE), batch, replace=False)].any(0).sum(1).mean() for _ in range(DRAWS)]
        consecutive = float(np.concatenate(stretches).mean()) if stretches else None
        iid = iid_distinct(trace.experts, trace.meta["active"], batch)
        out.append({"batch": batch, "consecutive": consecutive, "random": float(np.mean(drawn)), "iid": iid})
    return out


def window_counts(used_TLE: np.ndarray, window: int) -> Int[np.ndarray, "W L E"]:
    """How many tokens of every stretch of `window` tokens use each expert."""
    total = np.concatenate([np.zeros((1, *used_TLE.shape[1:]), np.int32), used_TLE.cumsum(0, dtype=np.int32)])
    return total[window:] - total[:-window]


# --- Local consistency and foresight


def srp(trace: Trace, window: int) -> dict[str, float] | None:
    """Segment routing best performance: how well one fixed group of experts would serve a stretch of tokens.

    In every stretch and layer the group is all experts used at least `alpha` times, with one `alpha` for the whole trace. Its F1 counts uses
    that the group covers against uses and against members times tokens; the best alpha's is taken. Source: arXiv 2505.16056, SRP.

    Args:
        trace: its sequences are read on their own, prompt left out.
        window: tokens of a stretch (m).

    Returns:
        `srp`; `rho`, the size of the best group in units of the experts that a token uses. None where no sequence is that long.
    """
    counts = [window_counts(run, window) for run in used_tokens(trace) if len(run) >= window]
    if not counts:
        return None
    uses_n = np.sum([np.bincount(c.ravel(), minlength=window + 1) for c in counts], axis=0)
    n = np.arange(window + 1)
    covered = np.cumsum((uses_n * n)[::-1])[::-1]
    offered = np.cumsum(uses_n[::-1])[::-1] * window
    all_uses = covered[0]
    if not all_uses:
        return None
    f1 = 2 * covered[1:] / (offered[1:] + all_uses)
    best = int(f1.argmax())
    return {"srp": float(f1[best]), "rho": float(offered[best + 1] / all_uses)}


def sch(trace: Trace, window: int, slots: int) -> float:
    """Segment cache hit rate: that of a cache which keeps what the next `window` steps use most often, and of equals the most recently used.

    Counts are not the best use of foresight (see `lookahead`): with a long window this stays below the optimum. Source: arXiv 2505.16056, SCH.

    Args:
        trace: what is asked for; the prompt warms the cache.
        window: steps ahead (m).
        slots: experts that a layer holds (rho times the experts that a token uses).
    """
    used_SLE, phase_S = used_steps(trace)
    steps = len(used_SLE)
    total = np.concatenate([np.zeros((1, *used_SLE.shape[1:]), np.int64), used_SLE.cumsum(0)])

    def cost(s: int, last_LE: np.ndarray) -> np.ndarray:
        ahead_LE = total[min(s + 1 + window, steps)] - total[s + 1]
        return -(ahead_LE * (steps + 1) + last_LE)

    return _rate(foresight_hits(used_SLE, np.full(trace.layers, slots), cost), used_SLE, phase_S)


def lookahead(trace: Trace, window: int, slots: int) -> float:
    """The hit rate of Belady's choice by a cache that sees `window` steps ahead and goes by recency beyond; with the whole trace it is the optimum.

    Args:
        trace: what is asked for; the prompt warms the cache.
        window: steps ahead.
        slots: experts that a layer holds.
    """
    used_SLE, phase_S = used_steps(trace)
    next_SLE = next_uses(used_SLE, len(used_SLE))
    steps = len(used_SLE)

    def cost(s: int, last_LE: np.ndarray) -> np.ndarray:
        seen_LE = (next_SLE[s] < steps) & (next_SLE[s] <= s + window)
        return np.where(seen_LE, next_SLE[s], 2 * steps - last_LE)

    return _rate(foresight_hits(used_SLE, np.full(trace.layers, slots), cost), used_SLE, phase_S)


def _rate(hits_SL: np.ndarray, used_SLE: np.ndarray, phase_S: np.ndarray) -> float:
    counted_S = phase_S != PROMPT
    return float(hits_SL[counted_S].sum() / used_SLE[counted_S].sum())
