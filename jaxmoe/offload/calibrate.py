"""HOBBIT's four weights (arXiv 2411.01433, its multidimensional cache) by trying: random points of the simplex, replayed; the fewest loads win.

HOBBIT names the weights and calibrates them per model without saying how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from jaxmoe.offload.replay_many import Sequences, hits_many, sequences_of
from jaxmoe.offload.trace import Trace
from jaxmoe.residency import Knowledge
from jaxmoe.residency.distance import MIX

Mix = tuple[float, ...]

POINTS, SAMPLE = 30, 12


def hobbit_mix(
    traces: Sequence[Trace] | Sequences,
    slots: int,
    seed: int = 0,
    points: int = POINTS,
    sample: int = SAMPLE,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Mix, int]:
    """Weights for `Knowledge.mix`.

    Args:
        traces: of one model, with sequences all of one length; other text than they will be used on.
        slots: experts that a layer holds, on the average over layers.
        seed: of the points and of the sample.
        points: random ones, beside the default, each weight alone, and each without one.
        sample: sequences that are replayed, at most.
        progress: called with `(points done, points in all)`.

    Returns:
        The weights, and the experts they brought in the counted steps of the sample. Of equals the first tried, and the default is tried first.
    """
    seen = traces if isinstance(traces, Sequences) else sequences_of(traces)
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(seen.used))[:sample])
    seen, mixes = seen.take(chosen), candidates(points, rng)
    loads = []
    for done, mix in enumerate(mixes):
        loads.append(_loads(seen, slots, mix))
        progress(done + 1, len(mixes))
    best = int(np.argmin(loads))
    return mixes[best], loads[best]


def candidates(points: int, rng: np.random.Generator) -> list[Mix]:
    """The default, the simplex's corners, its faces' middles, and points drawn evenly from it."""
    n = len(MIX)
    faces = (1 - np.eye(n)) / (n - 1)
    drawn: Float[np.ndarray, "P n"] = np.concatenate([np.eye(n), faces, rng.dirichlet(np.ones(n), points)])
    return [MIX, *(tuple(float(w) for w in row) for row in drawn)]


def _loads(seen: Sequences, slots: int, mix: Mix) -> int:
    hits = hits_many(seen, np.full(seen.used.shape[2], slots), "hobbit", Knowledge(mix=mix))[:, seen.counted].sum()
    return int(seen.used[:, seen.counted].sum() - hits)
