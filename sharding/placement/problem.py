"""What a placement of experts is decided from: how many tokens each expert gets, and which experts follow each other in a token's path.

Knows arrays of routed ids only; neither traces on disk nor models.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from sharding.split import SplitError

SPANS = 4
"""Of a trace: loads are kept even in each. Chosen on prompts of the default model; more are safer on other text, and save fewer hops."""


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Counts of one routing trace, and the devices to place experts on.

    Experts that are asked for together are best kept together, and then their device's load comes in bursts and grows with the topic. So loads are
    also counted in spans of the trace, each of which can be kept even.

    Attributes:
        load: tokens that asked for each expert.
        transitions: how often a token that asked for expert e of one layer asked for expert f of the next; a token of A experts a layer counts A * A
            pairs.
        devices: n; each holds E / n experts of every layer.
        links: cost of carrying one token between two devices; symmetric, zero on the diagonal.
        spans: `load` of each of R spans of the trace.
    """

    load: Int[np.ndarray, "L E"]
    transitions: Int[np.ndarray, "L1 E E"]
    devices: int
    links: Float[np.ndarray, "n n"]
    spans: Int[np.ndarray, "R L E"]

    def __post_init__(self):
        check_devices(self.devices, self.experts)
        _check_links(self.links, self.devices)
        want = (self.layers - 1, self.experts, self.experts)
        if self.transitions.shape != want:
            raise ValueError(f"transitions have the shape {list(self.transitions.shape)}; the load's {list(self.load.shape)} needs {list(want)}")

    @property
    def layers(self) -> int:
        """Layers that have experts (L)."""
        return self.load.shape[0]

    @property
    def experts(self) -> int:
        """Experts of a layer (E)."""
        return self.load.shape[1]

    @property
    def room(self) -> int:
        """Experts of a layer that a device holds (E / n)."""
        return self.experts // self.devices

    @property
    def uniform(self) -> bool:
        """Whether all links cost the same."""
        return is_uniform(self.links)


def problem_of(
    ids: Int[np.ndarray, "T L A"], experts: int, devices: int, links: Float[np.ndarray, "n n"] | None = None, spans: int = SPANS
) -> Problem:
    """Counts a trace.

    Args:
        ids: experts that each token asked for; -1 is none.
        experts: E.
        devices: n.
        links: cost of carrying a token from device to device; 1 between any two if not given.
        spans: into so many spans of as many tokens each the trace is cut; 0 for none.

    Raises:
        ValueError: a negative number of spans; ids outside the experts, or of another shape; links that aren't a cost matrix.
        SplitError: the experts don't divide among the devices.
    """
    check_devices(devices, experts)
    check_ids(ids, experts)
    if spans < 0:
        raise ValueError(f"spans = {spans}: a trace is cut into 0 spans or more")
    parts = [loads(part, experts) for part in (np.array_split(ids, spans) if spans else ())]
    each = np.asarray(parts, np.int64).reshape(spans, ids.shape[1], experts)
    costs = even_links(devices) if links is None else np.asarray(links, float)
    return Problem(loads(ids, experts), transitions(ids, experts), devices, costs, each)


def loads(ids: Int[np.ndarray, "T L A"], experts: int) -> Int[np.ndarray, "L E"]:
    """How many tokens asked for each expert."""
    out = np.zeros((ids.shape[1], experts), np.int64)
    _, layer, _ = at = np.nonzero(ids >= 0)
    np.add.at(out, (layer, ids[at]), 1)
    return out


def transitions(ids: Int[np.ndarray, "T L A"], experts: int) -> Int[np.ndarray, "L1 E E"]:
    """Pairs of experts that the same token asked for in neighbouring layers."""
    out = np.zeros((max(ids.shape[1] - 1, 0), experts, experts), np.int64)
    for layer, pairs in enumerate(out):
        before, after = np.broadcast_arrays(ids[:, layer, :, None], ids[:, layer + 1, None, :])
        both = (before >= 0) & (after >= 0)
        flat = before[both].astype(np.int64) * experts + after[both]
        pairs += np.bincount(flat, minlength=experts * experts).reshape(experts, experts)
    return out


def even_links(devices: int) -> Float[np.ndarray, "n n"]:
    """Links that all cost 1: a hop is a hop."""
    return 1.0 - np.eye(devices)


def node_links(devices: int, per_node: int, intra: float = 1.0, inter: float = 4.0) -> Float[np.ndarray, "n n"]:
    """Links that cost `intra` within a node of `per_node` devices and `inter` between nodes.

    Raises:
        SplitError: the devices don't make whole nodes.
    """
    if per_node < 1 or devices % per_node:
        raise SplitError(f"per_node = {per_node} doesn't divide {devices} devices: choose one of {_divisors(devices)}")
    node = np.arange(devices) // per_node
    cost = np.where(node[:, None] == node[None, :], float(intra), float(inter))
    np.fill_diagonal(cost, 0.0)
    return cost


def is_uniform(links: Float[np.ndarray, "n n"]) -> bool:
    """Whether all links between different devices cost the same."""
    off = links[~np.eye(len(links), dtype=bool)]
    return bool(off.size == 0 or np.all(off == off[0]))


# --- Checks


def check_devices(devices: int, experts: int) -> None:
    """Refuses a number of devices that the experts don't divide among.

    Raises:
        SplitError: so it is.
    """
    if isinstance(devices, bool) or not isinstance(devices, int | np.integer) or devices < 1:
        raise SplitError(f"devices = {devices!r}: a placement needs a whole number of devices, at least 1")
    if experts < 1 or experts % devices:
        raise SplitError(f"devices = {devices} doesn't divide the model's {experts} experts: choose one of {_divisors(experts)}")


def check_ids(ids: np.ndarray, experts: int) -> None:
    """Refuses what are no ids of experts.

    Raises:
        ValueError: so it is; says where.
    """
    if ids.ndim != 3 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids are {ids.dtype}{list(ids.shape)}; needed: whole numbers [tokens, layers, experts per token]")
    wrong = (ids < -1) | (ids >= experts)
    if wrong.any():
        t, layer, slot = np.argwhere(wrong)[0]
        raise ValueError(f"ids: token {t}, layer {layer}: expert {ids[t, layer, slot]} is outside the {experts} experts")


def _check_links(links: np.ndarray, devices: int) -> None:
    if links.shape != (devices, devices):
        raise ValueError(f"links have the shape {list(links.shape)}; {devices} devices need {[devices, devices]}")
    if not np.isfinite(links).all() or (links < 0).any() or np.diagonal(links).any() or (links != links.T).any():
        raise ValueError("links are costs: none negative, the same both ways, zero from a device to itself")


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
