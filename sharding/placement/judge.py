"""How good a placement is on a trace that it wasn't made from: load balance, hops between layers, devices that a token is sent to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from sharding.placement.assignment import Placement, contiguous, shuffled
from sharding.placement.problem import check_ids

SEEDS = 20
"""Random placements that are averaged."""


def judge(placement: Placement, ids: Int[np.ndarray, "T L A"]) -> dict[str, float]:
    """What a placement gives on routed ids.

    Args:
        placement: to be judged.
        ids: experts that each token asked for, the best first; -1 is none.

    Returns:
        See `judge_devices`.
    """
    check_ids(ids, placement.experts)
    if ids.shape[1] != placement.layers:
        raise ValueError(f"the trace has {ids.shape[1]} layers of experts, the placement {placement.layers}")
    return judge_devices(devices_of(placement, ids), placement.devices)


def devices_of(placement: Placement, ids: Int[np.ndarray, "T L A"]) -> Int[np.ndarray, "T L A"]:
    """The device of each request; -1 is none."""
    at = placement.place(ids)
    return np.where(at >= 0, at // (placement.experts // placement.devices), -1)


def judge_devices(device: Int[np.ndarray, "T L A"], devices: int) -> dict[str, float]:
    """What requests give that go to these devices (-1 is none).

    Returns:
        `max_over_mean`: the fullest device's requests over the mean, of all tokens together, averaged over layers; `worst_layer`, the worst one's;
        `all_layers`, with the layers' requests added up by device. `hops`: share of a token's pairs of experts of neighbouring layers that are on
        different devices; `top_hops`, of the pairs of best experts alone, as ExFlow counts. `devices`: different devices that a token's experts of a
        layer are on, averaged over tokens and layers.
    """
    load = np.stack([np.bincount(row[row >= 0], minlength=devices) for row in device.transpose(1, 0, 2).reshape(device.shape[1], -1)])
    used = load.sum(1) > 0
    over = load[used].max(1) / load[used].mean(1) if used.any() else np.ones(1)
    whole = load.sum(0).max() / load.sum(0).mean() if used.any() else 1.0
    spread = np.stack([(device == d).any(2) for d in range(devices)]).sum(0)
    asked = (device >= 0).any(2)
    return {
        "max_over_mean": float(over.mean()),
        "worst_layer": float(over.max()),
        "all_layers": float(whole),
        "hops": hop_share(device),
        "top_hops": hop_share(device[:, :, :1]),
        "devices": float(spread[asked].mean()) if asked.any() else 0.0,
    }


def hop_share(device: Int[np.ndarray, "T L A"]) -> float:
    """Share of a token's pairs of requests in neighbouring layers that are on different devices; pairs with none left out."""
    before, after = device[:, :-1, :, None], device[:, 1:, None, :]
    both = (before >= 0) & (after >= 0)
    return float(((before != after) & both).sum() / max(int(both.sum()), 1))


def baselines(ids: Int[np.ndarray, "T L A"], experts: int, devices: int, seeds: Sequence[int] = range(SEEDS)) -> dict[str, dict[str, float]]:
    """The same of experts as they stand, and of random placements, averaged."""
    layers = ids.shape[1]
    found = [judge(shuffled(layers, experts, devices, seed), ids) for seed in seeds]
    mean = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    return {"contiguous": judge(contiguous(layers, experts, devices), ids), "random": mean}
