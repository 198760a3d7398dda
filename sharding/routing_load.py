"""How many experts a step asks for, of which devices, and how many of them are not there: evenly routed, or as a recorded routing has it.

Routing comes in as plain arrays; nothing here knows where they were recorded.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Float, Int


def even_distinct(experts: int, active: int, tokens: float) -> float:
    """Distinct experts that tokens which choose evenly and on their own ask for: `E (1 - (1 - A / E)^tokens)`.

    Real text asks for fewer: its tokens' choices resemble each other.
    """
    return experts * (1 - (1 - active / experts) ** tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class Routing:
    """Which experts tokens ask for.

    Attributes:
        asked: for each MoE layer and expert, the share of tokens that ask for it; a layer's sum is the experts a token uses.
    """

    asked: Float[np.ndarray, "L E"]

    @staticmethod
    def of_ids(ids_TLA: Int[np.ndarray, "T L A"], experts: int) -> Routing:
        """Of recorded choices; negative ids are none.

        Raises:
            ValueError: there are none, or one beyond `experts`.
        """
        if ids_TLA.ndim != 3 or not len(ids_TLA) or ids_TLA.max() >= experts:
            raise ValueError(f"routing of shape {list(ids_TLA.shape)}: [tokens, layers, active] ids below {experts} are needed")
        counts = [np.bincount(layer[layer >= 0].ravel(), minlength=experts) for layer in ids_TLA.transpose(1, 0, 2)]
        return Routing(np.stack(counts) / len(ids_TLA))

    def busiest(self, devices: int, tokens: float) -> Load:
        """Of the device that is asked for most, experts being divided in order, as a mean over the layers."""
        wanted_LdE = self._wanted(devices, tokens)
        pairs = self.asked.reshape(len(self.asked), devices, -1).sum(2).max(1).mean() * tokens
        return Load(float(wanted_LdE.sum(2).max(1).mean()), float(pairs))

    def missed(self, devices: int, tokens: float, slots: int) -> float:
        """Of those experts, how many aren't there where each device keeps the `slots` experts of each layer that are asked for most."""
        wanted_LdE = np.sort(self._wanted(devices, tokens), axis=2)
        return float(wanted_LdE[..., : max(0, wanted_LdE.shape[2] - slots)].sum(2).max(1).mean())

    def _wanted(self, devices: int, tokens: float) -> np.ndarray:
        wanted = 1 - (1 - np.clip(self.asked, 0, 1)) ** tokens
        return wanted.reshape(len(self.asked), devices, -1)


@dataclasses.dataclass(frozen=True)
class Load:
    """What a step asks one device for: `distinct` experts, and `pairs` of a token and an expert, in each MoE layer."""

    distinct: float
    pairs: float


@functools.lru_cache(maxsize=65536)
def load(experts: int, active: int, devices: int, tokens: float, routing: Routing | None) -> Load:
    """What a step of `tokens` tokens asks a device for, which holds `experts / devices` of them: evenly, or the busiest device of a routing.

    Raises:
        ValueError: the routing is of another number of experts.
    """
    if routing is None:
        return Load(even_distinct(experts, active, tokens) / devices, tokens * active / devices)
    if routing.asked.shape[1] != experts:
        raise ValueError(f"the routing is of {routing.asked.shape[1]} experts, the model has {experts}")
    return routing.busiest(devices, tokens)


@functools.lru_cache(maxsize=65536)
def missed(experts: int, active: int, devices: int, tokens: float, slots: int | None, routing: Routing | None) -> float:
    """How many of those experts a device's `slots` don't hold; with even routing a slot holds what is asked for as often as any."""
    own = experts // devices
    if slots is None or slots >= own:
        return 0.0
    return load(experts, active, devices, tokens, None).distinct * (1 - slots / own) if routing is None else routing.missed(devices, tokens, slots)
